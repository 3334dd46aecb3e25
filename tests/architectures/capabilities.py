"""What the tests establish for each family: one function a capability, which fails where a number is wrong.

Each function takes a `Case` and returns `yes`, or in one line why the capability steps aside for this family. What they return stands in
`capabilities.json`, from which docs/architectures.md is made; a family that loses a capability makes its test fail.
`python tests/architectures/capabilities.py` writes the file anew.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, Family, base_of
from safetensors.torch import load_file
from torch.nn.functional import linear

import tiny
from layercard.adapters.apply import apply, loaded, place
from layercard.adapters.files import WEIGHTS_FILE
from layercard.adapters.verify import verify_adapter
from layercard.card.card import LayerCard
from layercard.data.load import Batch, Dataset, batches, load_data
from layercard.errors import ModelError
from layercard.fast.cut import cut_backward
from layercard.fast.labels import labels_only
from layercard.fast.lora import fused_lora
from layercard.fast.packing import unpadded
from layercard.fast.prefix import frozen_prefix
from layercard.models.adapted import unchanged
from layercard.models.hooks import capturing, stepped
from layercard.models.layers import LinearModule
from layercard.models.load import BaseModel, is_classifier
from layercard.models.losses import labelled_losses
from layercard.models.stored import fingerprint
from layercard.models.streamed import open_model
from layercard.profiling.profile import profile_records as profile
from layercard.profiling.step_probe import ReplayedSet
from layercard.selection.placement import Placement
from layercard.selection.select import select
from layercard.settings import ProfileSettings, TrainSettings
from layercard.training.evaluate import held_out_losses
from layercard.training.records import Run
from layercard.training.train import train

YES, NONE = "yes", "none"
PROFILE = ProfileSettings(rank=2, batch_size=4, label_samples=1, probe_records=4, cost=False)
RECORDED = Path(__file__).with_name("capabilities.json")


@dataclass(frozen=True)
class Case:
    """A family with what its tests share: card, placement and trained adapter are made once."""

    family: Family
    folder: Path

    @cached_property
    def base(self) -> BaseModel:
        return base_of(self.family.name)

    @cached_property
    def data(self) -> Dataset:
        records: list[dict[str, Any]] = list(tiny.tiny_records(12))
        if self.base.classes is not None:
            names = list(self.base.classes)
            records = [{"text": record["prompt"], "label": names[at % len(names)]} for at, record in enumerate(records)]
        path = tiny.write_records(self.folder / "records.jsonl", records)
        return load_data(str(path), self.base.tokenizer, classes=self.base.classes)

    @cached_property
    def batch(self) -> Batch:
        return next(batches(self.data.examples, 4, self.base.pad_id))

    @cached_property
    def card(self) -> LayerCard:
        return profile(self.base, self.data, PROFILE)

    @cached_property
    def placement(self) -> Placement:
        return select(self.card, k=2, objective="performance")

    @cached_property
    def epochs(self) -> list[list[Batch]]:
        """The records twice, in batches that are not the same."""
        examples = self.data.examples
        return [list(batches(examples[start:] + examples[:start], 4, self.base.pad_id)) for start in (0, 2)]

    @cached_property
    def stock(self) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Loss and gradients of each batch without any of the faster parts."""
        with _adapted(self) as model:
            return [_gradients(model, batch) for epoch in self.epochs for batch in epoch]

    @cached_property
    def run(self) -> Run:
        rate = 5e-3 if self.base.classes is None else 2e-3
        settings = TrainSettings(rank=2, steps=4, learning_rate=rate, warmup_ratio=0.0, save_steps=0)
        return train(self.base, self.placement, self.data, self.folder / "run", settings, valid=self.data)


def _signals(case: Case) -> dict[str, torch.Tensor]:
    """For each map `Σ δ aᵀ: [out, in]` over the tokens of the batch, and for each expert over those sent to it."""
    found: dict[str, torch.Tensor] = {}

    def sink(one: LinearModule, a_ti: torch.Tensor, d_to: torch.Tensor, tokens: object) -> None:
        found[one.path] = found.get(one.path, 0) + d_to.T @ a_ti

    with capturing(case.base.model, case.base.blocks) as capture:
        capture.start(case.batch.attention_mask, sink)
        labelled_losses(case.base.model, case.batch)[0].sum().backward()
    return found


