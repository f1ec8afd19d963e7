"""The loopback Hub, driven by the real client in other processes: its address is read when it is imported."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from minihub import MiniHub
from minihub_repository import find_metadata_problems

CARD = "---\nlicense: apache-2.0\nlanguage: [en]\ntags:\n- speech\n---\n# Model\n"


@pytest.fixture
def hub():
    with MiniHub() as hub:
        yield hub


def run_client(hub: MiniHub, folder: Path, code: str, **environment: str) -> str:
    """Returns what `code` prints, with `api` and the folder's path at hand; what it raises is part of it."""
    imports = "from pathlib import Path\nfrom huggingface_hub import *\n"
    prelude = f"{imports}api = HfApi()\nfolder = Path({str(folder)!r})\n"
    command = [sys.executable, "-c", prelude + code]
    variables = os.environ | hub.environment(folder / "cache") | environment
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


@pytest.fixture
def upload(tmp_path) -> Path:
    """A folder with a small file, a large one, an empty one and a folder inside."""
    folder = tmp_path / "upload"
    (folder / "inside" / "deep").mkdir(parents=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "inside" / "ünï code.txt").write_text("text", encoding="utf-8")
    (folder / "inside" / "deep" / "empty.txt").touch()
    return folder


def test_folder_comes_back_as_it_was_pushed(hub, tmp_path, upload):
    output = run_client(
        hub,
        tmp_path,
        """
api.create_repo("x")
api.upload_folder(repo_id="me/x", folder_path=folder / "upload", commit_message="first")
snapshot_download("me/x", local_dir=folder / "back")
print(api.whoami()["name"], api.list_repo_files("me/x"))
print(api.get_paths_info("me/x", ["model.safetensors"])[0].lfs.size)
print([entry.path for entry in api.list_repo_tree("me/x")])
print([entry.path for entry in api.list_repo_tree("me/x", "inside", recursive=True)])
print([commit.title for commit in api.list_repo_commits("me/x")])
""",
    )

    assert output.splitlines() == [
        "me ['README.md', 'inside/deep/empty.txt', 'inside/ünï code.txt', 'model.safetensors']",
        "25600",
        "['inside', 'README.md', 'model.safetensors']",
        "['inside/deep', 'inside/deep/empty.txt', 'inside/ünï code.txt']",
        "['first', 'initial commit']",
    ]
    for path in (path for path in upload.rglob("*") if path.is_file()):
        assert (tmp_path / "back" / path.relative_to(upload)).read_bytes() == path.read_bytes()
    assert any(path.startswith("/_lfs/") for _, path, _ in hub.log)


def test_revisions_branches_and_tags_keep_their_own_files(hub, tmp_path):
    output = run_client(
        hub,
        tmp_path,
        """
def put(text, **where):
    return api.upload_file(path_or_fileobj=text.encode(), path_in_repo="a.txt", repo_id="me/x", **where).oid
def get(revision):
    return Path(hf_hub_download("me/x", "a.txt", revision=revision)).read_text()
api.create_repo("me/x")
first = put("one")
api.create_tag("me/x", tag="v1")
api.create_branch("me/x", branch="pr/2")
put("two", revision="pr/2")
put("three")
print(get(first), get("v1"), get("pr/2"), get("main"))
refs = api.list_repo_refs("me/x")
print([ref.name for ref in refs.branches], [ref.name for ref in refs.tags], refs.tags[0].target_commit == first)
api.delete_branch("me/x", branch="pr/2")
api.delete_tag("me/x", tag="v1")
api.delete_file("a.txt", "me/x")
print(api.list_repo_files("me/x"), api.file_exists("me/x", "a.txt"), api.revision_exists("me/x", "v1"))
for attempt in (lambda: get("pr/3"), lambda: get("main"), lambda: put("four", parent_commit=first)):
    try:
        attempt()
    except Exception as error:
        print(type(error).__name__, error.response.status_code)
""",
    )

    assert output.splitlines() == [
        "one one two three",
        "['main', 'pr/2'] ['v1'] True",
        "[] False False",
        "RevisionNotFoundError 404",
        "RemoteEntryNotFoundError 404",
        "HfHubHTTPError 412",
    ]


def test_dataset_and_existing_repositories_are_told_apart(hub, tmp_path):
    output = run_client(
        hub,
        tmp_path,
        """
print(api.create_repo("x"), api.create_repo("x", exist_ok=True), api.create_repo("x", repo_type="dataset"))
api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="me/x", repo_type="dataset")
print(Path(hf_hub_download("me/x", "a.txt", repo_type="dataset")).read_text(), api.list_repo_files("me/x"))
api.delete_repo("me/x")
print(api.repo_exists("me/x"), api.repo_exists("me/x", repo_type="dataset"))
try:
    api.create_repo("me/x", repo_type="dataset")
except Exception as error:
    print(error.response.status_code)
""",
    )

    assert output.splitlines() == [
        f"{hub.url}/me/x {hub.url}/me/x {hub.url}/datasets/me/x",
        "1 []",
        "False True",
        "409",
    ]


