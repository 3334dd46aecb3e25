"""Sets of modules within a layer, on the tiny families."""

import pytest

from layercard.adapters.apply import place
from layercard.errors import PlacementError
from layercard.models.layers import find_blocks
from layercard.models.module_sets import MODULE_SETS, module_set
from tiny import TINY_FAMILIES, build_tiny


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_sets_divide_a_layer(family):
    modules = find_blocks(build_tiny(family))[1].adaptable
    sets = {name: [module.path for module in module_set(modules, name)] for name in MODULE_SETS}
    assert sorted(sets["mlp"] + sets["attention"]) == sorted(sets["all"]) == sorted(module.path for module in modules)
    assert (len(sets["out"]) == 2 and sets["down"] == sets["out"][1:]) or sets["down"][0] in sets["out"]
    # What writes into the hidden state is the last step of attention and of the feed-forward part, by the names that families use.
    writers = {"o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "out_proj", "fc2"}
    assert {path.rpartition(".")[2] for path in sets["out"]} <= writers


def test_unknown_set_has_a_suggestion():
    with pytest.raises(PlacementError, match=r"unknown.*mlp"):
        module_set(find_blocks(build_tiny("llama"))[0].adaptable, "mpl")


def test_placement_names_its_set(tiny_base):
    placement = place(tiny_base, [0, 2], modules="down")
    assert placement.modules == "down" and len(placement.paths) == 2
    assert type(placement).from_json(placement.to_json()) == placement
