"""A hub on 127.0.0.1 that speaks the few calls that `layercard push` and `pull` need, and fails where a test asks it to."""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_writer": "ann", "hf_reader": "bo"}
"""Tokens and whose they are; the reader's may not write."""
DATASET = r"/api/datasets/([\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """Branches with their files, and how often each was committed to."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[tuple[str, str]] = field(default_factory=list)

    def sha(self, branch: str) -> str:
        return hashlib.sha1(repr(sorted(self.branches[branch].items())).encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch, or of the branch that stands at a commit."""
        return next((files for name, files in self.branches.items() if revision in (name, self.sha(name))), None)


class Hub:
    """What the server holds, what it was asked, and where it fails.

    Attributes:
        repositories: By full name.
        asked: `METHOD path` of each request.
        fail: `commit` answers 500, `drop` ends the connection within a commit, `endless` sends a card without end,
            `slow` a byte now and then; a text with an escape character is what a
            refusal says.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.fail = ""

    def tags(self, name: str) -> set[str]:
        """The tags in a README's YAML."""
        text = self.repositories[name].branches["main"].get("README.md", b"").decode()
        return set(re.findall(r'^- "(.*)"$', text.partition("\n---")[0], re.MULTILINE))


class _Refused(Exception):
    """An answer that is no success: its status, the hub's code for it, and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.headers, self.message = status, {"X_Error_Code": code, "X_Error_Message": message}, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(200, b"")

    def do_GET(self) -> None:
        self._route("GET", b"")

    def do_POST(self) -> None:
        self._route("POST", self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    @property
    def user(self) -> str | None:
        return TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _answer(self, status: int, body: bytes | dict[str, Any] | list[Any], **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, method: str, body: bytes) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.hub.asked.append(f"{method} {path}")
        routes = (
            (r"/api/whoami-v2", self._whoami),
            (r"/api/validate-yaml", self._validate),
            (r"/api/repos/create", self._create),
            (r"/api/datasets", self._search),
            (rf"{DATASET}/preupload/(.+)", self._preupload),
            (rf"{DATASET}/commit/(.+)", self._commit),
            (rf"{DATASET}/branch/(.+)", self._branch),
            (rf"{DATASET}(?:/revision/(.+))?", self._info),
            (r"/datasets/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self._resolve),
        )
        calls = ((answer, match) for pattern, answer in routes if (match := re.fullmatch(pattern, path)))
        try:
            answer, found = next(calls, (self._unknown, re.match("", path)))
            answer(body, parse_qs(parts.query), *found.groups())
        except _Refused as refused:
            self._answer(refused.status, {"error": refused.message}, **refused.headers)

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        """A repository that the user may see, or write to."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.user != name.partition("/")[0]):
            raise _Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write:
            self._check_writer(name)
        return repository

    def _check_writer(self, name: str) -> None:
        if self.user != name.partition("/")[0] or self.user == "bo":
            raise _Refused(403, "", "You don't have the rights")

    def _unknown(self, *_: Any) -> None:
        raise _Refused(404, "", "the test server does not know this call")

    def _whoami(self, *_: Any) -> None:
        if self.user is None:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        self._answer(200, {"name": self.user, "type": "user"})

    def _validate(self, *_: Any) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _create(self, body: bytes, _: Any) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or self.user}/{asked['name']}"
        self._check_writer(name)
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, Repository(private=asked.get("visibility") == "private" or bool(asked.get("private"))))
        self._answer(status, {"url": f"{self.hub.url}/datasets/{name}"})

    def _search(self, _: bytes, query: dict[str, list[str]]) -> None:
        wanted, limit = set(query.get("filter", [])), int(query.get("limit", ["1000"])[0])
        found = [name for name in self.hub.repositories if wanted <= self.hub.tags(name) and not self.hub.repositories[name].private]
        self._answer(200, [{"id": name} for name in found[:limit]])

    def _info(self, _: bytes, __: Any, name: str, revision: str | None) -> None:
        repository = self._repository(name)
        files = repository.files(revision or "main")
        if files is None:
            raise _Refused(404, "RevisionNotFound", "Invalid rev id")
        branch = next(key for key, value in repository.branches.items() if value is files)
        siblings = [{"rfilename": path} for path in files]
        self._answer(200, {"id": name, "sha": repository.sha(branch), "private": repository.private, "siblings": siblings})

    def _preupload(self, body: bytes, _: Any, name: str, __: str) -> None:
        self._repository(name, write=True)
        files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]]
        self._answer(200, {"files": files})

    def _branch(self, _: bytes, __: Any, name: str, branch: str) -> None:
        repository = self._repository(name, write=True)
        if branch in repository.branches:
            raise _Refused(409, "", "Reference already exists")
        repository.branches[branch] = dict(repository.branches["main"])
        self._answer(201, {})

    def _commit(self, body: bytes, _: Any, name: str, branch: str) -> None:
        repository = self._repository(name, write=True)
        if self.hub.fail == "commit":
            raise _Refused(500, "", "Internal error")
        if self.hub.fail == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        lines = [json.loads(line) for line in body.splitlines()]
        files = {each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in lines if each["key"] == "file"}
        repository.branches[branch] = {**repository.branches[branch], **files}
        repository.commits.append((branch, lines[0]["value"]["summary"]))
        oid = repository.sha(branch)
        self._answer(200, {"commitUrl": f"{self.hub.url}/datasets/{name}/commit/{oid}", "commitOid": oid})

    def _resolve(self, _: bytes, __: Any, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        files = repository.files(revision)
        if files is None:
            raise _Refused(404, "RevisionNotFound", "Invalid rev id")
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        if "\x1b" in self.hub.fail:
            raise _Refused(500, "", self.hub.fail)
        if self.hub.fail not in ("endless", "slow"):
            self._answer(200, files[path])
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(b" " * (65536 if self.hub.fail == "endless" else 1))
                time.sleep(0.0 if self.hub.fail == "endless" else 0.1)
        except OSError:
            pass


@contextmanager
def served() -> Iterator[Hub]:
    """The hub, in a thread of its own for the length of a `with` block."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
