"""Streamed utterances are the ones that a corpus read whole gives."""

import numpy as np
import pytest
import soundfile

from data.asr import UtteranceDataset, decode_clips
from data.corpora import load_corpus
from data.streaming import stream_utterances


@pytest.fixture
def streamed(small_corpus, tiny_processor):
    corpus = load_corpus(str(small_corpus), split="train", streaming=True)
    return stream_utterances(corpus, tiny_processor, samples_per_logit=320)


def test_streamed_utterances_equal_those_of_the_corpus_read_whole(streamed, small_corpus, tiny_processor):
    clips = decode_clips(load_corpus(str(small_corpus), split="train"), tiny_processor, samples_per_logit=320)
    whole = UtteranceDataset(clips, tiny_processor)
    examples = list(streamed)
    assert len(examples) == len(whole) == 12
    for index, example in enumerate(examples):
        np.testing.assert_array_equal(example["input_features"], whole[index]["input_features"])
        assert example["labels"] == whole[index]["labels"]


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
