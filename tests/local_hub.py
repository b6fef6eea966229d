"""A small local stand-in for the Hugging Face Hub, used by the real client over HTTP, with faults that tests can set.

It has users, repositories of all types, commits, branches, pull requests and large files (git-LFS). It keeps them in
memory, even while it is down.
"""

import base64
import hashlib
import json
import re
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, RLock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = 100_000  # bytes; files of this size or more, and all weights, are stored as large files
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "other", "unknown")
NOW = "2026-01-01T00:00:00.000Z"


class Refused(Exception):
    """A response with a status other than 200."""

    def __init__(self, status: int, message: str = "", code: str = "", **more: str):
        self.status, self.message, self.code, self.more = status, message, code, more


class Cut(Exception):
    """A connection that is closed without a response."""


@dataclass
class Fault:
    """An error in the next `times` requests that match a pattern such as `POST /api/...`.

    Attributes:
        instead: status that is returned instead of handling the request.
        headers: headers of that response.
        lost: the request is handled, but there is no response.
        halved: the request is handled, but the response ends in the middle.
        late: the request is handled, but the response comes after this many seconds.
        dies: the server stops after reading this many bytes of the request body.
    """

    pattern: str
    times: int = 1
    instead: int | None = None
    headers: dict = field(default_factory=dict)
    lost: bool = False
    halved: bool = False
    late: float = 0
    dies: int | None = None


@dataclass
class Repo:
    owner: str
    private: bool
    commits: dict = field(default_factory=dict)  # by commit: files by path
    refs: dict = field(default_factory=dict)  # by branch or pull request: its commits, oldest first
    requests: list = field(default_factory=list)  # pull requests
    gated: bool = False
    settings: dict = field(default_factory=dict)
    variables: dict = field(default_factory=dict)


class LocalHub:
    """A server that runs until the end of the `with` block.

    Attributes:
        users: name and role by token.
        repos: by type and id.
        large: contents of large files by their SHA-256.
        requests: requests so far, as `POST /api/...`.
        faults: errors in future requests.
        shares_names: whether models, datasets and Spaces share one namespace; on the real Hub they do not.
    """

    def __init__(self):
        self.users = {"hf_ann": ("ann", "write"), "hf_ann_reads": ("ann", "read"), "hf_bob": ("bob", "write")}
        self.repos, self.large, self.requests, self.faults = {}, {}, [], []
        self.lock, self.port, self.up = RLock(), 0, False
        self.shares_names = False

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        if self.up:
            self.stop()

    def start(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Bound", (Handler,), {"hub": self}))
        self.port, self.up = self.server.server_port, True
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self.up = False
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, pattern: str, **how) -> None:
        self.faults.append(Fault(pattern, **how))

    def asked(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, request)) for request in self.requests)

    def files(self, repo_id: str, ref: str = "main", kind: str = "model") -> dict[str, bytes]:
        repo = self.repos[kind, repo_id]
        return dict(repo.commits[repo.refs[ref][-1]]) if ref in repo.refs else dict(repo.commits[ref])

    def add(self, repo_id: str, kind: str = "model", private: bool = False, **files: bytes) -> None:
        repo = self.repos[kind, repo_id] = Repo(repo_id.split("/")[0], private)
        repo.refs["main"] = []
        self.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n", **files})

    def commit(self, repo: Repo, ref: str, files: dict[str, bytes]) -> str:
        state = repr((len(repo.commits), ref, sorted((name, blob_id(content)) for name, content in files.items())))
        oid = hashlib.sha1(state.encode()).hexdigest()
        repo.commits[oid] = files
        repo.refs[ref].append(oid)
        return oid

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            fault = next((fault for fault in self.faults if fault.times and re.match(fault.pattern, request)), None)
            if fault:
                fault.times -= 1
            return fault


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    return size >= LARGE or path.endswith(".safetensors")


