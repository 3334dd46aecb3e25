"""Experts as stacked parameters: what each of them sees, and that a block of experts is measured as a dense one would be."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from layercard.adapters.apply import place
from layercard.card.card import LayerCard
from layercard.data.load import load_data
from layercard.models.hooks import capturing, run_experts, stepped
from layercard.models.layers import LinearModule, find_blocks, unread_experts
from layercard.models.load import BaseModel, wrap_model
from layercard.models.losses import labelled_losses
from layercard.profiling import profile as profile_module
from layercard.profiling.assemble_card import assemble_card
from layercard.profiling.fit import Fit, fit_pass
from layercard.profiling.held_out import HeldOut, held_out_pass
from layercard.profiling.profile import profile_records as profile, split_records
from layercard.selection.select import select
from layercard.settings import ProfileSettings, TrainSettings
from layercard.statistics.moments import GradientMoments, InputMoments
from layercard.statistics.residual import Whitening, projected_residual
from layercard.training.train import train
from reference import linear
from reference.experts import Rows, resnorm_squared, rows_by_token
from test_capture import batch_of, examples
from test_state import Threads
from tiny import HEADS, INNER, LAYERS, VOCAB, WIDTH, build_tiny, randomised, tiny_records, tiny_tokenizer, write_records

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 16},
    "olmoe": {"num_experts": 4},
}
LENGTHS = (9, 6, 12, 7, 5, 11)


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family] | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomised(AutoModelForCausalLM.from_config(config, dtype=torch.float64)).eval()
    model.set_experts_implementation("eager")  # the default of transformers has no double precision
    return model


def base_of(model: PreTrainedModel) -> BaseModel:
    return wrap_model(model, tiny_tokenizer(), name="tiny-experts")


def passes(base: BaseModel, *, batch_size: int = 2) -> tuple[Fit, HeldOut]:
    settings = ProfileSettings(rank=4, batch_size=batch_size, label_samples=2)
    fit = fit_pass(base, examples(LENGTHS, seed=1), settings)
    return fit, held_out_pass(base, examples(LENGTHS, seed=2), fit, settings)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_one_by_one_are_the_model_s_own(family: str, implementation: str) -> None:
    model = build(family)
    model.set_experts_implementation(implementation)
    module = find_blocks(model)[1].stacks[0].module
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, WIDTH, generator=draw, dtype=torch.float64)
    index = torch.stack([torch.randperm(4, generator=draw)[:2] for _ in range(11)])
    weights = torch.rand(11, 2, generator=draw, dtype=torch.float64)
    seen = []
    modules = {(stack.parameter, each.expert): each for stack in find_blocks(model)[1].stacks for each in stack.modules}

    def see(each: LinearModule, x: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        assert tokens is not None and x.shape == (len(tokens), each.in_features) and y.shape == (len(tokens), each.out_features)
        seen.append((each.name.rpartition(".")[2].partition("[")[0], each.expert, len(tokens)))
        return y

    with torch.no_grad():
        torch.testing.assert_close(run_experts(module, modules, see, hidden, index, weights), module(hidden, index, weights))
    assert sum(count for name, _, count in seen if name == "down_proj") == index.numel()
    assert {expert for _, expert, _ in seen} == set(index.unique().tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_autograd_s_and_rows_are_the_tokens_sent_there(family: str) -> None:
    model = build(family)
    batch = batch_of(examples(LENGTHS[:3]))
    blocks = find_blocks(model)
    stacks = {stack.path: stack for block in blocks for stack in block.stacks}
    assert len(stacks) == 2 * LAYERS
    sums = {path: torch.zeros(s.experts, s.out_features, s.in_features, dtype=torch.float64) for path, s in stacks.items()}
    inputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def sink(projection: Any, a: torch.Tensor, d: torch.Tensor, tokens: torch.Tensor | None) -> None:
        if projection.expert is not None:
            assert tokens is not None and len(tokens) == len(a) == len(d)
            sums[projection.path.partition("[")[0]][projection.expert] += d.T @ a
            inputs[projection.path] = (a, tokens)

    entered: list[torch.Tensor] = []
    handle = stacks[first := next(iter(stacks))].module.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with capturing(model, blocks) as capture:
        capture.start(batch.attention_mask, sink)
        labelled_losses(model, batch)[0].sum().backward()
    handle.remove()
    real = entered[0].detach()[batch.attention_mask.reshape(-1).bool()]
    for path, (a, tokens) in inputs.items():
        if path.startswith(f"{first}["):
            torch.testing.assert_close(a, real[tokens])
    weights = [stack.module.get_parameter(stack.parameter) for stack in stacks.values()]
    slopes = torch.autograd.grad(labelled_losses(model, batch)[0].sum(), weights)
    for (path, stack), slope in zip(stacks.items(), slopes, strict=True):
        torch.testing.assert_close(sums[path], slope.transpose(1, 2) if stack.transposed else slope)
    assert all("forward" not in vars(stack.module) for stack in stacks.values())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_step_of_experts_equals_a_step_of_their_weights(family: str) -> None:
    model = build(family)
    batch, block = batch_of(examples()), find_blocks(model)[1]
    draw = torch.Generator().manual_seed(0)
    steps = {
        own.path: (
            torch.randn(2, own.in_features, generator=draw).double() / 9,
            torch.randn(own.out_features, 2, generator=draw).double() / 9,
        )
        for stack in block.stacks
        for own in stack.modules
    }
    with torch.no_grad(), stepped(block, steps, 0.7):
        found, _ = labelled_losses(model, batch)
    with torch.no_grad():
        plain, _ = labelled_losses(model, batch)
        for stack in block.stacks:
            for own in stack.modules:
                down, up = steps[own.path]
                change = 0.7 * up @ down
                stack.module.get_parameter(stack.parameter)[own.expert] += change.T if stack.transposed else change
        expected, _ = labelled_losses(model, batch)
    torch.testing.assert_close(found, expected)
    assert float((found - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("keep_rows", [False, True])
def test_absent_tokens_count_as_zeros(keep_rows: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    a, d = torch.randn(13, 5, generator=draw).double(), torch.randn(13, 3, generator=draw).double()
    a[4:], d[4:] = 0, 0
    part, whole = InputMoments(5, keep_rows, absent=9), InputMoments(5, keep_rows)
    slopes, all_slopes = GradientMoments(3, 5, keep_rows), GradientMoments(3, 5, keep_rows)
    part.update(a[:4]), slopes.update(a[:4], d[:4])
    whole.update(a), all_slopes.update(a, d)
    torch.testing.assert_close(part.second_moment(), whole.second_moment())
    assert part.energy() == pytest.approx(whole.energy())
    one, other = Whitening.of(part, 0.3), Whitening.of(whole, 0.3)
    found, expected = (projected_residual(m, g, w, 0.1, 2) for m, g, w in ((part, slopes, one), (whole, all_slopes, other)))
    assert found.squared == pytest.approx(expected.squared) and one.noise_trace() == pytest.approx(other.noise_trace())
    torch.testing.assert_close(found.step, expected.step)
    assert found.squared == pytest.approx(float(linear.whitened(a, d * 13 * 0.1, 0.3).square().sum()))


def test_one_expert_is_a_dense_block() -> None:
    rotary = {"rope_type": "default", "rope_theta": 10000.0}
    sparse = build("mixtral", num_local_experts=1, num_experts_per_tok=1, rms_norm_eps=1e-6, rope_parameters=rotary)
    dense = build_tiny("llama", tie_word_embeddings=False).double()
    weights = dict(dense.named_parameters())
    with torch.no_grad():
        for name, weight in sparse.named_parameters():
            if name in weights:
                weights[name].copy_(weight)
        for block, other in zip(find_blocks(sparse), find_blocks(dense), strict=True):
            gate, up = block.stacks[0].module.gate_up_proj[0].chunk(2)
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", block.stacks[0].module.down_proj[0])):
                other.module.mlp.get_submodule(name).weight.copy_(weight)
    (fit, held), (plain, plain_held) = passes(base_of(sparse)), passes(base_of(dense))
    assert fit.loss == pytest.approx(plain.loss)
    for layer in range(LAYERS):
        found = {m.module.path.rpartition("mlp.")[2]: m.resnorm_squared for m in fit.layers[layer].modules}
        of = {m.module.name.rpartition(".")[2]: m.resnorm_squared for m in plain.layers[layer].modules}
        assert found["experts.gate_up_proj[0]"] == pytest.approx(of["gate_proj"] + of["up_proj"])
        assert found["experts.down_proj[0]"] == pytest.approx(of["down_proj"])
    torch.testing.assert_close(held.nats, plain_held.nats)


def test_signals_do_not_depend_on_batches_and_follow_a_permutation_of_experts() -> None:
    model = build("mixtral")
    fit, held = passes(base_of(model))
    same, same_held = passes(base_of(model), batch_size=5)
    for layer in range(LAYERS):
        for one, other in zip(fit.layers[layer].modules, same.layers[layer].modules, strict=True):
            assert one.module.path == other.module.path and one.tokens == other.tokens
            assert one.resnorm_squared == pytest.approx(other.resnorm_squared)
    for one, other in ((held.slopes, same_held.slopes), (held.drawn, same_held.drawn), (held.gradient, same_held.gradient)):
        torch.testing.assert_close(one, other)
    order = [2, 0, 3, 1]
    with torch.no_grad():
        for block in find_blocks(model):
            moe = block.module.mlp
            for parameter in (moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj):
                parameter.copy_(parameter[order].clone())
    moved, _ = passes(base_of(model))

    def by_expert(found: Fit) -> dict[str, float]:
        return {m.module.path: m.resnorm_squared for layer in found.layers for m in layer.modules if m.module.expert is not None}

    before, after = by_expert(fit), by_expert(moved)
    assert len(before) == len(after) > LAYERS * 4
    for path, value in after.items():
        stack, _, number = path.rstrip("]").partition("[")
        assert value == pytest.approx(before[f"{stack}[{order[int(number)]}]"])


def test_from_card_to_a_trained_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(build("qwen3_moe").float())
    data = load_data(write_records(tmp_path / "records.jsonl", tiny_records(12)), base.tokenizer)
    measured: list[HeldOut] = []

    def assemble(*arguments: Any) -> LayerCard:
        measured.append(arguments[4])
        return assemble_card(*arguments)

    monkeypatch.setattr(profile_module, "assemble_card", assemble)
    card = profile(base, data, ProfileSettings(rank=2, probe="step", cost=False))
    (held_out,) = measured

    def square(path: str) -> float:
        """The squared resnorm of a map, the mean of both halves of the records; noise may put it below zero."""
        values = held_out.modules.get(path, torch.zeros(2, len(data)))[1]
        return sum(float(values[held_out.half == half].sum() / held_out.labelled[held_out.half == half].sum()) / 2 for half in (0, 1))

    def root(squares: list[float]) -> Any:
        return pytest.approx(math.sqrt(max(0.0, sum(squares))), rel=1e-5)

    for block, entry in zip(base.blocks, card.layers, strict=True):
        stacks = [module for module in entry.modules if module.experts]
        assert [module.path for module in stacks] == [stack.path for stack in block.stacks]
        for module in stacks:
            assert module.experts == 4 and sum(module.expert_tokens) > 0
            squares = [square(f"{module.path}[{expert}]") for expert in range(4)]
            assert module.resnorm == root(squares) and list(module.expert_resnorm) == [root([each]) for each in squares]
        assert entry.resnorm.value == root([square(each.path) for each in block.modules])
    placement = select(card, k=1, objective="performance")
    (layer,) = placement.layers
    assert placement.parameters == tuple(stack.path for stack in base.blocks[layer].stacks)
    record = train(base, placement, data, tmp_path / "run", TrainSettings(rank=2, steps=3), valid=data)
    assert record.trainable_parameters > 0 and record.loss_after < record.loss_before
    assert record.placement["parameters"] == list(placement.parameters)


def test_experts_without_a_token_are_named(tmp_path: Path) -> None:
    model = build("mixtral", num_local_experts=4, num_experts_per_tok=1).float()
    with torch.no_grad():
        find_blocks(model)[1].module.mlp.gate.weight.zero_()  # every token goes to the same expert
    base = base_of(model)
    data = load_data(write_records(tmp_path / "records.jsonl", tiny_records(8)), base.tokenizer)
    card = profile(base, data, ProfileSettings(rank=2, probe="none", cost=False))
    assert any("experts that no token was sent to" in line and "1 (3 of 4)" in line for line in card.warnings)
    gate_up = next(module for module in card.layers[1].modules if module.experts)
    used = [count > 0 for count in gate_up.expert_tokens]
    assert sum(used) == 1 and used == [value > 0 for value in gate_up.expert_resnorm]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_resnorm_of_each_expert_is_that_of_a_loop_over_its_tokens(family: str) -> None:
    base, made = base_of(build(family)), examples(LENGTHS, seed=1)
    fit, _ = passes(base)
    module = base.blocks[1].stacks[0].module
    seen: list[list[torch.Tensor]] = []

    def keep(_: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.requires_grad_().retain_grad()
        seen.append([*args, output])

    with torch.no_grad():
        for weight in base.model.parameters():
            weight.requires_grad_(False)
    rows: Rows = {}
    handle = module.register_forward_hook(keep)
    for example in made:  # one record after another: there is no padding
        labelled_losses(base.model, batch_of([example]))[0].sum().backward()
        hidden, index, weights, output = (tensor.detach() if at < 3 else tensor for at, tensor in enumerate(seen.pop()))
        for key, found in rows_by_token(module, hidden, index, weights, output.grad).items():
            rows.setdefault(key, []).extend(found)
    handle.remove()
    ridges = {signals.path: signals.ridge for signals in fit.layers[1].inputs}
    checked = 0
    for m in fit.layers[1].modules:
        if m.module.expert is not None:
            own = rows[m.module.name.partition("[")[0].rpartition(".")[2], m.module.expert]
            assert m.tokens == len(own)
            assert m.resnorm_squared == pytest.approx(resnorm_squared(own, fit.tokens, fit.labelled, ridges[m.leader]), rel=1e-6)
            checked += 1
    assert checked == len(rows) >= 6


def test_rows_of_experts_land_at_their_records() -> None:
    base, made = base_of(build("qwen3_moe")), examples(LENGTHS, seed=2)
    fit, held = passes(base, batch_size=4)
    stacks = {stack.path: stack for block in base.blocks for stack in block.stacks}
    weights = [stack.module.get_parameter(stack.parameter) for stack in stacks.values()]
    maps = {p.path: p for block in base.blocks for p in block.linear_modules}
    for record, example in enumerate(made):
        loss = labelled_losses(base.model, batch_of([example]))[0].sum()
        slopes = torch.autograd.grad(loss, [*weights, *(p.module.weight for p in maps.values())])
        gradients = dict(zip([*stacks, *maps], slopes, strict=True))
        for layer, step in enumerate(each.step for each in fit.layers):
            expected = 0.0
            for path, (down, up) in step.items():
                stack, _, number = path.rstrip("]").partition("[")
                gradient = gradients[stack][int(number)] if number else gradients[stack]
                expected += float((gradient * (up @ down)).sum())
            assert float(held.slopes[layer, record]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_padding_alone_is_no_token_of_an_expert() -> None:
    model = build("mixtral", num_experts_per_tok=1)
    base, made = base_of(model), examples((12, 3), seed=1)
    block = base.blocks[0]
    with torch.no_grad():  # the padding token, and no other, goes to the last expert
        model.get_input_embeddings().weight[base.pad_id] = 50.0
        block.module.mlp.gate.weight.zero_()
        block.module.mlp.gate.weight[3] = 1.0
        block.module.post_attention_layernorm.weight.fill_(1.0)
        model.get_input_embeddings().weight[:, :] -= model.get_input_embeddings().weight.mean(dim=1, keepdim=True) + 1.0
        model.get_input_embeddings().weight[base.pad_id] = 50.0
        block.module.self_attn.o_proj.weight.zero_()
    entered = []
    handle = block.stacks[0].module.register_forward_pre_hook(lambda _, args: entered.append(args[1]))
    fit = fit_pass(base, made, ProfileSettings(rank=4, batch_size=2))
    handle.remove()
    assert 3 in entered[0]
    found = {m.module.expert for m in fit.layers[0].modules if m.module.expert is not None}
    assert found and 3 not in found
    assert all(math.isfinite(m.resnorm_squared) for layer in fit.layers for m in layer.modules)


def test_experts_count_as_one_input_by_their_tokens(tmp_path: Path) -> None:
    base = base_of(build("mixtral").float())
    data = load_data(write_records(tmp_path / "records.jsonl", tiny_records(12)), base.tokenizer)
    settings = ProfileSettings(rank=2, probe="none", cost=False)
    card = profile(base, data, settings)
    fits = [fit_pass(base, half, ProfileSettings(rank=2, batch_size=8)) for half in split_records(data, settings)]

    def of_half(fit: Fit, index: int) -> tuple[float, float]:
        inputs, modules = fit.layers[index].inputs, fit.layers[index].modules
        tokens = {m.module.path: m.tokens for m in modules}
        ranks = {signals.path: signals.energy**2 / signals.second_moment_squared for signals in inputs}
        single = [rank for path, rank in ranks.items() if "[" not in path]
        stacked = []
        for name in ("gate_up_proj[", "down_proj["):
            own = {path: rank for path, rank in ranks.items() if name in path}
            stacked.append(sum(tokens[path] * rank for path, rank in own.items()) / sum(tokens[path] for path in own))
        return sum([*single, *stacked]) / (len(single) + 2), sum(signals.energy for signals in inputs)

    for index, entry in enumerate(card.layers):
        ranks, energies = zip(*(of_half(fit, index) for fit in fits), strict=True)
        assert entry.effective_rank.value == pytest.approx(sum(ranks) / 2)
        assert entry.activation_energy.value == pytest.approx(sum(energies) / 2)


def test_few_tokens_and_unread_experts_are_named(tmp_path: Path) -> None:
    base = base_of(build("mixtral").float())
    data = load_data(write_records(tmp_path / "records.jsonl", tiny_records(5)), base.tokenizer)
    card = profile(base, data, ProfileSettings(rank=2, probe="none", cost=False))
    thin = sum(
        count < module.in_features for layer in card.layers for module in layer.modules if module.experts for count in module.expert_tokens
    )
    assert thin > 0 and any(line.startswith(f"few tokens for experts: {thin} of ") for line in card.warnings)
    module = base.blocks[1].stacks[0].module
    module.gate_up_proj = torch.nn.Parameter(module.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    stacks = [stack.name for stack in find_blocks(base.model)[1].stacks]
    assert stacks == ["mlp.experts.down_proj"]
    other = AutoConfig.for_model("llama4_text", **SIZES, num_local_experts=4, intermediate_size_mlp=INNER, head_dim=8)
    blocks = find_blocks(AutoModelForCausalLM.from_config(other))
    assert [block.stacks for block in blocks] == [()] * LAYERS
    assert {unread_experts(block) for block in blocks} == {("feed_forward.experts",)}
    assert unread_experts(find_blocks(build("mixtral"))[0]) == ()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phimoe", {"num_local_experts": 4}),
        ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": INNER, "head_dim": 8}),
        ("jetmoe", {"num_local_experts": 4, "kv_channels": 8}),
    ],
)
def test_routers_that_are_linear_modules_are_left_out(family: str, changes: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | changes)))
    routers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "router" in name]
    assert len(routers) >= LAYERS
    placement = place(base_of(model), range(LAYERS))
    assert len(placement.paths) >= LAYERS and not set(routers) & set(placement.paths)


def test_processes_that_see_other_experts_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    made = examples((3, 2, 3, 2), seed=3)
    settings = ProfileSettings(rank=4, batch_size=1)
    alone = fit_pass(base_of(build("mixtral", num_experts_per_tok=1)), made, settings)
    found: list[Fit] = []
    bases = [base_of(build("mixtral", num_experts_per_tok=1)) for _ in range(2)]
    functions = [lambda base=base: found.append(fit_pass(base, made, settings)) for base in bases]
    Threads(2, monkeypatch).run(functions)  # type: ignore[arg-type]
    assert len(found) == 2
    idle: set[str] = set()
    for fit in found:
        for layer in range(LAYERS):
            one, other = ({m.module.path: m for m in each.layers[layer].modules} for each in (alone, fit))
            assert one.keys() == other.keys()
            idle |= {own.path for own in find_blocks(build("mixtral"))[layer].modules} - one.keys()
            for path, signals in one.items():
                assert other[path].tokens == signals.tokens
                assert other[path].resnorm_squared == pytest.approx(signals.resnorm_squared)
    assert idle  # so few tokens that some expert is nobody's
