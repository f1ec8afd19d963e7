"""Streamed utterances are the ones that a corpus read whole gives."""

from functools import partial
from itertools import islice

import numpy as np
import pytest
import soundfile
from datasets import IterableDataset
from torch.utils.data import DataLoader

from data.augmentation import Augmentation
from data.corpora import load_corpus
from data.streaming import EndlessUtterances, stream_utterances
from data.utterances import UtteranceDataset, decode_clips


@pytest.fixture
def streamed(small_corpus, tiny_processor):
    corpus = load_corpus(str(small_corpus), split="train", streaming=True)
    return stream_utterances(corpus, tiny_processor, samples_per_logit=320)


def test_streamed_utterances_equal_those_of_the_corpus_read_whole(streamed, small_corpus, tiny_processor):
    clips = decode_clips(load_corpus(str(small_corpus), split="train"), tiny_processor, samples_per_logit=320)
    whole = UtteranceDataset(clips, tiny_processor)
    assert isinstance(streamed, IterableDataset)
    examples = list(streamed)
    assert len(examples) == len(whole) == 12
    for index, example in enumerate(examples):
        np.testing.assert_array_equal(example["input_features"], whole[index]["input_features"])
        assert example["labels"] == whole[index]["labels"]


def test_a_stream_does_not_reach_a_later_row(small_corpus, tiny_processor, monkeypatch, tmp_path):
    monkeypatch.setattr("data.corpora.NUM_TYPED_ROWS", 2)  # which are looked at before the stream begins
    rows = (small_corpus / "metadata.csv").read_text().splitlines()
    rows = [rows[0], *(str(small_corpus / row) for row in rows[1:]), "missing.wav,ann,one,train"]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(rows) + "\n")
    corpus = load_corpus(str(manifest), split="train", streaming=True)
    stream = iter(stream_utterances(corpus, tiny_processor, samples_per_logit=320))
    assert [len(next(stream)["labels"]) for _ in range(2)] == [3, 3]
    with pytest.raises(ValueError, match=r"missing\.wav"):
        load_corpus(str(manifest), split="train")


def test_streamed_utterances_have_pauses_by_seed_and_row(small_corpus, tiny_processor):
    corpus = load_corpus(str(small_corpus), split="train", streaming=True)
    options = {"samples_per_logit": 320, "augmentation": Augmentation(pause_share=1.0)}
    first, again, other = (
        [len(row["input_features"]) for row in stream_utterances(corpus, tiny_processor, **options, seed=seed)]
        for seed in (1, 1, 2)
    )
    plain = [len(row["input_features"]) for row in stream_utterances(corpus, tiny_processor, samples_per_logit=320)]
    assert first == again != other
    assert all(longer >= frames for longer, frames in zip(first, plain, strict=True))
    assert sum(first) > sum(plain) + 100


def test_pauses_make_no_room_for_a_transcript_that_its_audio_has_not(tmp_path, tiny_processor):
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(np.arange(1600) / 5), 16_000)  # 6 frames of logits
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,abcdefg\n")
    options = {"samples_per_logit": 320, "augmentation": Augmentation(pause_share=1.0)}
    corpus = load_corpus(str(tmp_path), streaming=True)
    assert [list(stream_utterances(corpus, tiny_processor, **options, seed=seed)) for seed in range(3)] == [[]] * 3


def test_streamed_utterances_leave_a_transcript_without_enough_frames_out(tmp_path, tiny_processor, caplog):
    tone = 0.1 * np.sin(np.arange(1600) / 5)  # 100 ms: 6 frames of logits
    for name in ("short", "long"):
        soundfile.write(tmp_path / f"{name}.wav", tone, 16_000)
    (tmp_path / "metadata.csv").write_text("file_name,text\nshort.wav,abcdef\nlong.wav,abcdefg\n")
    corpus = load_corpus(str(tmp_path), streaming=True)
    examples = list(stream_utterances(corpus, tiny_processor, samples_per_logit=320))
    assert len(examples) == 1
    assert "long.wav: CTC needs 7 frames, 6 are there. It is left out." in caplog.text


