"""A loopback server that speaks enough of the Hugging Face Hub for the real huggingface_hub client.

Model and data set listings at a commit, `resolve` with a redirect of LFS files to a second host name (as the
hub sends them to its CDN), Range requests, and switches for what goes wrong.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_a_token_that_was_granted_access"


def is_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


@dataclass
class Request:
    method: str
    path: str
    authorization: str | None
    range: str | None


@dataclass
class Hub:
    """Repositories as `{"owner/name": {commit: {file: bytes}}}`, data sets as `datasets/owner/name`."""

    url: str
    cdn: str
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: bool = False  # files need TOKEN
    served: dict[str, bytes] = field(default_factory=dict)  # other content than the commit names
    drops: dict[str, list[int]] = field(default_factory=dict)  # close each answer after so many bytes, in turn
    stall: str | None = None  # a file whose answer stops half way ...
    stalled: threading.Event = field(default_factory=threading.Event)  # ... which this tells ...
    resume: threading.Event = field(default_factory=threading.Event)  # ... until this is set
    status: int | None = None  # answer everything with this status
    requests: list[Request] = field(default_factory=list)

    def asked(self, name: str) -> list[Request]:
        """GET requests for the content of a file."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(f"/{name}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        authorization = self.headers.get("Authorization")
        hub.requests.append(Request(self.command, path, authorization, self.headers.get("Range")))
        if hub.status:
            return self.reply(hub.status, b"")
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/revision/([0-9a-f]{40})", path):
            kind, repo, commit = match.groups()
            return self.listing(repo if kind == "models" else f"datasets/{repo}", commit)
        if match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path):
            return self.resolve(*match.groups(), authorization)
        if match := re.fullmatch(r"/cdn/((?:datasets/)?[^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            repo, commit, name = match.groups()
            return self.content(name, hub.repos[repo][commit][name])
        return self.reply(404, b"")

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def listing(self, repo: str, commit: str) -> None:
        if repo not in self.hub.repos:
            return self.reply(404, b"", X_Error_Code="RepoNotFound")
        if commit not in self.hub.repos[repo]:
            return self.reply(404, b"", X_Error_Code="RevisionNotFound")
        siblings = []
        for name, data in self.hub.repos[repo][commit].items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"rfilename": name, "size": len(data), "blobId": blob}
            if is_lfs(name):
                sha = hashlib.sha256(data).hexdigest()
                entry |= {"blobId": "0" * 40, "lfs": {"sha256": sha, "size": len(data), "pointerSize": 134}}
            siblings.append(entry)
        body = {"id": repo.removeprefix("datasets/"), "sha": commit, "siblings": siblings, "tags": [], "private": False}
        self.reply(200, json.dumps(body).encode(), Content_Type="application/json")

    def resolve(self, repo: str, commit: str, name: str, authorization: str | None) -> None:
        if self.hub.gated and authorization != f"Bearer {TOKEN}":
            return self.reply(401, b"", X_Error_Code="GatedRepo", X_Error_Message="Access to this repository is gated.")
        files = self.hub.repos.get(repo, {}).get(commit, {})
        if name not in files:
            return self.reply(404, b"", X_Error_Code="EntryNotFound")
        if is_lfs(name):
            sha = hashlib.sha256(files[name]).hexdigest()
            location = f"{self.hub.cdn}/cdn/{repo}/{commit}/{name}"
            headers = {"X_Linked_Etag": f'"{sha}"', "X_Linked_Size": str(len(files[name])), "X_Repo_Commit": commit}
            return self.reply(302, b"", Location=location, **headers)
        return self.content(name, files[name], X_Repo_Commit=commit, ETag='"blob"')

    def content(self, name: str, data: bytes, **headers: str) -> None:
        data = self.hub.served.get(name, data)
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        part = data[start:]
        drops = self.hub.drops.get(name, [])
        cut = drops.pop(0) if drops else len(part)
        if name == self.hub.stall and not self.hub.resume.is_set():
            cut = len(part) // 2
        if cut >= len(part):
            return self.reply(206 if start else 200, part, **headers)
        self.send_response(206 if start else 200)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[:cut])
        self.wfile.flush()
        if name == self.hub.stall and not self.hub.resume.is_set():
            self.hub.stalled.set()
            self.hub.resume.wait(300)
        self.close_connection = True


@contextmanager
def serve() -> Iterator[Hub]:
    """A running server; two names of one address stand for the hub and its CDN."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    port = server.server_address[1]
    handler.hub = hub = Hub(f"http://127.0.0.1:{port}", f"http://localhost:{port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.resume.set()
        server.shutdown()
        server.server_close()
        thread.join()
