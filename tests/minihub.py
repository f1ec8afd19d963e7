"""A Hugging Face Hub on loopback, in memory, which speaks the protocol of the real `huggingface_hub` client."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from minihub_repository import DEFAULT_BRANCH, Commit, HubError, Repository, find_metadata_problems

DATE = "2025-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin", ".pt", ".pth")
WRONG_TOKEN = "Invalid credentials in Authorization header"  # the client looks for these very words


@dataclass
class Request:
    """One request; `arguments` are the named parts of its path, decoded."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    arguments: dict[str, str] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The body as JSON; an empty one as an empty mapping."""
        return json.loads(self.body or b"{}")


@dataclass
class Response:
    """One answer: bytes, or anything else as JSON."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class MiniHub:
    """
    Serves repositories at `url` while the context lasts.

    Anyone reads public repositories; private ones and every change need `token`. With `is_down` set, every request is
    answered 503.

    Args:
        user: Name of the one user, the owner of repositories without an owner in their name.
        token: The user's token.

    Example:

    ```python
    with MiniHub() as hub:
        # Before the client is imported, so in another process:
        subprocess.run(command, env=os.environ | hub.environment(tmp_path))
    ```
    """

    def __init__(self, *, user: str = "me", token: str = "hf_minihub"):
        self.user, self.token, self.is_down = user, token, False
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.gated: set[str] = set()  # names of repositories that nobody has been given access to
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int]] = []  # method, path and status of every request
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "MiniHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: str | Path) -> dict[str, str]:
        """Returns the variables that send the client here, with the user's token and a cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # large files by plain git LFS
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def answer(self, request: Request) -> Response:
        """Returns the answer to a request, an error among them."""
        try:
            with self._lock:
                if self.is_down:
                    raise HubError(503, "ServiceUnavailable")
                is_known = self._check_token(request)
                for pattern, methods, needs_token, action in ROUTES:
                    if request.method in methods and (match := pattern.fullmatch(request.path)):
                        if needs_token and not is_known:
                            raise HubError(401, "Unauthorized")
                        request.arguments = {name: unquote(part or "") for name, part in match.groupdict().items()}
                        return action(self, request)
                raise HubError(404, "NotFound")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            return Response({"error": error.message}, error.status, headers)

    def _check_token(self, request: Request) -> bool:
        authorization = request.headers.get("Authorization")
        if authorization and authorization != f"Bearer {self.token}":
            raise HubError(401, "Unauthorized", WRONG_TOKEN)
        return bool(authorization)

    def _find_repository(self, request: Request) -> Repository:
        kind = (request.arguments["kind"] or "models").removesuffix("s")
        repository = self.repositories.get((kind, request.arguments["repo_id"]))
        if not repository or (repository.is_private and "Authorization" not in request.headers):
            # One answer for both, so that nobody learns that a private repository exists.
            raise HubError(404, "RepoNotFound", "Repository not found")
        if request.arguments["repo_id"] in self.gated and "/resolve/" in request.path:
            raise HubError(403, "GatedRepo", "Access to this model is restricted")
        return repository

    def _whoami(self, _: Request) -> Response:
        access_token = {"displayName": "test", "role": "write"}
        auth = {"type": "access_token", "accessToken": access_token}
        return Response({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": auth})

    def _validate_yaml(self, request: Request) -> Response:
        errors, warnings = find_metadata_problems(request.json()["content"])
        body = {
            "errors": [{"message": message} for message in errors],
            "warnings": [{"message": message} for message in warnings],
        }
        return Response(body, 400 if errors else 200)

    def _create(self, request: Request) -> Response:
        wanted = request.json()
        kind, repo_id = self._name_repository(wanted)
        prefix = "" if kind == "model" else f"{kind}s/"
        body = {"url": f"{self.url}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}
        if (kind, repo_id) in self.repositories:
            return Response({**body, "error": "You already created this repo"}, 409)
        is_private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.repositories[kind, repo_id] = Repository(repo_id, kind, is_private)
        return Response(body)

    def _delete(self, request: Request) -> Response:
        if not self.repositories.pop(self._name_repository(request.json()), None):
            raise HubError(404, "RepoNotFound", "Repository not found")
        return Response()

    def _name_repository(self, wanted: dict[str, Any]) -> tuple[str, str]:
        return wanted.get("type") or "model", f"{wanted.get('organization') or self.user}/{wanted['name']}"

    def _show(self, request: Request) -> Response:
        repository = self._find_repository(request)
        sha = repository.resolve(request.arguments["revision"] or DEFAULT_BRANCH)
        owner = repository.repo_id.split("/")[0]
        body = {"_id": "0" * 24, "id": repository.repo_id, "modelId": repository.repo_id, "author": owner, "sha": sha}
        body |= {"private": repository.is_private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        body |= {"tags": [], "createdAt": DATE, "lastModified": DATE}
        files = sorted(repository.commits[sha].files)
        return Response({**body, "siblings": [{"rfilename": path} for path in files]})

    def _preupload(self, request: Request) -> Response:
        self._find_repository(request).resolve(request.arguments["revision"])
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in request.json()["files"]
        ]
        return Response({"files": files})

    def _start_large_files(self, request: Request) -> Response:
        self._find_repository(request)
        objects = []
        for wanted in request.json()["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.url}/_lfs/{wanted['oid']}"}}}
            is_known = wanted["oid"] in self.blobs
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **({} if is_known else upload)})
        return Response({"transfer": "basic", "objects": objects})

    def _store_large_file(self, request: Request) -> Response:
        oid = request.arguments["oid"]
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "BadOid", "The content does not have the announced SHA-256")
        self.blobs[oid] = request.body
        return Response(headers={"ETag": f'"{oid}"'})

    def _commit(self, request: Request) -> Response:
        repository, branch = self._find_repository(request), request.arguments["revision"]
        if branch not in repository.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        parent = repository.branches[branch]
        commit = Commit(files=dict(repository.commits[parent].files), parent=parent)
        for line in request.body.splitlines():
            operation = json.loads(line)
            commit.apply(operation["key"], operation["value"], blobs=self.blobs)
        sha = repository.add_commit(branch, commit)
        url = f"{self.url}/{repository.repo_id}/commit/{sha}"
        return Response({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _list_refs(self, request: Request) -> Response:
        repository = self._find_repository(request)
        body: dict[str, list] = {"converts": [], "pullRequests": []}
        for key, folder, names in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags)):
            body[key] = [
                {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": sha} for name, sha in names.items()
            ]
        return Response(body)

    def _list_commits(self, request: Request) -> Response:
        history = self._find_repository(request).history(request.arguments["revision"])
        authors = [{"user": self.user}]
        return Response(
            [
                {"id": sha, "title": commit.title, "message": commit.message, "date": DATE, "authors": authors}
                for sha, commit in history
            ]
        )

    def _change_branch(self, request: Request) -> Response:
        repository = self._find_repository(request)
        start = repository.resolve(request.json().get("startingPoint") or DEFAULT_BRANCH)
        return self._change_name(request, repository.branches, request.arguments["name"], start)

    def _change_tag(self, request: Request) -> Response:
        repository, name = self._find_repository(request), request.arguments["name"]
        if request.method == "DELETE":
            return self._change_name(request, repository.tags, name, "")
        return self._change_name(request, repository.tags, request.json()["tag"], repository.resolve(name))

    @staticmethod
    def _change_name(request: Request, names: dict[str, str], name: str, sha: str) -> Response:
        if request.method == "DELETE":
            if not names.pop(name, None):
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {name}")
        elif name in names:
            raise HubError(409, "Conflict", f"Reference already exists: {name}")
        else:
            names[name] = sha
        return Response()

    def _list_tree(self, request: Request) -> Response:
        repository = self._find_repository(request)
        commit = repository.commits[repository.resolve(request.arguments["revision"])]
        is_recursive = request.query.get("recursive", "").lower() in ("true", "1")
        return Response(commit.list_folder(request.arguments["path"].rstrip("/"), is_recursive=is_recursive))

    def _describe_paths(self, request: Request) -> Response:
        repository = self._find_repository(request)
        commit = repository.commits[repository.resolve(request.arguments["revision"])]
        is_json = request.body.startswith(b"{")
        paths = request.json()["paths"] if is_json else parse_qs(request.body.decode()).get("paths", [])
        return Response([commit.describe(path) for path in paths if path in commit.files])

    def _download(self, request: Request) -> Response:
        repository = self._find_repository(request)
        sha = repository.resolve(request.arguments["revision"])
        blob = repository.commits[sha].files.get(request.arguments["path"])
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not blob:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return Response({"error": "Entry not found"}, 404, headers)
        headers["ETag"] = f'"{blob.oid}"'
        if blob.is_lfs:
            headers |= {"X-Linked-ETag": f'"{blob.oid}"', "X-Linked-Size": str(blob.size)}
        return _cut_range(Response(self.blobs[blob.oid], headers=headers), request.headers.get("Range"))


def _cut_range(response: Response, wanted: str | None) -> Response:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if not match:
        return response
    size = len(response.body)
    first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
    if first > last:
        return Response({}, 416, {"Content-Range": f"bytes */{size}"})
    headers = response.headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
    return Response(response.body[first : last + 1], 206, headers)


Action = Callable[[MiniHub, Request], Response]
REPO = "(?P<repo_id>[^/]+/[^/]+)"
API = f"/api/(?P<kind>models|datasets|spaces)/{REPO}"
PAGE = f"/(?:(?P<kind>datasets|spaces)/)?{REPO}"
REVISION = "(?P<revision>[^/]+)"
# Path, methods, whether they need a token, and what they do. The client quotes slashes inside a revision, so paths are
# matched before they are decoded.
ROUTES: list[tuple[re.Pattern[str], tuple[str, ...], bool, Action]] = [
    (re.compile(path), tuple(methods.split()), needs_token, action)
    for path, methods, needs_token, action in [
        ("/api/whoami-v2", "GET", True, MiniHub._whoami),
        ("/api/validate-yaml", "POST", False, MiniHub._validate_yaml),
        ("/api/repos/create", "POST", True, MiniHub._create),
        ("/api/repos/delete", "DELETE", True, MiniHub._delete),
        (r"/_lfs/(?P<oid>[0-9a-f]{64})", "PUT", False, MiniHub._store_large_file),
        (rf"{PAGE}\.git/info/lfs/objects/batch", "POST", True, MiniHub._start_large_files),
        (f"{API}(?P<revision>)", "GET", False, MiniHub._show),
        (f"{API}/revision/{REVISION}", "GET", False, MiniHub._show),
        (f"{API}/preupload/{REVISION}", "POST", True, MiniHub._preupload),
        (f"{API}/commit/{REVISION}", "POST", True, MiniHub._commit),
        (f"{API}/refs", "GET", False, MiniHub._list_refs),
        (f"{API}/commits/{REVISION}", "GET", False, MiniHub._list_commits),
        (f"{API}/branch/(?P<name>[^/]+)", "POST DELETE", True, MiniHub._change_branch),
        (f"{API}/tag/(?P<name>[^/]+)", "POST DELETE", True, MiniHub._change_tag),
        (f"{API}/tree/{REVISION}(?:/(?P<path>.*))?", "GET", False, MiniHub._list_tree),
        (f"{API}/paths-info/{REVISION}", "POST", False, MiniHub._describe_paths),
        (f"{PAGE}/(?:resolve|raw)/{REVISION}/(?P<path>.+)", "GET HEAD", False, MiniHub._download),
    ]
]


def _read_body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    chunks = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        chunks.append(handler.rfile.read(size))
        handler.rfile.readline()
    handler.rfile.readline()
    return b"".join(chunks)


def _make_handler(hub: MiniHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # one packet for headers and body

        def log_message(self, *_: object) -> None:
            """Requests are kept in `hub.log`; the terminal is the tests'."""

        def _answer(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            response = hub.answer(Request(self.command, url.path, query, self.headers, _read_body(self)))
            hub.log.append((self.command, url.path, response.status))
            is_bytes = isinstance(response.body, bytes)
            body = response.body if is_bytes else json.dumps(response.body).encode()
            self.send_response(response.status)
            headers = {"Content-Type": "application/octet-stream" if is_bytes else "application/json"}
            for name, value in (headers | {"Content-Length": str(len(body))} | response.headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    return Handler
