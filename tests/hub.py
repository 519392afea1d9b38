"""A loopback server for pushing and loading models and datasets as with the Hugging Face Hub.

    with Hub() as hub:
        hub.add_repo("user/shapes", folder, repo_type="dataset")
        subprocess.run([sys.executable, "train.py", "--push_to_hub"], env=hub.environment("hf_test_write"), check=True)
        weights = hub.files("user/model")["unet/diffusion_pytorch_model.safetensors"]

It speaks the part of the Hub's HTTP API that this takes: whoami; creation, info, trees, references and history of
repositories; `resolve` with ranges; preupload, LFS, commits and branches; the check of a card's metadata. Clients reach
it through HF_ENDPOINT, which `huggingface_hub` reads at import: a client is a process of its own, or passes
`endpoint=hub.url`. Xet is not spoken, and a client that has `hf_xet` uploads through nothing else unless
HF_HUB_DISABLE_XET is set. Repositories are kept in memory; they start with an empty commit, where the Hub's start with
one that adds `.gitattributes`.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_test_write": "write", "hf_test_read": "read"}
LFS_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pkl", ".png", ".jpg", ".parquet", ".arrow")
LFS_MIN_SIZE = 1000
LOCAL_VARIABLES = re.compile(r"HF_|HUGGING|TRANSFORMERS_|DIFFUSERS_CACHE|.*_proxy$", re.IGNORECASE)
FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", re.DOTALL)
# The Hub's rule for these fields of a card is the form of the id, not that the repository exists.
CARD_IDS = {
    "base_model": "Use a model id from https://hf.co/models.",
    "datasets": "Use a dataset id from https://hf.co/datasets.",
}
REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Reply(NamedTuple):
    status: int
    body: bytes = b""
    headers: dict = {}

    @classmethod
    def json(cls, data, status=200, headers=None):
        return cls(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})


class Refused(Exception):
    """An error in the Hub's form: the message in the body and in a header, and the code `huggingface_hub` tells by."""

    def __init__(self, status, message, code=None, headers=None):
        super().__init__(message)
        message = " ".join(message.encode("ascii", "replace").decode().split())
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.reply = Reply.json({"error": message}, status, headers)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict
    token: str | None
    range: str | None
    body: bytes

    @property
    def segments(self):
        return [unquote(segment) for segment in self.path.strip("/").split("/")]


# ----------------------------------------------------------------------------------------------------------------------
# Repositories
# ----------------------------------------------------------------------------------------------------------------------


def is_lfs(path, size):
    return path.endswith(LFS_SUFFIXES) and size > LFS_MIN_SIZE


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def size(self):
        return len(self.content)

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self):
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def blob_id(self):
        """Git's id of what git stores: the content, or for LFS the pointer to it."""
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.lfs else self.blob_id

    def lfs_info(self, name):
        """What replies tell about an LFS file; they disagree on the name of the SHA-256."""
        return {"lfs": {name: self.sha256, "size": self.size, "pointerSize": len(self.pointer)}} if self.lfs else {}


@dataclass(frozen=True)
class Commit:
    files: dict
    title: str
    message: str = ""
    parent: str | None = None
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    @cached_property
    def id(self):
        tree = sorted((path, file.blob_id) for path, file in self.files.items())
        return hashlib.sha1(repr((self.parent, self.title, self.message, tree)).encode()).hexdigest()


