"""Whether an adapter or configuration adapts in a model what it was meant to, for those made elsewhere too.

PEFT itself is asked: it wraps the model, whose weights may be missing, and what it adapted is compared with what was asked for. Then it
loads the saved weights. What landed elsewhere, matched nothing or has no effect is said in words.
"""

import difflib
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from peft import PeftConfig, PeftModel, PeftType
from pydantic import Field
from transformers import PreTrainedModel

from layercard.adapters.apply import STARTS_THAT_LEAVE_WEIGHTS, WITH_PATTERNS, adapted_ranks
from layercard.adapters.files import SavedAdapter, empty_adapters, load_weights, read_adapter, saved_modules, saved_placement
from layercard.card.numbers import listed
from layercard.errors import PlacementError
from layercard.models.adapted import adapted_paths, few
from layercard.models.embedded import EMBEDDED, HUB_ID
from layercard.models.layers import find_blocks
from layercard.records import Record
from layercard.selection.placement import Placement

TOWERS = {"vision": "the vision tower", "visual": "the vision tower", "audio": "the audio tower"}
"""What a list of layers is called that has such a word in its path."""
CHOICES = ("layers_to_transform", "layers_pattern", "target_modules", "target_parameters")
"""What a configuration chooses modules by."""
VLLM_LACKS = (
    "modules_to_save",
    "use_dora",
    "bias",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
"""Settings of LoRA that vLLM 0.30.0 refuses or has nothing for."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` of vLLM takes (vllm/config/lora.py, 0.30.0); 16 where it is not given."""


class Verification(Record):
    """What an adapter or configuration asks for, what it adapts, and where the two differ."""

    error: ClassVar = PlacementError
    noun: ClassVar = "verification"
    made_by: ClassVar = "layercard verify"

    schema_: Literal["layercard-verification/1"] = Field(default="layercard-verification/1", alias="schema")
    as_planned: bool
    source: str
    model: dict[str, Any]
    method: str
    asked: dict[str, Any]  # what the configuration chooses modules by, as far as it is given
    planned_layers: tuple[int, ...] | None  # the placement's, those given, or the configuration's; `None` where nothing says
    adapted_layers: tuple[int, ...]  # layers of the text model with something adapted
    adapted: tuple[str, ...]  # paths of the modules and parameters that PEFT adapts
    saved: tuple[str, ...] | None  # paths of the modules with saved weights; `None` where there are no weights
    differences: tuple[str, ...]  # what is not as planned, a sentence each
    notes: tuple[str, ...]  # what is worth knowing and is not a difference

    def check(self) -> None:
        """Raise `PlacementError` with the first difference, and the number of the others, unless all is as planned."""
        if self.differences:
            more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
            raise PlacementError(f"{self.source} is not as planned: {self.differences[0]}{more}")


def verify_config(
    model: PreTrainedModel,
    config: PeftConfig,
    *,
    placement: Placement | None = None,
    layers: Sequence[int] | None = None,
    name: str = "",
    source: str = "the configuration",
    serve: str = "",
) -> Verification:
    """What a PEFT configuration adapts in a model, against what was planned.

    Args:
        model: The model without adapters; it may lie on the meta device, and is as before afterwards.
        config: The configuration; it is not changed.
        placement: The placement that it should follow, target by target.
        layers: The layers that it should adapt, where there is no placement; its own `layers_to_transform` when not given.
        name: What the model is called.
        source: What the configuration is called.
        serve: `vllm` to say what vLLM makes of it, too.

    Raises:
        ModelError: The model has no decoder blocks.
    """
    return _Check(model, SavedAdapter(config, None, []), placement, layers).run(name, source, serve=serve)


def verify_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    placement: Placement | None = None,
    layers: Sequence[int] | None = None,
    name: str = "",
    fingerprint: str | None = None,
    serve: str = "",
) -> Verification:
    """`verify_config` of an adapter's folder or configuration file, with its saved weights and its base model.

    Adapters of mlx-lm are read, too: as PEFT would have them.

    Args:
        model: The model without adapters; it may lie on the meta device.
        folder: An adapter's folder, or a configuration of PEFT's as JSON.
        placement: The placement that it should follow; `placement.json` in the folder when not given, unless `layers` are.
        layers: The layers that it should adapt.
        name: What the model is called; compared with the name of the adapter's base model.
        fingerprint: The model's fingerprint, where its weights were read; compared with the placement's, and then names do not matter.
        serve: `vllm` to say what vLLM makes of it, too.

    Raises:
        PlacementError: There is no such adapter, or it cannot be read.
        ModelError: The model has no decoder blocks.
    """
    adapter = read_adapter(folder, model)
    if placement is None and layers is None:
        placement = saved_placement(folder)
    base = base_difference(adapter.config, placement, name, fingerprint)
    return _Check(model, adapter, placement, layers).run(name, str(folder), base, serve)


