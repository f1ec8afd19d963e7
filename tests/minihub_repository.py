"""What the loopback Hub keeps and checks: repositories with commits, branches and tags, and model cards' metadata."""

import base64
import hashlib
import re
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

DEFAULT_BRANCH = "main"
POINTER_SIZE = 130  # bytes of the file that stands for a large one in git
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)


class HubError(Exception):
    """An answer other than success, with the code by which the client chooses its exception."""

    def __init__(self, status: int, code: str, message: str | None = None):
        super().__init__(message or code)
        self.status, self.code, self.message = status, code, message or code


class Blob(NamedTuple):
    """A file's content: its SHA-256, its bytes' count, and whether it came as a large file."""

    oid: str
    size: int
    is_lfs: bool


@dataclass
class Commit:
    """A tree of files and how it came about."""

    files: dict[str, Blob]
    title: str = "initial commit"
    message: str = ""
    parent: str | None = None

    def apply(self, key: str, value: dict[str, Any], *, blobs: MutableMapping[str, bytes]) -> None:
        """
        Does one line of a commit's body.

        Args:
            key: What is done.
            value: To what.
            blobs: Contents by hash; a small file's is added, a large file's must be there.
        """
        if key == "header":
            if value.get("parentCommit") not in (None, self.parent):
                raise HubError(412, "PreconditionFailed", "A commit has happened since")
            self.title, self.message = value["summary"], value.get("description") or ""
        elif key == "file":
            content = base64.b64decode(value["content"])
            oid = hashlib.sha256(content).hexdigest()
            blobs[oid] = content
            self.files[value["path"]] = Blob(oid, len(content), is_lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in blobs:
                raise HubError(400, "BadOid", f"{value['path']} was never uploaded")
            self.files[value["path"]] = Blob(value["oid"], len(blobs[value["oid"]]), is_lfs=True)
        elif key == "deletedFile":
            self.files.pop(value["path"], None)
        elif key == "deletedFolder":
            folder = value["path"].rstrip("/") + "/"
            self.files = {path: blob for path, blob in self.files.items() if not path.startswith(folder)}
        else:
            raise HubError(400, "BadRequest", f"Operation {key} is not served")

    def describe(self, path: str) -> dict[str, Any]:
        """Returns the entry of one file in a listing."""
        blob = self.files[path]
        large = {"lfs": {"oid": blob.oid, "size": blob.size, "pointerSize": POINTER_SIZE}} if blob.is_lfs else {}
        return {"type": "file", "path": path, "oid": blob.oid[:40], "size": blob.size, **large}

    def list_folder(self, folder: str, *, is_recursive: bool) -> list[dict[str, Any]]:
        """Returns the entries of the folders and files in `folder`, the root if empty."""
        prefix = f"{folder}/" if folder else ""
        under = sorted(path for path in self.files if path.startswith(prefix))
        if folder and not under:
            raise HubError(404, "EntryNotFound", "Entry not found")
        parents = {path[:end] for path in under for end in range(len(prefix), len(path)) if path[end] == "/"}
        shown = [path for path in sorted(parents) if is_recursive or "/" not in path[len(prefix) :]]
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in shown]
        return entries + [self.describe(path) for path in under if is_recursive or "/" not in path[len(prefix) :]]


