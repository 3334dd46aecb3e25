"""The calculator: what it saves follows from what was measured, and the page computes the same as Python."""

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from layercard.errors import ReportError
from layercard.report.roi import (
    FORMULAS,
    FUNCTIONS,
    NOT_MEASURED,
    RATIOS,
    SHOWN,
    Ratio,
    Ratios,
    RoiInputs,
    javascript,
    roi,
)

HALF = Ratio.of(0.5, "measured", low=0.4, high=0.6)
DOCS = Path(__file__).resolve().parents[1] / "docs"

amounts = st.one_of(st.just(0.0), st.floats(1e-3, 1e6))
optional = st.one_of(st.none(), amounts)
wide = {
    "gpus": st.integers(1, 1000),
    "smaller_gpu_speed": st.floats(0.05, 4),
    "adapters_served": st.integers(0, 10**6),
    "requests_per_month": st.integers(0, 10**9),
    "tokens_per_month": st.integers(0, 10**12),
    "concurrent_requests": st.floats(1, 256),
}
numbers = {name: optional if field.default is None else amounts for name, field in RoiInputs.model_fields.items() if name != "currency"}
inputs = st.builds(RoiInputs, **(numbers | wide))


@st.composite
def ratio(draw: st.DrawFn, most: float = 1.0, measured: st.SearchStrategy[bool] = st.booleans()) -> Ratio:  # noqa: B008
    low, mid, high = sorted(draw(st.floats(0, most)) for _ in range(3))
    return draw(st.sampled_from([NOT_MEASURED, Ratio(low=low, mid=mid, high=high, measured=draw(measured), source="drawn")]))


def ratios(most: float = 1.0) -> st.SearchStrategy[Ratios]:
    absolute = dict.fromkeys(("run_memory_gb", "adapter_mb", "adapter_latency_ms"), optional)
    return st.builds(Ratios, **{name: ratio(most) for name in RATIOS}, **absolute)


def total(given_inputs: RoiInputs, given_ratios: Ratios) -> list[float]:
    found = roi(given_inputs, given_ratios).results["saved_month"]
    assert found.low is not None and found.mid is not None and found.high is not None
    return [found.low, found.mid, found.high]


def test_one_example_by_hand() -> None:
    figures = RoiInputs(
        gpu_price_per_hour=4,
        runs_per_month=10,
        hours_per_run=5,
        gpus=2,
        adapters_served=100,
        adapter_mb=40,
        storage_price_per_gb_month=0.5,
        tokens_per_month=36_000_000,
        requests_per_month=60_000,
        concurrent_requests=10,
        adapter_latency_ms=2,
        engineer_hours=10,
        engineer_rate=70,
        profile_hours=1,
        gpu_watts=700,
        grid_gco2_per_kwh=400,
    )
    found = roi(figures, Ratios(time=HALF, latency=Ratio.of(0.25, "m"), adapter_size=Ratio.of(0.2, "m"))).results
    mid = {name: value.mid for name, value in found.items()}
    assert mid["training_saved"] == pytest.approx(10 * 5 * 2 * 4 * 0.5)
    assert mid["serving_saved"] == pytest.approx(36e6 * 0.002 / 3600 / 10 * 0.75 * 4)  # 36 M tokens, 2 ms each, ten at a time
    assert mid["storage_saved"] == pytest.approx(100 * 0.040 * 0.8 * 0.5)
    assert mid["saved_month"] == pytest.approx(200 + 6 + 1.6)
    assert mid["payback_months"] == pytest.approx(704 / 207.6)
    assert mid["request_seconds_saved"] == pytest.approx(600 * 0.0015)
    assert mid["energy_saved"] == pytest.approx((50 + 1.5) * 0.7)
    assert mid["co2_saved"] == pytest.approx((50 + 1.5) * 0.7 * 0.4)
    assert (found["training_saved"].low, found["training_saved"].high) == pytest.approx((160, 240))


def test_a_smaller_gpu_counts_only_where_all_layers_do_not_fit_it() -> None:
    known = {"run_memory_gb": 60, "smaller_gpu_memory_gb": 48, "smaller_gpu_price_per_hour": 1, "smaller_gpu_speed": 0.8}
    figures = RoiInputs(gpu_price_per_hour=4, runs_per_month=1, hours_per_run=10, **known)
    memory = Ratio.of(0.7, "m", low=0.6, high=0.9)
    found = roi(figures, Ratios(time=Ratio.of(0.5, "m"), memory=memory)).results
    assert found["smaller_gpu_saved"].low == 0  # at 0.9 it needs 54 GB
    assert found["smaller_gpu_saved"].mid == pytest.approx(10 * 0.5 * (4 - 1 / 0.8))
    assert found["hours_saved"].mid == pytest.approx(10 * (1 - 0.5 / 0.8))
    roomy = figures.model_copy(update={"smaller_gpu_memory_gb": 80.0})
    assert roi(roomy, Ratios(time=Ratio.of(0.5, "m"), memory=memory)).results["smaller_gpu_saved"].high == 0


@given(inputs, ratios(), st.sampled_from(["gpu_price_per_hour", "runs_per_month", "hours_per_run", "tokens_per_month", "adapters_served"]))
@settings(max_examples=60, deadline=None)
def test_more_volume_or_a_higher_price_never_saves_less(figures: RoiInputs, shares: Ratios, name: str) -> None:
    more = figures.model_copy(update={name: type(getattr(figures, name))(getattr(figures, name) * 2 + 1)})
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(total(figures, shares), total(more, shares), strict=True))