def profiles(case: Case) -> str:
    """The card is made, its signals are the gradients of a weight added to each map, and the model is bit for bit as before."""
    before = fingerprint(case.base.model)
    assert len(case.card.layers) == len(case.base.blocks)
    assert all(layer.modules and layer.gradient_norm.value > 0 and layer.resnorm.value >= 0 for layer in case.card.layers)
    signals = _signals(case)
    projections = [p for block in case.base.blocks for p in block.linear_modules]
    added = [torch.zeros(p.out_features, p.in_features, requires_grad=True) for p in projections]
    with ExitStack() as stack:
        for p, weight in zip(projections, added, strict=True):
            hook = lambda _, args, out, weight=weight: out + linear(args[0].to(weight.dtype), weight).to(out.dtype)  # noqa: E731
            stack.callback(p.module.register_forward_hook(hook).remove)
        gradients = torch.autograd.grad(labelled_losses(case.base.model, case.batch)[0].sum(), added)
    for p, gradient in zip(projections, gradients, strict=True):
        torch.testing.assert_close(signals[p.path], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=p.path)
    assert fingerprint(case.base.model) == before
    return YES


def streams(case: Case) -> str:
    """From a folder, one block in memory at a time, the card has the numbers of the one of the model in memory."""
    folder = case.folder / "model"
    case.base.model.save_pretrained(folder)
    case.base.tokenizer.save_pretrained(folder)
    try:
        streamed = open_model(str(folder), device="cpu")
    except ModelError as error:
        return str(error).replace(str(folder), "the model").partition(" (")[0].partition(";")[0].partition(", so it")[0]
    card = profile(streamed, case.data, PROFILE)
    assert card.model.fingerprint == case.base.fingerprint
    for name in ("resnorm", "effective_rank", "predicted_gain", "centrality", "step_probe", "gain_estimate"):
        torch.testing.assert_close(torch.tensor(card.values(name)), torch.tensor(case.card.values(name)), rtol=1e-4, atol=1e-6, msg=name)
    return YES


def selects(case: Case) -> str:
    """A placement of two layers names exactly their maps and stacks of experts."""
    assert len(case.placement.layers) == 2
    chosen = [case.base.blocks[layer] for layer in case.placement.layers]
    assert set(case.placement.paths) == {p.path for block in chosen for p in block.linear_modules}
    assert set(case.placement.parameters) == {stack.path for block in chosen for stack in block.stacks}
    return YES


def profiles_experts(case: Case) -> str:
    """Signals of each stacked expert are autograd's gradients of its part of the stack, and the card has them."""
    stacks = [stack for block in case.base.blocks for stack in block.stacks]
    if not stacks:
        return NONE
    signals = _signals(case)
    weights = [stack.module.get_parameter(stack.parameter) for stack in stacks]
    with unchanged(case.base.model):
        for weight in weights:
            weight.requires_grad_(True)
        gradients = torch.autograd.grad(labelled_losses(case.base.model, case.batch)[0].sum(), weights)
    for stack, gradient in zip(stacks, gradients, strict=True):
        found = [signals.get(one.path, torch.zeros(one.out_features, one.in_features)) for one in stack.modules]
        expected = gradient.mT if stack.transposed else gradient
        torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=stack.path)
    assert all(any(module.experts for module in case.card.layers[block.index].modules) for block in case.base.blocks if block.stacks)
    return YES


def trains(case: Case) -> str:
    """Training with all of the faster parts moves every adapter, and the held-out loss."""
    assert case.run.loss_reduction > 0
    weights = load_file(case.folder / "run" / WEIGHTS_FILE)
    still = [name for name, weight in weights.items() if "lora_B" in name and not weight.any()]
    assert not still, f"nothing was learnt in {still}"
    return YES


def saves_and_loads(case: Case) -> str:
    """The adapter read back from its folder has the held-out loss that training measured."""
    expected = case.run.loss_after
    with loaded(case.base, case.folder / "run") as model:
        found = held_out_losses(model, case.base.pad_id, case.data)
    assert abs(found.loss - expected) <= 1e-5 * expected
    return YES


def verifies(case: Case) -> str:
    """The saved adapter is found to be as planned, and found out where another layer was wanted."""
    assert case.run
    found = verify_adapter(case.base.model, case.folder / "run", fingerprint=case.base.fingerprint)
    assert found.as_planned, found.differences
    assert (set(found.adapted), found.adapted_layers) == (set(case.placement.targets), case.placement.layers)
    (other,) = set(range(len(case.base.blocks))) - set(case.placement.layers)
    assert not verify_adapter(case.base.model, case.folder / "run", layers=[other]).as_planned
    return YES


