"""Whoever evaluates on what was trained on is told so, on the screen and in the card."""

import json

import numpy as np
import pytest
import soundfile
from datasets import Dataset, IterableDataset

from data.overlap import describe_overlap
from recipes.train_ctc import main as train_ctc_main

SPLITS = {"train_split": "train", "eval_split": "test"}


@pytest.fixture
def recordings(tmp_path):
    """Paths of four recordings of one size; the last is a copy of the first."""
    for name, seed in (("a", 0), ("b", 1), ("c", 2), ("copy", 0)):
        samples = 0.1 * np.random.default_rng(seed).standard_normal(100_000)
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000)
    return {name: str(tmp_path / f"{name}.wav") for name in ("a", "b", "c", "copy")}


def make_corpus(*paths: str, inside: bool = False) -> Dataset:
    rows = [{"path": path, "bytes": open(path, "rb").read() if inside else None} for path in paths]
    return Dataset.from_dict({"audio": rows})


@pytest.mark.parametrize("inside", [False, True])
def test_recordings_in_both_splits_are_counted_by_content(recordings, inside, caplog):
    train = make_corpus(recordings["a"], recordings["b"])
    evaluation = make_corpus(recordings["copy"], recordings["c"], recordings["b"], inside=inside)
    sentence = describe_overlap(train, evaluation, **SPLITS)
    assert sentence == "2 of the 3 recordings that are evaluated on were trained on too."
    assert caplog.text.count(sentence) == 1


def test_nothing_is_said_of_splits_that_share_nothing(recordings, caplog):
    assert describe_overlap(make_corpus(recordings["a"]), make_corpus(recordings["b"]), **SPLITS) is None
    assert caplog.text == ""


def test_a_stream_is_compared_by_the_name_of_its_split(recordings):
    stream = IterableDataset.from_generator(lambda: iter([{"audio": {"path": recordings["a"], "bytes": None}}]))
    evaluation = make_corpus(recordings["a"])
    assert describe_overlap(stream, evaluation, **SPLITS) is None
    assert "'train', is evaluated on" in describe_overlap(stream, evaluation, train_split="train", eval_split="train")


def test_a_recogniser_evaluated_on_its_training_split_says_so(run_recipe_main, small_corpus, tmp_path, caplog):
    run_recipe_main(
        train_ctc_main, "--dataset", small_corpus, "--eval_split", "train", "--num_mel_bins", 16, "--hidden_size", 8,
        "--num_hidden_layers", 1, "--max_steps", 1, "--save_strategy", "no", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    sentence = "The split that was trained on, 'train', is evaluated on: that says nothing of new speech."
    assert sentence in caplog.text
    assert sentence in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["caution"] == sentence