def entry(path: str, content: bytes) -> dict:
    """Return a file as the Hub lists it."""
    if not is_large(path, len(content)):
        return {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    digest = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
    lfs = {"oid": digest, "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(content), "oid": blob_id(pointer), "lfs": lfs}


def card_errors(text: str) -> list[str]:
    """Return the errors for which the Hub rejects the metadata of a card, according to its documentation."""
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"]
    errors = []
    if (name := data.get("license")) not in (*LICENSES, None):
        errors.append(f'"license" must be one of the known ones, not {name}')
    if data.get("license") != "other" and ("license_name" in data or "license_link" in data):
        errors.append('"license_name" and "license_link" go with "license: other"')
    for name in ("base_model", "datasets"):
        values = data.get(name, [])
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
                errors.append(f'"{name}" must be the id of a repository, not {value}')
    if data.get("base_model_relation") not in ("finetune", "adapter", "merge", "quantized", None):
        errors.append('"base_model_relation" is not one of the known ones')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be strings')
    for model in data.get("model-index", []):
        for result in model["results"]:
            if "type" not in result["task"] or not {"name", "type"} <= result["dataset"].keys():
                errors.append('"model-index": a result needs a task.type, a dataset.name and a dataset.type')
            if not all({"type", "value"} <= metric.keys() for metric in result["metrics"]):
                errors.append('"model-index": a metric needs a type and a value')
    return errors


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: LocalHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        address = urlsplit(self.path)
        self.url_path, self.query = unquote(address.path), parse_qs(address.query)
        request = f"{self.command} {self.url_path}"
        fault = self.hub.take_fault(request)
        try:
            if not self.hub.up:
                raise Cut
            self.hub.requests.append(request)
            self.body = self.read_body(fault)
            if fault and fault.instead:
                self.answer(fault.instead, b'{"error": "This does not work just now."}', fault.headers)
                return
            try:
                with self.hub.lock:
                    status, content, headers = 200, *self.dispatch()
            except Refused as refusal:
                status, content = refusal.status, json.dumps({"error": refusal.message, **refusal.more}).encode()
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            if fault and fault.lost:
                raise Cut
            if fault:
                Event().wait(fault.late)
            self.answer(status, content, headers, halved=bool(fault and fault.halved))
        except (Cut, ConnectionError):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_POST = do_PUT = do_GET

    def read_body(self, fault: Fault | None) -> bytes:
        if fault and fault.dies is not None:
            self.rfile.read(fault.dies)
            self.hub.stop()
            raise Cut
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, content: bytes, headers: dict, halved: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            if value not in ("", None):
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if halved else content)
        if halved:
            raise Cut

    def user(self) -> tuple[str | None, str | None]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token, (None, None))

    def repo(self, kind: str, repo_id: str, to_write: bool = False) -> Repo:
        name, role = self.user()
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and name != repo.owner):
            raise Refused(404 if name else 401, "Repository not found", "RepoNotFound")
        if repo.gated and name != repo.owner:
            raise Refused(403 if name else 401, f"Access to {kind} {repo_id} is restricted.", "GatedRepo")
        if to_write and (name != repo.owner or role == "read"):
            raise Refused(403, "You do not have the rights to write to this repository")
        return repo

    def at(self, repo: Repo, revision: str) -> str:
        if revision in repo.refs:
            return repo.refs[revision][-1]
        if revision in repo.commits:
            return revision
        raise Refused(404, "Invalid rev id", "RevisionNotFound")

    def dispatch(self) -> tuple[bytes, dict]:
        kinds = {"models": "model", "datasets": "dataset", "spaces": "space"}
        for verb, pattern, action in ROUTES:
            if verb == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, self.url_path)):
                named = match.groupdict()
                named["kind"] = kinds[(named.get("kind") or "models").strip("/")]
                args = [named[name] for name in ("kind", "repo", "rest") if name in named and "repo" in named]
                result = getattr(self, action)(*args)
                return result if isinstance(result, tuple) else (json.dumps(result).encode(), {})
        raise Refused(404, f"no such page: {self.command} {self.url_path}", "EntryNotFound")

    def whoami(self):
        name, role = self.user()
        if name is None:
            raise Refused(401, "Invalid username or password.")
        return {"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}}

    def validate(self):
        errors = card_errors(json.loads(self.body)["content"])
        if errors:
            raise Refused(400, "; ".join(errors))
        return {"errors": [], "warnings": []}

    def create(self):
        request = json.loads(self.body)
        name, role = self.user()
        owner, kind = request.get("organization") or name, request.get("type", "model")
        repo_id = f"{owner}/{request['name']}"
        if name is None or owner != name or role == "read":
            raise Refused(403, f"You do not have the rights to create a {kind} under the namespace {owner}")
        taken = [existing for existing, other in self.hub.repos if other == repo_id]
        taken = [existing for existing in taken if existing == kind or self.hub.shares_names]
        if taken:
            raise Refused(409, f"You already created this {taken[0]} repo", url=self.address(taken[0], repo_id))
        if kind == "space" and not request.get("sdk"):
            raise Refused(400, "a Space needs an sdk")
        self.hub.add(repo_id, kind, private=request.get("visibility") == "private" or bool(request.get("private")))
        self.hub.repos[kind, repo_id].settings = request
        return {"url": self.address(kind, repo_id)}

    def address(self, kind, repo_id):
        return f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"

    def info(self, kind, repo_id, revision=None):
        repo = self.repo(kind, repo_id)
        head = self.at(repo, revision or "main")
        files = [{"rfilename": path} for path in repo.commits[head]]
        return {"id": repo_id, "sha": head, "private": repo.private, "siblings": files, "tags": [], "downloads": 0}

    def tree(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id)
        return [entry(*file) for file in repo.commits[self.at(repo, revision)].items()]

    def paths_info(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id)
        files = repo.commits[self.at(repo, revision)]
        return [entry(path, files[path]) for path in parse_qs(self.body.decode())["paths"] if path in files]

    def branch(self, kind, repo_id, name):
        repo = self.repo(kind, repo_id, to_write=True)
        if name in repo.refs:
            raise Refused(409, "Reference already exists")
        repo.refs[name] = list(repo.refs["main"])
        return {}

    def preupload(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id, to_write="create_pr" not in self.query)
        files, answers = repo.commits[self.at(repo, revision)], []
        for file in json.loads(self.body)["files"]:
            path, large = file["path"], is_large(file["path"], file["size"])
            existing = entry(path, files[path]) if path in files else {}
            oid = existing.get("lfs", existing).get("oid")
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def batch(self, kind, repo_id):
        self.repo(kind, repo_id)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            href = f"{self.hub.url}/storage/{wanted['oid']}"
            upload = {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}
            answers.append({**wanted, **({} if wanted["oid"] in self.hub.large else upload)})
        return {"transfer": "basic", "objects": answers}

    def store(self, _kind, _storage, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content does not match its SHA-256")
        self.hub.large[oid] = self.body
        return {}

    def verify(self, _kind, _storage, oid):
        if oid not in self.hub.large or len(self.hub.large[oid]) != json.loads(self.body)["size"]:
            raise Refused(404, "the object does not exist")
        return {}

    def commit(self, kind, repo_id, revision):
        as_request = "create_pr" in self.query
        repo = self.repo(kind, repo_id, to_write=not as_request)
        header, *operations = map(json.loads, self.body.splitlines())
        head = self.at(repo, revision)
        if header["value"].get("parentCommit", head) != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refused(400, f"the large file {value['path']} was not uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                raise Refused(400, f"no {operation['key']} here")
        url, answer = self.address(kind, repo_id), {}
        if as_request:
            number = len(repo.requests) + 1
            revision = f"refs/pr/{number}"
            repo.refs[revision] = list(repo.refs["main"])
            about = {"num": number, "title": header["value"]["summary"], "author": {"name": self.user()[0]}}
            about |= {
                "createdAt": NOW,
                "status": "open",
                "isPullRequest": True,
                "repo": {"name": repo_id, "type": kind},
            }
            repo.requests.append(about)
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        oid = self.hub.commit(repo, revision, files)
        return {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, **answer}

    def discussions(self, kind, repo_id):
        author = self.query.get("author", [None])[0]
        requests = [about for about in self.repo(kind, repo_id).requests if about["author"]["name"] == author]
        return {"count": len(requests), "start": 0, "discussions": requests}

    def set_variable(self, kind, repo_id):
        variables = self.repo(kind, repo_id, to_write=True).variables
        request = json.loads(self.body)
        variables[request["key"]] = {"value": request["value"]}
        return {name: {"key": name, **value} for name, value in variables.items()}

    def resolve(self, kind, repo_id, rest):
        revision, path = rest.split("/", 1)
        repo = self.repo(kind, repo_id)
        head = self.at(repo, revision)
        if path not in repo.commits[head]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = repo.commits[head][path]
        about = entry(path, content)
        return content, {"ETag": f'"{about.get("lfs", about)["oid"]}"', "X-Repo-Commit": head}


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
_PAGE = r"/(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+?)"
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", "/api/repos/create", "create"),
    ("GET", _API, "info"),
    ("GET", f"{_API}/revision/(?P<rest>.+)", "info"),
    ("GET", f"{_API}/tree/(?P<rest>.+)", "tree"),
    ("POST", f"{_API}/paths-info/(?P<rest>.+)", "paths_info"),
    ("POST", f"{_API}/branch/(?P<rest>.+)", "branch"),
    ("POST", f"{_API}/preupload/(?P<rest>.+)", "preupload"),
    ("POST", f"{_API}/commit/(?P<rest>.+)", "commit"),
    ("GET", f"{_API}/discussions", "discussions"),
    ("POST", f"{_API}/variables", "set_variable"),
    ("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/(?P<repo>storage)/(?P<rest>[0-9a-f]{64})", "store"),
    ("POST", "/(?P<repo>storage)/(?P<rest>[0-9a-f]{64})/verify", "verify"),
    ("GET", f"{_PAGE}/resolve/(?P<rest>.+)", "resolve"),
)