def base_difference(config: PeftConfig, placement: Placement | None, name: str, fingerprint: str | None) -> str:
    """How the adapter's base model is another than this one; empty where it is the same, or where nothing tells."""
    planned = placement.model if placement is not None else {}
    if fingerprint and planned.get("fingerprint"):
        theirs = f"{planned.get('name')!r} (fingerprint {planned['fingerprint']})"
        same = planned["fingerprint"] == fingerprint
        return "" if same else f"the adapter is for {theirs}, this model has fingerprint {fingerprint}"
    base = config.base_model_name_or_path
    last = [path.replace("\\", "/").rstrip("/").rpartition("/")[2].lower() for path in (base or "", name)]
    same = last[0] == last[1] or set(last) == {EMBEDDED, HUB_ID.rpartition("/")[2].lower()}
    return f"the adapter was trained on {base!r}, this model is {name!r}" if base and name and not same else ""


class _Check:
    """One verification: where adapters were to land in a model, and where they did."""

    def __init__(self, model: PreTrainedModel, adapter: SavedAdapter, placement: Placement | None, layers: Sequence[int] | None) -> None:
        self.model, self.adapter, self.config, self.placement = model, adapter, adapter.config, placement
        blocks = find_blocks(model)
        self.blocks = [f"{block.path}." for block in blocks]
        self.modules = [{module.path for module in block.linear_modules} for block in blocks]  # of each block
        self.stacks = [{stack.path for stack in block.stacks} for block in blocks]
        self.all_paths = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        given = vars(self.config)
        asked, names = given.get("layers_to_transform"), given.get("target_modules")
        self.asked_layers = None if asked is None else [asked] if isinstance(asked, int) else list(asked)
        # Empty where `target_modules` is a regular expression, `all-linear` or not given.
        self.asked_names = [] if names is None or isinstance(names, str) else sorted(map(str, names))
        self.asked_parameters = sorted(map(str, given.get("target_parameters") or ()))
        self.planned = placement.layers if placement is not None else layers if layers is not None else self.asked_layers
        self.adapted: tuple[str, ...] = ()

    def run(self, name: str, source: str, base: str = "", serve: str = "") -> Verification:
        """Let PEFT wrap the model, and compare; `base` is a difference that is known before."""
        given, weights, notes = vars(self.config), self.adapter.weights, self._config_notes()
        serving: list[str] = []
        try:
            with empty_adapters(self.model, self.config) as wrapped:
                self.adapted = adapted_paths(wrapped)
                self._leave_out_converted(wrapped.peft_config["default"])
                differences = [*self._indices(), *self._layer_differences(), *self._unmatched_names()]
                differences += [] if self.planned is None else self._outside()
                differences += [*self._targets(), *self._ranks(wrapped)]
                if self.planned is not None and given.get("bias") == "all":
                    differences.append("bias='all' trains the biases of every layer")
                differences += [] if weights is None else load_weights(wrapped, weights)
                if serve:
                    refused, serving = self._by_vllm(wrapped)
                    differences += refused
        except PlacementError as error:
            differences = [*self._indices(), *self._unmatched_names(), str(error)]
        if not self.adapted and not differences:
            differences = ["no module of this model is adapted"]
        notes += self._outside() if self.planned is None else []
        notes += self._partly_adapted()
        paths = None
        if weights is not None:
            paths, none_acts, effect = saved_modules(self.config, weights)
            (differences if none_acts else notes).extend([effect] if effect else [])
        if self.adapter.left_out:
            notes.append(f"this PEFT leaves out {few(self.adapter.left_out)}, which it does not know")
        if base and self.adapter.maker == "PEFT":
            differences.insert(0, base)
        elif base:  # mlx-lm trains on copies of a model that have names of their own
            notes.append(base)
        asked = {choice: given.get(choice) for choice in CHOICES}
        return Verification(
            as_planned=not differences,
            source=source,
            model={"name": name, "layers": len(self.blocks)},
            method=PeftType(self.config.peft_type).value,
            asked={choice: sorted(value) if isinstance(value, set) else value for choice, value in asked.items() if value is not None},
            planned_layers=None if self.planned is None else tuple(self.planned),
            adapted_layers=tuple(self._by_layer()),
            adapted=self.adapted,
            saved=paths,
            differences=tuple(differences),
            notes=(*notes, *serving),
        )

    def _by_vllm(self, model: PeftModel) -> tuple[list[str], list[str]]:
        """What vLLM refuses or serves at another scale, and what else it does with the adapter.

        Read in vLLM 0.30.0: lora/peft_helper.py, lora/lora_model.py, lora/utils.py, config/lora.py; its issues 59799 (scales), 55545.
        """
        given, mend = vars(self.config), "merge the adapter into the weights, or train without"
        refused = []
        if self.adapter.maker != "PEFT":
            refused.append(f"vLLM cannot read an adapter of {self.adapter.maker}; convert it to PEFT's form, or merge it")
        if self.config.peft_type != PeftType.LORA:
            return [*refused, f"vLLM serves LoRA only, not {PeftType(self.config.peft_type).value}; merge the adapter into the weights"], []
        unserved = [field for field in VLLM_LACKS if given.get(field) not in (None, False, "none", [], {})]
        refused += [f"vLLM does not serve {field} = {given[field]!r}; {mend}" for field in unserved]
        start = given.get("init_lora_weights", True)
        if start not in STARTS_THAT_LEAVE_WEIGHTS:
            refused.append(f"it began out of the weights ({start}), and vLLM adds it to the weights as they were; convert it to plain LoRA")

        # One scale for all: vLLM reads `r` and `lora_alpha` alone, and takes the rank of a module from its weights.
        ranks, rank = adapted_ranks(model), int(given["r"])
        scale = given["lora_alpha"] / (math.sqrt(rank) if given.get("use_rslora") else rank)
        other = [path for path, (_, trained) in ranks.items() if not math.isclose(trained, scale)]
        if other:
            example = f"{other[0]} at {scale:g} instead of {ranks[other[0]][1]:g}"
            reason = "for it does not read rank_pattern and alpha_pattern; multiply their lora_B by the ratio and leave the patterns out"
            refused.append(f"vLLM serves {len(other)} modules at another scale than they were trained at, such as {example}, {reason}")
        highest = max([rank, *(each for each, _ in ranks.values())])
        setting = next((allowed for allowed in VLLM_RANKS if allowed >= highest), None)
        if setting is None:
            refused.append(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, and this one has {highest}; {mend}")

        # What it needs to be told, and what it costs.
        words = sorted({path.rpartition(".")[2] for path in self.adapted})
        notes = [] if setting is None else [f"vLLM: start it with --enable-lora --max-lora-rank {setting}"]
        notes.append(f"vLLM: the model's class must support LoRA (SupportsLoRA), and have linear modules {', '.join(words)}")
        ends = [path for path in self.adapted if path.rpartition(".")[2] in ("lm_head", "embed_tokens", "wte", "embed_in", "embed_out")]
        if ends:
            notes.append(f"vLLM: only classes with embedding_modules take {few(ends)}; the others refuse the adapter")
        if any(path in stacks for stacks in self.stacks for path in self.adapted):
            scaled = ", and rsLoRA's scale is not used there" if given.get("use_rslora") else ""
            notes.append(f"vLLM: stacked experts need a class with LoRA for fused experts{scaled}")
        towers = [path for path in self.adapted if self._layer(path) is None and path not in ends]
        if towers:
            notes.append(f"vLLM: adapters outside the text model are left out, such as {towers[0]}")
        layers = len(self._by_layer())
        if layers < len(self.blocks):
            notes.append(
                f"vLLM: {layers} of {len(self.blocks)} layers cost as much time and memory as all, for it holds and computes adapters of "
                "every layer; merged into the weights, they cost nothing"
            )
        return refused, notes

    def _leave_out_converted(self, config: PeftConfig) -> None:
        """Forget names that PEFT has turned into stacked experts (`gate_proj`): they match something, under another name."""
        parameters, left = vars(config).get("target_parameters"), vars(config).get("target_modules")
        if set(parameters or ()) != set(self.asked_parameters) and not isinstance(left, str):
            self.asked_names = [name for name in self.asked_names if name in (left or ())]

    def _layer(self, path: str) -> int | None:
        """Index of the block that a path lies in; `None` outside of them."""
        return next((index for index, block in enumerate(self.blocks) if path.startswith(block)), None)

    def _by_layer(self) -> dict[int, set[str]]:
        """Adapted paths by the index of their block, ascending; those outside of the blocks are left out."""
        layers: dict[int, set[str]] = {}
        for path in self.adapted:
            layer = self._layer(path)
            if layer is not None:
                layers.setdefault(layer, set()).add(path)
        return dict(sorted(layers.items()))

    def _has(self, layer: int, name: str) -> bool:
        """Whether a block has a linear module of this name."""
        return any(_matches(name, path) for path in self.modules[layer])

    def _indices(self) -> list[str]:
        """What PEFT makes of `layers_to_transform` that nobody means, and where it is not what was planned."""
        if self.asked_layers is None:
            return []
        last, words = len(self.blocks) - 1, []
        if not self.asked_layers:
            return [f"layers_to_transform is empty, which PEFT reads as all layers (0-{last})"]
        outside = [layer for layer in self.asked_layers if not 0 <= layer <= last]
        if outside:
            dropped = "it" if len(outside) == 1 else "them"
            words.append(f"{_numbered_are(outside)} not in the model, which has layers 0-{last}: PEFT drops {dropped} silently")
        if self.planned is not None and set(self.planned) != set(self.asked_layers):
            words.append(f"the configuration asks for {_numbered(self.asked_layers)}, not {listed(sorted(self.planned))}")
        return words

    def _layer_differences(self) -> list[str]:
        """Differences between the layers that were planned and those that are adapted; none where no layers were planned."""
        if self.planned is None:
            return []
        inside = sorted({layer for layer in self.planned if 0 <= layer < len(self.blocks)})
        start = f"you asked for {_numbered(inside) if inside else 'no layer of this model'}"
        words, adapted = [], self._by_layer()
        # Experts go first: PEFT ignores `layers_to_transform` for them, so mostly those of all layers are adapted.
        stacked = [layer for layer, paths in adapted.items() if paths & self.stacks[layer]]
        if set(stacked) - set(inside):
            number = f"all {len(stacked)} layers" if len(stacked) == len(self.blocks) else f"layers {listed(stacked)}"
            words.append(f"{start}, experts of {number} are adapted")
        more = [layer for layer, paths in adapted.items() if layer not in inside and paths - self.stacks[layer]]
        if more:
            words.append(f"{start}, {_numbered_are(more)} adapted too")
        for layer in inside:
            if layer not in adapted:
                absent = [name for name in self.asked_names if "." not in name and not self._has(layer, name)]
                reason = f" has no {', '.join(absent)} and" if absent and len(absent) == len(self.asked_names) else ""
                words.append(f"block {layer}{reason} gets nothing")
        return words

    def _unmatched_names(self) -> list[str]:
        """Names in the configuration that match nothing in the model."""
        words, last_parts = [], {path.rpartition(".")[2] for path in self.all_paths}
        asked = [("target_modules", name) for name in self.asked_names] + [("target_parameters", name) for name in self.asked_parameters]
        for field, name in asked:
            if not any(_matches(name, path) for path in self.all_paths):
                close = difflib.get_close_matches(name, last_parts, n=1, cutoff=0.7)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                words.append(f"{field} names {name!r}, which matches nothing in this model{hint}")
        return words

    def _outside(self) -> list[str]:
        """What is adapted outside of the text model's blocks, grouped by the list of layers it lies in."""
        towers: dict[str, set[int]] = {}
        others = []
        for path in (path for path in self.adapted if self._layer(path) is None):
            match = re.match(r"(.+?)\.(\d+)\.", path)
            if match:
                towers.setdefault(match[1], set()).add(int(match[2]))
            else:
                others.append(path)
        too = " too" if self.planned is not None else ", which is not part of the text model"
        words = []
        for tower, layers in towers.items():
            plain = next((name for word, name in TOWERS.items() if word in tower), "")
            words.append(f"{_numbered(layers)} of {f'{plain} ({tower})' if plain else tower} {_are(layers)} adapted{too}")
        return words + ([f"{few(others)} {_are(others)} adapted{too}"] if others else [])

    def _targets(self) -> list[str]:
        """Targets of the placement that are not adapted, and what is adapted beside them, within the layers of the placement."""
        if self.placement is None:
            return []
        unknown = next((path for path in self.placement.targets if path not in self.all_paths), None)
        if unknown is not None:
            return [f"the placement names {unknown}, which this model does not have; select again for this model"]
        adapted, planned, reached = set(self.adapted), set(self.placement.targets), set(self._by_layer())
        missing = [path for path in planned - adapted if self._layer(path) in reached]
        extra = [path for path in adapted - planned if self._layer(path) in self.placement.layers]
        sides = ((missing, "planned and not adapted"), (extra, "adapted and not planned"))
        return [f"{few(paths)} {what}" for paths, what in sides if paths]

    def _ranks(self, model: PeftModel) -> list[str]:
        """Targets whose rank or scale is another than the placement's."""
        if self.placement is None or not self.placement.rank_pattern:
            return []
        actual, alphas = adapted_ranks(model), self.placement.alpha_pattern
        planned = {path: (rank, alphas[path] / rank) for path, rank in self.placement.rank_pattern.items()}
        other = [path for path in planned if path in actual and actual[path] != planned[path]]
        if not other:
            return []
        (rank, scale), (has_rank, has_scale) = planned[other[0]], actual[other[0]]
        example = f"{other[0]}: {has_rank} and {has_scale:g}, not {rank} and {scale:g}"
        return [f"{len(other)} modules have another rank or scale than planned, such as {example}"]

    def _config_notes(self) -> list[str]:
        """Ranks of single modules without an alpha, which change the scale alpha / rank there; modules trained whole."""
        given, notes = vars(self.config), []
        alone = min(set(given.get("rank_pattern") or {}) - set(given.get("alpha_pattern") or {}), default=None)
        if alone is not None and self.config.peft_type in WITH_PATTERNS:
            notes.append(f"rank_pattern names {alone!r} and alpha_pattern does not, so the scale alpha / rank is another there")
        if given.get("modules_to_save"):
            notes.append(f"{few(given['modules_to_save'])} trained whole and saved along")
        return notes

    def _partly_adapted(self) -> list[str]:
        """Blocks that lack some of the named modules and are adapted in the others: worth knowing, but not a difference."""
        adapted, lacking = self._by_layer(), dict[str, list[int]]()
        for layer in adapted if self.planned is None else sorted(set(self.planned) & set(adapted)):
            for name in (name for name in self.asked_names if "." not in name):
                if not self._has(layer, name) and any(self._has(other, name) for other in range(len(self.blocks))):
                    lacking.setdefault(name, []).append(layer)
        blocks = {
            name: f"block {layers[0]} has" if len(layers) == 1 else f"blocks {listed(layers)} have" for name, layers in lacking.items()
        }
        return [f"{words} no {name}" for name, words in blocks.items()]


def _matches(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _numbered(layers: Collection[int]) -> str:
    return f"layer {next(iter(layers))}" if len(layers) == 1 else f"layers {listed(sorted(layers))}"


def _are(things: Collection[object]) -> str:
    return "is" if len(things) == 1 else "are"


def _numbered_are(layers: Collection[int]) -> str:
    return f"{_numbered(layers)} {_are(layers)}"
