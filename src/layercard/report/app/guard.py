"""What the server answers at all: its own pages and events, asked for by their own names, and nothing fetched for a visitor."""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Server = Callable[[Scope, Receive, Send], Awaitable[None]]

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
    """ASGI middleware that refuses other paths, and other host names than the given ones.

    A page of another site whose name is made to lead to this machine (DNS rebinding) asks with its own name, and gets nothing.

    Args:
        app: The server behind it.
        hosts: Names under which the server may be asked for; empty: any.
    """

    def __init__(self, app: Server, hosts: frozenset[str] = frozenset()) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with 403 what is not served, and pass on the rest."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket" or not self.allows(scope["path"], dict(scope["headers"]).get(b"host", b"").decode("latin-1")):
            await _refuse(send)
        else:
            await self._app(scope, receive, _with_headers(send))

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


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *HEADERS]
        await send(message)

    return sending


async def _refuse(send: Send) -> None:
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"not served\n"})
