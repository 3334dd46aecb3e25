"""The backward cut: losses and adapters of stock PEFT, nothing below the lowest adapter in backward, and everything put back."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from layercard import CutBackward, FrozenPrefix, cut_backward
from layercard.errors import TrainingError
from layercard.fast.anatomy import anatomy
from layercard.models.layers import find_blocks
from test_adapters import state_of
from tiny import DISTINCT_FAMILIES, VOCAB, build_tiny, tiny_records, tiny_tokenizer

CHECKPOINTING = {"off": None, "reentrant": {"use_reentrant": True}, "non-reentrant": {"use_reentrant": False}}


def peft_model(family: str = "llama", layers: tuple[int, ...] = (2,), dropout: float = 0.0, **changes: Any) -> PeftModel:
    """A tiny model with LoRA adapters of rank 2 on every linear map of the given layers, B not zero, in train mode."""
    model = build_tiny(family, **changes)
    paths = [projection.path for layer in layers for projection in find_blocks(model)[layer].linear_modules]
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_dropout=dropout, target_modules=paths, task_type=TaskType.CAUSAL_LM))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.1)
    return wrapped.train()


def batches(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of two rows, the second one padded on the right or on the left."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for at in range(count):
        ids = torch.randint(6, VOCAB, (2, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        if at % 2:
            mask = mask.flip(1)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def enable(model: nn.Module, kind: str) -> None:
    """Switch checkpointing on as `Trainer` does, or leave it off."""
    kwargs = CHECKPOINTING[kind]
    if kwargs is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)


def train(model: nn.Module, data: list[dict[str, torch.Tensor]], accumulation: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain loop: losses of each batch, and the trained weights."""
    torch.manual_seed(7)
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for at, batch in enumerate(data):
        loss = model(**batch, use_cache=False).loss / accumulation
        loss.backward()
        losses.append(loss.item())
        if (at + 1) % accumulation == 0:
            optimiser.step()
            optimiser.zero_grad()
    return losses, {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def assert_equal_runs(one: tuple[list[float], dict[str, torch.Tensor]], other: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, other[1][name], rtol=1e-5, atol=1e-6)


@contextmanager
def counted(model: nn.Module) -> Iterator[tuple[Counter[int], set[int]]]:
    """How often each block's first linear map is computed, and which blocks take part in backward."""
    forwards: Counter[int] = Counter()
    backward: set[int] = set()

    def count(index: int) -> Callable[..., None]:
        return lambda module, args, output: forwards.update([index])

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: backward.add(index))

        return hook

    with ExitStack() as stack:
        for block in anatomy(model).blocks:
            stack.callback(block.linear_modules[0].module.register_forward_hook(count(block.index)).remove)
            stack.callback(block.module.register_forward_hook(watch(block.index)).remove)
        yield forwards, backward


@pytest.mark.parametrize("layers", [(2,), (1,)])
@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_losses_and_adapters_are_those_of_stock_training(family: str, kind: str, layers: tuple[int, ...]) -> None:
    stock, before, inside = (peft_model(family, layers) for _ in range(3))
    enable(stock, kind)
    expected = train(stock, batches(4))
    enable(before, kind)
    with cut_backward(before):
        assert_equal_runs(train(before, batches(4)), expected)
    with cut_backward(inside):
        enable(inside, kind)
        assert_equal_runs(train(inside, batches(4)), expected)
    assert expected[0][0] != pytest.approx(expected[0][-1])


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_dropout_draws_what_stock_training_draws(kind: str) -> None:
    """GPT-2 drops embeddings, attention and residuals in every block, below the cut as well; LoRA drops its input."""
    stock, ours = (peft_model("gpt2", (1,), dropout=0.3) for _ in range(2))
    enable(stock, kind)
    enable(ours, kind)
    expected = train(stock, batches(4))
    with cut_backward(ours):
        assert_equal_runs(train(ours, batches(4)), expected)
    quiet = peft_model("gpt2", (1,), dropout=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    assert train(quiet, batches(4))[0] != pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_blocks_below_run_once_and_have_no_backward(family: str, kind: str) -> None:
    model = peft_model(family, (1,))
    enable(model, kind)
    with counted(model) as (forwards, backward), cut_backward(model):
        model(**batches(1)[0]).loss.backward()
        again = 1 if kind == "off" else 2
        assert forwards == {0: 1, 1: again, 2: again}
        assert backward == {1, 2}
    if kind != "off":  # what it is good for: stock training goes down to the embedding
        with counted(model) as (forwards, backward):
            model(**batches(1)[0]).loss.backward()
        assert forwards == {0: 2, 1: 2, 2: 2}
        assert backward == {0, 1, 2}


def test_hooks_put_on_twice_or_inside_do_not_reach_below(capsys: pytest.CaptureFixture[str]) -> None:
    """TRL and Trainer each hook the embedding, so that one hook can no longer be taken off by its handle."""
    model = peft_model("llama", (2,))
    model.enable_input_require_grads()
    with counted(model) as (forwards, backward), cut_backward(model) as cut:
        enable(model, "reentrant")
        model.enable_input_require_grads()
        model(**batches(1)[0]).loss.backward()
        assert forwards == {0: 1, 1: 1, 2: 2}
        assert backward == {2}
        assert str(cut) == "layers in backward: 1/3"
        assert (cut.lowest, cut.layers, cut.layers_in_backward) == (2, 3, "1/3")
    assert capsys.readouterr() == ("", "")


def test_checkpointing_every_other_layer_stays_so() -> None:
    model = peft_model("llama", (1, 3), num_hidden_layers=5)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True}, every_n_layers=2)
    with counted(model) as (forwards, backward), cut_backward(model):
        model(**batches(1)[0]).loss.backward()
    assert forwards == {0: 1, 1: 1, 2: 2, 3: 1, 4: 2}
    assert backward == {1, 2, 3, 4}


