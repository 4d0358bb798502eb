"""A model hub on 127.0.0.1, in memory: as much of one as `huggingface_hub` calls to make, fill and read a repository.

It checks the token, the hashes and the sizes. Faults are planted with `fail`: an answer, or a connection that is cut.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "loopback-token"
REPO = r"((?:datasets/)?[\w.-]+/[\w.-]+)"  # a data set is kept under its name with `datasets/` before it


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repo:
    def __init__(self, private):
        self.private = private
        self.branches = {"main": {}}  # revision -> {path: (content, is_lfs)}
        self.commits = []  # (revision, message)

    def sha(self, revision):
        files = sorted((path, sha256(content)) for path, (content, _) in self.branches[revision].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()


class Fault(Exception):
    """An answer other than success."""

    def __init__(self, status, code="", message=""):
        super().__init__(message)
        self.status = status
        self.headers = {k: v for k, v in (("X-Error-Code", code), ("X-Error-Message", message)) if v}


class LoopbackHub:
    """State and faults of the server; `url` is what HF_ENDPOINT is set to."""

    def __init__(self):
        self.repos, self.lfs, self.requests, self.planted = {}, {}, Counter(), []
        self.lock = threading.RLock()

    def fail(self, method, path, status=None, times=1, message="", code=""):
        """Answer `status` at the next `times` requests that match, or cut the connection if None."""
        self.planted.append([method, re.compile(path), status, times, message, code])

    def files(self, repo_id, revision="main"):
        return {path: content for path, (content, _) in self.repos[repo_id].branches[revision].items()}

    def take_fault(self, method, path):
        for fault in self.planted:
            if fault[0] == method and fault[3] > 0 and fault[1].search(path):
                fault[3] -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args):
        pass

    def handle_any(self):
        parts = urlsplit(self.path)
        self.query, path, size = parse_qs(parts.query), unquote(parts.path), int(self.headers.get("Content-Length", 0))
        with self.hub.lock:
            self.hub.requests[f"{self.command} {path}"] += 1
            fault = self.hub.take_fault(self.command, path)
        if fault is not None and fault[2] is None:
            self.rfile.read(min(64, size))  # cut in the middle of the body
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(size)
        try:
            if fault is not None:
                raise Fault(fault[2], fault[5], fault[4])
            with self.hub.lock:
                self.route(re.sub("^/api/datasets/", "/api/models/datasets/", parts.path))
        except Fault as refusal:
            self.answer({"error": str(refusal)}, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def route(self, path):
        for method, pattern, action in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return action(self, *(unquote(group or "") for group in match.groups()))
        raise Fault(404, message=f"the loopback hub does not know {self.command} {path}")

    def answer(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def is_known(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ") == TOKEN

    def check_writer(self):
        if not self.is_known():
            raise Fault(401, message="Invalid credentials in Authorization header")

    def branch(self, repo_id, revision="main"):
        """A repository, and the name of the branch that a name or a commit stands for."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.is_known()):
            raise Fault(404 if self.is_known() else 401, "RepoNotFound", "Repository not found")
        for name in repo.branches:
            if revision in (name, repo.sha(name)):
                return repo, name
        raise Fault(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # Writing

    def validate_yaml(self):
        import yaml

        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        errors = [] if isinstance(metadata, dict) else [{"message": "the metadata is no mapping"}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self):
        self.check_writer()
        request = json.loads(self.body)
        kind = "datasets/" if request.get("type") == "dataset" else ""
        repo_id = f"{kind}{request.get('organization') or 'me'}/{request['name']}"
        exists = repo_id in self.hub.repos
        if not exists:
            self.hub.repos[repo_id] = Repo(request.get("visibility") == "private" or bool(request.get("private")))
        self.answer({"url": f"{self.hub.url}/{repo_id}"}, 409 if exists else 200)

    def create_branch(self, repo_id, name):
        self.check_writer()
        repo, main = self.branch(repo_id)
        if name in repo.branches:
            raise Fault(409, message="Reference already exists")
        repo.branches[name] = dict(repo.branches[main])
        self.answer({})

    def preupload(self, repo_id, revision):
        self.check_writer()
        repo, name = self.branch(repo_id, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            content, is_lfs = repo.branches[name].get(file["path"], (None, False))
            oid = None if content is None else sha256(content) if is_lfs else git_oid(content)
            mode = "lfs" if file["path"].endswith((".safetensors", ".png", ".parquet")) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def lfs_batch(self, repo_id):
        self.check_writer()
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.lfs:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if sha256(self.body) != oid:
            raise Fault(400, message="the content is not what its hash says")
        self.hub.lfs[oid] = self.body
        self.answer({})

    def commit(self, repo_id, revision):
        self.check_writer()
        repo, name = self.branch(repo_id, revision)
        header, *lines = map(json.loads, self.body.splitlines())
        files = dict(repo.branches[name])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif value["oid"] in self.hub.lfs:
                files[value["path"]] = (self.hub.lfs[value["oid"]], True)
            else:
                raise Fault(400, message=f"{value['path']} was never uploaded")
        url, number = f"{self.hub.url}/{repo_id}", len(repo.branches)
        is_pull_request = self.query.get("create_pr") == ["1"]
        name = f"refs/pr/{number}" if is_pull_request else name
        repo.branches[name] = files
        repo.commits.append((name, header["value"]["summary"]))
        made = {"commitUrl": f"{url}/commit/{repo.sha(name)}", "commitOid": repo.sha(name)}
        self.answer(made | {"pullRequestUrl": f"{url}/discussions/{number}" if is_pull_request else None})

    # Reading

    def info(self, repo_id, revision="main"):
        repo, name = self.branch(repo_id, revision)
        siblings = [{"rfilename": path} for path in repo.branches[name]]
        repo_id = repo_id.removeprefix("datasets/")
        content = {"_id": "0", "id": repo_id, "modelId": repo_id, "private": repo.private, "sha": repo.sha(name)}
        self.answer({**content, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo_id, revision, folder=""):
        repo, name = self.branch(repo_id, revision)
        listing = []
        for path, (content, is_lfs) in repo.branches[name].items():
            if path.startswith(folder):
                entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
                lfs = {"oid": sha256(content), "size": len(content), "pointerSize": 1}
                listing.append({**entry, "lfs": lfs} if is_lfs else entry)
        if folder and not listing:
            raise Fault(404, "EntryNotFound", "no such folder")
        self.answer(listing)

    def resolve(self, repo_id, revision, path):
        repo, name = self.branch(repo_id, revision)
        headers = {"X-Repo-Commit": repo.sha(name)}
        if path not in repo.branches[name]:
            self.answer(b"", 404, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        content, _ = repo.branches[name][path]
        headers |= {"ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        self.answer(content, 200, headers | {"Content-Type": "application/octet-stream"})


ROUTES = [
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", rf"/api/models/{REPO}/branch/([^/]+)", Handler.create_branch),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Handler.lfs_put),
    ("GET", rf"/api/models/{REPO}(?:/revision/([^/]+))?", lambda self, repo, name: self.info(repo, name or "main")),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET", rf"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def loopback_hub():
    """A running hub; it ends with the block."""
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
