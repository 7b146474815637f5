"""A small Hub for tests: repositories with commits over the HTTP API that huggingface_hub speaks, in memory.

Users are known by their tokens; a repository is written by its owner with a token that may write. Faults can be
planted: the next answers to matching requests are errors, or come late.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER_TOKEN = "hf_owner"
READER_TOKEN = "hf_reader"


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Fault:
    """Answer matching requests with `status`, or `delay` seconds late, `times` times."""

    path: str
    status: int | None = None
    delay: float = 0.0
    times: int = 1


@dataclass
class Repo:
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    branches: dict[str, int] = field(default_factory=lambda: {"main": 0})

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        if revision in self.branches:
            return self.commits[self.branches[revision]]
        for sha, files in self.commits:
            if sha == revision:
                return sha, files
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, files))
        self.branches[branch] = len(self.commits) - 1
        return sha


class LocalHub:
    """The state of the server; `url` is its endpoint."""

    def __init__(self) -> None:
        self.users = {OWNER_TOKEN: ("owner", True), READER_TOKEN: ("owner", False)}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.url = ""

    def create(self, repo_id: str, kind: str = "models", private: bool = False, files: dict | None = None) -> Repo:
        repo = self.repos[kind, repo_id] = Repo(private)
        repo.add("main", {})
        if files:
            repo.add("main", dict(files))
        return repo

    def files(self, repo_id: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        return self.repos[kind, repo_id].at(revision)[1]

    def fault_for(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *args) -> None:
        pass

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        fault = self.hub.fault_for(path)
        try:
            if fault is not None:
                time.sleep(fault.delay)
                if fault.status is not None:
                    raise HubError(fault.status, "planted fault")
            for pattern, action in ROUTES:
                if match := re.fullmatch(pattern, path):
                    return action(self, *match.groups())
            raise HubError(404, f"no such route: {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self.send(error.status, json.dumps({"error": str(error)}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            pass

    do_GET = do_HEAD = do_POST = do_DELETE = respond  # noqa: N815

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        fixed = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        for name, value in (fixed | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, content, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode())

    # who asks, and what they may

    def user(self) -> tuple[str | None, bool]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token, (None, False))

    def readable(self, kind: str, repo_id: str) -> Repo:
        repo = self.hub.repos.get((kind, repo_id))
        name, _ = self.user()
        if repo is None or (repo.private and name != repo_id.split("/")[0]):
            raise HubError(401 if name is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, kind: str, repo_id: str) -> Repo:
        repo = self.readable(kind, repo_id)
        name, may_write = self.user()
        if not may_write or name != repo_id.split("/")[0]:
            raise HubError(403, "you don't have the rights to write there")
        return repo

    # routes

    def validate_yaml(self) -> None:
        import yaml

        text = json.loads(self.content)["content"]
        metadata = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        errors = []
        if "model-index" in metadata and not all("results" in model for model in metadata["model-index"]):
            errors.append({"message": "model-index without results"})
        if any(value is None for value in metadata.values()):
            errors.append({"message": "empty metadata"})
        self.send_json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def create_repo(self) -> None:
        request = json.loads(self.content)
        kind = (request.get("type") or "model") + "s"
        name, may_write = self.user()
        owner = request.get("organization") or name
        if not may_write or owner != name:
            raise HubError(403, f"you don't have the rights to create a {kind[:-1]} under the namespace {owner}")
        repo_id = f"{owner}/{request['name']}"
        body = {"url": f"{self.hub.url}/{'datasets/' * (kind == 'datasets')}{repo_id}", "name": repo_id}
        if (kind, repo_id) in self.hub.repos:
            return self.send_json({**body, "error": "You already created this repo"}, status=409)
        self.hub.create(repo_id, kind, bool(request.get("private")) or request.get("visibility") == "private")
        return self.send_json(body)

    def info(self, kind: str, repo_id: str, revision: str | None = None) -> None:
        repo = self.readable(kind, repo_id)
        sha, files = repo.at(revision or "main")
        siblings = [{"rfilename": name} for name in sorted(files)]
        self.send_json({"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings})

    def branch(self, kind: str, repo_id: str, name: str) -> None:
        repo = self.writable(kind, repo_id)
        repo.branches[name] = repo.branches["main"]
        self.send_json({})

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        self.writable(kind, repo_id).at(revision)
        paths = [entry["path"] for entry in json.loads(self.content)["files"]]
        # how the client uploads large files is its own affair: here all files come with the commit
        answers = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
        self.send_json({"files": answers})

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.writable(kind, repo_id)
        with self.hub.lock:
            head, files = repo.at(revision)
            files = dict(files)
            for line in self.content.splitlines():
                entry = json.loads(line)
                value, key = entry["value"], entry["key"]
                if key == "header" and value.get("parentCommit", head) != head:
                    raise HubError(412, "a commit has happened since")
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "deletedFile":
                    files.pop(value["path"], None)
            sha = repo.add(revision, files)
        self.send_json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True})

    def tree(self, kind: str, repo_id: str, revision: str, inside: str | None = None) -> None:
        _, files = self.readable(kind, repo_id).at(revision)
        files = {name: content for name, content in files.items() if name.startswith(f"{inside}/" if inside else "")}
        if inside and not files:
            raise HubError(404, f"{inside} does not exist", "EntryNotFound")
        self.send_json(
            [
                {"type": "file", "path": name, "size": len(content), "oid": sha256(content)}
                for name, content in sorted(files.items())
            ]
        )

    def resolve(self, datasets: str | None, repo_id: str, revision: str, name: str) -> None:
        sha, files = self.readable("datasets" if datasets else "models", repo_id).at(revision)
        if name not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha}
            return self.send(404, b"{}", headers)
        content = files[name]
        return self.send(200, content, {"X-Repo-Commit": sha, "ETag": f'"{sha256(content)}"'})


REPO = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable]] = [
    (r"/api/validate-yaml", Handler.validate_yaml),
    (r"/api/repos/create", Handler.create_repo),
    (rf"/api/(models|datasets)/{REPO}/preupload/([^/]+)", Handler.preupload),
    (rf"/api/(models|datasets)/{REPO}/commit/([^/]+)", Handler.commit),
    (rf"/api/(models|datasets)/{REPO}/tree/([^/]+)(?:/(.*))?", Handler.tree),
    (rf"/api/(models|datasets)/{REPO}/branch/([^/]+)", Handler.branch),
    (rf"/api/(models|datasets)/{REPO}(?:/revision/([^/]+))?", Handler.info),
    (rf"/(?:(datasets)/)?{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def serve() -> Iterator[LocalHub]:
    """Run a Hub on a free port of this machine for the length of the block."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
