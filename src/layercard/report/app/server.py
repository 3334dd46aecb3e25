"""Serves the page: on this machine alone unless told otherwise, without analytics, sharing, or anything else from the network.

What is answered at all is the page's own files and events, asked for by the server's own names; nothing is fetched for a visitor.
"""

import contextlib
import os
import re
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layercard.errors import OutputError
from layercard.report.app.explorer import Explorer
from layercard.report.app.library import LARGEST, Library

FIRST_PORT, PORTS = 7860, 100
ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_RUN_HISTORY": "False", "GRADIO_SHARE": "False"}
UNSET = ("GRADIO_ALLOWED_PATHS", "GRADIO_ROOT_PATH", "GRADIO_MCP_SERVER", "GRADIO_SSR_MODE", "GRADIO_NUM_WORKERS", "GRADIO_WATCH_DIRS")
"""What Gradio reads from the environment while it serves, and what it must not find there."""

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
API = "queue/join|queue/data|upload|upload_progress|cancel|reset|heartbeat|startup-events|info|app_id|component_server"
SERVED = re.compile(
    rf"/(|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|login_check|gradio_api/({API})(/.*)?|(assets|static|svelte)/.*)/?"
)
"""Paths that the page needs; all others (files, proxies, saved runs, code editing) are not served."""
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob:; frame-ancestors 'self'; "
    "form-action 'none'; base-uri 'self'"
)
"""A browser that keeps this loads nothing from, and sends nothing to, any other machine."""
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """ASGI middleware that refuses other paths, and other host names than the given ones (any, where none are given).

    A page of another site whose name is made to lead to this machine (DNS rebinding) asks with its own name, and gets nothing.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], hosts: frozenset[str] = frozenset()) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer with 403 what is not served, and pass on the rest."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and self.allows(scope["path"], dict(scope["headers"]).get(b"host", b"").decode("latin-1")):
            await self._app(scope, receive, with_headers)
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"not served\n"})

    def allows(self, path: str, host: str) -> bool:
        """Whether a path is served under a host name."""
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        return SERVED.fullmatch(path) is not None and ".." not in path and (not self._hosts or name.strip("[]").lower() in self._hosts)


def own_names(host: str) -> frozenset[str]:
    """The names of a server that listens on `host`; empty where it listens for other machines, which may call it anything.

    >>> sorted(own_names("127.0.0.1")), own_names("0.0.0.0")
    (['127.0.0.1', '::1', 'localhost'], frozenset())
    """
    return frozenset({"127.0.0.1", "localhost", "::1"}) if is_local(host) else frozenset()


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


@contextlib.contextmanager
def serving(library: Library, host: str = "127.0.0.1", port: int | None = None, *, browser: bool = False) -> Iterator[str]:
    """The app, served for the length of a `with` block on the port, or the first free one from 7860 on; yields its address.

    Raises:
        OutputError: Gradio is not installed, or the port is taken.
    """
    if find_spec("gradio") is None:
        raise OutputError('the app needs Gradio, which is not installed; install it with `pip install "layercard[app]"`')
    port, environment = free_port(host, port), dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="layercard-app-") as folder:
        os.environ.update(ENVIRONMENT | {"GRADIO_TEMP_DIR": folder})
        for name in UNSET:
            os.environ.pop(name, None)
        try:
            import gradio as gr
            from starlette.middleware import Middleware

            from layercard.report.app.pages import Page

            explorer = Explorer(library, uploads=Path(folder))
            blocks = Page(explorer).blocks
            blocks.queue(default_concurrency_limit=4, max_size=64, api_open=False)
            fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
            off: dict[str, Any] = dict.fromkeys(("share", "run_history", "enable_monitoring", "mcp_server", "ssr_mode", "pwa"), False)
            try:
                _, address, _ = blocks.launch(
                    server_name=host,
                    server_port=port,
                    inbrowser=browser,
                    prevent_thread_lock=True,
                    quiet=True,
                    allowed_paths=[],
                    max_file_size=LARGEST,
                    app_kwargs={"middleware": [Middleware(Guard, hosts=own_names(host))], "docs_url": None, "redoc_url": None},
                    footer_links=[],
                    state_session_capacity=200,
                    theme=gr.themes.Default(primary_hue="blue", **fonts),
                    css=(Path(__file__).parents[1] / "templates" / "app.css").read_text(encoding="utf-8"),
                    **off,
                )
                yield str(address)
            finally:
                explorer.jobs.cancel()
                blocks.close(verbose=False)
        finally:
            os.environ.clear()
            os.environ.update(environment)


def free_port(host: str, port: int | None) -> int:
    """The port itself if nothing listens there, or the first free one from 7860 on.

    Raises:
        OutputError: It is taken, or the host is not this machine's.
    """
    for number in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                trial.bind((host, number))
                return int(trial.getsockname()[1])
    where = f"{host}:{port}" if port is not None else f"{host}, ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1},"
    raise OutputError(f"cannot listen on {where}: taken, or no address of this machine; choose another with --port or --host")
