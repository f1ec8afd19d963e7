"""A store serves no adapter that loading would refuse, and sees what has changed in its folder."""

import json
import os
from pathlib import Path

import pytest
import torch
from kills import leave_pending
from peft import LoraConfig
from safetensors.torch import load_file, save
from serving import BIAS, CONFIG_NAME, logits_loaded, logits_served, write_adapter

from inference.adapter_store import AdapterStore, list_adapter_names, locate_adapter, stat_files
from modeling import DeepSpeech2ForCTC, SpeechAdapterConfig, load_speech_adapter, save_adapter
from modeling.adapter_loading import read_adapter
from modeling.adapters import ADAPTER_WEIGHTS_NAME, BASE
from modeling.files import PENDING_FOLDER
from publishing.hub import HubTarget, collect_files
from recipes.manage_adapters import main as adapters_main


@pytest.mark.parametrize("capacity", [0, -1, 1.5, "2"])
def test_a_capacity_that_is_no_number_of_adapters_is_refused(tiny_model, people, capacity):
    with pytest.raises(ValueError, match="`capacity` must be a whole number from 1 on, got"):
        AdapterStore(tiny_model, people, capacity=capacity)


def test_a_capacity_beyond_memory_is_refused(tiny_model, people):
    store = AdapterStore(tiny_model, people, capacity=2**50)
    with pytest.raises(ValueError, match=r"adapters that fit into memory, got 1125899906842624 of \d+ bytes"):
        store.activate("ann")


def test_more_adapters_in_a_batch_than_capacity_are_refused(tiny_model, people):
    store = AdapterStore(tiny_model, people, capacity=2)
    with pytest.raises(ValueError, match=r"at most 2 different ones \(`capacity`\), got 3. Raise `capacity`"):
        store.rows(["ann", "ben", "cho", BASE, "ann"]).__enter__()


def test_a_folder_that_is_none_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="`folder` must be a folder of adapters, got '.*nowhere', which is none"):
        AdapterStore(tiny_model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"`folder` must be a folder of adapters, got '.*nowhere' \(No such file"):
        list_adapter_names(tmp_path / "nowhere")


def test_a_name_that_is_not_there_is_refused_with_those_like_it(tiny_model, people):
    with pytest.raises(ValueError, match=r"`adapter_name` must be an adapter in .*, got 'bem'. Did you mean 'ben'\?"):
        AdapterStore(tiny_model, people).rows(["bem"]).__enter__()
    with pytest.raises(ValueError, match="got 'zoroaster'. Nothing there has a name like it"):
        locate_adapter(people, "zoroaster")


@pytest.mark.parametrize("name", ["../people/ann", "ann/", ".", "", "/etc"])
def test_a_name_that_is_a_path_is_refused(tiny_model, people, name):
    store = AdapterStore(tiny_model, people)
    assert name not in store
    with pytest.raises(ValueError, match="`adapter_name` must be 1 to 64 letters, digits, '_' or '-'"):
        store.activate(name)


def test_only_folders_of_adapters_are_listed(tiny_model, store_folder):
    (store_folder / "not_one").mkdir()
    (store_folder / "dot.ted").mkdir()
    (store_folder / "dot.ted" / CONFIG_NAME).touch()
    (store_folder / "file").touch()
    store = AdapterStore(tiny_model, store_folder)
    assert store.names == ["ann", "ben", "cho", "dan"]
    assert "ann" in store
    assert "not_one" not in store


def test_a_name_in_the_model_and_in_the_store_is_refused(tiny_model, people):
    load_speech_adapter(tiny_model, str(people / "dan"), "ann")
    with pytest.raises(ValueError, match="`adapter_names` must be clear, got 'ann', in the model and in "):
        AdapterStore(tiny_model.eval(), people).rows(["ann", "ben"]).__enter__()


