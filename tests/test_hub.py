"""Pushing: what leaves the machine and what does not, checked on a Hub that the real client talks to."""

import json
import logging
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, close_session, constants
from kills import leave_pending
from minihub import MiniHub
from readme import find_commands, find_example
from transformers import AutoModelForCTC, AutoProcessor, WhisperConfig, WhisperForConditionalGeneration

from modeling import SpeechAdapterConfig
from modeling.adapter_files import save_adapter
from modeling.adapters import find_active_adapters
from publishing.card import public_name, training_command
from publishing.hub import HubTarget, adapter_code, check_target, collect_files, push_folder, take_hub_target
from recipes.personalize import main as personalize_main
from recipes.push import main
from recipes.train_ctc import main as train_ctc_main
from training.trainer import RecipeTrainingArguments

TOKEN = "hf_very_secret_token"
ADAPTER_CODE = {"adapters.py", "adapter_config.py", "adapter_blocks.py", "adapter_layer.py", "adapter_loading.py"}


def connect(patch: pytest.MonkeyPatch, hub: MiniHub) -> None:
    """Sends the client of this process to `hub` with its user's token."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", hub.token)
    patch.setenv("NO_PROXY", "127.0.0.1")


def download_from(patch: pytest.MonkeyPatch, hub: MiniHub, cache: Path) -> None:
    """Lets this process download from `hub` too: the client makes up its addresses when it is imported."""
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))


def train_and_push(patch: pytest.MonkeyPatch, base: Path, corpus: Path, output_dir: Path) -> Path:
    """Pushes `base`, a branch of it with a silent classifier, and an adapter for ann, also as a private copy."""
    main([str(base), "--hub_model_id", "me/base"])
    silent = output_dir.parent / "silent"
    model = AutoModelForCTC.from_pretrained(base)
    model.classifier[1].weight.data.zero_()
    model.save_pretrained(silent)
    main([str(silent), "--hub_model_id", "me/base", "--hub_revision", "zeros"])
    flags = ["--model_name_or_path", base, "--dataset", corpus, "--speaker_id", "ann", "--base_eval_speakers", "ben"]
    flags += ["--adapter_hidden_sizes", 4, "--max_steps", 3, "--learning_rate", "1e-1", "--save_strategy", "steps"]
    flags += ["--save_steps", 2, "--output_dir", output_dir, "--language", "en", "--dataset_licence", "cc0-1.0"]
    flags += ["--push_to_hub", "--hub_model_id", "ann", "--hub_base_model_id", "me/base"]
    with patch.context() as context:
        context.setattr(sys, "argv", ["recipes/personalize.py", *map(str, flags)])
        personalize_main()
    main([str(output_dir), "--hub_model_id", "me/secret", "--hub_base_model_id", "me/base", "--hub_private_repo"])
    return output_dir


def push_stock_model(folder: Path) -> tuple[Path, Path]:
    """Pushes a tiny Whisper and an adapter of it; returns their folders."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "vocab_size": 20}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(max_source_positions=10, max_target_positions=10, suppress_tokens=None,
                           begin_suppress_tokens=None, **sizes, **tokens)  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.save_pretrained(folder / "stock")
    push_folder(folder / "stock", HubTarget("me/stock"))
    model.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[4], target_modules=["proj_out"]), "eve")
    for name, parameter in model.named_parameters():
        if "speech_adapter" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, folder / "stock_adapter", "eve")
    target = check_target(HubTarget("me/stock-adapter", base_model_id="me/stock"), needs_base=True)
    push_folder(folder / "stock_adapter", target)
    return folder / "stock", folder / "stock_adapter"


def read_repository(hub: MiniHub, repo_id: str, branch: str = "main") -> dict[str, bytes]:
    """Returns the files of a repository by path."""
    repository = hub.repositories["model", repo_id]
    files = repository.commits[repository.branches[branch]].files
    return {path: hub.blobs[blob.oid] for path, blob in files.items()}


@pytest.fixture(scope="module")
def pushed(small_base, small_corpus, tmp_path_factory):
    """A Hub that this process's client talks to, and the folder of a training that was pushed to me/ann there."""
    with MiniHub(token=TOKEN) as hub, pytest.MonkeyPatch.context() as patch:
        connect(patch, hub)
        yield hub, train_and_push(patch, small_base, small_corpus, tmp_path_factory.mktemp("trained") / "ann")


@pytest.fixture
def hub(pushed) -> MiniHub:
    return pushed[0]


@pytest.fixture
def trained(pushed) -> Path:
    return pushed[1]


@pytest.fixture
def arguments(tmp_path):
    """Makes training arguments that ask for a push."""
    return lambda **flags: RecipeTrainingArguments(str(tmp_path / "out"), use_cpu=True, push_to_hub=True, **flags)