@given(inputs, ratios(1.5))
@settings(max_examples=60, deadline=None)
def test_ranges_are_in_order_and_only_measured_ratios_save(figures: RoiInputs, shares: Ratios) -> None:
    found = roi(figures, shares)
    low, mid, high = total(figures, shares)
    assert low <= mid <= high
    plain = Ratios(**{name: NOT_MEASURED if not getattr(shares, name).measured else getattr(shares, name) for name in RATIOS})
    known = plain.model_copy(update={name: getattr(shares, name) for name in ("run_memory_gb", "adapter_mb", "adapter_latency_ms")})
    assert roi(figures, known).results == found.results
    assert (found.with_assumptions is None) == (known == shares)


@given(inputs)
@settings(max_examples=30, deadline=None)
def test_equal_cost_saves_nothing(figures: RoiInputs) -> None:
    same = Ratio.of(1.0, "measured")
    found = roi(figures, Ratios(time=same, memory=same, latency=same, adapter_size=same)).results
    zero = {name for name, unit in ((f.name, f.unit) for f in SHOWN) if name not in ("setup_cost", "first_year", "payback_months")}
    assert all(found[name].mid in (0, None) for name in zero)
    assert found["payback_months"].mid is None
    assert roi(figures, Ratios()).results == found


def test_money_and_hours_scale_with_their_units() -> None:
    """In another currency, money is multiplied and nothing else; with more GPUs, GPU hours are and waiting is not."""
    shares = Ratios(time=HALF, latency=HALF, adapter_size=HALF, adapter_mb=10, adapter_latency_ms=1)
    figures = RoiInputs(gpu_watts=300, grid_gco2_per_kwh=200)
    prices = {n: getattr(figures, n) * 7 for n in ("gpu_price_per_hour", "storage_price_per_gb_month", "engineer_rate")}
    one, other = roi(figures, shares).results, roi(figures.model_copy(update=prices), shares).results
    for formula in SHOWN:
        factor = 7 if formula.unit.startswith("money") else 1
        assert other[formula.name].mid == pytest.approx(factor * one[formula.name].mid), formula.name
    wide = roi(figures.model_copy(update={"gpus": 3}), shares).results
    assert wide["hours_saved"] == one["hours_saved"]
    assert wide["training_saved"].mid == pytest.approx(3 * one["training_saved"].mid)


def test_no_energy_without_watts_and_no_co2_without_a_grid() -> None:
    found = roi(RoiInputs(gpu_watts=300), Ratios(time=HALF)).results
    assert found["energy_saved"].mid is not None
    assert found["co2_saved"].mid is None


def test_what_is_assumed_is_said() -> None:
    guess = Ratio.of(0.6, "guessed from shapes", measured=False)
    found = roi(RoiInputs(gpu_price_per_hour=3), Ratios(time=guess))
    assert found.results["training_saved"].high == 0
    assert found.with_assumptions is not None and found.with_assumptions["training_saved"].mid > 0
    said = " ".join(found.assumptions)
    assert "guessed from shapes" in said and "runs_per_month" in said and "adapter_latency_ms" in said
    assert "gpu_price_per_hour" not in said
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gpu_prize_per_hour": 1}, "did you mean gpu_price_per_hour"),
        ({"gpus": 0}, "gpus"),
        ({"runs_per_month": -1}, "runs_per_month"),
        ({"hours_per_run": math.nan}, "hours_per_run"),
        ({"currency": "<b>"}, "currency"),
        ({"gpu_watts": "many"}, "gpu_watts"),
    ],
)
def test_bad_figures_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ReportError, match=words):
        RoiInputs.of(values)


def test_a_ratio_whose_ends_are_crossed_is_refused() -> None:
    with pytest.raises(ValueError, match="not in order"):
        Ratio(low=0.9, mid=0.5, high=1, measured=True, source="")


def test_the_docs_give_every_formula_and_every_figure() -> None:
    text = (DOCS / "roi.md").read_text(encoding="utf-8")
    assert [f.name for f in FORMULAS if f"`{f.name}` | {f.unit} | `{f.expression}`" not in text] == []
    assert [name for name in (*RoiInputs.model_fields, *RATIOS, *FUNCTIONS) if f"`{name}" not in text] == []


def node() -> str:
    found = shutil.which("node") or shutil.which("nodejs")
    if found is None:
        pytest.skip("needs node to run the page's JavaScript; benchmarks/report_browser.py does the same in Chromium")
    return found


def test_the_page_computes_what_python_computes(tmp_path: Path) -> None:
    """200 random inputs, bit for bit: the same formulas in the same order on the same doubles."""
    runner = node()
    cases: list[tuple[RoiInputs, Ratios]] = []

    @given(inputs, ratios(1.5))
    @settings(max_examples=200, deadline=None, database=None)
    def collect(figures: RoiInputs, shares: Ratios) -> None:
        cases.append((figures, shares))

    collect()
    assert len(cases) >= 200
    values = [[{k: v for k, v in a.model_dump().items() if k != "currency"}, b.model_dump()] for a, b in cases]
    script = tmp_path / "twin.js"
    work = f"const cases = {json.dumps(values)};\nconsole.log(JSON.stringify(cases.map(([a, b]) => layercardRoi(a, b))));"
    script.write_text(javascript() + work, encoding="utf-8")
    done = subprocess.run([runner, str(script)], capture_output=True, text=True, check=True)
    for (figures, shares), twin in zip(cases, json.loads(done.stdout, parse_int=float), strict=True):
        found = roi(figures, shares).to_json()
        for part in ("results", "with_assumptions"):
            assert {n: v for n, v in (twin[part] or {}).items() if v != found[part][n]} == {}, found[part]
        assert (twin["with_assumptions"] is None) == (found["with_assumptions"] is None)