@dataclass
class Repository:
    """Commits by hash, and the branches and tags that point to them."""

    repo_id: str
    kind: str
    is_private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.add_commit(DEFAULT_BRANCH, Commit(files={}))

    def add_commit(self, branch: str, commit: Commit) -> str:
        """Moves `branch` to `commit` and returns its hash."""
        identity = f"{self.kind} {self.repo_id} {len(self.commits)} {sorted(commit.files.items())}"
        sha = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[sha] = commit
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """Returns the hash of a branch, a tag or a hash."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def history(self, revision: str) -> Iterator[tuple[str, Commit]]:
        """Gives the commits up to `revision`, newest first."""
        sha: str | None = self.resolve(revision)
        while sha:
            yield sha, self.commits[sha]
            sha = self.commits[sha].parent


LANGUAGE = "[a-z]{2,3}|code|multilingual"
LICENSE = (  # the families; the Hub lists every version
    r"(apache|afl|artistic|bsl|c-uda|cc0|cdla|ecl|epl|etalab|eupl|agpl|gpl|lgpl|lppl|mpl|ofl|osl)(-[a-z]+)*(-\d\.\dc?)?"
    r"|cc(-by(-nc)?(-sa|-nd)?-\d\.\d)?|bsd(-[23]-clause(-clear)?)?|(bigscience|creativeml|bigcode)?-?openrail(-m|\+\+)?"
    r"|mit|isc|ms-pl|ncsa|zlib|pddl|odbl|odc-by|wtfpl|gfdl|unlicense|postgresql|unknown|other|bigscience-bloom-rail-1.0|llama2|gemma|deepfloyd-if-license"
)
PIPELINE_TAG = "automatic-speech-recognition|audio-to-audio|text-to-speech|audio-text-to-text|any-to-any|translation"
REPO_NAME = r"([\w-][\w.-]*/)?[\w-][\w.-]*"


def find_metadata_problems(content: str) -> tuple[list[str], list[str]]:
    """
    Returns what the Hub would say against the metadata of a README: errors, then warnings.

    Args:
        content: The README, with its YAML between lines of three dashes.
    """
    match = FRONT_MATTER.match(content)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"], []
    if not isinstance(metadata, dict):
        return ["the metadata must be a mapping"], []
    errors = [
        f'"{key}" must be a string or a list of strings'
        for key in ("language", "tags", "datasets", "metrics", "base_model")
        if key in metadata and not _is_string_or_strings(metadata[key])
    ]
    errors += [
        f'"{key}" must be a string'
        for key in ("license", "library_name", "pipeline_tag")
        if key in metadata and not isinstance(metadata[key], str)
    ]
    errors += _find_unknown_values(metadata)
    return errors + _find_model_index_errors(metadata.get("model-index", [])), []


def _find_unknown_values(metadata: dict[str, Any]) -> list[str]:
    """Values that the Hub knows no meaning of, by the rules that its documentation publishes."""
    rules = {
        "language": (LANGUAGE, "an ISO 639-1, 639-2 or 639-3 code, or a special value like code or multilingual"),
        "license": (LICENSE, "a license of https://hf.co/docs/hub/repositories-licenses"),
        "pipeline_tag": (PIPELINE_TAG, "a task of https://hf.co/tasks"),
        "datasets": (REPO_NAME, "a dataset id from https://hf.co/datasets"),
        "base_model": (REPO_NAME, "a model id from https://hf.co/models"),
    }
    errors = []
    for key, (pattern, expected) in rules.items():
        values = metadata.get(key)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str) and not re.fullmatch(pattern, value):
                errors.append(f'"{key}" with value "{value}" is not valid. It must be {expected}')
    return errors


def _is_string_or_strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _find_model_index_errors(models: Any) -> list[str]:
    if not isinstance(models, list):
        return ['"model-index" must be an array']
    errors = []
    for number, model in enumerate(models):
        where = f'"model-index[{number}]'
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'{where}.name" is required')
        elif not isinstance(model.get("results"), list):
            errors.append(f'{where}.results" must be an array')
        else:
            for index, result in enumerate(model["results"]):
                errors += _find_result_errors(result, f"{where}.results[{index}]")
    return errors


def _find_result_errors(result: Any, where: str) -> list[str]:
    if not isinstance(result, dict):
        return [f'{where}" must be a mapping']
    required = {"task": ("type",), "dataset": ("type", "name")}
    errors = [
        f'{where}.{part}.{key}" is required'
        for part, keys in required.items()
        for key in keys
        if not isinstance(result.get(part), dict) or not isinstance(result[part].get(key), str)
    ]
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return [*errors, f'{where}.metrics" must be an array with an entry']
    for index, metric in enumerate(metrics):
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str) or metric.get("value") is None:
            errors.append(f'{where}.metrics[{index}]" must have a type and a value')
    return errors