def test_adapter_repository_holds_weights_card_picture_and_code_and_nothing_of_the_training(hub, trained, tmp_path):
    assert (trained / "checkpoint-3" / "training_args.bin").is_file()
    names = read_repository(hub, "me/ann").keys()
    others = {"adapter_config.json", "adapter_model.safetensors", "README.md", "eval_results.json", "results.png"}
    AutoProcessor.from_pretrained(trained).save_pretrained(tmp_path)
    assert names == others | adapter_code().keys() | {path.name for path in tmp_path.iterdir()}
    assert names >= ADAPTER_CODE


def test_model_repository_holds_processor_and_code(hub, small_base):
    files = read_repository(hub, "me/base")
    assert files.keys() >= {"model.safetensors", "config.json", "tokenizer_config.json", "vocab.json", "README.md"}
    assert files.keys() >= ADAPTER_CODE | {"modeling_deepspeech2.py", "processing_deepspeech2.py"}
    assert files["model.safetensors"] == (small_base / "model.safetensors").read_bytes()
    assert not any(name.endswith((".bin", ".pt")) or "checkpoint" in name for name in files)


def test_pushed_adapter_names_its_base_on_the_hub_at_its_commit(hub, trained, small_base):
    config = json.loads(read_repository(hub, "me/ann")["adapter_config.json"])
    branches = hub.repositories["model", "me/base"].branches
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", branches["main"])
    assert json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"] == str(small_base)


def test_branch_holds_its_own_weights(hub):
    on_main, on_branch = (read_repository(hub, "me/base", branch) for branch in ("main", "zeros"))
    assert on_main["model.safetensors"] != on_branch["model.safetensors"]


def test_card_says_what_was_done_and_the_hub_accepts_it(hub, trained):
    card = ModelCard(read_repository(hub, "me/ann")["README.md"].decode())
    card.validate()
    data = card.data
    assert (data.base_model, data.language, data.library_name) == ("me/base", ["en"], "peft")
    assert data.to_dict()["base_model_relation"] == "adapter"
    results = json.loads((trained / "eval_results.json").read_text())
    values = [(result.dataset_name, result.metric_type, result.metric_value) for result in data.eval_results]
    corpus = results["run"]["dataset"]
    assert values == [
        (corpus, "wer", results["eval_wer"]),
        (corpus, "cer", results["eval_cer"]),
        (f"{corpus}, other speakers", "wer", results["others_eval_wer"]),
        (f"{corpus}, other speakers", "cer", results["others_eval_cer"]),
    ]
    revision = hub.repositories["model", "me/base"].branches["main"]
    share = results["trainable_parameters"] / results["total_parameters"]
    for fact in (
        f"`me/base` at `{revision}`",
        f"{results['base_wer']:.2%} | {results['eval_wer']:.2%}",
        f"{results['others_base_wer']:.2%} | {results['others_eval_wer']:.2%}",
        f"{results['trainable_parameters']:,} ({share:.2%})",
        f"{results['train_seconds'] / 3600:.3g} hours",
        "cc0-1.0",
        "bottleneck, hidden sizes [4]",
        "accelerate launch recipes/personalize.py --model_name_or_path small_base0",
        f"torch {torch.__version__.split('+')[0]}",
        "![Results](results.png)",
    ):
        assert " ".join(fact.split()) in " ".join(card.content.split())


def test_card_of_a_model_validates_too(hub):
    card = ModelCard(read_repository(hub, "me/base")["README.md"].decode())
    card.validate()
    assert card.data.library_name == "transformers"
    assert 'from_pretrained("me/base", trust_remote_code=True)' in card.content


def test_training_script_pushes_a_model_without_its_checkpoints(
    run_recipe_main, hub, small_corpus, tmp_path, capfd, caplog
):
    caplog.set_level(logging.DEBUG)
    run_recipe_main(
        train_ctc_main, "--dataset", small_corpus, "--num_mel_bins", 16, "--hidden_size", 8, "--num_hidden_layers", 1,
        "--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1, f"--output_dir={tmp_path}/out",
        "--push_to_hub", "--hub_model_id", "fresh", "--hub_private_repo", "True", "--hub_token", TOKEN,
    )  # fmt: skip
    assert hub.repositories["model", "me/fresh"].is_private
    files = read_repository(hub, "me/fresh")
    assert files.keys() >= {"model.safetensors", "README.md", "modeling_deepspeech2.py"}
    assert not any("checkpoint" in name or name.endswith(".bin") for name in files)
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    out, err = capfd.readouterr()
    for name, content in {**files, **written, "log": f"{out}{err}{caplog.text}".encode()}.items():
        assert TOKEN.encode() not in content, name
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
        assert b"/pytest-" not in content, name


