"""Scores by which other tools choose layers, so that their choices can be trained side by side with ours.

| score | of | what |
| --- | --- | --- |
| `gradient_norm` | aletheia-lora | its own package's probe: norms of parameter gradients over 5 records, summed |
| `activation_norm` | Act-LoRA (Information 17(3), 283) | mean norm of the block's output over tokens |
| `one_minus_cka` | CKA layer-wise LoRA (arXiv 2602.05988) | 1 − linear CKA of the block's input and output |
| `snr` | Spectrum (arXiv 2406.06623) | singular values above over those below the Marchenko–Pastur edge, weights alone |
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch

from layercard.data.load import Example, batches
from layercard.errors import BenchmarkError
from layercard.models.hooks import frozen, hidden_states
from layercard.models.load import BaseModel
from layercard.models.losses import labelled_losses

PEERS = ("gradient_norm", "activation_norm", "one_minus_cka", "snr")


def peer_scores(base: BaseModel, examples: Sequence[Example], names: Sequence[str] = PEERS, batch_size: int = 8) -> dict[str, list[float]]:
    """Some scores of `PEERS`, one number a layer; layers with the largest are chosen.

    Raises:
        BenchmarkError: `gradient_norm` is asked for, and aletheia-lora is not installed.
    """
    scores: dict[str, list[float]] = {}
    if "gradient_norm" in names:
        scores["gradient_norm"] = aletheia_scores(base, examples)
    if {"activation_norm", "one_minus_cka"} & set(names):
        # The hidden states of all tokens between the blocks.
        streams: list[list[torch.Tensor]] = [[] for _ in range(len(base.blocks) + 1)]
        with torch.no_grad(), frozen(base.model):
            for batch in batches(examples, batch_size, base.pad_id, by_length=True):
                batch = batch.to(base.device)
                mask = batch.attention_mask.bool()
                states = hidden_states(partial(labelled_losses, base.model, batch), base.blocks, range(len(streams)))
                for index, hidden in states.items():
                    streams[index].append(hidden[mask].float().cpu())
        borders = [torch.cat(parts) for parts in streams]
        scores["activation_norm"] = [float(border.norm(dim=1).mean()) for border in borders[1:]]
        scores["one_minus_cka"] = [1 - linear_cka(below, above) for below, above in pairwise(borders)]
    if "snr" in names:
        scores["snr"] = snr_scores(base)
    return {name: scores[name] for name in names}


def linear_cka(x_td: torch.Tensor, y_td: torch.Tensor) -> float:
    """Linear centred kernel alignment of two representations of the same tokens, 0 to 1 (Kornblith et al. 2019, eq. 3).

    `‖Yᵀ X‖_F² / (‖Xᵀ X‖_F ‖Yᵀ Y‖_F)`, columns centred.
    """
    x, y = (z.double() - z.double().mean(dim=0) for z in (x_td, y_td))
    norm = torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)
    return float((y.T @ x).square().sum() / norm) if norm > 0 else 1.0


def weight_snr(weight: torch.Tensor) -> float:
    """Spectrum's signal-to-noise ratio of one weight `[out, in]`: sum of the singular values above the edge over those below.

    The edge is `σ (1 + √(min/max of the shape))` with σ the interquartile range of the singular values over 1.349; divided by
    the largest singular value, as Spectrum does.
    """
    values = torch.linalg.svdvals(weight.float())
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], device=values.device))
    edge = float(high - low) / 1.349 * (1 + (min(weight.shape) / max(weight.shape)) ** 0.5)
    signal, noise = values[values > edge].sum(), values[values <= edge].sum()
    return float(signal / noise.clamp(min=1e-12) / values.max()) if noise > 0 else float(signal / values.max())


def snr_scores(base: BaseModel) -> list[float]:
    """Mean over a layer's modules of the signal-to-noise ratio, each as a share of the largest of its kind (Spectrum ranks by kind)."""
    table: dict[str, list[float]] = {}
    for block in base.blocks:
        for linear in block.linear_modules:
            weight = linear.module.get_parameter("weight").detach()
            table.setdefault(linear.path.rpartition(".")[2], []).append(weight_snr(weight))
    shares = [[value / max(values) for value in values] for values in table.values() if len(values) == len(base.blocks)]
    return [sum(column) / len(column) for column in zip(*shares, strict=True)]


def aletheia_scores(base: BaseModel, examples: Sequence[Example], probe_batches: int = 5) -> list[float]:
    """The probe of the aletheia-lora package, as it is: batch size 1, loss on all tokens, train mode, in the model's own dtype.

    It looks at `probe_batches` records, 5 unless told otherwise.
    """
    try:
        from aletheia_lora import gradient_probe
    except ImportError:
        raise BenchmarkError("the gradient_norm strategy runs aletheia-lora's own probe; pip install 'layercard[bench]'") from None
    records = [torch.tensor(example.input_ids) for example in examples]
    items = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in records]  # a list is a data set to its loader
    with frozen(base.model):
        try:
            norms = gradient_probe(base.model, items, len(base.blocks), probe_batches=min(probe_batches, len(examples)))
        finally:
            base.model.zero_grad(set_to_none=True)
    return [float(norms[layer]) for layer in range(len(base.blocks))]