def everything(model: nn.Module) -> dict[str, Any]:
    state = {key: value for key, value in state_of(model).items() if key not in ("weights", "grad")}
    own = {"gradient_checkpointing", "_gradient_checkpointing_func", "forward"}
    return state | {"own": {name: {k: v for k, v in vars(m).items() if k in own} for name, m in model.named_modules()}}


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_all_is_put_back(kind: str) -> None:
    model = peft_model("gpt2", (1,))
    enable(model, kind)
    before = everything(model)
    with cut_backward(model):
        model(**batches(1)[0]).loss.backward()
    assert everything(model) == before
    with pytest.raises(ZeroDivisionError), cut_backward(model):
        model(**batches(1)[0])
        raise ZeroDivisionError
    assert everything(model) == before
    with pytest.raises(IndexError), cut_backward(model):
        model(input_ids=torch.full((1, 3), VOCAB))
    assert everything(model) == before


def test_checkpointing_switched_on_inside_stays_on_afterwards() -> None:
    model, other = peft_model(), peft_model()
    with cut_backward(model):
        enable(model, "reentrant")
        model(**batches(1)[0]).loss.backward()
    enable(other, "reentrant")
    assert everything(model)["hooks"] == everything(other)["hooks"]
    assert {name: own.get("gradient_checkpointing") for name, own in everything(model)["own"].items()} == {
        name: own.get("gradient_checkpointing") for name, own in everything(other)["own"].items()
    }
    model.zero_grad()
    assert_equal_runs(train(model, batches(2)), train(other, batches(2)))


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_accumulated_gradients_and_evaluation_in_between(kind: str) -> None:
    def evaluated(model: PeftModel) -> tuple[list[float], dict[str, torch.Tensor]]:
        first, _ = train(model, batches(4), accumulation=2)
        with torch.no_grad():
            between = model.eval()(**batches(1, seed=3)[0]).loss.item()
        second, weights = train(model.train(), batches(4, seed=1), accumulation=2)
        return [*first, between, *second], weights

    stock, ours = (peft_model("qwen3", (1,)) for _ in range(2))
    enable(stock, kind)
    enable(ours, kind)
    with cut_backward(ours):
        assert_equal_runs(evaluated(ours), evaluated(stock))


def test_generation_inside_is_as_outside() -> None:
    model = peft_model("llama", (1,)).eval()
    ids = torch.tensor([[7, 8, 9]])
    expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    with cut_backward(model):
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), expected)


def test_a_plain_model_with_some_blocks_and_the_head_unfrozen() -> None:
    def build() -> nn.Module:
        model = build_tiny("qwen3").train().requires_grad_(False)
        for part in (model.model.layers[1], model.model.norm, model.lm_head):
            part.requires_grad_(True)
        return model

    expected, ours = train(build(), batches(3)), build()
    with cut_backward(ours) as cut:
        assert cut.layers_in_backward == "2/3"
        assert_equal_runs(train(ours, batches(3)), expected)