def test_streamed_utterances_leave_a_silent_recording_out(tmp_path, tiny_processor, caplog):
    tone = 0.1 * np.sin(np.arange(16_000) / 5)
    for name, gain in (("a", 1), ("silent", 0), ("b", 1)):
        soundfile.write(tmp_path / f"{name}.wav", gain * tone, 16_000)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,a\nsilent.wav,no\nb.wav,b\n")
    corpus = load_corpus(str(tmp_path), streaming=True)
    examples = list(stream_utterances(corpus, tiny_processor, samples_per_logit=320))
    assert [example["labels"] for example in examples] == [tiny_processor.tokenizer(text).input_ids for text in "ab"]
    assert "silent.wav` must hold sound" in caplog.text


def test_streamed_utterances_leave_out_what_cannot_be_learnt(tmp_path, tiny_processor, caplog):
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(np.arange(16_000) / 5), 16_000)
    soundfile.write(tmp_path / "long.wav", 0.1 * np.sin(np.arange(32_000) / 5), 16_000)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,größer\na.wav,...\nlong.wav,b\na.wav,c\n")
    corpus = load_corpus(str(tmp_path), streaming=True)
    examples = list(stream_utterances(corpus, tiny_processor, samples_per_logit=320, max_clip_seconds=1.5))
    assert [example["labels"] for example in examples] == [tiny_processor.tokenizer("c").input_ids]
    assert "a.wav: `text` has 'ß' (U+00DF), 'ö' (U+00F6) outside the vocabulary. It is left out." in caplog.text
    assert "a.wav: `text` has no word. It is left out." in caplog.text
    assert "long.wav: 2.0 s, more than `max_clip_seconds`. It is left out." in caplog.text


def test_each_pass_over_a_stream_has_another_order_and_another_augmentation(small_corpus, tiny_processor):
    corpus = load_corpus(str(small_corpus), split="train", streaming=True)
    augmentation = Augmentation(min_speed=0.9, max_speed=1.1)
    read = partial(stream_utterances, processor=tiny_processor, samples_per_logit=320, augmentation=augmentation)
    endless = EndlessUtterances(corpus, seed=3, read=read)
    examples, again = (list(islice(endless, 24)) for _ in range(2))
    first, second = examples[:12], examples[12:]
    labels = [[tuple(example["labels"]) for example in examples] for examples in (first, second)]
    assert labels[0] != labels[1]
    assert sorted(labels[0]) == sorted(labels[1])
    lengths = [{len(example["input_features"]) for example in examples} for examples in (first, second)]
    assert lengths[0] != lengths[1]
    for example, other in zip(examples, again, strict=True):
        np.testing.assert_array_equal(example["input_features"], other["input_features"])


def test_workers_share_a_stream_without_an_end(small_corpus, tiny_processor):
    corpus = load_corpus(str(small_corpus), split="train", streaming=True)
    read = partial(stream_utterances, processor=tiny_processor, samples_per_logit=320)
    endless = EndlessUtterances(corpus, seed=3, read=read)
    batches = DataLoader(
        endless, batch_size=12, num_workers=2, collate_fn=lambda rows: [row["labels"] for row in rows]
    )
    passes = [sorted(map(tuple, labels)) for labels in islice(batches, 2)]
    assert passes[0] == passes[1] == sorted(tuple(example["labels"]) for example in islice(endless, 12))


def test_a_stream_without_a_usable_utterance_is_refused(small_corpus):
    corpus = load_corpus(str(small_corpus), split="train", streaming=True)
    endless = EndlessUtterances(corpus, seed=0, read=lambda corpus, **_: corpus.take(0))
    with pytest.raises(ValueError, match="`train_split` must have at least one usable utterance, got none"):
        next(iter(endless))
