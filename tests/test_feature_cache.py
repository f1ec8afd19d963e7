"""Frozen states are computed once, read as they were computed, and computed again when anything about them changes."""

import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from safetensors import safe_open
from torch.utils.data import DataLoader

from data.augmentation import Augmentation
from data.collators import CTCCollator, pack_states
from data.state_cache import (
    CACHE_NAME,
    SCRATCH_PREFIX,
    CachedUtterances,
    FeatureCache,
    build_cache,
    digest_utterances,
    resolve_cache_folder,
)
from data.utterances import UtteranceDataset
from training.trainer import SeededLengthSampler

TEXTS = ["one", "two", "three", "four", "five", "six", "seven"]
# Bytes by which ten times the data may raise a process's memory: 30 MB are stored.
MAX_GROWTH_BYTES = 8_000_000
FORK = multiprocessing.get_context("fork")
MEMORY_SCRIPT = """
import json, sys
import numpy as np, torch
from datasets import Dataset
from torch.utils.data import DataLoader
from data.utterances import UtteranceDataset
from data.collators import pack_states
from data.state_cache import CachedUtterances

def read(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))

class Clips(UtteranceDataset):
    labels = property(lambda self: [[1]] * len(self))

    def __getitem__(self, index):
        return index

def make(count):
    samples = list(np.random.default_rng(0).standard_normal((count, 800)).astype(np.float32))
    columns = {"samples": samples, "num_samples": [800] * count, "text": ["a"] * count, "speaker_id": [""] * count}
    return Clips(Dataset.from_dict(columns), None)

def run(rows):
    return {"hidden_states": torch.rand(len(rows), 50, 256)}, torch.full((len(rows),), 50)

def build(dataset):
    options = {"collate": list, "key": {}, "folder": sys.argv[1], "batch_size": 8}
    return CachedUtterances.build(dataset, run, **options)

small, large = make(60), make(600)
build(small)
before = read("VmRSS")
build(large)
building = read("VmHWM") - before
cached = build(large)
opening = read("VmHWM") - before
before = read("RssAnon")
peak = before
for batch in DataLoader(cached, batch_size=8, collate_fn=pack_states):
    peak = max(peak, read("RssAnon"))
reading = peak - before
before = read("RssAnon")
copies = [item["states"]["hidden_states"].clone() for item in cached]
print(json.dumps({"building": building, "opening": opening, "reading": reading, "copying": read("RssAnon") - before}))
"""


def make_clips(texts: list[str] = TEXTS, *, factor: float = 0.1) -> Dataset:
    """Clips of noise of one speaker, 0.2 to 0.5 s at 16 kHz, none as long as another and the longest in the middle."""
    order = np.random.default_rng(1).permutation(len(texts))
    samples = [
        factor * np.random.default_rng(row).standard_normal(3200 + 800 * order[row]) for row in range(len(texts))
    ]
    return Dataset.from_dict(
        {
            "samples": [clip.astype(np.float32) for clip in samples],
            "num_samples": [len(clip) for clip in samples],
            "text": texts,
            "speaker_id": ["ann"] * len(texts),
        }
    )


