"""A Hub on this machine's loopback, as far as kernels and huggingface_hub speak to it.

Reading: overview of an organisation, refs, tree, revision, and HEAD and GET of a file. Writing:
create a repository and a branch, and commit. Commits are kept in memory and never change.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """Immutable commits, and the branches that name some of them."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + b"\0" + content)
        sha = digest.hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> tuple[str, Files | None]:
        sha = self.branches.get(revision.removeprefix("refs/heads/"), revision)
        return sha, self.commits.get(sha)


class Hub:
    """Serves its repositories while used as a context manager; `requests` is what was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.trusted: set[str] = set()
        self.requests: list[str] = []

    def add(self, repo_id: str, folder: Path, *branches: str) -> str:
        """Publish a folder as one commit on some branches."""
        paths = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
        repository = self.repositories.setdefault(repo_id, Repository())
        shas = {repository.commit(branch, files) for branch in branches[:1]}
        (sha,) = shas
        repository.branches.update(dict.fromkeys(branches, sha))
        return sha

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.hub.requests.append(f"POST {self.path}")
        parts = self.parts()
        if parts == ["api", "validate-yaml"]:
            return self.json({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(self.body)
            assert asked["type"] == "kernel", asked
            repo_id = f"{asked['organization']}/{asked['name']}"
            created = repo_id not in self.hub.repositories
            repository = self.hub.repositories.setdefault(repo_id, Repository())
            if created:
                repository.commit("main", {})
            return self.json(
                {"url": f"{self.hub.endpoint}/kernels/{repo_id}"}, 200 if created else 409
            )
        repository = self.hub.repositories["/".join(parts[2:4])]
        if parts[4] == "branch":
            repository.branches.setdefault(parts[5], repository.branches["main"])
            return self.json({})
        if parts[4] == "preupload":
            files = json.loads(self.body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self.json({"files": [{"path": f["path"], **plain} for f in files]})
        assert parts[4] == "commit", parts
        files = dict(repository.resolve(parts[5])[1] or {})
        for line in self.body.splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "deletedFile":
                del files[value["path"]]
            elif change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        sha = repository.commit(parts[5], files)
        url = f"{self.hub.endpoint}/kernels/{'/'.join(parts[2:4])}/commit/{sha}"
        return self.json({"commitUrl": url, "commitOid": sha, "success": True})

    def parts(self) -> list[str]:
        # Decoded after splitting: refs%2Fheads%2Fv1 is one part.
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def respond(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = self.parts()
        if parts[:2] == ["api", "organizations"]:
            trusted = parts[2] in self.hub.trusted
            names = {"name": parts[2], "fullname": parts[2], "avatarUrl": ""}
            return self.json({**names, "trustedKernelPublisher": trusted})
        if parts[:2] == ["api", "kernels"]:
            repository = self.hub.repositories.get("/".join(parts[2:4]))
            return self.missing("RepoNotFound") if repository is None else self.about(repository)
        if parts[0] == "kernels" and "resolve" in parts:
            return self.file(*parts[1:3], *parts[4:])
        return self.missing("NotFound")

    def about(self, repository: Repository) -> None:
        _, _, organisation, name, *rest = self.parts()
        if rest == ["refs"]:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in repository.branches.items()
            ]
            return self.json({"branches": branches, "tags": [], "converts": []})
        sha, files = repository.resolve(rest[1] if len(rest) > 1 else "main")
        if files is None:
            return self.missing("RevisionNotFound")
        if rest and rest[0] == "tree":
            return self.tree(files, "/".join(rest[2:]))
        siblings = [{"rfilename": path} for path in sorted(files)]
        about = {"id": f"{organisation}/{name}", "author": organisation, "sha": sha}
        return self.json({**about, "private": False, "gated": False, "siblings": siblings})

    def tree(self, files: Files, folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = sorted(path for path in files if path.startswith(prefix))
        if not inside and folder:
            return self.missing("EntryNotFound")
        recursive = "recursive=true" in urlsplit(self.path).query.lower()
        entries: dict[str, dict] = {}
        for path in inside:
            first, *deeper = path[len(prefix) :].split("/")
            if deeper:
                known = {"type": "directory", "oid": blob_id(first.encode()), "size": 0}
                entries[prefix + first] = {**known, "path": prefix + first}
            if recursive or not deeper:
                known = {"type": "file", "oid": blob_id(files[path]), "size": len(files[path])}
                entries[path] = {**known, "path": path}
        return self.json(list(entries.values()))

    def file(self, organisation: str, name: str, revision: str, *path: str) -> None:
        repository = self.hub.repositories.get(f"{organisation}/{name}")
        if repository is None:
            return self.missing("RepoNotFound")
        sha, files = repository.resolve(revision)
        if files is None:
            return self.missing("RevisionNotFound")
        content = files.get("/".join(path))
        if content is None:
            return self.missing("EntryNotFound", {"X-Repo-Commit": sha})
        headers = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": sha}
        return self.send(200, content, headers)

    def json(self, answer: object, status: int = 200) -> None:
        self.send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self.send(404, b"{}", {"X-Error-Code": code, **(headers or {})})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