def test_no_card_and_no_configuration_holds_a_local_path(hub, trained):
    local = {path.name: path.read_bytes() for path in trained.iterdir() if path.suffix in (".json", ".md")}
    assert b"/pytest-" in local.pop("adapter_config.json")  # where its base is, for this machine alone
    for name, content in {**read_repository(hub, "me/ann"), **read_repository(hub, "me/base"), **local}.items():
        assert b"/pytest-" not in content, name


def test_command_in_the_card_has_no_token_and_no_path_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = [f"{tmp_path}/recipes/x.py", "--hub_token", "hf_1", "--hub_token=hf_2", "--dataset=/home/me/a b"]
    monkeypatch.setattr(sys, "argv", [*argv, "--adapter", "/home/me/x", "--output_dir", "outputs/x"])
    expected = "accelerate launch recipes/x.py '--dataset=a b' --adapter x --output_dir outputs/x"
    assert training_command() == expected
    assert public_name("../me/x") == "x"


def test_trainer_learns_nothing_of_the_push(hub, arguments):
    training_args = arguments(hub_model_id="me/x", hub_token=TOKEN, hub_private_repo=True, hub_revision="dev")
    target = take_hub_target(training_args)
    assert target == HubTarget("me/x", is_private=True, revision="dev", token=TOKEN)
    assert TOKEN not in repr(target)
    assert (training_args.push_to_hub, training_args.hub_token) == (False, None)
    assert ("model", "me/x") not in hub.repositories


def test_push_is_refused_before_training_when_it_would_fail_after(hub, trained, arguments, monkeypatch):
    def take(base=None, base_model_id=None, **flags):
        return take_hub_target(arguments(**flags), base=base, base_model_id=base_model_id)

    with pytest.raises(ValueError, match="`hub_model_id` must be a name on the Hub such as me/model, got ''"):
        take()
    for name in ("../x", "/etc/x", "a/b/c", "me/.."):
        with pytest.raises(ValueError, match="`hub_model_id` must be a name on the Hub .* Paths are none"):
            take(hub_model_id=name)
    with pytest.raises(ValueError, match="`hub_model_id` must begin with one of me, got 'you/x'"):
        take(hub_model_id="you/x")
    with pytest.raises(ValueError, match="`hub_token` must be a valid token"):
        take(hub_model_id="me/x", hub_token="hf_wrong")
    with pytest.raises(ValueError, match="`hub_base_model_id` must name the base on the Hub, got none"):
        take(hub_model_id="me/x", base=str(trained))
    with pytest.raises(ValueError, match="`hub_base_model_id` must be a model on the Hub, got 'me/nothing'"):
        take(hub_model_id="me/x", base="me/nothing")
    with pytest.raises(ValueError, match="`hub_base_model_id` must be a name on the Hub"):
        take(hub_model_id="me/x", base=str(trained), base_model_id="../base")
    monkeypatch.setattr("publishing.hub.HfApi.whoami", lambda _: {"auth": {"accessToken": {"role": "read"}}})
    with pytest.raises(ValueError, match="`hub_token` must allow writing, got a token of role 'read'"):
        take(hub_model_id="me/x")
    assert ("model", "me/x") not in hub.repositories


def test_push_needs_a_token_and_a_hub(arguments, monkeypatch, tmp_path):
    with MiniHub() as hub:
        connect(monkeypatch, hub)
        hub.is_down = True
        with pytest.raises(ValueError, match=f"The Hub at {hub.url} answered 503. Try again"):
            take_hub_target(arguments(hub_model_id="me/x"))
        hub.is_down = False
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(ValueError, match="`hub_token` must be given to push"):
            take_hub_target(arguments(hub_model_id="me/x"))
    with MiniHub() as gone:
        connect(monkeypatch, gone)
    with pytest.raises(ValueError, match=f"The Hub at {gone.url} must be reachable .*Connection refused"):
        take_hub_target(arguments(hub_model_id="me/x", hub_token=TOKEN))


