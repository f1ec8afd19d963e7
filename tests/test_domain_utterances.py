"""Utterances of two domains: joined and cut to what a model hears, cached, and made into batches."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from data.domain_utterances import CachedDomain, DomainCollator, DomainUtterances, PairedUtterances
from data.prompts import make_prompt
from tests.speech_models import make_chat_processor, make_whisper_processor

WINDOW = 1_000


def make_clips(sizes: list[int], *, seed: int = 0, **columns: list) -> Dataset:
    """Clips as from `split_long`, noise of `sizes` samples."""
    generator = np.random.default_rng(seed)
    defaults = {
        "name": [f"{row}.wav" for row in range(len(sizes))],
        "text": [f"word{row}" for row in range(len(sizes))],
        "instruction": [""] * len(sizes),
        "speaker_id": ["ann"] * len(sizes),
        "samples": [generator.normal(0, 0.1, size).astype(np.float32) for size in sizes],
        "num_samples": sizes,
        "utterance": list(range(len(sizes))),
        "num_parts": [1] * len(sizes),
    }
    return Dataset.from_dict(defaults | columns)


def parted() -> Dataset:
    """A whole clip and one in two parts."""
    return make_clips([800, 900, 700], text=["short", "long", "long"], utterance=[0, 1, 1], num_parts=[1, 2, 2])


def test_joined_clips_fit_the_window_and_each_is_used_once():
    dataset = DomainUtterances(make_clips([400, 500, 300, 900, 200, 100] * 5), max_samples=WINDOW, concatenate=(1, 4))
    assert sorted(row for rows in dataset.groups for row in rows) == list(range(30))
    assert max(dataset.lengths) <= WINDOW
    assert max(map(len, dataset.groups)) > 1


def test_an_utterance_is_its_clips_one_after_the_other():
    clips = make_clips([300, 200, 100])
    dataset = DomainUtterances(clips, max_samples=WINDOW, concatenate=(3, 3))
    (rows,) = dataset.groups
    item = dataset[0]
    np.testing.assert_array_equal(item["samples"], np.concatenate([np.float32(clips[row]["samples"]) for row in rows]))
    assert item["num_samples"] == dataset.lengths[0] == 600
    assert item["text"] == dataset.references[0] == " ".join(f"word{row}" for row in rows)
    assert item["instruction"] is None


def test_parts_of_a_clip_are_items_of_one_utterance():
    dataset = DomainUtterances(parted(), max_samples=WINDOW)
    assert dataset.utterances == [0, 1, 1]
    assert dataset.references == ["short", "long"]


def test_split_clips_are_left_out_of_training_on_transcripts_and_counted():
    dataset = DomainUtterances(parted(), max_samples=WINDOW, is_whole=True)
    assert dataset.groups == [[0]]
    assert dataset.num_left_out == 1
    assert DomainUtterances(parted(), max_samples=WINDOW).num_left_out == 0


def test_nothing_left_is_refused():
    clips = parted().select([1, 2])
    with pytest.raises(ValueError, match="`dataset` must have at least one usable utterance, got none. Cut"):
        DomainUtterances(clips, max_samples=WINDOW, is_whole=True)


@pytest.mark.parametrize("columns", [{"speaker_id": [""] * 2}, {"instruction": ["Who?"] * 2}])
def test_clips_of_nobody_or_with_questions_are_not_joined(columns):
    with pytest.raises(ValueError, match="`concatenate_max` above 1 joins clips of one speaker"):
        DomainUtterances(make_clips([10, 10], **columns), max_samples=WINDOW, concatenate=(1, 2))


def test_the_digest_follows_every_sample():
    clips = make_clips([20, 30])
    changed = clips.to_list()
    changed[1]["samples"][7] += 1e-3
    digests = [
        DomainUtterances(rows, max_samples=WINDOW).samples_digest
        for rows in (clips, clips, Dataset.from_list(changed))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_pairs_are_of_the_same_clips():
    source, target = (
        DomainUtterances(make_clips([400, 500, 300] * 4, seed=seed), max_samples=WINDOW, concatenate=(1, 3), seed=5)
        for seed in (0, 1)
    )
    pairs = PairedUtterances(source, target)
    assert pairs.groups == source.groups == target.groups
    np.testing.assert_array_equal(pairs[2]["source_samples"], source[2]["samples"])
    np.testing.assert_array_equal(pairs[2]["samples"], target[2]["samples"])


def test_utterances_of_other_lengths_are_no_pairs():
    source, target = (DomainUtterances(make_clips(sizes), max_samples=WINDOW) for sizes in ([10, 20], [10, 21]))
    with pytest.raises(ValueError, match="`source` and `target` must hold the same utterances"):
        PairedUtterances(source, target)


def test_cached_utterances_take_a_variant_an_epoch_and_are_as_many_in_each():
    datasets = [DomainUtterances(make_clips(sizes), max_samples=WINDOW) for sizes in ([10, 20, 30], [40, 50])]
    caches = [[{"states": torch.full((2, 3), float(variant))} for _ in range(3)] for variant in range(2)]
    cached = CachedDomain(list(zip(datasets, caches, strict=True)))
    assert len(cached) == len(cached.lengths) == 2
    assert (cached[1]["num_samples"], cached[1]["text"]) == (20, "word1")
    cached.set_epoch(3)
    assert cached.lengths == [40, 50]
    assert (cached[1]["num_samples"], cached[1]["states"].unique().tolist()) == (50, [1.0])
    cached.set_epoch(2)
    assert cached.lengths == [10, 20]


def test_a_batch_of_samples_has_features_mask_frames_and_labels():
    prompt = make_prompt(make_whisper_processor())
    dataset = DomainUtterances(make_clips([16_000, 9_000]), max_samples=prompt.max_samples)
    batch = DomainCollator(prompt, has_answers=True)([dataset[0], dataset[1]])
    assert batch.keys() == {"num_frames", "attention_mask", "input_features", "decoder_input_ids", "labels"}
    assert batch["num_frames"].tolist() == [50, 29]
    assert batch["attention_mask"].sum(1).tolist() == [100, 57]
    expected = prompt.extract([dataset[0]["samples"], dataset[1]["samples"]])
    assert torch.equal(batch["input_features"], expected["input_features"])
    assert prompt.read(batch["labels"].clamp(min=0)[:, 1:7], 0) == ["word0", "word1"]


def test_a_batch_of_cached_pairs_is_padded_and_has_no_labels_unless_asked_for():
    prompt = make_prompt(make_chat_processor())
    items = [
        {"states": torch.ones(frames, 3), "source_states": torch.zeros(frames, 3), "num_samples": frames * 640}
        for frames in (4, 2)
    ]
    batch = DomainCollator(prompt, has_answers=False)(items)
    assert batch.keys() == {"num_frames", "feature_attention_mask", "states", "source_states"}
    assert batch["states"].sum((1, 2)).tolist() == [12, 6]
    assert batch["num_frames"].tolist() == [4, 2]


def test_placeholders_of_a_batch_are_checked():
    prompt = make_prompt(make_chat_processor())
    item = DomainUtterances(make_clips([16_000]), max_samples=prompt.max_samples)[0]
    with pytest.raises(ValueError, match="got 0 placeholders for 25 frames"):
        DomainCollator(prompt, has_answers=True, audio_token_id=10_000)([item])