def use_features(batch: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Runs nothing: the features themselves are the states, and no batch changes them."""
    return {"hidden_states": batch["input_features"]}, batch["attention_mask"].sum(1)


def refuse(_batch: dict) -> None:
    """Stands where a whole cache has to be found."""
    raise AssertionError("the frozen part runs again")


def find_scratch(folder: Path) -> list[Path]:
    return list(folder.glob(f"*/{SCRATCH_PREFIX}*"))


@pytest.fixture
def dataset(tiny_processor) -> UtteranceDataset:
    return UtteranceDataset(make_clips(), tiny_processor)


@pytest.fixture
def build(tiny_processor, tmp_path) -> Callable[..., FeatureCache]:
    """Builds a cache in the test's folder; by default of features in batches of 3."""

    def build(dataset, run=use_features, *, key=None, batch_size=3, **options):
        options = {"folder": tmp_path / "caches", "batch_size": batch_size, **options}
        return build_cache(dataset, run, collate=CTCCollator(tiny_processor), key=key or {"base": "a"}, **options)

    return build


def test_cached_states_equal_recomputation_bit_for_bit(dataset, build, tiny_model, tiny_processor):
    def run(batch):
        output = tiny_model(batch["input_features"], batch["attention_mask"], output_hidden_states=True)
        conv, recurrent = output.hidden_states
        return {"conv": conv, "hidden_states": recurrent}, output.logits_lengths

    cache = build(dataset, run)

    collate = CTCCollator(tiny_processor)
    order = sorted(range(7), key=lambda row: -dataset.num_samples[row])
    for rows in (order[:3], order[3:6], order[6:]):
        with torch.no_grad():
            states, lengths = run(collate([dataset[row] for row in rows]))
        for position, row in enumerate(rows):
            assert cache.lengths[row] == lengths[position]
            assert cache[row].keys() == {"conv", "hidden_states"}
            for name, values in cache[row].items():
                assert torch.equal(values, states[name][position, : lengths[position]])


def test_a_cache_gives_every_utterance_in_the_order_of_the_dataset(dataset, build):
    cache = build(dataset)
    assert len(cache) == len(dataset)
    for item, utterance in zip(cache, dataset, strict=True):
        assert torch.equal(item["hidden_states"], torch.from_numpy(utterance["input_features"]))
    assert cache.lengths == [len(utterance["input_features"]) for utterance in dataset]
    assert cache.num_frames == sum(cache.lengths)


def test_bfloat16_rounds_the_states_and_halves_the_file(dataset, build):
    exact, rounded = build(dataset), build(dataset, dtype="bfloat16")
    for values, expected in zip(rounded, exact, strict=True):
        assert torch.equal(values["hidden_states"], expected["hidden_states"].bfloat16())
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert exact.nbytes - rounded.nbytes == pytest.approx(2 * 16 * exact.num_frames, abs=64)


def test_the_file_is_plain_safetensors(dataset, build):
    cache = build(dataset)
    with safe_open(cache.path, framework="np") as file:
        assert list(file.offset_keys()) == ["lengths", "starts", "hidden_states"]
        assert file.get_tensor("lengths").tolist() == cache.lengths
        assert file.get_tensor("hidden_states").shape == (cache.num_frames, 16)
        assert json.loads(file.metadata()["key"])["base"] == "a"


def test_items_are_views_of_one_mapped_tensor(dataset, build):
    cache = build(dataset)
    assert len({item["hidden_states"].untyped_storage().data_ptr() for item in cache}) == 1
    assert str(cache.path) in Path("/proc/self/maps").read_text()


def test_a_pickled_cache_holds_its_path_and_not_its_states(dataset, build):
    cache = build(dataset)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[3]["hidden_states"], cache[3]["hidden_states"])


def test_a_second_user_reuses_the_states(dataset, build, tiny_processor, caplog):
    caplog.set_level(logging.INFO, logger="data.state_cache")
    batches = []

    def run(batch):
        batches.append(len(batch["labels"]))
        return use_features(batch)

    first = build(dataset, run)
    second = build(UtteranceDataset(make_clips(), tiny_processor), run)

    assert batches == [3, 3, 1]
    assert first.path == second.path
    megabytes = f"{first.nbytes / 1e6:.1f} MB in float32, in {first.path.parents[1]}."
    assert [record.getMessage() for record in caplog.records] == [
        f"Frozen states: 1 of 1 variants built, 0 reused; 7 utterances, {first.num_frames} frames, {megabytes}",
        f"Frozen states: 0 of 1 variants built, 1 reused; 7 utterances, {first.num_frames} frames, {megabytes}",
    ]