@pytest.mark.timeout(20)  # without a limit of its own the client waits for ever
def test_a_hub_that_takes_the_call_and_never_answers_is_given_up(arguments, tiny_base, monkeypatch):
    monkeypatch.setattr("publishing.hub.MAX_SILENT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        connect(monkeypatch, SimpleNamespace(url=url, token=TOKEN))
        with pytest.raises(ValueError, match=f"The Hub at {url} must be reachable .*timed out"):
            take_hub_target(arguments(hub_model_id="me/x"))
        with pytest.raises(ValueError, match=f"The Hub at {url} must be reachable .*timed out.* push it with"):
            push_folder(tiny_base, HubTarget("me/x"))
    close_session()  # other tests wait longer


@pytest.mark.usefixtures("hub")
def test_a_wrong_token_stops_a_training_before_it_writes(run_recipe_main, small_corpus, tmp_path):
    with pytest.raises(ValueError, match="`hub_token` must be a valid token"):
        run_recipe_main(
            train_ctc_main, "--dataset", small_corpus, "--output_dir", tmp_path / "out", "--push_to_hub",
            "--hub_model_id", "me/x", "--hub_token", "hf_wrong",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_private_push_into_a_public_repository_is_refused(hub, trained):
    files = read_repository(hub, "me/ann")
    with pytest.raises(ValueError, match="`hub_private_repo` asks for a private repository, but me/ann is .* public"):
        push_folder(trained, HubTarget("me/ann", is_private=True, base_model_id="me/base"))
    assert read_repository(hub, "me/ann") == files
    assert hub.repositories["model", "me/secret"].is_private


def test_a_push_that_fails_leaves_the_folder_and_says_how_to_push_again(trained):
    with pytest.raises(ValueError, match="refused.* The folder is whole; push it with `python recipes/push.py`"):
        push_folder(trained, HubTarget("me/ann", base_model_id="me/base", token="hf_wrong"))


def test_a_folder_without_adapter_or_model_is_not_pushed(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="`folder` must hold an adapter or a model, got"):
        collect_files(tmp_path, HubTarget("me/x"))


def test_a_folder_without_card_is_pushed_with_a_warning(tiny_base, caplog):
    files = collect_files(tiny_base, HubTarget("me/x"))
    assert "the repository gets no card" in caplog.text
    assert {path.suffix for path in files.values()} <= {".json", ".py", ".safetensors"}


def test_only_what_belongs_to_the_model_leaves_the_machine(tmp_path):
    private = ["training_args.bin", "optimizer.pt", "trainer_state.json", ".secret.json", "credentials.json"]
    private += ["notes.txt", "train.py", "photo.png", "backup.safetensors", "model-old.safetensors", "vocab.json.bak"]
    public = ["generation_config.json", "vocab.json", "model-00001-of-00002.safetensors", "results.png"]
    public += ["model.safetensors.index.json", "modeling_x.py", "parts_x.py", "processing_x.py"]
    for name in private + public:
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.Model"}}')
    (tmp_path / "processor_config.json").write_text('{"auto_map": {"AutoProcessor": [null, "processing_x.X"]}}')
    (tmp_path / "modeling_x.py").write_text("from .parts_x import Part\n")
    (tmp_path / "README.md").write_text("# x\n\n![Results](results.png)\n")
    (tmp_path / "checkpoint-1").mkdir()
    expected = {*public, "config.json", "processor_config.json", "README.md"}
    assert collect_files(tmp_path, HubTarget("me/x")).keys() == expected


def test_what_a_killed_save_left_is_pushed_and_not_moved(tmp_path):
    leave_pending(tmp_path, {"config.json": b"{}", "model.safetensors": b"new"})
    files = collect_files(tmp_path, HubTarget("me/x"))
    assert {name: path.read_bytes() for name, path in files.items()} == {
        "config.json": b"{}",
        "model.safetensors": b"new",
    }
    assert not (tmp_path / "config.json").exists()


def test_links_are_not_pushed(tmp_path):
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "config.json").symlink_to("secret")
    with pytest.raises(ValueError, match="`folder` must hold files to push, got links: config.json. Put the files"):
        collect_files(tmp_path, HubTarget("me/x"))


def test_readme_commands_push_what_the_readme_example_loads(hub, trained, small_base, tmp_path, monkeypatch):
    (tmp_path / "outputs").mkdir()
    shutil.copytree(small_base, tmp_path / "outputs" / "demo" / "base")
    shutil.copytree(trained, tmp_path / "outputs" / "demo" / "whisperer", ignore=shutil.ignore_patterns("checkpoint*"))
    monkeypatch.chdir(tmp_path)
    download_from(monkeypatch, hub, tmp_path / "cache")
    for tokens in find_commands("python recipes/push.py"):
        main(tokens[2:])
    example = {}
    exec(find_example("me/whisperer"), example)
    assert find_active_adapters(example["model"]) == ["default"]
    assert "me/whisperer" in {repo_id for _, repo_id in hub.repositories}


def test_repository_with_files_outside_itself_writes_none_of_them(hub, trained, small_base, tmp_path, monkeypatch):
    main([str(trained), "--hub_model_id", "me/climber", "--hub_base_model_id", "me/base"])
    repository = hub.repositories["model", "me/climber"]
    files = repository.commits[repository.branches["main"]].files
    files["../../../../climbed.json"] = files["adapter_config.json"]
    download_from(monkeypatch, hub, tmp_path / "a" / "b" / "cache")
    model = AutoModelForCTC.from_pretrained(small_base)
    model.load_adapter("me/climber", adapter_name="ann", cache_dir=str(tmp_path / "a" / "b" / "cache"))
    assert find_active_adapters(model) == ["ann"]
    assert not list(tmp_path.rglob("climbed.json"))
    assert not list(tmp_path.parent.glob("climbed.json"))
