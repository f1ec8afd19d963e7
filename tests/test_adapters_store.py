"""The store of adapters: what its commands print, and that they do all or nothing."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling import SpeechAdapterConfig
from modeling.adapter_files import save_adapter
from recipes.manage_adapters import list_adapters, main

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def store(tiny_adapters, tmp_path) -> Path:
    """A folder with the adapters alice and bob."""
    for name, folder in tiny_adapters.items():
        shutil.copytree(folder, tmp_path / "store" / name)
    return tmp_path / "store"


@pytest.fixture
def make_adapter(tiny_model, tmp_path):
    """Saves an adapter whose parameters all have one value; returns its folder."""

    def make(name: str, value: float, **settings) -> Path:
        config = SpeechAdapterConfig(**{"kind": "mlp", "hidden_sizes": [4], **settings})
        tiny_model.add_adapter(config, name)
        with torch.no_grad():
            for key, parameter in tiny_model.named_parameters():
                parameter.fill_(value) if f".{name}." in key else None
        save_adapter(tiny_model, tmp_path / name, name)
        tiny_model.delete_adapter(name)
        return tmp_path / name

    return make


def test_list_prints_a_line_an_adapter_and_marks_damaged_ones(store, capsys):
    (store / "broken").mkdir()
    (store / "broken" / CONFIG).write_text("{", encoding="utf-8")
    (store / "no_adapter").mkdir()
    (store / "notes.txt").touch()
    main(["list", str(store)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[1:]] == [["alice", "mlp"], ["bob", "bottleneck"], ["broken", "damaged"]]
    assert lines[1][2:4] == ["8", str(round((store / "alice" / WEIGHTS).stat().st_size / 1024))]


def test_list_says_that_a_folder_is_empty_or_none(tmp_path, capsys):
    main(["list", str(tmp_path)])
    assert capsys.readouterr().out == f"No adapters in {tmp_path}.\n"
    with pytest.raises(ValueError, match="`list` must be given a folder of adapters, got .*nowhere"):
        main(["list", str(tmp_path / "nowhere")])


def test_list_opens_no_weights_among_thousands(tmp_path, monkeypatch):
    config = json.dumps({"peft_type": "SPEECH_ADAPTER", "kind": "mlp", "hidden_sizes": [8, 4]})
    for number in range(3000):
        folder = tmp_path / f"speaker_{number:04}"
        folder.mkdir()
        (folder / CONFIG).write_text(config)
        (folder / WEIGHTS).write_bytes(b"0" * 2048)
    opened = []
    for module, name in ((builtins, "open"), (os, "open"), (__import__("io"), "open")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda path, *a, f=original, **k: (opened.append(str(path)), f(path, *a, **k))[1]
        )
    rows = list_adapters(tmp_path)
    monkeypatch.undo()
    assert [row["name"] for row in rows] == [f"speaker_{number:04}" for number in range(3000)]
    assert {(row["hidden sizes"], row["KiB"]) for row in rows} == {("8-4", "2")}
    assert len(opened) == 3000
    assert not [path for path in opened if WEIGHTS in path]


def test_list_starts_without_torch(store):
    code = "import sys; from recipes.manage_adapters import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "list", str(store)]
    root = Path(__file__).parents[1]
    assert subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout.endswith("False\n")


def test_info_prints_what_the_files_say(store, capsys):
    main(["info", str(store / "alice"), str(store / "bob")])
    alice, bob = json.loads(capsys.readouterr().out)
    tensors = load_file(store / "alice" / WEIGHTS)
    assert (alice["kind"], alice["hidden_sizes"], alice["dtype"]) == ("mlp", [8], "F32")
    assert alice["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert bob["kind"] == "bottleneck"


def test_copy_is_the_adapter_without_what_is_left_of_its_training(store):
    (store / "alice" / "checkpoint-5").mkdir()
    (store / "alice" / "training_args.bin").touch()
    (store / "alice" / "README.md").write_text("card")
    main(["copy", str(store / "alice"), str(store / "copies" / "carol")])
    assert {path.name for path in (store / "copies" / "carol").iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    assert (store / "copies" / "carol" / WEIGHTS).read_bytes() == (store / "alice" / WEIGHTS).read_bytes()
    assert {path.name for path in (store / "copies").iterdir()} == {"carol"}


def test_copy_that_breaks_off_leaves_nothing(store, monkeypatch):
    def break_off(*_args):
        raise OSError("disk full")

    monkeypatch.setattr("recipes.manage_adapters.os.rename", break_off)
    with pytest.raises(OSError, match="disk full"):
        main(["copy", str(store / "alice"), str(store / "carol")])
    assert {path.name for path in store.iterdir()} == {"alice", "bob"}


def test_copy_refuses_what_is_no_adapter_a_bad_name_and_a_folder_that_exists(store):
    (store / "empty").mkdir()
    with pytest.raises(ValueError, match="`adapter` must be a folder with adapter_config.json"):
        main(["copy", str(store / "empty"), str(store / "carol")])
    with pytest.raises(ValueError, match="`adapter_name` must be 1 to 64 letters.*got 'carol.v2'"):
        main(["copy", str(store / "alice"), str(store / "carol.v2")])
    with pytest.raises(ValueError, match="`copy` must go to a new folder, got .*bob, which exists"):
        main(["copy", str(store / "alice"), str(store / "bob")])
    assert {path.name for path in store.iterdir()} == {"alice", "bob", "empty"}


def test_delete_removes_the_adapters_and_their_checkpoints(store):
    (store / "alice" / "checkpoint-5").mkdir()
    main(["delete", str(store / "alice"), str(store / "bob")])
    assert list(store.iterdir()) == []


def test_delete_removes_none_when_one_of_them_must_stay(store, tiny_base, tmp_path):
    model = shutil.copytree(tiny_base, store / "model")
    shutil.copy(store / "alice" / CONFIG, model)
    (store / "link").symlink_to(store / "alice")
    (store / "mixed" / "photos").mkdir(parents=True)
    shutil.copy(store / "alice" / CONFIG, store / "mixed")
    before = {path.name for path in store.iterdir()}
    for folder, message in (
        (store, "folders of adapters, got .*, which is none"),
        (store / "link", "folders of adapters, got .*link, which is none"),
        (tmp_path / "nowhere", "folders of adapters, got .*nowhere, which is none"),
        (model, "adapters alone, got .*model, which holds a model too"),
        (store / "mixed", "adapters alone, got .*mixed, which holds the folder photos too"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["delete", str(store / "bob"), str(folder)])
    assert {path.name for path in store.iterdir()} == before


def test_merge_is_the_mean_of_the_parameters(make_adapter, tiny_model, tmp_path):
    first, second = make_adapter("first", 1.0), make_adapter("second", 2.0)
    main(["merge", str(first), str(second), "--output_dir", str(tmp_path / "even")])
    main(["merge", str(first), str(second), "--weights", "1", "3", "--output_dir", str(tmp_path / "uneven")])
    for name, value in (("even", 1.5), ("uneven", 1.75)):
        tensors = load_file(tmp_path / name / WEIGHTS)
        assert tensors.keys() == load_file(first / WEIGHTS).keys()
        assert all(torch.equal(tensor, torch.full_like(tensor, value)) for tensor in tensors.values())
    tiny_model.load_adapter(str(tmp_path / "uneven"), "merged")
    assert next(p for name, p in tiny_model.named_parameters() if ".merged." in name).unique().tolist() == [1.75]


def test_merge_computes_in_fp32_and_writes_the_dtype_of_the_first(make_adapter, tmp_path):
    folders = [make_adapter("first", 1.0), make_adapter("second", 1.0 + 2**-7), make_adapter("third", 1.0)]
    for folder in folders:
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    main(["merge", *map(str, folders), "--weights", "1", "6", "1", "--output_dir", str(tmp_path / "merged")])
    for tensor in load_file(tmp_path / "merged" / WEIGHTS).values():
        # 1 + 0.75 / 128, which is nearer to 1 + 1 / 128 than to 1.
        assert torch.equal(tensor, torch.full_like(tensor, 1.0 + 2**-7))
        assert tensor.dtype == torch.bfloat16


def test_merge_refuses_adapters_that_do_not_fit_together(make_adapter, tmp_path):
    first, out = make_adapter("first", 1.0), str(tmp_path / "out")
    wide = make_adapter("wide", 1.0, hidden_sizes=[5])
    narrow = make_adapter("narrow", 1.0, kind="bottleneck")
    with pytest.raises(ValueError, match=r"of one kind and size, got .*first with `hidden_sizes` \[4\] .*wide"):
        main(["merge", str(first), str(wide), "--output_dir", out])
    with pytest.raises(ValueError, match="of one kind and size, got .*first with `kind` 'mlp' and .*'bottleneck'"):
        main(["merge", str(first), str(narrow), "--output_dir", out])
    with pytest.raises(ValueError, match="`merge` must be given two adapters or more, got 1"):
        main(["merge", str(first), "--output_dir", out])
    for weights in (["1"], ["1", "-1"], ["1", "0"], ["nan", "1"]):
        with pytest.raises(ValueError, match="`weights` must be 2 positive numbers"):
            main(["merge", str(first), str(first), "--weights", *weights, "--output_dir", out])
    with pytest.raises(ValueError, match="`output_dir` must be a new folder, got .*wide, which exists"):
        main(["merge", str(first), str(first), "--output_dir", str(wide)])
    with pytest.raises(ValueError, match="`adapter_name` must be"):
        main(["merge", str(first), str(first), "--output_dir", out + ".v2"])
    assert not Path(out).exists()


def test_merge_refuses_adapters_of_other_bases_and_other_tensors(make_adapter, tmp_path):
    first, second, out = make_adapter("first", 1.0), make_adapter("second", 1.0), str(tmp_path / "out")
    config = json.loads((second / CONFIG).read_text())
    (second / CONFIG).write_text(json.dumps(config | {"base_fingerprint": {"weights": "0"}}))
    with pytest.raises(ValueError, match="`merge` must be given adapters of one base, got .*first of .*second of"):
        main(["merge", str(first), str(second), "--output_dir", out])
    for folder, base in ((first, "me/one"), (second, "me/two")):
        nameless = config | {"base_fingerprint": None, "base_model_name_or_path": base}
        (folder / CONFIG).write_text(json.dumps(nameless))
    with pytest.raises(ValueError, match="adapters of one base, got .*first of me/one and .*second of me/two"):
        main(["merge", str(first), str(second), "--output_dir", out])
    (second / CONFIG).write_text((first / CONFIG).read_text())
    tensors = load_file(second / WEIGHTS)
    name = min(tensors)
    save_file(tensors | {name: torch.zeros(3)}, second / WEIGHTS)
    with pytest.raises(ValueError, match=f"adapters of one size, got .*first and .*second: {name}"):
        main(["merge", str(first), str(second), "--output_dir", out])
    assert not Path(out).exists()
