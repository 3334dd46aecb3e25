"""Loading by name, the fingerprint, and the losses of labelled tokens against transformers' own loss."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from layercard.data.load import IGNORED, Batch, collate, load_data
from layercard.errors import ModelError
from layercard.models import load as loading, load as models
from layercard.models.load import describe, load_model, wrap_model
from layercard.models.losses import labelled_logits, labelled_losses
from layercard.models.stored import fingerprint
from layercard.models.streamed import open_model
from tiny import DISTINCT_FAMILIES, LAYERS, VOCAB, build_tiny, tiny_tokenizer


def make_batch(lengths: list[int], prompts: list[int], seed: int = 0, pad_id: int = 1) -> Batch:
    """A right-padded batch of random tokens; row i has `lengths[i]` tokens, of which those from `prompts[i]` on are labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids[row, :length] = torch.randint(6, VOCAB, (length,), generator=generator)
        mask[row, :length] = 1
        labels[row, prompt:length] = ids[row, prompt:length]
    return Batch(ids, mask, labels, tuple(range(len(lengths))))


class TestLabelledLosses:
    @pytest.mark.parametrize("family", DISTINCT_FAMILIES)
    def test_mean_equals_the_loss_of_transformers(self, family: str) -> None:
        model = build_tiny(family)
        batch = make_batch([9, 14, 5], [4, 11, 1])
        losses, rows = labelled_losses(model, batch)
        theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        assert rows.tolist() == [0] * 5 + [1] * 3 + [2] * 4
        torch.testing.assert_close(losses.mean(), theirs, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("family", DISTINCT_FAMILIES)
    def test_each_equals_the_row_alone_without_padding(self, family: str) -> None:
        model = build_tiny(family)
        lengths, prompts = [9, 14, 5], [4, 11, 1]
        batch = make_batch(lengths, prompts)
        losses, rows = labelled_losses(model, batch)
        for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
            ids = batch.input_ids[row : row + 1, :length]
            slow = [-model(input_ids=ids[:, :at]).logits[0, -1].float().log_softmax(-1)[ids[0, at]] for at in range(max(prompt, 1), length)]
            torch.testing.assert_close(losses[rows == row], torch.stack(slow), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("family", DISTINCT_FAMILIES)
    def test_gradients_equal_those_of_transformers(self, family: str) -> None:
        model = build_tiny(family)
        batch = make_batch([7, 10], [3, 6])
        labelled_losses(model, batch)[0].mean().backward()
        ours = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        model.zero_grad()
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                torch.testing.assert_close(ours[name], weight.grad, rtol=1e-4, atol=1e-6)

    def test_a_label_on_the_first_token_is_never_predicted(self) -> None:
        model = build_tiny("llama")
        losses, rows = labelled_losses(model, make_batch([6, 4], [0, 2]))
        assert rows.tolist() == [0] * 5 + [1] * 2
        other, _ = labelled_losses(model, make_batch([6, 4], [1, 2]))
        torch.testing.assert_close(losses, other)

    def test_labels_with_gaps(self) -> None:
        model = build_tiny("qwen3")
        batch = make_batch([8, 8], [1, 1])
        batch.labels[0, 3:6] = IGNORED
        losses, rows = labelled_losses(model, batch)
        theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        assert rows.tolist() == [0] * 4 + [1] * 7
        torch.testing.assert_close(losses.mean(), theirs)

    def test_a_row_without_labels_has_no_loss_and_a_batch_without_any_gives_none(self) -> None:
        model = build_tiny("llama")
        _, rows = labelled_losses(model, make_batch([6, 4], [6, 2]))
        assert rows.tolist() == [1, 1]
        losses, rows = labelled_losses(model, make_batch([6, 4], [6, 4]))
        assert losses.shape == rows.shape == (0,)

    def test_padding_and_the_width_of_the_batch_change_nothing(self) -> None:
        model = build_tiny("mistral")
        narrow = make_batch([6, 4], [2, 2])
        wide = Batch(
            nn.functional.pad(narrow.input_ids, (0, 7), value=99),
            nn.functional.pad(narrow.attention_mask, (0, 7)),
            nn.functional.pad(narrow.labels, (0, 7), value=IGNORED),
            narrow.rows,
        )
        torch.testing.assert_close(labelled_losses(model, narrow)[0], labelled_losses(model, wide)[0])

    @pytest.mark.parametrize("family", DISTINCT_FAMILIES)
    def test_the_head_runs_only_on_positions_before_a_label(self, family: str) -> None:
        model = build_tiny(family)
        seen: list[int] = []
        head = model.get_output_embeddings()
        hook = head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[1]))
        labelled_losses(model, make_batch([12, 12], [9, 10]))
        hook.remove()
        assert seen == [3]

    def test_a_forward_without_logits_to_keep_gives_the_same(self) -> None:
        class Plain(LlamaForCausalLM):
            def forward(self, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None) -> Any:  # type: ignore[override]
                return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

        model = build_tiny("llama")
        plain = Plain(model.config).eval()
        plain.load_state_dict(model.state_dict())
        batch = make_batch([9, 6], [4, 3])
        torch.testing.assert_close(labelled_losses(plain, batch)[0], labelled_losses(model, batch)[0])

    def test_a_peft_model_is_looked_through(self) -> None:
        model = build_tiny("llama")
        batch = make_batch([12, 12], [9, 10])
        before = labelled_losses(model, batch)[0].detach()
        adapted = get_peft_model(model, LoraConfig(target_modules=["model.layers.1.self_attn.q_proj"], r=2))
        seen: list[int] = []
        hook = model.lm_head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[1]))
        torch.testing.assert_close(labelled_losses(adapted, batch)[0], before)
        hook.remove()
        assert seen == [3]

    def test_losses_are_float32_and_logits_keep_the_dtype(self) -> None:
        model = build_tiny("llama").to(torch.bfloat16)
        batch = make_batch([6], [2])
        assert labelled_losses(model, batch)[0].dtype == torch.float32
        logits, targets, rows = labelled_logits(model, batch)
        assert (logits.dtype, logits.shape) == (torch.bfloat16, (4, VOCAB))
        assert targets.tolist() == batch.input_ids[0, 2:].tolist()
        assert rows.tolist() == [0] * 4

    def test_rows_are_those_of_the_batch_not_of_the_list(self, tiny_file: Path) -> None:
        data = load_data(tiny_file, tiny_tokenizer(), records=6)
        _, rows = labelled_losses(build_tiny("llama"), collate(data.examples, [5, 2], 1))
        assert sorted(set(rows.tolist())) == [0, 1]
        assert (rows == 0).sum() == data.examples[5].labelled


