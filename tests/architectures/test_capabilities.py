"""Every family through profile, select, train, save, load and verify, and the faster parts of training against stock training."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from capabilities import CAPABILITIES, Case, established, recorded
from families import FAMILIES


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The case of a family, made once."""

    families = {family.name: family for family in FAMILIES}

    def make(name: str) -> Case:
        if families[name].quantised:
            pytest.importorskip("bitsandbytes", reason="8-bit and 4-bit maps need bitsandbytes: pip install 'layercard[quantised]'")
        return Case(families[name], Path(tmp_path_factory.mktemp("case")))

    return cache(make)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_family_can_what_the_table_says(family: str, capability: str, case_of: Callable[[str], Case]) -> None:
    assert established(case_of(family), capability) == recorded()[family][capability]


def test_page_has_the_table() -> None:
    script = Path(__file__).resolve().parents[2] / "docs" / "generate_architectures.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0, f"run {script}"


def test_table_has_every_family_and_no_other() -> None:
    assert {name: list(row) for name, row in recorded().items()} == {family.name: ["about", *CAPABILITIES] for family in FAMILIES}
    assert {name: row["about"] for name, row in recorded().items()} == {family.name: family.about for family in FAMILIES}
