"""What a push replaces, and what a card says, wherever and whenever it is pushed from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from minihub import MiniHub
from minihub_repository import find_metadata_problems
from test_hub import connect, download_from, read_repository
from transformers import AutoModelForCTC

from modeling.adapters import ADAPTER_WEIGHTS_NAME
from publishing.card import CardArguments, CardSubject, read_subject, write_card
from publishing.card_metadata import LANGUAGES, LICENCES
from publishing.hub import HubTarget, collect_files, push_folder
from publishing.report import write_results
from recipes.push import main
from recipes.train_ctc import main as train_ctc_main

RESULTS = {"eval_wer": 0.5, "eval_cer": 0.25, "total_parameters": 10, "train_runtime": 1.0}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with MiniHub() as hub:
        connect(monkeypatch, hub)
        download_from(monkeypatch, hub, tmp_path / "hub_cache")
        yield hub


@pytest.fixture
def model_folder(tiny_base, tmp_path) -> Path:
    """A copy of the tiny base with a card of it."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    write_results(folder, RESULTS)
    write_card(folder, CardSubject("me/corpus", "test", "A recogniser.", language=["en"]))
    return folder


def push_adapter(folder: str, repo_id: str) -> None:
    push_folder(folder, HubTarget(repo_id, base_model_id="me/base"))


def test_a_model_pushed_over_an_adapter_is_what_loads(hub, model_folder, tiny_adapters, caplog):
    push_adapter(tiny_adapters["alice"], "me/x")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="LICENSE", repo_id="me/x")
    num_commits = len(HfApi().list_repo_commits("me/x"))
    push_folder(model_folder, HubTarget("me/x"))

    files = read_repository(hub, "me/x")
    assert files.keys() == collect_files(model_folder, HubTarget("me/x")).keys() | {"LICENSE"}
    assert ADAPTER_WEIGHTS_NAME not in files
    assert len(HfApi().list_repo_commits("me/x")) == num_commits + 1
    assert "me/x loses what it held before: adapter_config.json, adapter_model.safetensors" in caplog.text
    loaded = AutoModelForCTC.from_pretrained("me/x", trust_remote_code=False)
    assert not hasattr(loaded, "peft_config")
    expected = AutoModelForCTC.from_pretrained(model_folder)
    assert torch.equal(loaded.classifier[1].weight, expected.classifier[1].weight)


def test_an_adapter_pushed_over_a_model_leaves_no_weights_of_it(hub, model_folder, tiny_adapters):
    push_folder(model_folder, HubTarget("me/x"))
    push_adapter(tiny_adapters["alice"], "me/x")
    files = read_repository(hub, "me/x")
    assert ADAPTER_WEIGHTS_NAME in files
    assert not files.keys() & {"config.json", "model.safetensors", "vocab.json", "modeling_deepspeech2.py"}
    assert files["adapter_model.safetensors"] == (Path(tiny_adapters["alice"]) / ADAPTER_WEIGHTS_NAME).read_bytes()