class TestFingerprint:
    def test_any_changed_weight_changes_it(self) -> None:
        model = build_tiny("gpt2")
        first = fingerprint(model, exact=True)
        assert len(first) == 16 and int(first, 16) >= 0
        for name, weight in model.named_parameters():
            kept = weight.detach().clone()
            with torch.no_grad():
                weight.view(-1)[-1] += 1e-3
            assert fingerprint(model, exact=True) != first, name
            weight.data.copy_(kept)
        assert fingerprint(model, exact=True) == first

    @pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
    def test_it_is_that_of_the_weights_as_stored(self, stored: str, tmp_path: Path) -> None:
        build_tiny("llama").to(getattr(torch, stored)).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        kinds = ("float32", "bfloat16", "float16", "auto")
        loaded = {kind: load_model(tmp_path, device="cpu", dtype=kind) for kind in kinds}
        for kind, base in loaded.items():
            assert base.model.dtype == getattr(torch, stored if kind == "auto" else kind)
        prints = {base.fingerprint for base in loaded.values()}
        assert prints == {open_model(str(tmp_path), device="cpu").base.fingerprint} and len(prints) == 1

        # Weights that were changed in memory are other weights, also where their type has lost a part of them.
        base = load_model(tmp_path, device="cpu", dtype="float16")
        with torch.no_grad():
            base.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        assert models.wrap_model(base.model, base.tokenizer).fingerprint not in prints

    def test_saving_using_and_loading_do_not_change_it(self, tiny_base: models.BaseModel, tmp_path: Path) -> None:
        tiny_base.model.save_pretrained(tmp_path / "again")
        tiny_base.tokenizer.save_pretrained(tmp_path / "again")
        tiny_base.model(input_ids=torch.tensor([[7, 8]]))
        assert fingerprint(tiny_base.model) == tiny_base.fingerprint
        assert load_model(tmp_path / "again", device="cpu").fingerprint == tiny_base.fingerprint

    def test_a_layout_in_memory_does_not_matter(self) -> None:
        model = build_tiny("llama")
        first = fingerprint(model, exact=True)
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data = weight.data.t().contiguous().t()
        assert not weight.is_contiguous() and fingerprint(model, exact=True) == first