def test_a_model_that_gets_an_adapter_meanwhile_is_refused_until_close(tiny_model, people, five_rows):
    store = AdapterStore(tiny_model, people)
    said = logits_served(store, ["ann"] * 5, five_rows)
    load_speech_adapter(tiny_model, str(people / "dan"), "own")
    tiny_model.eval()
    with pytest.raises(
        ValueError, match="`model` must not get or lose adapters while .* a SpeechAdapterLayer at class"
    ):
        store.rows(["ann"] * 5).__enter__()
    store.close()
    assert torch.equal(logits_served(store, ["ann"] * 5, five_rows), said)


def corrupt(folder: Path, how: str) -> None:
    path = folder / ADAPTER_WEIGHTS_NAME
    tensors = load_file(path)
    content = path.read_bytes()
    tensors[BIAS][3] = float("nan")
    changes = {
        "cut short": lambda: path.write_bytes(content[:-10]),
        "header": lambda: path.write_bytes(b"\xff" + content[1:]),
        "nan": lambda: path.write_bytes(save(tensors, metadata={"format": "pt"})),
        "shape": lambda: path.write_bytes(save(tensors | {BIAS: torch.zeros(4)})),
        "too little": lambda: path.write_bytes(save({BIAS: torch.zeros(30)})),
        "integers": lambda: path.write_bytes(save(tensors | {BIAS: torch.zeros(30, dtype=torch.int32)})),
        "pickle": lambda: path.rename(folder / "adapter_model.bin"),
        "no weights": path.unlink,
        "no config": (folder / CONFIG_NAME).unlink,
        "bad config": lambda: (folder / CONFIG_NAME).write_text("{"),
    }
    changes[how]()


@pytest.mark.parametrize("is_known", [False, True], ids=["at first use", "after it was used"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut short", "`adapter` must have whole weights, got a damaged"),
        ("header", "`adapter` must have whole weights, got a damaged"),
        ("nan", "`adapter` must have finite weights, got NaN or infinity"),
        ("shape", "`adapter` must be an adapter of this base, got .* is torch.float32 .4,. and should be"),
        ("too little", "`adapter` must hold exactly the tensors of its configuration"),
        ("integers", "`adapter` must be an adapter of this base, got .* is torch.int32"),
        ("pickle", "`adapter` must have its weights in adapter_model.safetensors, got the pickle"),
        ("no weights", "`adapter` must be a folder with adapter_model.safetensors, got"),
        ("no config", "`adapter_name` must be an adapter in .*, got 'ann'"),
        ("bad config", "`adapter` must have a JSON file as configuration, got"),
    ],
)
def test_a_damaged_adapter_is_refused_and_the_others_are_served(
    tiny_model, store_folder, five_rows, how, message, is_known
):
    store = AdapterStore(tiny_model, store_folder, capacity=2)
    for name in ("ben", *["ann"] * is_known):
        store.activate(name)
    said = logits_served(store, ["ben"] * 5, five_rows)
    corrupt(store_folder / "ann", how)

    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            logits_served(store, ["ben", "ann", BASE, "ben", "ann"], five_rows)
    assert store.loaded == ["ben"]
    assert torch.equal(logits_served(store, ["ben"] * 5, five_rows), said)


def test_an_adapter_of_another_base_is_refused_unless_that_is_allowed(tiny_model, people):
    with torch.no_grad():
        tiny_model.classifier[1].weight[0, 0] += 1
    with pytest.raises(ValueError, match="`adapter` must be used with the base that it was made for, .*: weights: "):
        AdapterStore(tiny_model, people).activate("ann")
    store = AdapterStore(tiny_model, people, allow_base_mismatch=True)
    assert store.activate("ann").keys() == {"classifier"}


def test_another_vocabulary_is_refused(tiny_model, tiny_base, tiny_processor, tmp_path):
    tiny_model.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[8]), "ann")
    save_adapter(tiny_model, tmp_path / "ann", "ann", processor=tiny_processor)
    settings = json.loads((tmp_path / "ann" / CONFIG_NAME).read_text())
    settings["base_fingerprint"]["vocabulary"] = "0" * 32
    (tmp_path / "ann" / CONFIG_NAME).write_text(json.dumps(settings))
    model = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    with pytest.raises(ValueError, match="`adapter` must be used with the base that .*: vocabulary: "):
        AdapterStore(model, tmp_path, processor=tiny_processor).activate("ann")