def test_a_branch_keeps_what_another_one_replaces(hub, model_folder, tiny_adapters):
    push_adapter(tiny_adapters["alice"], "me/x")
    push_folder(model_folder, HubTarget("me/x", revision="full"))
    assert ADAPTER_WEIGHTS_NAME in read_repository(hub, "me/x")
    assert ADAPTER_WEIGHTS_NAME not in read_repository(hub, "me/x", "full")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--language", "Klingonese"), "`language` must be a language code such as tr or pt-BR, got 'Klingonese'"),
        (("--language", "en", "zz"), "`language` must be a code of ISO 639 such as en or yue, got 'zz'"),
        (("--licence", "free"), "`licence` must be a licence identifier of the Hub .*got 'free'. Give `other`"),
        (("--dataset_licence", "CC"), None),
        (("--dataset_licence", "mine"), "`dataset_licence` must be a licence identifier of the Hub .*got 'mine'"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_anything_is_read(run_recipe_main, tmp_path, flags, message):
    message = message or "nowhere"  # the corpus: the flag is fine
    with pytest.raises(ValueError, match=message):
        run_recipe_main(
            train_ctc_main, "--dataset", tmp_path / "nowhere", "--output_dir", tmp_path / "out", *flags
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_names_are_written_as_the_hub_writes_them():
    card = CardArguments(language=["English", "pt-BR"], dataset_licence="CC BY-SA 4.0", licence="Apache-2.0")
    assert (card.language, card.dataset_licence, card.licence) == (["en", "pt"], "cc-by-sa-4.0", "apache-2.0")


def test_a_push_corrects_the_card_of_a_finished_folder(hub, model_folder):
    results = json.loads((model_folder / "eval_results.json").read_text())
    results["run"]["language"] = ["Englisch"]  # of a time when nothing was checked
    write_results(model_folder, results)
    with pytest.raises(ValueError, match="`language` must be a language code such as tr or pt-BR, got 'Englisch'"):
        main([str(model_folder), "--hub_model_id", "me/x"])
    assert ("model", "me/x") not in hub.repositories

    flags = ["--language", "ko", "--licence", "mit", "--dataset_licence", "cc0-1.0"]
    main([str(model_folder), "--hub_model_id", "me/x", *flags])

    files = read_repository(hub, "me/x")
    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert (card.data.language, card.data.license) == (["ko"], "mit")
    assert json.loads(files["eval_results.json"])["run"]["language"] == ["ko"]
    assert "cc0-1.0" in card.content
    assert read_subject(model_folder).language == ["Englisch"]


def test_a_card_that_no_recipe_wrote_is_not_corrected(hub, tiny_base):
    with pytest.raises(ValueError, match="`folder` must have a card that a recipe wrote to correct it, got none"):
        main([tiny_base, "--hub_model_id", "me/x", "--licence", "mit"])
    assert ("model", "me/x") not in hub.repositories


@pytest.mark.parametrize("is_local", [True, False])
def test_a_card_does_not_depend_on_the_folder_that_one_pushes_from(tiny_base, tmp_path, monkeypatch, is_local):
    trained, other = tmp_path / "trained", tmp_path / "other"
    for folder in (trained, other):
        (folder / "me").mkdir(parents=True)
    names = ("me/corpus", "me/base")
    for name in names:
        ((trained if is_local else other) / name).mkdir()  # where it is not local, one has such a folder later
    monkeypatch.chdir(trained)
    shutil.copytree(tiny_base, "out")
    write_results("out", RESULTS)
    write_card("out", CardSubject("me/corpus", "test", "A recogniser.", base="me/base"))
    said = []
    for folder in (trained, other):
        monkeypatch.chdir(folder)
        card = ModelCard(collect_files(trained / "out", HubTarget("me/x"))["README.md"].decode())
        said.append((card.data.datasets, card.data.base_model))
    assert said == ([(None, None)] * 2 if is_local else [(["me/corpus"], "me/base")] * 2)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("language: English", '"language" with value "English" is not valid'),
        ("language: [en, klingon]", '"language" with value "klingon" is not valid'),
        ("license: free", '"license" with value "free" is not valid'),
        ("pipeline_tag: speech", '"pipeline_tag" with value "speech" is not valid'),
        ("datasets: [outputs/my corpus/x]", '"datasets" with value "outputs/my corpus/x" is not valid'),
        ("base_model: /outputs/base", '"base_model" with value "/outputs/base" is not valid'),
    ],
)
def test_the_test_hub_refuses_what_the_hub_refuses(metadata, problem):
    (error,), _ = find_metadata_problems(f"---\n{metadata}\n---\n")
    assert error.startswith(problem)


def test_the_test_hub_takes_every_language_and_licence_that_we_take():
    rows = [f"language: '{code}'" for code in LANGUAGES] + [f"license: {name}" for name in LICENCES]
    assert [row for row in rows if find_metadata_problems(f"---\n{row}\n---\n")[0]] == []