def test_the_head_alone() -> None:
    model = build_tiny("qwen3").train().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    enable(model, "reentrant")
    with counted(model) as (forwards, backward), cut_backward(model) as cut:
        model(**batches(1)[0]).loss.backward()
        assert str(cut) == "layers in backward: 0/3"
        assert forwards == {0: 1, 1: 1, 2: 1}
        assert backward == set()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_with_an_adapter_in_the_first_block_nothing_is_cut_and_all_is_exact() -> None:
    model = peft_model("llama", (0,))
    enable(model, "reentrant")
    with counted(model) as (forwards, backward), cut_backward(model) as cut:
        model(**batches(1)[0]).loss.backward()
    assert cut.layers_in_backward == "3/3"
    assert forwards == {0: 2, 1: 2, 2: 2}
    assert backward == {0, 1, 2}


class OldStyleDecoder(nn.Module):
    """A decoder that checkpoints its blocks itself, as models on the hub for transformers 4 do; it borrows a Llama's parts."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(llama.__dict__)
        self.gradient_checkpointing = False

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        rotary = self.rotary_emb(hidden, position_ids=positions)
        for layer in self.layers:
            run = lambda h, layer=layer: layer.forward(h, position_embeddings=rotary, position_ids=positions)  # noqa: E731
            hidden = self._gradient_checkpointing_func(run, hidden) if self.gradient_checkpointing and self.training else run(hidden)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def test_a_decoder_that_checkpoints_by_itself() -> None:
    def build() -> PeftModel:
        model = peft_model("llama", (1,))
        causal = anatomy(model).causal
        causal.model = OldStyleDecoder(causal.model)
        return model.train()

    def switch(model: PeftModel) -> PeftModel:
        enable(model, "reentrant")
        for block in anatomy(model).blocks:
            block.module.gradient_checkpointing = False
        return model

    batch = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in batches(3)]
    expected, ours = train(build(), batch), switch(build())
    with counted(ours) as (forwards, _), cut_backward(ours):
        assert_equal_runs(train(ours, batch), expected)
    assert forwards == {0: 3, 1: 6, 2: 6}


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2), "prompt_encoder"),
        (PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2), "prompt_encoder"),
        (LoraConfig(target_modules=["embed_tokens", "q_proj"]), "embed_tokens.lora_embedding"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), "embed_tokens.modules_to_save"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]), "token_adapter"),
    ],
    ids=["prompt", "prefix", "adapted embedding", "trained embedding", "trained tokens"],
)
def test_what_trains_below_is_refused(config: Any, word: str) -> None:
    model = get_peft_model(build_tiny("qwen3"), config)
    with pytest.raises(TrainingError, match=rf"cannot be cut: \S*{word}.* trains below the blocks.*; freeze it"), cut_backward(model):
        pass


def test_a_tied_head_that_trains_is_refused() -> None:
    model = build_tiny("llama").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"embed_tokens.* trains below"), cut_backward(model):
        pass


def test_a_model_where_nothing_trains_is_refused() -> None:
    with pytest.raises(TrainingError, match="add adapters first"), cut_backward(build_tiny("llama").requires_grad_(False)):
        pass
    with pytest.raises(TrainingError, match="no transformers model"), cut_backward(nn.Linear(2, 2)):
        pass


def test_a_block_below_that_becomes_trainable_is_noticed() -> None:
    model = peft_model("llama", (2,))
    with cut_backward(model):
        anatomy(model).blocks[0].module.requires_grad_(True)
        with pytest.raises(TrainingError, match="below block 2 has become trainable"):
            model(**batches(1)[0])


def test_two_cuts_nest() -> None:
    model = peft_model("llama", (1,))
    before = everything(model)
    with cut_backward(model), cut_backward(model):
        model(**batches(1)[0]).loss.backward()
    assert everything(model) == before


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_in_bfloat16_as_well(kind: str) -> None:
    """The same operations in the same order: equal also where rounding is coarse."""
    stock, ours = (peft_model("llama", (1,)) for _ in range(2))
    enable(stock, kind)
    enable(ours, kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = train(stock, batches(3))
        with cut_backward(ours):
            assert_equal_runs(train(ours, batches(3)), expected)
    assert train(peft_model("llama", (1,)), batches(3))[0] != pytest.approx(expected[0], rel=1e-5)


# --- Trainer and TRL -----------------------------------------------------------------------------------------------------------


class Counting(TrainerCallback):
    """Counts, inside a training, what `counted` counts, and keeps the log."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.stack = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.forwards, self.backward = self.stack.enter_context(counted(model))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stack.close()


ARGUMENTS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def rows(count: int = 12) -> list[dict[str, torch.Tensor]]:
    return [{name: value[0] for name, value in batch.items()} for batch in batches(count)]