def test_an_adapter_that_does_not_act_is_refused(tiny_model, tmp_path):
    tiny_model.unused = torch.nn.Linear(4, 4)
    tiny_model.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[8], target_modules=["unused"]), "ann")
    torch.nn.init.ones_(tiny_model.unused.speech_adapter_blocks["ann"][-1].weight)
    save_adapter(tiny_model, tmp_path / "ann", "ann")
    tiny_model.delete_adapter("ann")
    with pytest.raises(ValueError, match="`adapter` must act on the model, got 'ann', with and without which"):
        AdapterStore(tiny_model.eval(), tmp_path).activate("ann")


def test_an_adapter_of_another_method_is_refused(tiny_model, tmp_path):
    tiny_model.add_adapter(LoraConfig(target_modules=["classifier.1"], r=2), "low")
    save_adapter(tiny_model, tmp_path / "low", "low")
    with pytest.raises(ValueError, match="`folder` must hold speech adapters, got .*low, which is LORA"):
        AdapterStore(tiny_model, tmp_path).activate("low")


def test_any_number_of_configurations_shares_the_memory(tiny_model, tiny_base, five_rows, tmp_path):
    for size in range(1, 11):
        write_adapter(tiny_base, tmp_path / f"size_{size}", size, kind="mlp", hidden_sizes=[size])
    store = AdapterStore(tiny_model, tmp_path, capacity=3)
    for size in (*range(1, 11), 1):
        blocks = store.activate(f"size_{size}")
        assert [len(block[0].bias) for block in blocks.values()] == [size]
    assert store.loaded == ["size_9", "size_10", "size_1"]
    names = ["size_1", "size_10", BASE, "size_4", "size_1"]
    expected = logits_loaded(tiny_base, tmp_path, names, five_rows)
    torch.testing.assert_close(logits_served(store, names, five_rows), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "replacement"])  # alike in their tensors, told apart by the configuration
def test_an_adapter_that_is_saved_again_is_read_again(tiny_model, tiny_base, store_folder, five_rows, kind):
    store = AdapterStore(tiny_model, store_folder, capacity=2)
    old = logits_served(store, ["ann"] * 5, five_rows)
    write_adapter(tiny_base, store_folder / "ann", 9, kind=kind)

    new = logits_served(store, ["ann"] * 5, five_rows)

    assert not torch.equal(new, old)
    assert torch.equal(new, logits_loaded(tiny_base, store_folder, ["ann"] * 5, five_rows))
    assert store.loaded == ["ann"]


@pytest.mark.parametrize("num_moved", [0, 1])
def test_a_save_that_was_interrupted_is_served_where_it_is(
    tiny_model, tiny_base, store_folder, five_rows, tmp_path, num_moved
):
    store = AdapterStore(tiny_model, store_folder)
    old = logits_served(store, ["ann"] * 5, five_rows)
    write_adapter(tiny_base, tmp_path / "new" / "ann", 9, kind="mlp")
    files = {path.name: path.read_bytes() for path in (tmp_path / "new" / "ann").iterdir()}
    leave_pending(store_folder / "ann", files, num_moved=num_moved)

    said = logits_served(store, ["ann"] * 5, five_rows)

    assert (store_folder / "ann" / PENDING_FOLDER / ADAPTER_WEIGHTS_NAME).is_file()
    assert not torch.equal(said, old)
    assert torch.equal(said, logits_loaded(tiny_base, tmp_path / "new", ["ann"] * 5, five_rows))


