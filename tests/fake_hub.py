"""A hub on localhost that answers huggingface_hub as the real one does, and keeps account of what it was asked for."""

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ERRORS = {
    "RepoNotFound": (401, "Repository not found"),
    "RevisionNotFound": (404, "Invalid rev id"),
    "EntryNotFound": (404, "Entry not found"),
    "GatedRepo": (403, "Access to this model is restricted"),
    "": (401, "Invalid credentials in Authorization header"),
}
"""What the hub answers by its X-Error-Code; without one, the text tells."""


@dataclasses.dataclass
class Hub:
    """repos: by name, by commit, the bytes of files by path. Branches and tags are in `revisions`, by name."""

    url: str
    repos: dict[str, dict[str, dict[str, bytes]]] = dataclasses.field(default_factory=dict)
    revisions: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)
    """X-Error-Code by the beginning of the path; or "down" for 503, or "cut" for half a file."""
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Method and path, in turn."""
    sent: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes of each file that were sent, by name."""
    ranges: bool = True
    """Whether it sends parts of files, as the real one does."""

    def add(self, repo: str, folder: Path, revision: str = "main", **more: bytes) -> str:
        """The commit under which `revision` of `repo` now has the files of the folder and `more`."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        files |= more
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        self.revisions.setdefault(repo, {})[revision] = commit
        return commit

    @property
    def fetched(self) -> list[str]:
        """The files whose contents were asked for, sorted: downloads run side by side."""
        return sorted(
            path.split("/resolve/")[1].partition("/")[2]
            for how, path in self.requests
            if how == "GET" and "/resolve/" in path
        )

    def answer(self, path: str, part: str | None = None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; `part` is the Range that was asked for."""
        refused = next((code for start, code in self.refusals.items() if path.startswith(start)), None)
        if refused not in (None, "cut"):
            return _error(refused)
        kind, repo, revision, file = _parts(path)
        if repo not in self.repos:
            return _error("RepoNotFound")
        commits, named = self.repos[repo], self.revisions[repo]
        commit = named.get(revision, revision)
        if commit not in commits:
            return _error("RevisionNotFound")
        files = commits[commit]
        if kind == "info":
            siblings = [{"rfilename": name} for name in files]
            return _json({"id": repo, "modelId": repo, "sha": commit, "private": False, "siblings": siblings})
        if kind == "tree":
            return _json([_entry(name, content) for name, content in files.items()])
        if file not in files:
            return _error("EntryNotFound")
        content = files[file]
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": commit, "Content-Length": str(len(content))}
        if refused == "cut":
            return 200, {**headers, "Connection": "close"}, content[: len(content) // 2]
        if part is None or not self.ranges:
            return 200, headers, content
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", part).groups())
        body, whole = content[first : last + 1], len(content)
        if not body:
            return 416, {"Content-Range": f"bytes */{whole}"}, b""
        headers |= {"Content-Length": str(len(body)), "Content-Range": f"bytes {first}-{first + len(body) - 1}/{whole}"}
        return 206, headers, body


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # which holds each body back for 40 ms

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            status, headers, body = hub.answer(path, self.headers["Range"])
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                if "/resolve/" in path:  # before the client can go on
                    file = path.rpartition("/")[2]
                    hub.sent[file] = hub.sent.get(file, 0) + len(body)
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_port}")
        # A thread serves each connection until its client closes it, which need not be waited for.
        server.daemon_threads, server.block_on_close = True, False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _parts(path: str) -> tuple[str, str, str, str]:
    """What is asked for, and of which repo, revision and file."""
    if path.startswith("/api/models/"):
        path = path.removeprefix("/api/models/")
        for kind, mark in (("info", "/revision/"), ("tree", "/tree/")):
            if mark in path:
                repo, _, revision = path.partition(mark)
                return kind, repo, revision, ""
        return "info", path, "main", ""
    repo, _, rest = path[1:].partition("/resolve/")
    revision, _, file = rest.partition("/")
    return "file", repo, revision, file


def _entry(name: str, content: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if name.endswith((".safetensors", ".bin")):
        entry["lfs"] = {"oid": _digest(content), "size": len(content), "pointerSize": 134}
    return entry


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(value) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(code: str) -> tuple[int, dict[str, str], bytes]:
    if code == "down":
        return 503, {}, b""
    status, text = ERRORS[code]
    headers = {"X-Error-Message": text} | ({"X-Error-Code": code} if code else {})
    return status, headers, b""
