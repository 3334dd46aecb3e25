"""Serves the page: on this machine alone unless told otherwise, without analytics, sharing, or anything else from the network."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layercard.errors import OutputError
from layercard.report.app.explorer import Explorer
from layercard.report.app.guard import Guard, own_names
from layercard.report.app.library import LARGEST, Library

FIRST_PORT, PORTS = 7860, 100
_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SHARE": "False",
}
_UNWANTED = ("GRADIO_ALLOWED_PATHS", "GRADIO_ROOT_PATH", "GRADIO_MCP_SERVER", "GRADIO_SSR_MODE", "GRADIO_NUM_WORKERS", "GRADIO_WATCH_DIRS")


def check_installed() -> None:
    """Raise `OutputError` unless Gradio is there."""
    if find_spec("gradio") is None:
        raise OutputError('the app needs Gradio, which is not installed; install it with `pip install "layercard[app]"`')


@contextlib.contextmanager
def serving(library: Library, host: str = "127.0.0.1", port: int | None = None, *, browser: bool = False) -> Iterator[str]:
    """The app, served for the length of a `with` block; yields its address.

    Args:
        library: The files that it shows.
        host: Where it listens.
        port: The port; the first free one from 7860 on unless given.
        browser: Whether to open the address in a browser.

    Raises:
        OutputError: Gradio is not installed, or the port is taken.
    """
    check_installed()
    port = free_port(host, port)
    with tempfile.TemporaryDirectory(prefix="layercard-app-") as folder, _environment(folder):
        explorer = Explorer(library, uploads=Path(folder))
        blocks = _page(explorer)
        try:
            _, address, _ = blocks.launch(**_launch(host, port, browser))
            yield str(address)
        finally:
            explorer.jobs.cancel()
            blocks.close(verbose=False)


def free_port(host: str, port: int | None) -> int:
    """The port itself if nothing listens there, or the first free one from 7860 on.

    Raises:
        OutputError: It is taken, or the host is not this machine's.
    """
    wanted = [port] if port is not None else list(range(FIRST_PORT, FIRST_PORT + PORTS))
    reason = "taken"
    for number in wanted:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                trial.bind((host, number))
                return int(trial.getsockname()[1])
    where = f"{host}:{port}" if port is not None else f"{host}, ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1},"
    raise OutputError(f"cannot listen on {where}: {reason}, or no address of this machine; choose another with --port or --host")


def _page(explorer: Explorer) -> Any:
    from layercard.report.app.pages import Page

    blocks = Page(explorer).blocks
    blocks.queue(default_concurrency_limit=4, max_size=64, api_open=False)
    return blocks


def _launch(host: str, port: int, browser: bool) -> dict[str, Any]:
    """Arguments of `Blocks.launch`."""
    import gradio as gr
    from starlette.middleware import Middleware

    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return {
        "server_name": host,
        "server_port": port,
        "inbrowser": browser,
        "prevent_thread_lock": True,
        "quiet": True,
        "share": False,
        "allowed_paths": [],
        "max_file_size": LARGEST,
        "app_kwargs": {"middleware": [Middleware(Guard, hosts=own_names(host))], "docs_url": None, "redoc_url": None},
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "mcp_server": False,
        "ssr_mode": False,
        "pwa": False,
        "state_session_capacity": 200,
        "theme": gr.themes.Default(primary_hue="blue", **fonts),
        "css": (Path(__file__).parents[1] / "templates" / "app.css").read_text(encoding="utf-8"),
    }


@contextlib.contextmanager
def _environment(folder: str) -> Iterator[None]:
    """What Gradio reads from the environment, for the length of the block."""
    before = {name: os.environ.get(name) for name in (*_ENVIRONMENT, *_UNWANTED, "GRADIO_TEMP_DIR")}
    os.environ.update(_ENVIRONMENT | {"GRADIO_TEMP_DIR": folder})
    for name in _UNWANTED:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