@pytest.mark.parametrize("name", ["info", "load", "store", "push"])
def test_reading_an_adapter_moves_nothing_out_of_a_folder_that_it_links_to(tiny_model, store_folder, tmp_path, name):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / ADAPTER_WEIGHTS_NAME).write_text("mine")
    (store_folder / "ann" / PENDING_FOLDER).symlink_to(precious)
    folder = store_folder / "ann"
    acts = {
        "info": lambda: adapters_main(["info", str(folder)]),
        "load": lambda: load_speech_adapter(tiny_model, str(folder), "ann"),
        "store": lambda: AdapterStore(tiny_model, store_folder).activate("ann"),
        "push": lambda: collect_files(folder, HubTarget("me/ann")),
    }
    with pytest.raises(ValueError, match="`folder` must not hold .moving, which no writer of this machine left"):
        acts[name]()
    assert os.listdir(precious) == [ADAPTER_WEIGHTS_NAME]


def test_an_adapter_that_changes_while_it_is_checked_is_read_again(
    tiny_model, tiny_base, store_folder, five_rows, monkeypatch
):
    def read_late(folder: str):
        saved = read_adapter(folder)
        if not changes:
            changes.append(write_adapter(tiny_base, store_folder / "ann", 9, kind="mlp"))
        return saved

    changes = []
    monkeypatch.setattr("inference.adapter_store.read_adapter", read_late)
    said = logits_served(AdapterStore(tiny_model, store_folder), ["ann"] * 5, five_rows)

    assert len(changes) == 1
    assert torch.equal(said, logits_loaded(tiny_base, store_folder, ["ann"] * 5, five_rows))


def test_weights_that_change_while_they_are_read_are_read_again(
    tiny_model, tiny_base, store_folder, five_rows, monkeypatch
):
    store = AdapterStore(tiny_model, store_folder, capacity=1)
    store.activate("ann")
    store.activate("ben")
    path = store_folder / "ann" / ADAPTER_WEIGHTS_NAME
    changed = {name: value.neg() for name, value in load_file(path).items()}
    content, looks = save(changed, metadata={"format": "pt"}), []

    def stat_and_change(folder: str):
        states = stat_files(folder)
        if folder == str(store_folder / "ann"):
            looks.append(states)
            if len(looks) == 1:  # the file is about to be read
                path.write_bytes(content)
        return states

    monkeypatch.setattr("inference.adapter_store.stat_files", stat_and_change)
    said = logits_served(store, ["ann"] * 5, five_rows)

    assert len(set(looks)) == 2
    assert torch.equal(said, logits_loaded(tiny_base, store_folder, ["ann"] * 5, five_rows))


def test_a_file_that_has_not_changed_is_not_checked_twice(tiny_model, store_folder):
    store = AdapterStore(tiny_model, store_folder, capacity=1)
    store.activate("ann")
    path = store_folder / "ann" / ADAPTER_WEIGHTS_NAME
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-4:] = torch.tensor([float("nan")]).numpy().tobytes()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # what no program does by chance

    store.activate("ben")
    assert store.activate("ann")["classifier"][-1].weight.isnan().sum() == 1
    path.touch()
    with pytest.raises(ValueError, match="`adapter` must have finite weights"):
        store.activate("ann")


def test_adapters_that_come_back_into_memory_are_read_without_the_checks(tiny_model, people, monkeypatch):
    read = []

    def count(folder):
        read.append(Path(folder).name)
        return read_adapter(folder)

    monkeypatch.setattr("inference.adapter_store.read_adapter", count)
    store = AdapterStore(tiny_model, people, capacity=1)
    for name in ("ann", "ben", "ann", "ben"):
        store.activate(name)
    assert read == ["ann", "ben"]


def test_a_training_model_is_refused_and_left_as_it_was(tiny_model, people):
    tiny_model.train()
    modules = list(tiny_model.named_modules())
    with pytest.raises(ValueError, match="`adapter_names` works for inference only"):
        AdapterStore(tiny_model, people).rows(["ann", "ben"]).__enter__()
    assert list(tiny_model.named_modules()) == modules
    assert all(module.training for module in tiny_model.modules())
