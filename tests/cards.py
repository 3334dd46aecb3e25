"""Cards, placements and comparisons as a real profile would give them, made from a seed: for the tests of reports and commands."""

import math
import random
from typing import Any

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def fake_card(depth: int = 30, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A card of a `depth`-layer model: resnorm falls from layer 0, gains form a hump in the middle, coupling decays with distance."""
    rng = random.Random(seed)
    coupling = [[_coupling(i, j, rng) for j in range(depth)] for i in range(depth)]
    for i in range(depth):
        for j in range(i):
            coupling[i][j] = coupling[j][i]
    card = {
        "schema": "layercard/1",
        "model": {"name": "smollm2-135m", "fingerprint": "0123456789abcdef", "layers": depth},
        "data": {
            "source": "e2e/train.jsonl",
            "fingerprint": "fedcba9876543210",
            "records": 64,
            "tokens": 3901,
            "labelled_tokens": 1790,
            "truncated": 0,
        },
        "settings": {"seed": seed, "ridge": 0.01, "rank": 8, "dtype": "float32", "device": "cpu", "batch_size": 8, "label_samples": 4},
        "versions": {"layercard": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "layers": [_layer(i, depth, coupling[i], rng) for i in range(depth)],
        "coupling": coupling,
        "descent": [0.5] * depth,
        "curvature": [0.4] * depth,
        "stability": {"gain_estimate": 0.94, "step_probe": 0.93, "centrality": 0.96},
        "units": {"gain_estimate": "nats per labelled token, relative scale", "resnorm": "sqrt(nats) per labelled token"},
        "warnings": ["massive activations in layers 11 and 28: the down projection's input has 1,000 times its neighbours' energy"],
    }
    return {**card, **changes}


def fake_placement(card: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """A placement of `layers` for the model of `card`."""
    return {
        "schema": "layercard-placement/1",
        "model": card["model"],
        "layers": layers,
        "paths": [f"model.layers.{layer}.{name}" for layer in layers for name in PROJECTIONS],
        "objective": "balanced",
        "predicted": {"performance_kept": {"value": 0.96, "low": 0.93, "high": 0.99}},
        "reasons": {str(layer): "covers its neighbours" for layer in layers},
    }


def fake_run(card: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """What `layercard train` writes for `layers` of the model of `card`."""
    depth, placement = int(card["model"]["layers"]), fake_placement(card, layers)
    numbers = {"steps": 3, "tokens_seen": 100, "losses": [2.0, 1.8, 1.6], "train_seconds": 12.0, "peak_memory_bytes": 1000}
    size = {"layers_in_backward": f"{depth - min(layers)}/{depth}", "trainable_parameters": 10, "adapter_bytes": 40}
    about = {"started": "2026-01-01T00:00:00+00:00", "placement": placement, "settings": {}, "model": card["model"], "data": card["data"]}
    return {"schema": "layercard-run/1", **about, **numbers, **size}


def _coupling(i: int, j: int, rng: random.Random) -> float:
    return 1.0 if i == j else math.exp(-((abs(i - j) / 12) ** 1.2)) * rng.uniform(0.75, 1.0) * 0.85


def _sampled(value: float, spread: float) -> dict[str, float]:
    return {"value": value, "low": value - abs(value) * spread, "high": value + abs(value) * spread}


def _module(path: str, resnorm: float) -> dict[str, Any]:
    signals = {"resnorm": resnorm * 0.38, "resnorm_rank": resnorm * 0.2, "gradient_norm": 1.0, "ridge": 0.01}
    return {"path": path, "in_features": 576, "out_features": 576, **signals, "shares_input_with": None}


def _layer(index: int, depth: int, couplings: list[float], rng: random.Random) -> dict[str, Any]:
    at = index / max(depth - 1, 1)
    noise = rng.uniform(0.95, 1.05)
    gain = (1.12 - 1.1 * (at - 0.43) ** 2) * rng.uniform(0.98, 1.02)
    resnorm = (12.0 if index == 0 else 2.6 * math.exp(-1.6 * at)) * noise
    energy = 60 * math.exp(2 * at) * noise * (1000 if index in (11, 28) else 1)
    return {
        "index": index,
        "resnorm": _sampled(resnorm, 0.08),
        "resnorm_rank": _sampled(resnorm * 0.6, 0.08),
        "residual_fraction": _sampled(0.3 * noise * (1 - at / 2), 0.05),
        "gradient_norm": _sampled(4 * noise * (1.4 - at), 0.1),
        "activation_energy": _sampled(energy, 0.03),
        "effective_rank": _sampled(1.2 if index in (11, 28) else 40 * noise, 0.05),
        "condition": _sampled(3e3 * noise, 0.2),
        "noise_amplification": _sampled(1e-2 * noise, 0.2),
        "predicted_gain": _sampled(0.2 + 0.4 * at * noise, 0.15),
        "centrality": _sampled(sum(c * c for c in couplings), 0.02),
        "step_probe": _sampled(gain * 0.4, 0.12),
        "training_probe": None,
        "gain_estimate": _sampled(gain, 0.06),
        "forward_seconds": None,
        "backward_seconds": None,
        "adapter_seconds": None,
        "saved_bytes": None,
        "modules": [_module(f"model.layers.{index}.{name}", resnorm) for name in PROJECTIONS],
    }


def fake_comparison(card: dict[str, Any], placements: dict[str, list[int]]) -> dict[str, Any]:
    """What `layercard compare` writes for named layer lists, with times and losses that look real."""
    depth = int(card["model"]["layers"])
    rows = []
    for name, layers in placements.items():
        share = 1 - 0.35 * math.exp(-len(layers) / 3) if len(layers) < depth else 1.0
        time = 0.25 + 0.75 * (depth - min(layers)) / depth
        rows.append(
            {
                "name": name,
                "layers": layers,
                "loss_reduction": _sampled(1.61 * share, 0.05),
                "performance_kept": _sampled(100 * share, 0.02),
                "train_seconds": 90 * time,
                "peak_memory_bytes": 200_000_000,
                "trainable_parameters": 81_408 * len(layers),
                "adapter_bytes": 326_000 * len(layers),
                "layers_in_backward": f"{depth - min(layers)}/{depth}",
                "time_share": 100 * time,
            }
        )
    about = {"model": card["model"], "data": {}, "valid": {}, "settings": {}, "versions": {}}
    return {"schema": "layercard-compare/1", **about, "loss_before": 2.9, "rows": rows}


def fake_result(card: dict[str, Any], layers: list[int], modules: str = "mlp") -> dict[str, Any]:
    """What `layercard run` ends with when it chose `modules` in `layers`: nearly as good as all layers, in a third of the time."""
    every = len(layers) == card["model"]["layers"] and modules == "all"
    estimate = {"loss_reduction": _sampled(0.93, 0.02), "source": "estimated", "step_seconds": 1.2, "peak_memory_bytes": 800 << 20}
    measured = {"loss_reduction": _sampled(0.92, 0.02), "source": "measured", "step_seconds": 0.41, "peak_memory_bytes": 200 << 20}
    return {
        "schema": "layercard-result/1",
        "model": card["model"],
        "data": {**card["data"], "records": 900},
        "valid": {**card["data"], "records": 100},
        "chosen": {"name": "last half, MLP", "layers": layers, "modules": modules, "learning_rate": 0.002},
        "verdict": "all layers" if every else "adapt",
        "why": "last half, MLP is the cheapest in time within 1 % of the best with 93 % probability",
        "measured": {"loss_before": 2.9, "loss_after": 1.98, "loss_reduction": 0.92, "interval": (0.88, 0.96)},
        "all_layers": measured if every else estimate,
        "steps": 480,
        "planned_steps": 480,
        "seconds": {"timing": 5.0, "profile": 20.0, "race": 60.0, "train": 197.0, "evaluate": 9.0, "total": 291.0},
        "step_seconds": 0.41,
        "peak_memory_bytes": 200 << 20,
        "adapter_bytes": 1 << 20,
        "settings": {"rank": 8, "seed": 0, "search": "20%"},
    }


def fake_race(card: dict[str, Any], layers: list[int], modules: str = "mlp") -> dict[str, Any]:
    """The race that led to `fake_result`: three heats of 24 steps and two of 72."""
    depth = card["model"]["layers"]
    chosen = {"name": "last half, MLP", "layers": layers, "modules": modules, "learning_rate": 0.002}
    every = {"name": "all layers", "layers": list(range(depth)), "modules": "all", "learning_rate": 0.002}
    out = {"name": "all layers, out", "layers": list(range(depth)), "modules": "out", "learning_rate": 0.002}
    heats = []
    for entrant, steps, loss, seconds, memory in (
        *((every, 24, 2.3, 1.2, 800), (chosen, 24, 2.31, 0.41, 200), (out, 24, None, 0.9, 500)),
        *((every, 72, 2.1, 1.2, 800), (chosen, 72, 2.105, 0.41, 200)),
    ):
        measured = {"loss": loss, "nats": [] if loss is None else [10 * loss] * 4, "peak_memory_bytes": memory << 20, "seconds": 9.0}
        heats.append(
            {"entrant": entrant, "steps": steps, "learning_rate": 0.005, "step_seconds": seconds, "trainable_parameters": 9, **measured}
        )
    about = {"model": card["model"], "data": card["data"], "held_out_records": 4, "labelled": [10] * 4, "loss_before": 2.9, "steps": 480}
    decided = {"objective": "time", "tolerance": 0.01, "heats": heats, "chosen": chosen, "why": "cheapest", "seconds": 60.0}
    return {"schema": "layercard-race/1", **about, **decided}