def test_private_repository_is_read_with_the_token_only(hub, tmp_path):
    output = run_client(
        hub,
        tmp_path,
        """
api.create_repo("me/x", private=True)
api.upload_file(path_or_fileobj=b"secret", path_in_repo="a.txt", repo_id="me/x")
print(Path(hf_hub_download("me/x", "a.txt")).read_text(), api.model_info("me/x").private)
attempts = (
    lambda: hf_hub_download("me/x", "a.txt", token=False, cache_dir=folder / "other"),
    lambda: snapshot_download("me/x", token=False, cache_dir=folder / "other"),
    lambda: api.model_info("me/x", token=False),
    lambda: api.model_info("me/none", token=False),
)
for attempt in attempts:
    try:
        attempt()
    except Exception as error:
        print(type(error).__name__, "secret" in str(error))
""",
    )

    assert output.splitlines() == ["secret True", *["RepositoryNotFoundError False"] * 4]


@pytest.mark.parametrize("token", ["hf_wrong", ""])
def test_nothing_is_changed_without_the_right_token(hub, tmp_path, token):
    output = run_client(
        hub,
        tmp_path,
        """
for attempt in (lambda: api.create_repo("me/x"), api.whoami):
    try:
        attempt()
    except Exception as error:
        print(getattr(error, "response", None) is not None and error.response.status_code, type(error).__name__)
""",
        HF_TOKEN=token,
    )

    assert output.splitlines()[0] == "401 HfHubHTTPError"
    assert len(output.splitlines()) == 2
    assert hub.repositories == {}
    assert "hf_minihub" not in output


def test_hub_that_is_down_gives_an_error_within_seconds(hub, tmp_path):
    hub.is_down = True
    start = time.monotonic()

    output = run_client(
        hub,
        tmp_path,
        """
for attempt in (lambda: snapshot_download("me/x"), lambda: api.create_repo("me/x"), lambda: api.model_info("me/x")):
    try:
        attempt()
    except Exception as error:
        print(type(error).__name__)
""",
    )

    assert output.splitlines() == ["LocalEntryNotFoundError", "HfHubHTTPError", "HfHubHTTPError"]
    assert time.monotonic() - start < 8
    assert {status for *_, status in hub.log} == {503}


def test_cached_file_is_read_when_the_hub_goes_down(hub, tmp_path):
    read = 'print(Path(hf_hub_download("me/x", "a.txt")).read_text())'
    run_client(
        hub,
        tmp_path,
        'api.create_repo("x")\napi.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="me/x")\n' + read,
    )
    hub.is_down = True

    assert run_client(hub, tmp_path, read).splitlines()[-1] == "1"


def test_part_of_a_file_is_served(hub, tmp_path):
    output = run_client(
        hub,
        tmp_path,
        """
api.create_repo("x")
api.upload_file(path_or_fileobj=bytes(range(100)), path_in_repo="a.bin", repo_id="me/x")
url = hf_hub_url("me/x", "a.bin")
for wanted in ("bytes=10-12", "bytes=98-", "bytes=98-500", "bytes=100-"):
    answer = get_session().get(url, headers={"Range": wanted})
    print(answer.status_code, list(answer.content)[:3], answer.headers["Content-Range"])
print(get_hf_file_metadata(url).size)
""",
    )

    assert output.splitlines() == [
        "206 [10, 11, 12] bytes 10-12/100",
        "206 [98, 99] bytes 98-99/100",
        "206 [98, 99] bytes 98-99/100",
        "416 [123, 125] bytes */100",
        "100",
    ]


def test_card_with_invalid_metadata_is_not_committed(hub, tmp_path):
    output = run_client(
        hub,
        tmp_path,
        """
api.create_repo("x")
card = "---\\nmodel-index:\\n- name: x\\n  results:\\n  - task: {type: asr}\\n---\\n"
for attempt in (lambda: api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="me/x"),
                lambda: RepoCard(card, ignore_metadata_errors=True).validate()):
    try:
        attempt()
    except ValueError as error:
        print("metrics" in str(error) and "dataset.type" in str(error))
print(api.list_repo_files("me/x"))
""",
    )

    assert output.splitlines()[-3:] == ["True", "True", "[]"]


GOOD_RESULT = "{task: {type: asr}, dataset: {type: d, name: D}, metrics: [{type: wer, value: 0.1}]}"


@pytest.mark.parametrize(
    ("metadata", "errors"),
    [
        (f"model-index: [{{name: x, results: [{GOOD_RESULT}]}}]", []),
        ("license: [", None),
        ("- a", ["the metadata must be a mapping"]),
        ("license: 3", ['"license" must be a string']),
        ("tags: [1]", ['"tags" must be a string or a list of strings']),
        ("model-index: {}", ['"model-index" must be an array']),
        ("model-index: [{results: []}]", ['"model-index[0].name" is required']),
        ("model-index: [{name: x}]", ['"model-index[0].results" must be an array']),
        (
            "model-index: [{name: x, results: [{task: {type: asr}, dataset: {type: d}, metrics: [{type: wer}]}]}]",
            [
                '"model-index[0].results[0].dataset.name" is required',
                '"model-index[0].results[0].metrics[0]" must have a type and a value',
            ],
        ),
    ],
)
def test_metadata_is_judged_field_by_field(metadata, errors):
    found, warnings = find_metadata_problems(f"---\n{metadata}\n---\n# Title\n")

    assert warnings == []
    assert found == errors or (errors is None and found[0].startswith("the metadata is not YAML"))


def test_card_without_metadata_is_a_warning():
    assert find_metadata_problems("# Title\n") == ([], ["empty or missing yaml metadata in repo card"])
