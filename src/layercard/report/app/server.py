"""Serves the page: on this machine alone unless told otherwise, without analytics, sharing, or anything else from the network.

What is answered at all is the page's own files and events, asked for by the page itself (`Guard`); nothing is fetched for a visitor.
"""

import contextlib
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import webbrowser
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layercard.errors import LayercardError, OutputError
from layercard.files import LOCK_FILE, alone
from layercard.report.app.explorer import MOST_UPLOADS, Explorer
from layercard.report.app.library import LARGEST, Library

FIRST_PORT, PORTS = 7860, 100
FOLDER = "layercard-app-"
"""How the names of folders with uploads and half cards begin, each in the hands of one running app."""
ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_RUN_HISTORY": "False", "GRADIO_SHARE": "False"}
UNSET = ("GRADIO_ALLOWED_PATHS", "GRADIO_ROOT_PATH", "GRADIO_MCP_SERVER", "GRADIO_SSR_MODE", "GRADIO_NUM_WORKERS", "GRADIO_WATCH_DIRS")
"""What Gradio reads from the environment while it serves, and what it must not find there."""

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
UPLOAD = "/gradio_api/upload"
MOST_BYTES = 100 * 2**20
"""Bytes of one upload of several files, with what stands around them."""
MOST_WORDS = 2**20
"""Bytes of any other request: what the widgets hold."""
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
    """ASGI application around Gradio's that answers what its own page asks for, and nothing else.

    Refused are other paths; other host names than `hosts` (any is right where there are none), since a page of another site whose name
    is made to lead to this machine (DNS rebinding) asks with its own; whatever a page of another site or port asks for; and what is
    over the limits, before it is read.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], hosts: frozenset[str] = frozenset()) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer with 403 or 413 what is refused, and pass on the rest with limits on its body."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":  # the page opens no WebSocket
            await send({"type": "websocket.close", "code": 1008})
        elif refusal := self.refusal(scope):
            status, why = refusal
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain"), *HEADERS]})
            await send({"type": "http.response.body", "body": f"{why}\n".encode()})
        else:
            await self._app(scope, limited(scope, receive), with_headers)

    def refusal(self, scope: Message) -> tuple[int, str] | None:
        """The status and the reason where a request is refused; nothing of its body was read by then."""

        def sent(name: bytes) -> list[str]:
            return [value.decode("latin-1").lower() for key, value in scope["headers"] if key == name]

        hosts, path = sent(b"host"), scope["path"]
        if not SERVED.fullmatch(path) or ".." in path:
            return 403, "not served"
        if len(hosts) != 1 or (self._hosts and hosts[0] not in self._hosts):
            return 403, "not served under this host name"
        # Browsers say which page asks: this one itself, or nobody where the address was typed.
        own, asking = f"{scope['scheme']}://{hosts[0]}", sent(b"sec-fetch-site")
        if any(origin != own for origin in sent(b"origin")) or not {*asking} <= {"same-origin", "none"}:
            return 403, f"not served to another site; open {own} itself"
        if any(not length.isdigit() or int(length) > _most(path) for length in sent(b"content-length")):
            return 413, f"over {_most(path) // 2**20} MiB"
        return None


def _most(path: str) -> int:
    return MOST_BYTES if path.rstrip("/") == UPLOAD else MOST_WORDS


def limited(scope: Message, receive: Receive) -> Receive:
    """`receive` that ends a request at the first byte over its limit, and an upload at the head of a file that is not taken in.

    It ends with the exception that Gradio's own reading of an upload ends with, which removes what was stored of it.
    """
    from python_multipart.multipart import MultipartParser, parse_options_header
    from starlette.formparsers import MultiPartException

    size = files = part_size = 0
    name, value, disposition = bytearray(), bytearray(), b""

    def header_end() -> None:
        nonlocal disposition
        if name.lower() == b"content-disposition":
            disposition = bytes(value)
        name.clear()
        value.clear()

    def head_end() -> None:
        nonlocal files, part_size, disposition
        files, part_size = files + 1, 0
        _, options = parse_options_header(disposition)
        disposition = b""
        if not options.get(b"filename", b"").lower().endswith(b".json"):
            raise MultiPartException("not a .json file; upload a card, a placement, a run record or a comparison")
        if files > MOST_UPLOADS:
            raise MultiPartException(f"over {MOST_UPLOADS} files; put more into a folder given with --cards")

    def data(chunk: bytes, start: int, end: int) -> None:
        nonlocal part_size
        part_size += end - start
        if part_size > LARGEST:
            raise MultiPartException(f"a file is over the maximum allowed size of {LARGEST // 2**20} MiB")

    check: MultipartParser | None = None
    if scope["path"].rstrip("/") == UPLOAD:
        _, options = parse_options_header(dict(scope["headers"]).get(b"content-type", b""))
        events: Any = {"on_header_end": header_end, "on_headers_finished": head_end, "on_part_data": data}
        events["on_header_field"] = lambda chunk, start, end: name.extend(chunk[start:end])
        events["on_header_value"] = lambda chunk, start, end: value.extend(chunk[start:end])
        check = MultipartParser(options.get(b"boundary", b"none")[:200], events)

    async def counting() -> Message:
        nonlocal size
        message = await receive()
        body = message.get("body", b"")
        size += len(body)
        if size > _most(scope["path"]):
            raise MultiPartException(f"over the maximum allowed size of {_most(scope['path']) // 2**20} MiB")
        if check is not None:
            check.write(body)
        return message

    return counting


def own_names(host: str, port: int) -> frozenset[str]:
    """What a server on `host` is called; empty where it listens for other machines, which may call it anything.

    >>> sorted(own_names("127.0.0.1", 7860)), own_names("0.0.0.0", 7860)
    (['127.0.0.1:7860', '[::1]:7860', 'localhost:7860'], frozenset())
    """
    if not is_local(host):
        return frozenset()
    names = {"127.0.0.1", "localhost", "[::1]", _bracketed(host)}
    return frozenset({f"{name}:{port}" for name in names} | (names if port == 80 else set()))


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@contextlib.contextmanager
def serving(library: Library, host: str = "127.0.0.1", port: int | None = None, *, browser: bool = False) -> Iterator[str]:
    """The app, served for the length of a `with` block on the port, or the first free one from 7860 on; yields its address.

    Raises:
        OutputError: Gradio is not installed, or the port is taken.
    """
    if find_spec("gradio") is None:
        raise OutputError('the app needs Gradio, which is not installed; install it with `pip install "layercard[app]"`')
    sweep()
    environment = dict(os.environ)
    with listening(host, port) as door, tempfile.TemporaryDirectory(prefix=FOLDER) as name, alone(Path(name)):
        os.environ.update(ENVIRONMENT | {"GRADIO_TEMP_DIR": name})
        for variable in UNSET:
            os.environ.pop(variable, None)
        try:
            import gradio as gr
            import uvicorn
            from fastapi import FastAPI

            from layercard.report.app.pages import Page

            explorer = Explorer(library, folder=Path(name))
            blocks = Page(explorer).blocks
            blocks.queue(default_concurrency_limit=4, max_size=64, api_open=False)
            blocks.state_session_capacity = 200
            fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
            no_docs: dict[str, Any] = dict.fromkeys(("docs_url", "redoc_url", "openapi_url"))
            app = gr.mount_gradio_app(
                FastAPI(**no_docs),
                blocks,
                path="/",
                show_error=False,
                max_file_size=LARGEST,
                app_kwargs=no_docs,
                footer_links=[],
                theme=gr.themes.Default(primary_hue="blue", **fonts),
                css=(Path(__file__).parents[1] / "templates" / "app.css").read_text(encoding="utf-8"),
                **dict.fromkeys(("run_history", "enable_monitoring", "mcp_server", "ssr_mode", "pwa"), False),
            )
            blocks.has_launched = blocks.is_running = True  # else Gradio takes any path that a visitor names for an upload
            number = door.getsockname()[1]
            # The guard stands before all of Gradio, whose answers to other origins would else come first. Streams of events never end
            # by themselves, so they are cut when the app ends.
            server = uvicorn.Server(
                uvicorn.Config(Guard(app, own_names(host, number)), log_level="warning", ws="none", timeout_graceful_shutdown=1)
            )
            thread = threading.Thread(target=server.run, args=([door],), daemon=True)
            thread.start()
            try:
                while not server.started and thread.is_alive():
                    time.sleep(0.01)
                address = f"http://{_bracketed(host)}:{number}"
                if browser:
                    webbrowser.open(address)
                yield address
            finally:
                explorer.close()
                blocks.close(verbose=False)
                server.should_exit = True
                thread.join()
        finally:
            os.environ.clear()
            os.environ.update(environment)


def listening(host: str, port: int | None) -> socket.socket:
    """A socket on the port, or on the first free one from 7860 on.

    Raises:
        OutputError: It is taken, or the host is not this machine's.
    """
    for number in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS):
        door = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((host, number))
            door.listen(128)
        except OSError:
            door.close()
        else:
            return door
    where = f"{host}:{port}" if port is not None else f"{host}, ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1},"
    raise OutputError(f"cannot listen on {where}: taken, or no address of this machine; choose another with --port or --host")


def sweep() -> None:
    """Remove the folders of apps that were killed: uploads, and the card that one was making."""
    for lock in Path(tempfile.gettempdir()).glob(f"{FOLDER}*/{LOCK_FILE}"):
        folder = lock.parent
        with contextlib.suppress(OSError, LayercardError):  # in the hands of an app that runs, or of another user
            if not folder.is_symlink() and folder.lstat().st_uid == os.getuid():
                with alone(folder):
                    shutil.rmtree(folder)