def flip(position: Callable[[bytes], int]) -> Callable[[Path], None]:
    """Returns what turns over the bits of one byte of a file, found in its content."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position(content)] ^= 0xFF
        path.write_bytes(content)

    return damage


def replace(old: bytes, new: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "it cannot be read: .*incomplete"),
        (lambda path: os.truncate(path, 0), "it cannot be read"),
        (flip(lambda _content: 0), "it cannot be read"),
        (flip(lambda content: len(content) - 1), "the checksum of 'hidden_states' is another"),
        (flip(lambda content: len(content) // 2), "the checksum of 'hidden_states' is another"),
        (flip(lambda content: 8 + int.from_bytes(content[:8], "little")), "the checksum of 'lengths' is another"),
        (replace(b'"F32"', b'"I32"'), "the checksum of 'hidden_states' is another"),
        (replace(b'"hidden_states"', b'"hidden_statez"'), "the checksum of 'hidden_statez' is another"),
        (replace(b'\\"base\\": \\"a\\"', b'\\"base\\": \\"b\\"'), "it was made for another key"),
    ],
)
def test_a_damaged_cache_is_built_anew_with_a_warning(dataset, build, caplog, damage, message):
    path = build(dataset).path
    whole = path.read_bytes()
    damage(path)
    assert path.read_bytes() != whole

    build(dataset)

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"Cache {path} is built anew: ")
    assert re.search(message, record.getMessage())
    assert path.read_bytes() == whole
    build(dataset, refuse)


def test_a_cache_in_the_place_of_another_is_built_anew(dataset, build, caplog):
    path, other = build(dataset).path, build(dataset, key={"base": "b"}).path
    shutil.copy(other, path)
    build(dataset)
    assert "is built anew: it was made for another key." in caplog.text


def test_an_error_while_computing_leaves_nothing_behind(dataset, build, tmp_path):
    results = iter([use_features])
    with pytest.raises(StopIteration):
        build(dataset, lambda batch: next(results)(batch))
    assert not find_scratch(tmp_path / "caches")
    assert not list((tmp_path / "caches").glob(f"*/{CACHE_NAME}"))


@pytest.mark.parametrize(
    "change",
    [
        lambda clips: clips.select([1, 0, *range(2, 7)]),
        lambda clips: clips.select(range(6)),
        lambda _clips: make_clips(factor=0.2),
        lambda _clips: make_clips([*TEXTS[:6], "eight"]),
    ],
    ids=["order", "number", "samples", "text"],
)
def test_changed_data_are_another_cache(build, tiny_processor, change):
    path = build(UtteranceDataset(make_clips(), tiny_processor)).path
    assert build(UtteranceDataset(change(make_clips()), tiny_processor)).path != path


def test_another_key_or_precision_is_another_cache(dataset, build):
    paths = {build(dataset, key=key).path for key in ({"base": "a"}, {"base": "b"}, {"base": "a", "mel": 16})}
    paths.add(build(dataset, dtype="bfloat16").path)
    assert len(paths) == 4


def test_a_seed_is_another_cache_only_where_it_changes_the_utterances(tiny_processor):
    def digest(seed: int, epoch: int = 0, **options) -> str:
        dataset = UtteranceDataset(make_clips(), tiny_processor, seed=seed, **options)
        dataset.set_epoch(epoch)
        return digest_utterances(dataset)

    masks = {"augmentation": Augmentation(num_mel_masks=1)}
    more_masks = {"augmentation": Augmentation(num_mel_masks=2)}
    joins = {"augmentation": Augmentation(), "concatenate": (2, 3)}
    assert digest(0) == digest(1) == digest(0, epoch=1) == digest(0, augmentation=Augmentation())
    assert (
        len({digest(0), digest(0, **masks), digest(1, **masks), digest(0, 1, **masks), digest(0, **more_masks)}) == 5
    )
    assert len({digest(0), digest(0, **joins), digest(1, **joins), digest(0, epoch=1, **joins)}) == 4


@pytest.mark.parametrize(
    ("augmentation", "concatenate", "is_random"),
    [
        (None, (2, 3), False),
        (Augmentation(), (1, 1), False),
        (Augmentation(), (2, 3), True),
        (Augmentation(min_speed=0.9), (1, 1), True),
        (Augmentation(max_speed=1.1), (1, 1), True),
        (Augmentation(num_time_masks=1), (1, 1), True),
        (Augmentation(num_mel_masks=1), (1, 1), True),
    ],
)
def test_utterances_are_random_when_epochs_differ(tiny_processor, augmentation, concatenate, is_random):
    dataset = UtteranceDataset(make_clips(), tiny_processor, augmentation=augmentation, concatenate=concatenate)
    first = [utterance["input_features"] for utterance in dataset]
    dataset.set_epoch(1)
    second = [utterance["input_features"] for utterance in dataset]
    are_equal = all(np.array_equal(left, right) for left, right in zip(first, second, strict=True))
    assert dataset.is_random == is_random == (not are_equal)


def start_builder(folder: Path, processor) -> tuple:
    """Starts a process that wants the cache; if it runs the frozen part, it says so and waits there."""
    parent, child = FORK.Pipe()

    def run(batch):
        child.send("running")
        child.recv()
        return use_features(batch)

    def work() -> None:
        torch.set_num_threads(1)  # the threads of the process that forked are not there
        dataset = UtteranceDataset(make_clips(), processor)
        child.send("begins")
        options = {"collate": CTCCollator(processor), "key": {"base": "a"}, "folder": folder, "batch_size": 7}
        build_cache(dataset, run, **options)
        child.send("done")

    process = FORK.Process(target=work, daemon=True)
    process.start()
    assert parent.recv() == "begins"
    return process, parent


def test_what_a_killed_process_left_is_removed(dataset, build, tiny_processor, tmp_path):
    process, pipe = start_builder(tmp_path / "caches", tiny_processor)
    assert pipe.recv() == "running"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(find_scratch(tmp_path / "caches")) == 1

    cache = build(dataset)

    assert not find_scratch(tmp_path / "caches")
    assert torch.equal(cache[0]["hidden_states"], torch.from_numpy(dataset[0]["input_features"]))


def test_of_two_processes_that_start_together_one_builds(dataset, build, tiny_processor, tmp_path):
    first, first_pipe = start_builder(tmp_path / "caches", tiny_processor)
    assert first_pipe.recv() == "running"
    second, second_pipe = start_builder(tmp_path / "caches", tiny_processor)
    assert not second_pipe.poll(0.5)  # it waits for the first
    first_pipe.send("go on")
    assert first_pipe.recv() == "done"
    assert second_pipe.recv() == "done"
    for process in (first, second):
        process.join()
        assert process.exitcode == 0
    assert len(list((tmp_path / "caches").glob(f"*/{CACHE_NAME}"))) == 1
    build(dataset, refuse)


def build_utterances(dataset: UtteranceDataset, folder: Path, **options) -> CachedUtterances:
    arguments = {"collate": CTCCollator(dataset.processor), "key": {}, "folder": folder, "batch_size": 3, **options}
    return CachedUtterances.build(dataset, use_features, **arguments)


def test_epochs_read_their_variant_with_its_groups_and_labels(tiny_processor, tmp_path):
    augmentation = Augmentation(min_speed=0.9, max_speed=1.1, num_mel_masks=1)
    options = {"augmentation": augmentation, "concatenate": (1, 3), "seed": 5}
    cached = build_utterances(UtteranceDataset(make_clips(), tiny_processor, **options), tmp_path, num_variants=2)

    assert len(cached.caches) == 2
    fresh = UtteranceDataset(make_clips(), tiny_processor, **options)
    references = []
    for epoch in range(4):
        cached.set_epoch(epoch)
        fresh.set_epoch(epoch % 2)
        assert len(cached) == len(fresh)
        assert (cached.references, cached.speakers, cached.seconds) == (
            fresh.references,
            fresh.speakers,
            fresh.seconds,
        )
        assert cached.lengths == [len(item["states"]["hidden_states"]) for item in cached]
        for item, utterance in zip(cached, fresh, strict=True):
            assert item["labels"] == utterance["labels"]
            assert torch.equal(item["states"]["hidden_states"], torch.from_numpy(utterance["input_features"]))
        references.append(cached.references)
    assert references[0] == references[2] != references[1] == references[3]


def test_utterances_that_never_change_have_one_variant(dataset, tmp_path):
    cached = build_utterances(dataset, tmp_path, num_variants=4)
    assert len(cached.caches) == 1
    cached.set_epoch(3)
    assert cached[2]["labels"] == dataset[2]["labels"]


def test_cached_utterances_are_drawn_by_length_and_packed(dataset, tmp_path):
    cached = build_utterances(dataset, tmp_path)
    sampler = SeededLengthSampler(3, cached, seed=0, find_epoch=lambda: 0)
    loader = DataLoader(cached, batch_size=3, sampler=sampler, collate_fn=pack_states)
    batches = list(loader)
    assert sorted(length for batch in batches for length in batch["logits_lengths"].tolist()) == sorted(cached.lengths)
    assert max(batches[0]["logits_lengths"]) == max(cached.lengths)
    for batch in batches:
        assert batch["frozen_states"]["hidden_states"].shape == (batch["logits_lengths"].sum(), 16)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    growth = json.loads(finished.stdout.splitlines()[-1])
    assert sum(path.stat().st_size for path in tmp_path.glob(f"*/{CACHE_NAME}")) > 33e6
    assert growth["copying"] > 20_000_000  # the measurement sees it when 30 MB are held
    assert max(growth["building"], growth["opening"], growth["reading"]) < MAX_GROWTH_BYTES


def test_caches_are_in_the_hugging_face_cache_unless_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    assert resolve_cache_folder() == tmp_path / "frozen_features"
    assert resolve_cache_folder(tmp_path / "mine") == tmp_path / "mine"
    assert resolve_cache_folder("~/mine") == Path.home() / "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "`cache_dtype` must be one of float32, bfloat16, got 'float16'"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"num_variants": 0}, "`cache_variants` must be at least 1 for a cache, got 0"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(dataset, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_utterances(dataset, tmp_path, **options)


def test_a_folder_that_cannot_be_written_is_named(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"`cache_dir` must have room .* got .*file \(.*Name another folder"):
        build_utterances(dataset, tmp_path / "file")