def trained_by_trainer(tmp_path: Path, callbacks: list[TrainerCallback], **changes: Any) -> tuple[Any, Counting]:
    counting = Counting()
    model = peft_model("llama", (2,))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **{**ARGUMENTS, **changes}),
        train_dataset=rows(),
        callbacks=[*callbacks, counting],
    )
    before = everything(model)["hooks"]
    trainer.train()
    hooked = 1 if changes.get("activation_checkpointing") else 0
    assert everything(model)["hooks"] == before + hooked
    return (counting.losses, {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}), counting


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_trainer_with_the_callback(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes = {"activation_checkpointing": kind != "off", "activation_checkpointing_kwargs": CHECKPOINTING[kind]}
    stock, counts = trained_by_trainer(tmp_path, [], **changes)
    assert "layers in backward" not in capfd.readouterr().err
    ours, cut_counts = trained_by_trainer(tmp_path, [CutBackward()], **changes)
    assert_equal_runs(ours, stock)
    assert capfd.readouterr().err.count("layers in backward: 1/3\n") == 1
    again = 1 if kind == "off" else 2
    assert counts.forwards == {0: 6 * again, 1: 6 * again, 2: 6 * again}
    assert cut_counts.forwards == {0: 6, 1: 6, 2: 6 * again}
    assert cut_counts.backward == {2}


class Failing(TrainerCallback):
    """Raises at the end of the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError


def test_a_training_that_raised_is_closed_by_the_next(tmp_path: Path) -> None:
    model = peft_model("llama", (2,))
    before = everything(model)
    arguments = TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS)
    failing = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[CutBackward(), FrozenPrefix(), Failing()])
    with pytest.raises(ZeroDivisionError):
        failing.train()
    assert everything(model)["own"] != before["own"]
    with pytest.raises(ZeroDivisionError):
        failing.train()
    other, counting = peft_model("llama", (2,)), Counting()
    Trainer(model=other, args=arguments, train_dataset=rows(), callbacks=[CutBackward()]).train()
    assert everything(model)["own"] != before["own"]  # another model's training has nothing to do with it
    Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[CutBackward(), counting]).train()
    assert counting.forwards == {0: 6, 1: 6, 2: 6}
    after = everything(model)
    assert all(after[key] == before[key] for key in ("own", "hooks", "requires_grad"))


def test_callbacks_leave_in_the_order_of_with(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`Trainer` ends callbacks first to last; forwards put in place of others must go last to first."""
    model = peft_model("llama", (2,))
    before = everything(model)
    stock, _ = trained_by_trainer(tmp_path, [], max_steps=9)
    capfd.readouterr()
    ours, counts = trained_by_trainer(tmp_path, [CutBackward(), FrozenPrefix(passes=3, always=True)], max_steps=9)
    assert_equal_runs(ours, stock)
    assert counts.forwards == {0: 6, 1: 6, 2: 18}  # three epochs of six batches, the first of which fills the cache
    said = capfd.readouterr().err
    assert said.count("layers in backward: 1/3\n") == 1
    assert "24 of 36 records read" in said
    arguments = TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS)
    Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[CutBackward(), FrozenPrefix(always=True)]).train()
    after = everything(model)
    assert all(after[key] == before[key] for key in ("own", "hooks", "requires_grad"))


def test_a_callback_without_a_model() -> None:
    with pytest.raises(TrainingError, match="CutBackward was called without a model"):
        CutBackward().on_train_begin(None, None, None)


def trained_by_trl(tmp_path: Path, callbacks: list[TrainerCallback], **changes: Any) -> tuple[Any, Counting]:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    counting, model = Counting(), build_tiny("llama")
    paths = [projection.path for projection in find_blocks(model)[1].linear_modules]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **{**ARGUMENTS, "bf16": False, **changes}),
        train_dataset=datasets.Dataset.from_list(tiny_records(12)),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=paths, task_type=TaskType.CAUSAL_LM),
        callbacks=[*callbacks, counting],
    )
    trainer.train()
    weights = {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return (counting.losses, weights), counting


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}], ids=["default", "reentrant"])
def test_trl_with_its_defaults(changes: dict[str, Any], tmp_path: Path) -> None:
    """TRL switches checkpointing on; stock, every block is computed twice, however few train."""
    stock, counts = trained_by_trl(tmp_path / "stock", [], **changes)
    ours, cut_counts = trained_by_trl(tmp_path / "ours", [CutBackward()], **changes)
    assert_equal_runs(ours, stock)
    assert len(stock[0]) == 3
    assert counts.forwards == {0: 12, 1: 12, 2: 12}
    assert counts.backward == {0, 1, 2}
    assert cut_counts.forwards == {0: 6, 1: 12, 2: 12}
    assert cut_counts.backward == {1, 2}
