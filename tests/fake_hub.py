"""A hub of models and datasets on this machine, which huggingface_hub, transformers and datasets talk to.

They read `HF_ENDPOINT` when they are imported, so what uses it runs in a process of its own: `hub.environment`.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+)"
API = re.compile(rf"/api/(?P<kind>models|datasets)/{REPOSITORY}(/(?P<what>revision|tree|paths-info)/(?P<rest>.*))?")
FILE = re.compile(rf"(/(?P<kind>datasets))?/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class FakeHub:
    """`with FakeHub(folder) as hub: commit = hub.push("org/name", {"config.json": b"…"})`.

    environment  what a process needs that should use it; its cache is in `folder`
    seen         (method, path) of every request
    gated        repositories nobody may read
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.repositories = {}  # (kind, name) -> {commit: {path: bytes}}, the newest last
        self.seen = []
        self.gated = set()

    def __enter__(self):
        handler = type("Bound", (Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    @property
    def environment(self):
        url = f"http://127.0.0.1:{self.http.server_address[1]}"
        return {"HF_ENDPOINT": url, "HF_HOME": str(self.folder / "cache"), "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip

    def push(self, name, files, kind="models"):
        """A new commit of a repository: these files, or those of a folder. Returns its hash."""
        if not isinstance(files, dict):
            files = {str(p.relative_to(files)): p.read_bytes() for p in Path(files).rglob("*") if p.is_file()}
        commits = self.repositories.setdefault((kind, name), {})
        commit = hashlib.sha1(repr((name, len(commits))).encode()).hexdigest()
        commits[commit] = files
        return commit

    def files(self, kind, name, revision):
        """(commit, its files); None where there is no such repository or revision."""
        commits = self.repositories.get((kind, name), {})
        if revision in (None, "main") and commits:
            revision = list(commits)[-1]
        return (revision, commits[revision]) if revision in commits else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.hub.seen.append((self.command, self.path))
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if found := API.fullmatch(path):
            self._api(found, body)
        elif found := FILE.fullmatch(path):
            self._file(found)
        else:
            self._refuse(404, "EntryNotFound", "no such page")

    do_HEAD = do_POST = do_GET  # noqa: N815 - the names that http.server calls

    def _found(self, kind, name, revision):
        """The files of a revision; None after an answer that says why there are none, as the hub does."""
        if name in self.hub.gated:
            self._refuse(403, "GatedRepo", f"Access to {name} is restricted")
        elif (kind, name) not in self.hub.repositories:
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif (found := self.hub.files(kind, name, revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return found
        return None

    def _api(self, found, body):
        kind, name, what = found["kind"], found["name"], found["what"]
        revision, _, folder = (found["rest"] or "").partition("/")
        if (there := self._found(kind, name, revision or None)) is None:
            return
        commit, files = there
        if what == "tree":
            below = [path for path in files if not folder or path.startswith(f"{folder}/")]
            if below:
                self._answer([described(path, files[path]) for path in below])
            else:
                self._refuse(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        elif what == "paths-info":
            asked = parse_qs(body).get("paths") or json.loads(body or "{}").get("paths", [])
            self._answer([described(path, files[path]) for path in asked if path in files])
        else:
            siblings = [{"rfilename": path} for path in files]
            self._answer(dict(id=name, sha=commit, private=False, gated=False, disabled=False, tags=[], downloads=0,
                              likes=0, siblings=siblings, author=name.split("/")[0]))  # fmt: skip

    def _file(self, found):
        there = self._found(found["kind"] or "models", found["name"], found["revision"])
        if there is None:
            return
        commit, files = there
        if found["file"] not in files:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        content = files[found["file"]]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        self._send(206 if wanted else 200, content, headers)

    def _answer(self, data):
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status, code, message, headers=None):
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def _send(self, status, content, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def described(path, content):
    return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": path}