def probes(case: Case) -> str:
    """Replayed from any block on, with a step in that block, the losses are those of the whole forward."""
    base, draw = case.base, torch.Generator().manual_seed(0)
    held = ReplayedSet(base, case.data.examples, range(len(base.blocks)), batch_size=4)
    for block in base.blocks:
        step = {
            p.path: (0.1 * torch.randn(2, p.in_features, generator=draw), 0.1 * torch.randn(p.out_features, 2, generator=draw))
            for p in block.modules
        }
        plain = held_out_losses(base.model, base.pad_id, case.data, batch_size=4)
        with stepped(block, step, 1.0):
            whole = held_out_losses(base.model, base.pad_id, case.data, batch_size=4)
            replayed = held.losses(block.index)
        assert not torch.allclose(whole.nats, plain.nats, rtol=1e-4)
        torch.testing.assert_close(replayed.nats, whole.nats, rtol=1e-5, atol=0)
    return YES


Fast = Callable[[Any], AbstractContextManager[Any]]


@contextmanager
def _adapted(case: Case) -> Iterator[Any]:
    """The model in train mode with adapters in its upper two layers that already do something, the same each time."""
    with unchanged(case.base.model):
        torch.manual_seed(0)
        model = apply(case.base.model, place(case.base, [1, 2]), rank=2)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0.0, 0.1)
        yield model.train()


def _compare(case: Case, part: Fast, *, epochs: int = 1, checkpointing: bool = False) -> Any:
    """What a part yields, after epochs whose losses and gradients were compared with stock ones."""
    with _adapted(case) as model:
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with part(model) as done:
            fast = [_gradients(model, batch) for epoch in case.epochs[:epochs] for batch in epoch]
        if checkpointing:
            model.gradient_checkpointing_disable()
    for (expected_loss, expected), (loss, found) in zip(case.stock, fast, strict=False):
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert found.keys() == expected.keys() and any(bool(gradient.any()) for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)
    return done


def _gradients(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss as a plain loop over transformers' own loss has it; a classifier's is asked for by `labelled_losses`."""
    model.zero_grad()
    if is_classifier(model):
        loss = labelled_losses(model, batch)[0].mean()
    else:
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def cuts(case: Case) -> str:
    """Without the blocks below the cut, under checkpointing too, losses and gradients are stock ones."""
    assert _compare(case, cut_backward).lowest == 1
    if case.base.model.supports_gradient_checkpointing:
        _compare(case, cut_backward, checkpointing=True)
    return YES


def caches(case: Case) -> str:
    """With the frozen prefix cached, losses and gradients are stock ones and records are found again."""
    done = _compare(case, lambda model: frozen_prefix(model, always=True, strict=False), epochs=2)
    return YES if done.active and done.records_read >= len(case.data) else done.reason or next(iter(done.untouched))


def unpads(case: Case) -> str:
    """Without padding in the blocks, losses and gradients are stock ones."""
    done = _compare(case, unpadded)
    return YES if done.active and done.spared > 0 else done.reason


def takes_labels_only(case: Case) -> str:
    """With the head on labelled positions only, losses and gradients are stock ones."""
    done = _compare(case, labels_only)
    return YES if done.active and done.spared > 0 else done.reason


def fuses(case: Case) -> str:
    """With adapters computed in one step, losses and gradients are stock ones."""
    done = _compare(case, fused_lora)
    kinds = {type(p.module).__name__ for block in case.base.blocks for p in block.linear_modules} - {"Linear", "Conv1D"}
    return YES if done.fused == done.adapters else f"{done.fused} of {done.adapters} adapters: maps are {', '.join(sorted(kinds))}"


CAPABILITIES: dict[str, Callable[[Case], str]] = {
    "profile": profiles,
    "experts": profiles_experts,
    "stream": streams,
    "select": selects,
    "train": trains,
    "save and load": saves_and_loads,
    "verify": verifies,
    "step probe": probes,
    "backward cut": cuts,
    "prefix cache": caches,
    "unpadded": unpads,
    "labels only": takes_labels_only,
    "fused LoRA": fuses,
}
"""Columns of the table."""


def recorded() -> dict[str, dict[str, str]]:
    """What `capabilities.json` says, by family and capability."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def established(case: Case, capability: str) -> str:
    """What a family's own model shows about a capability, without the name of its class."""
    return CAPABILITIES[capability](case).replace(type(case.base.model).__name__, "the model")


def main() -> int:
    """Establish everything anew and write it down."""
    found: dict[str, dict[str, str]] = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(family, Path(folder))
            found[family.name] = {"about": family.about} | {name: established(case, name) for name in CAPABILITIES}
    RECORDED.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