class Repo:
    def __init__(self, repo_type, repo_id, private=False):
        self.type, self.id, self.private = repo_type, repo_id, private
        self.commits, self.branches = {}, {}
        self.objects, self.expected = {}, set()  # the LFS files by SHA-256, and the SHA-256 of those to be uploaded
        self.commit("main", {}, "initial commit")

    @property
    def owner(self):
        return self.id.split("/")[0]

    @property
    def url_path(self):
        return f"datasets/{self.id}" if self.type == "dataset" else self.id

    def commit(self, branch, files, title, message="", parent=None):
        commit = Commit(files, title, message, parent)
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        self.objects |= {file.sha256: file for file in files.values() if file.lfs}
        return commit

    def at(self, revision):
        """The commit of a branch or of a full commit id."""
        commit_id = self.branches.get(revision, revision)
        if commit_id not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit_id]

    def history(self, revision="main"):
        """The commits that led to a revision, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits


# ----------------------------------------------------------------------------------------------------------------------
# Replies
# ----------------------------------------------------------------------------------------------------------------------


def info(repo, commit, blobs):
    """The reply of /api/models/{id} and /api/datasets/{id}."""
    siblings = [{"rfilename": path} for path in commit.files]
    if blobs:
        for sibling, file in zip(siblings, commit.files.values(), strict=True):
            sibling |= {"size": file.size, "blobId": file.blob_id, **file.lfs_info("sha256")}
    return {
        "id": repo.id,
        "author": repo.owner,
        "sha": commit.id,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "createdAt": repo.history(commit.id)[-1].date,
        "lastModified": commit.date,
        "tags": [],
        "siblings": siblings,
    }


def tree(commit, folder="", recursive=True):
    """The entries below a folder, as the replies of /tree and /paths-info list them."""
    below = f"{folder}/" if folder else ""
    last = {"lastCommit": {"id": commit.id, "title": commit.title, "date": commit.date}}
    entries = {}
    for path, file in sorted(commit.files.items()):
        if not path.startswith(below):
            continue
        parts = path.removeprefix(below).split("/")
        for depth in range(1, len(parts)):
            parent = below + "/".join(parts[:depth])
            oid = hashlib.sha1(parent.encode()).hexdigest()
            entries[parent] = {"type": "directory", "oid": oid, "size": 0, "path": parent, **last}
        entries[path] = {"type": "file", "oid": file.blob_id, "size": file.size, "path": path, **last}
        entries[path] |= file.lfs_info("oid")
    if folder and not entries:
        raise Refused(404, f"{folder} does not exist on this revision", "EntryNotFound")
    return [entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(below)]


def card_problems(content):
    """Errors and warnings about the metadata of a README.md: the syntax and the form of repository ids in it."""
    block = FRONT_MATTER.match(content)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if not isinstance(metadata, dict):
        return ["The metadata is not a mapping"], []
    errors = []
    for key, advice in CARD_IDS.items():
        values = metadata.get(key) or []
        for index, value in enumerate(values if isinstance(values, list) else [values]):
            if not isinstance(value, str) or not REPO_ID.fullmatch(value):
                errors.append(f'"{key}[{index}]" with value "{value}" is not valid. {advice}')
    return errors, []


def ranged(content, spec, headers):
    """The reply to a GET of `content`, or of the part that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", spec or "")
    if match is None or not any(match.groups()):
        return Reply(200, content, headers)
    size = len(content)
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        return Reply(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
    return Reply(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


# ----------------------------------------------------------------------------------------------------------------------
# The server
# ----------------------------------------------------------------------------------------------------------------------


class Hub:
    """The server; it listens from `__enter__` to `__exit__`.

    Args:
        tokens: what each token may do, {token: "write" or "read"}. All belong to `user`.
        user: the name that owns the tokens, and the only namespace that they may write to.

    Attributes:
        url: the endpoint.
        requests: (method, path without the query, status) of each request, in the order of the replies; the status of a
            connection that was closed is "break", "drop" or "lose".
        tokens_seen: the tokens that requests carried, known or not.
        fail: called with the method and path of each request; returns None to serve it, a status or a `Reply` to refuse
            it with, ("slow", seconds) to serve it so much later, or how to close the connection: "break" halfway
            through the request's body or, where it has none, the reply's; "drop" without a reply to a request that is
            not heeded; "lose" without a reply to one that is.
    """

    def __init__(self, tokens=None, user="user"):
        self.tokens = dict(TOKENS if tokens is None else tokens)
        self.user = user
        self.repos = {}
        self.requests = []
        self.tokens_seen = set()
        self.fail = lambda method, path: None
        self.lock = threading.Lock()

    def __enter__(self):
        self.home = tempfile.TemporaryDirectory(prefix="hub-")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.home.cleanup()

    def environment(self, token=None):
        """The complete environment of a client process, with a cache of its own that the clients of this hub share."""
        # A variable set for the real Hub (a token, a cache, a proxy, offline mode) must not reach the client.
        ours = {name: value for name, value in os.environ.items() if not LOCAL_VARIABLES.match(name)}
        ours |= {"HF_ENDPOINT": self.url, "HF_HOME": self.home.name, "HF_HUB_OFFLINE": "0"}
        ours |= {"HF_DATASETS_CACHE": os.path.join(self.home.name, "datasets")}
        ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return ours if token is None else ours | {"HF_TOKEN": token}

    def add_repo(self, repo_id, folder, repo_type="model", private=False, revision="main"):
        """Commits the files of a folder, and nothing else, to a new or known repository; returns the commit's id."""
        folder = Path(folder)
        contents = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        files = {path: File(content, is_lfs(path, len(content))) for path, content in contents.items()}
        with self.lock:
            repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_type, repo_id, private))
            parent = repo.branches.get(revision, repo.branches["main"])
            return repo.commit(revision, files, "Add files", parent=parent).id

    def repo(self, repo_id, repo_type="model"):
        return self.repos[repo_type, repo_id]

    def files(self, repo_id, repo_type="model", revision="main"):
        """{path: content} of a repository; KeyError where there is none."""
        with self.lock:
            return {path: file.content for path, file in self.repo(repo_id, repo_type).at(revision).files.items()}

    # ------------------------------------------------------------------------------------------------------------------
    # Routes
    # ------------------------------------------------------------------------------------------------------------------

    def answer(self, request):
        try:
            with self.lock:
                return self.route(request)
        except Refused as refused:
            return refused.reply
        except (KeyError, TypeError, ValueError) as error:
            return Refused(400, f"Malformed request: {error!r}").reply

    def route(self, request):
        if request.token is not None and request.token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        match [request.method, *request.segments]:
            case ["GET", "api", "agent-harnesses"]:  # asked for once by every client that has a new HF_HOME
                return Reply.json({"standardEnvVars": [], "harnesses": {}})
            case ["GET", "api", "whoami-v2"]:
                return self.whoami(request)
            case ["POST", "api", "validate-yaml"]:
                errors, warnings = card_problems(json.loads(request.body)["content"])
                messages = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
                return Reply.json(messages, 400 if errors else 200)
            case ["POST", "api", "repos", "create"]:
                return self.create_repo(request)
            case [method, "api", "models" | "datasets" as kind, namespace, name, *call]:
                return self.route_api(request, kind.removesuffix("s"), f"{namespace}/{name}", [method, *call])
            case ["PUT", "lfs", repo_type, namespace, name, oid]:
                return self.lfs_upload(request, self.repo(f"{namespace}/{name}", repo_type), oid)
            case [method, "datasets", namespace, name, *call]:
                return self.route_files(request, "dataset", f"{namespace}/{name}", [method, *call])
            case [method, namespace, name, *call]:
                return self.route_files(request, "model", f"{namespace}/{name}", [method, *call])
        raise Refused(501, "Not spoken by this server")

    def route_api(self, request, repo_type, repo_id, call):
        writes = call[:2] in (["POST", "branch"], ["POST", "preupload"], ["POST", "commit"], ["GET", "auth-check"])
        repo = self.find(request, repo_type, repo_id, write=writes)
        match call:
            case ["GET"] | ["GET", "revision", _]:
                commit = repo.at(call[2] if len(call) > 1 else "main")
                return Reply.json(info(repo, commit, blobs="blobs" in request.query))
            case ["GET", "auth-check", "write"]:
                return Reply.json({})
            case ["GET", "tree", revision, *path]:
                recursive = request.query.get("recursive") == ["true"]
                return Reply.json(tree(repo.at(revision), "/".join(path), recursive))
            case ["POST", "paths-info", revision]:
                paths = parse_qs(request.body.decode()).get("paths", [])
                return Reply.json([entry for entry in tree(repo.at(revision)) if entry["path"] in paths])
            case ["GET", "refs"]:
                refs = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in repo.branches.items()]
                return Reply.json({"branches": refs, "tags": [], "converts": [], "pullRequests": []})
            case ["GET", "commits", revision]:
                shared = {"authors": [{"user": repo.owner}]}
                keys = ("id", "title", "message", "date")
                return Reply.json([{k: getattr(c, k) for k in keys} | shared for c in repo.history(revision)])
            case ["POST", "branch", branch]:
                if branch in repo.branches:
                    raise Refused(409, f"Reference refs/heads/{branch} already exists")
                repo.branches[branch] = repo.at(json.loads(request.body).get("startingPoint", "main")).id
                return Reply.json({})
            case ["POST", "preupload", revision]:
                return self.preupload(request, repo.at(revision))
            case ["POST", "commit", branch]:
                return self.commit(request, repo, branch)
        raise Refused(501, "Not spoken by this server")

    def route_files(self, request, repo_type, repo_id, call):
        match call:
            case ["GET" | "HEAD", "resolve", revision, *path]:
                return self.resolve(request, self.find(request, repo_type, repo_id).at(revision), "/".join(path))
            case ["POST", "info", "lfs", "objects", "batch"]:
                repo = self.find(request, repo_type, repo_id.removesuffix(".git"), write=True)
                return self.lfs_batch(json.loads(request.body)["objects"], repo)
            case ["POST", "info", "lfs", "objects", "verify"]:
                repo = self.find(request, repo_type, repo_id.removesuffix(".git"), write=True)
                return Reply(200 if json.loads(request.body)["oid"] in repo.objects else 404)
        raise Refused(501, "Not spoken by this server")

    # ------------------------------------------------------------------------------------------------------------------
    # Users and repositories
    # ------------------------------------------------------------------------------------------------------------------

    def whoami(self, request):
        if request.token is None:
            raise Refused(401, "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.tokens[request.token]}}
        return Reply.json({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": access})

    def may_write(self, request, repo_id):
        return self.tokens.get(request.token) == "write" and repo_id.split("/")[0] == self.user

    def find(self, request, repo_type, repo_id, write=False):
        """The repository that a request names, if the token may see it and, with `write`, change it."""
        repo = self.repos.get((repo_type, repo_id))
        hidden = repo is None or repo.private and (request.token is None or repo.owner != self.user)
        if request.token is None and (hidden or write):
            # Over https the client takes any such 401 to mean a missing repository; over http it has to be told.
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        if hidden:
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and not self.may_write(request, repo_id):
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    def create_repo(self, request):
        wanted = json.loads(request.body)
        repo_type = wanted.get("type") or "model"
        repo_id = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if repo_type not in ("model", "dataset"):
            raise Refused(501, "Not spoken by this server")
        if request.token is None:
            raise Refused(401, "Invalid username or password.")
        if not self.may_write(request, repo_id):
            namespace = repo_id.split("/")[0]
            raise Refused(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"')
        # The older name of `visibility` is what a client of huggingface_hub 0.x sends.
        repo = Repo(repo_type, repo_id, private=wanted.get("visibility") == "private" or wanted.get("private", False))
        known = self.repos.setdefault((repo_type, repo_id), repo)
        reply = {"url": f"{self.url}/{repo.url_path}", "name": repo_id, "id": repo_id, "private": known.private}
        if known is not repo:
            # With exist_ok the client reads the URL from this refusal.
            return Reply.json({"error": f"You already created this {repo_type} repo", **reply}, 409)
        return Reply.json(reply)

    # ------------------------------------------------------------------------------------------------------------------
    # Downloads
    # ------------------------------------------------------------------------------------------------------------------

    def resolve(self, request, commit, path):
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.id})
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        return ranged(file.content, request.range, headers)

    # ------------------------------------------------------------------------------------------------------------------
    # Uploads: preupload tells LFS from regular files, LFS contents are sent on their own, commit names and joins all
    # ------------------------------------------------------------------------------------------------------------------

    def preupload(self, request, commit):
        replies = []
        for file in json.loads(request.body)["files"]:
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            reply = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            # The client leaves a file out of the commit when this id is that of its own.
            known = commit.files.get(file["path"])
            replies.append(reply | ({"oid": known.etag} if known else {}))
        return Reply.json({"files": replies, "commitOid": commit.id})

    def lfs_batch(self, objects, repo):
        replies = []
        for wanted in objects:
            oid = wanted["oid"]
            reply = {"oid": oid, "size": wanted["size"]}
            if oid not in repo.objects:
                repo.expected.add(oid)
                upload = {"href": f"{self.url}/lfs/{repo.type}/{repo.id}/{oid}"}
                verify = {"href": f"{self.url}/{repo.url_path}.git/info/lfs/objects/verify"}
                reply["actions"] = {"upload": upload, "verify": verify}
            replies.append(reply)
        return Reply.json({"transfer": "basic", "objects": replies})

    def lfs_upload(self, request, repo, oid):
        # The request carries no token: like the Hub's signed URLs, having been told the URL is the permission.
        if oid not in repo.expected:
            raise Refused(403, "Request has expired")
        file = File(request.body, lfs=True)
        if file.sha256 != oid:
            raise Refused(400, "The content does not have the announced SHA-256")
        repo.objects[oid] = file
        return Reply(200, headers={"ETag": f'"{oid}"'})

    def commit(self, request, repo, branch):
        if "create_pr" in request.query:
            raise Refused(501, "Not spoken by this server: pull requests")
        if branch not in repo.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent = repo.at(branch)
        files = dict(parent.files)
        header = {}
        for line in request.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            path = value.get("path")
            match key:
                case "header":
                    header = value
                case "file":
                    files[path] = File(base64.b64decode(value["content"], validate=True), lfs=False)
                case "lfsFile":
                    if value["oid"] not in repo.objects:
                        raise Refused(400, f"LFS object {value['oid']} was not uploaded")
                    files[path] = repo.objects[value["oid"]]
                case "deletedFile" | "deletedFolder":
                    folder = path.rstrip("/") + "/" if key == "deletedFolder" else None
                    gone = [known for known in files if known == path or folder and known.startswith(folder)]
                    if not gone:
                        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                    files = {known: file for known, file in files.items() if known not in gone}
                case _:
                    raise Refused(501, f"Not spoken by this server: {key}")
        if header.get("parentCommit", parent.id) != parent.id:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        if "README.md" in files and files["README.md"] != parent.files.get("README.md"):
            errors, _ = card_problems(files["README.md"].content.decode())
            if errors:
                raise Refused(400, errors[0])
        commit = repo.commit(branch, files, header["summary"], header.get("description", ""), parent.id)
        url = f"{self.url}/{repo.url_path}/commit/{commit.id}"
        return Reply.json({"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""})


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with one request a connection, so that no client keeps one open to a hub that is gone."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def handle_request(self):
        self.close_connection = True
        hub, url = self.server.hub, urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        length = int(self.headers.get("Content-Length", 0))
        if token is not None:
            hub.tokens_seen.add(token)
        fault = hub.fail(self.command, url.path)
        if fault == "break" and length:
            self.rfile.read(length // 2)
            hub.requests.append((self.command, url.path, fault))
            return
        if isinstance(fault, tuple) and fault[0] == "slow":
            threading.Event().wait(fault[1])  # not by `time.sleep`, which tests replace
            fault = None
        # A refusal, too, waits for the whole body: closing before that may cost the client the reply.
        body = self.rfile.read(length)
        request = Request(self.command, url.path, parse_qs(url.query), token, self.headers.get("Range"), body)
        if "Transfer-Encoding" in self.headers:
            reply = Refused(411, "Length required").reply
        elif isinstance(fault, int):
            reply = Refused(fault, "Injected failure").reply
        elif isinstance(fault, Reply):
            reply, fault = fault, None
        elif fault == "drop":
            reply = None
        else:
            reply = hub.answer(request)
        # Before the reply leaves, so that a client that has it finds it logged.
        hub.requests.append((self.command, url.path, fault or reply.status))
        if fault in ("drop", "lose"):
            return
        with contextlib.suppress(ConnectionError):
            self.send(reply, broken=fault == "break")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def send(self, reply, broken):
        if broken and self.command == "HEAD":
            return
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": len(reply.body), "Connection": "close"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: len(reply.body) // 2] if broken else reply.body)
