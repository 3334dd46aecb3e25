"""Placements to export, and the golden files made of them: `python tests/exports.py` writes them anew."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layercard.export.export import exported
from layercard.export.trainers import TRAINERS, LoraSettings
from layercard.selection.placement import Placement

GOLDEN = Path(__file__).parent / "golden" / "export"
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def placed(
    layers: tuple[int, ...], names: tuple[str, ...], prefix: str = "model.layers", experts: tuple[str, ...] = (), **changes: Any
) -> Placement:
    """A placement of a model of 30 layers: the same modules in each of some layers."""
    paths = tuple(f"{prefix}.{layer}.{name}" for layer in layers for name in names)
    parameters = tuple(f"{prefix}.{layer}.{name}" for layer in layers for name in experts)
    model = {"name": "org/model", "fingerprint": "0123456789abcdef", "layers": 30}
    return Placement(model=model, layers=layers, paths=paths, objective="balanced", parameters=parameters, **changes)


def ranked(placement: Placement) -> Placement:
    """The same with a rank and an alpha for each target."""
    ranks = {path: 4 + at % 3 for at, path in enumerate(placement.targets)}
    value = placement.to_json() | {"rank_pattern": ranks, "alpha_pattern": {path: 2.0 * rank for path, rank in ranks.items()}}
    return Placement.from_json(value)


CASES = {
    "dense": placed((3, 11), ATTENTION + MLP),
    "uneven": Placement(
        model={"name": "org/model", "layers": 30},
        layers=(1, 2),
        paths=("model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj"),
        objective="x",
    ),
    "partial": placed((3,), ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")),
    "ranks": ranked(placed((1, 12), ATTENTION[:2])),
    "experts": placed((0, 5), ATTENTION, experts=EXPERTS),
    "vision": placed((3, 11), ATTENTION + MLP, "model.language_model.layers"),
    "gpt2": placed((2, 20), ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), "transformer.h"),
}
REFUSED = {
    "trl": (),
    "llamafactory": ("ranks", "experts"),
    "ms-swift": ("ranks",),
    "mlx-lm": ("ranks", "experts"),
    "megatron-bridge": ("partial", "ranks", "experts", "gpt2"),
}
"""What a trainer cannot express."""


def golden() -> Iterator[tuple[Path, str]]:
    """Each golden file and what it should hold; TRL has one for Python and one for its command line."""
    for name, trainer in TRAINERS.items():
        suffixes = [".py", ".yaml"] if name == "trl" else [".py" if trainer.script else trainer.suffixes[0]]
        for case, placement in CASES.items():
            if case in REFUSED.get(name, ()):
                continue
            for suffix in suffixes:
                if (name, suffix, case) != ("trl", ".yaml", "ranks"):
                    yield GOLDEN / f"{name}.{case}{suffix}", exported(placement, trainer, LoraSettings(), suffix=suffix).text


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for path, text in golden():
        path.write_text(text, encoding="utf-8")
