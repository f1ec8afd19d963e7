"""One processor turns audio into features and text into labels, and comes back from disk as it was."""

import json
import unicodedata

import numpy as np
import pytest
from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer

from data.text import build_vocabulary
from modeling import DeepSpeech2FeatureExtractor, DeepSpeech2Processor, JamoCTCTokenizer

NOISE = 0.1 * np.random.default_rng(0).standard_normal(8000)


@pytest.fixture
def jamo_tokenizer(tmp_path) -> JamoCTCTokenizer:
    """A tokenizer of the jamo in a few words, and "é"."""
    (tmp_path / "vocab.json").write_text(json.dumps(build_vocabulary(["불을 켜 줘", "é"], text_unit="jamo")))
    return JamoCTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)


def test_audio_and_text_become_features_and_labels(tiny_processor):
    batch = tiny_processor(audio=[NOISE, NOISE[:4000]], text=["a b", "c"], sampling_rate=16_000, return_tensors="pt")

    expected = tiny_processor.feature_extractor([NOISE, NOISE[:4000]], return_tensors="pt")
    assert batch.input_features.equal(expected.input_features)
    assert batch.attention_mask.equal(expected.attention_mask)
    assert batch["labels"] == [[3, 2, 4], [5]]


def test_text_alone_and_audio_alone_are_enough(tiny_processor):
    assert dict(tiny_processor(text="a b")) == {"labels": [3, 2, 4]}
    assert set(tiny_processor(NOISE)) == {"input_features", "attention_mask"}


def test_neither_audio_nor_text_is_refused(tiny_processor):
    with pytest.raises(ValueError, match="`audio` or `text` must be given, got neither"):
        tiny_processor()


def test_decoding_collapses_repeats_and_blanks(tiny_processor):
    #      a  a     a  |  c  c
    ids = [3, 3, 0, 3, 2, 5, 5, 0]
    assert tiny_processor.decode(ids) == "aa c"
    assert tiny_processor.batch_decode([ids, [0, 0]]) == ["aa c", ""]
    offsets = tiny_processor.decode(ids, output_char_offsets=True).char_offsets
    assert [(part["char"], part["start_offset"], part["end_offset"]) for part in offsets] == [
        ("a", 0, 2),
        ("a", 3, 4),
        (" ", 4, 5),
        ("c", 5, 7),
    ]


def test_processor_survives_save_and_load_with_its_classes(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    reloaded = AutoProcessor.from_pretrained(tmp_path)

    assert type(reloaded) is DeepSpeech2Processor
    assert type(reloaded.feature_extractor) is DeepSpeech2FeatureExtractor
    assert reloaded.tokenizer.get_vocab() == tiny_processor.tokenizer.get_vocab()
    assert reloaded.feature_extractor.to_dict() == tiny_processor.feature_extractor.to_dict()
    np.testing.assert_array_equal(reloaded(NOISE).input_features, tiny_processor(NOISE).input_features)
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is DeepSpeech2FeatureExtractor


def test_jamo_tokenizer_survives_save_and_load_with_its_class(jamo_tokenizer, tmp_path):
    DeepSpeech2Processor(DeepSpeech2FeatureExtractor(16), jamo_tokenizer).save_pretrained(tmp_path / "saved")

    for reloaded in (
        AutoProcessor.from_pretrained(tmp_path / "saved").tokenizer,
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    ):
        assert type(reloaded) is JamoCTCTokenizer
        assert reloaded("불을").input_ids == jamo_tokenizer("불을").input_ids
        assert (reloaded.bos_token, reloaded.eos_token) == (None, None)


def test_jamo_tokenizer_spells_each_syllable_in_its_jamo(jamo_tokenizer):
    ids = jamo_tokenizer("불 é").input_ids
    assert jamo_tokenizer.convert_ids_to_tokens(ids) == [*unicodedata.normalize("NFD", "불"), "|", "é"]


def test_jamo_tokenizer_joins_what_it_spelled(jamo_tokenizer):
    text = "줘 켜 불을 é"
    ids = jamo_tokenizer(text).input_ids
    with_blanks = [part for label in ids for part in (label, label, 0)]

    assert jamo_tokenizer.decode(with_blanks) == text
    assert unicodedata.is_normalized("NFC", jamo_tokenizer.decode(with_blanks))
    # Also a syllable that no transcript had.
    assert jamo_tokenizer.decode(jamo_tokenizer("줄").input_ids) == "줄"