class TestLoadModel:
    def test_a_local_folder(self, tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        phases: list[tuple[str, int, int]] = []
        base = load_model(str(tiny_folder), device="cpu", progress=lambda *step: phases.append(step))
        assert capfd.readouterr() == ("", "")
        assert phases == [("load", 0, 1), ("load", 1, 1)]
        assert base.name == str(tiny_folder)
        assert not base.model.training and base.device.type == "cpu"
        assert next(base.model.parameters()).dtype == torch.float32
        about = {"name": str(tiny_folder), "fingerprint": base.fingerprint, "layers": LAYERS, "rounded": False, "sketch": base.sketch}
        assert describe(base) == about
        ids = torch.tensor([[7, 9, 30]])
        torch.testing.assert_close(base.model(input_ids=ids).logits, build_tiny("llama")(input_ids=ids).logits)

    @pytest.mark.parametrize("family", DISTINCT_FAMILIES)
    def test_every_family_survives_a_folder(self, family: str, tmp_path: Path) -> None:
        build_tiny(family).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        base = load_model(tmp_path, device="cpu")
        assert len(base.blocks) == LAYERS
        assert base.fingerprint == fingerprint(build_tiny(family))

    def test_weights_in_several_files(self, tmp_path: Path) -> None:
        model = build_tiny("llama")
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        tiny_tokenizer().save_pretrained(tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert load_model(tmp_path, device="cpu").fingerprint == fingerprint(model)
        sorted(tmp_path.glob("*.safetensors"))[1].unlink()
        with pytest.raises(ModelError, match="cannot be read as a causal language model"):
            load_model(tmp_path, device="cpu")

    def test_the_random_state_is_left_alone_and_loading_is_quiet_again_afterwards(self, tiny_folder: Path) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
        torch.manual_seed(5)
        load_model(tiny_folder, device="cpu")
        torch.testing.assert_close(torch.rand(3), expected)
        with pytest.raises(ModelError):
            load_model(tiny_folder / "missing", device="cpu")
        assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before

    def test_pad_id_falls_back_to_the_end_token_and_then_to_zero(self) -> None:
        model = build_tiny("llama")
        assert wrap_model(model, tiny_tokenizer()).pad_id == 1
        assert wrap_model(model, tiny_tokenizer(pad=False)).pad_id == 2
        bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
        assert wrap_model(model, bare).pad_id == 0

    def test_wrapping_puts_the_model_in_eval_mode(self) -> None:
        assert not wrap_model(build_tiny("gpt2").train(), tiny_tokenizer()).model.training


UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


class TestRefusals:
    """Each is one line that says what was wrong, what was found and how to mend it."""

    def refused(self, name: str | Path, **how: Any) -> str:
        with pytest.raises(ModelError) as caught:
            load_model(name, **{"device": "cpu", **how})
        message = str(caught.value)
        assert "\n" not in message and len(message) < 400
        return message

    @pytest.mark.parametrize("name", ["smollm-135m", "SmolLM2-135M", "smollm2_135m", "smollm2-135"])
    def test_a_misspelt_embedded_model(self, name: str) -> None:
        assert "did you mean smollm2-135m?" in self.refused(name)

    def test_a_missing_folder_names_its_neighbour(self, tiny_folder: Path) -> None:
        assert f"did you mean {tiny_folder}?" in self.refused(tiny_folder.with_name("tiny-lama"))
        assert "no such model" in self.refused("./nowhere/to/be/found")
        assert "no model is named" in self.refused("")

    def test_an_unreachable_hub(self) -> None:
        assert "'someone/some-model' is not a local folder, the hub cannot be reached" in self.refused("someone/some-model")
        assert "the hub cannot be reached" in self.refused("gpt2")

    def test_a_hub_that_answers_but_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loading, "hub_answers", lambda: True)
        assert "the hub did not give it" in self.refused("someone/some-model")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda folder: (folder / "model.safetensors").unlink(), "has a config.json but no weights"),
            (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
            (
                lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
                "only pickled weights (pytorch_model.bin)",
            ),
            (lambda folder: (folder / "model.safetensors").rename(folder / "model.pt"), "only pickled weights (model.pt)"),
            (lambda folder: cut(folder / "model.safetensors"), "cannot be read as a causal language model"),
            (lambda folder: without(folder, UP_PROJ), f"lack 1 of the model's tensors, such as {UP_PROJ}"),
            (lambda folder: configure(folder, intermediate_size=40), "cannot be read as a causal language model"),
            (lambda folder: configure(folder, model_type="no-such-family"), "cannot be read as a causal language model"),
            (lambda folder: cut(folder / "config.json"), "cannot be read as a causal language model"),
            (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "its tokenizer cannot be read"),
        ],
    )
    def test_a_folder_that_is_not_whole(self, change: Any, words: str, tiny_folder: Path) -> None:
        change(tiny_folder)
        assert words in self.refused(tiny_folder)

    def test_an_adapter(self, tmp_path: Path) -> None:
        get_peft_model(build_tiny("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        assert "adapter without its base model" in self.refused(tmp_path)

    def test_gguf_files_and_files_that_are_no_models(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("hello")
        assert "is a file but not a .gguf file" in self.refused(tmp_path / "notes.txt")
        (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
        assert f"name the file itself: {tmp_path / 'broken.gguf'}" in self.refused(tmp_path)
        assert "cannot be read as a GGUF model" in self.refused(tmp_path / "broken.gguf")
        assert f"did you mean {tmp_path / 'broken.gguf'}?" in self.refused(tmp_path / "brokn.gguf")

    def test_code_that_comes_with_the_model_is_not_run(self, tiny_folder: Path) -> None:
        code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        (tiny_folder / "config.json").write_text(json.dumps({"model_type": "no-such-family", "auto_map": code}))
        (tiny_folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tiny_folder / 'ran')!r}).touch()")
        assert "needs code that comes with the model" in self.refused(tiny_folder)
        assert not (tiny_folder / "ran").exists()

    @pytest.mark.parametrize("device", ["gpu", "tpu:0", "", "cpu:x", "CUDA"])
    def test_unknown_devices(self, device: str, tiny_folder: Path) -> None:
        assert "device" in self.refused(tiny_folder, device=device)

    @pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
    def test_devices_that_are_not_there(self, device: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert "is not available in this PyTorch" in self.refused(tiny_folder, device=device)

    def test_a_gpu_with_too_high_a_number(self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert "found 1 GPU(s), numbered from 0" in self.refused(tiny_folder, device="cuda:3")

    def test_unknown_dtypes(self, tiny_folder: Path) -> None:
        assert "choose one of float32, float16, bfloat16, auto" in self.refused(tiny_folder, dtype="fp8")

    def test_the_automatic_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert models.find_device("auto") == torch.device("cpu")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert models.find_device("auto") == torch.device("mps")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert models.find_device("auto") == torch.device("cuda")
