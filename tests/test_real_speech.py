"""Real recordings of spoken digits: they load as they are, and an unheard speaker is understood after a minute."""

import json
from functools import partial

import pytest

from benchmarks.recording_conditions import add_pause, list_conditions
from benchmarks.robustness import Listener, measure
from data.corpora import load_corpus, take_seconds
from data.speakers import select_speakers
from data.utterances import UtteranceDataset, decode_clips
from recipes.personalize import main as personalize_main
from recipes.train_ctc import main as train_ctc_main


def test_real_recordings_become_utterances_without_loss(fsdd_folder, tiny_processor):
    corpus = select_speakers(load_corpus(str(fsdd_folder), split="test"), ["theo"])
    clips = decode_clips(corpus, tiny_processor, samples_per_logit=320, is_joined=True)
    utterances = UtteranceDataset(clips, tiny_processor, concatenate=(1, 4))
    assert len(clips) == 100
    assert sorted(" ".join(utterances.references).split()) == sorted(corpus["text"])


def test_five_seconds_of_a_real_speaker_cover_every_digit(fsdd_folder):
    corpus = select_speakers(load_corpus(str(fsdd_folder), split="train"), ["jackson"])
    taken = take_seconds(corpus, 8.0, seed=0)
    assert sum(taken["seconds"]) <= 8.0
    assert len(set(taken["text"])) == 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_minute_of_a_real_speaker_removes_more_than_half_of_the_errors(fsdd_folder, run_recipe_main, tmp_path):
    config = "--config recipes/configs/{}_fsdd.yaml --dataset {}".format
    run_recipe_main(
        train_ctc_main, *config("train_ctc", fsdd_folder).split(), "--exclude_speakers", "jackson",
        "--num_train_epochs", 10, "--output_dir", tmp_path / "base",
    )  # fmt: skip
    run_recipe_main(
        personalize_main, *config("personalize", fsdd_folder).split(), "--model_name_or_path", tmp_path / "base",
        "--speaker_id", "jackson", "--max_train_seconds", 60, "--output_dir", tmp_path / "jackson",
    )  # fmt: skip
    results = json.loads((tmp_path / "jackson" / "eval_results.json").read_text())
    assert results["eval_wer"] < 0.5 * results["base_wer"]
    assert results["trainable_parameters"] <= 0.04 * results["total_parameters"]

    # Two seconds of silence at both ends, as a phone records them, change nothing.
    conditions = {"as recorded": list_conditions()["as recorded"]}
    for kind in ("zeros", "room noise"):
        conditions[kind] = partial(add_pause, kind=kind, place="both ends", seconds=2.0)
    for adapter in (None, tmp_path / "jackson"):
        listener = Listener("jackson", tmp_path / "base", adapter, ("jackson",))
        wer = {row["condition"]: row["wer"] for row in measure(listener, str(fsdd_folder), conditions)}
        assert max(wer["zeros"], wer["room noise"]) <= wer["as recorded"] + 0.03
