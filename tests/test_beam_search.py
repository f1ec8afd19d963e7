import json
import logging
import re
import unicodedata
from functools import partial

import numpy as np
import pytest
from transformers import Wav2Vec2CTCTokenizer

from data.text import build_vocabulary, normalize_text, set_language
from inference.beam_search import (
    BeamDecoder,
    DecodingArguments,
    build_decoder,
    read_arpa_words,
    read_word_list,
    spell_words,
)
from modeling import JamoCTCTokenizer

ARPA = """\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-2.0	<unk>
-99	<s>	-0.3
-1.0	</s>
{cat}	cat	-0.2
{cut}	cut	-0.2

\\2-grams:
-0.3	cat </s>
-0.3	cut </s>

\\end\\
"""


def make_log_probs(tokenizer, path: str, also: dict[int, tuple[str, float]] | None = None) -> np.ndarray:
    """Frames that say the letters of `path` ("_" is the blank), and at some frames another letter nearly as loud."""
    log_probs = np.full((len(path), len(tokenizer)), -10.0, dtype=np.float32)
    indices = {"_": tokenizer.pad_token_id}
    for frame, letter in enumerate(path):
        log_probs[frame, indices.get(letter, tokenizer.convert_tokens_to_ids(letter))] = 0.0
    for frame, (letter, log_prob) in (also or {}).items():
        log_probs[frame, tokenizer.convert_tokens_to_ids(letter)] = log_prob
    return log_probs


@pytest.fixture
def tokenizer(tiny_processor):
    return tiny_processor.tokenizer


@pytest.fixture
def word_list(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("Cat\ncut\n\nall\ncat\n", encoding="utf-8")
    return path


@pytest.fixture
def write_arpa(tmp_path):
    def write(cat: str = "-0.5", cut: str = "-1.5") -> str:
        path = tmp_path / "words.arpa"
        path.write_text(ARPA.format(cat=cat, cut=cut), encoding="utf-8")
        return str(path)

    return write


def test_word_list_corrects_the_letter_that_the_greedy_path_misspells(tokenizer, word_list):
    log_probs = make_log_probs(tokenizer, "c_z_t|aal_l", also={2: ("a", -1.0)})

    assert tokenizer.decode(log_probs.argmax(-1).tolist()) == "czt all"
    assert BeamDecoder(tokenizer, word_list=word_list).decode(log_probs) == "cat all"


def test_beam_search_aligns_every_frame_with_its_letter(tokenizer, word_list):
    log_probs = make_log_probs(tokenizer, "__cc_zt||aal_l_", also={5: ("a", -1.0)})

    path = BeamDecoder(tokenizer, word_list=word_list).align(log_probs)

    letters = {tokenizer.pad_token_id: "_"}
    assert "".join(letters.get(index, tokenizer.convert_ids_to_tokens(int(index))) for index in path) == (
        "__cc_at||aal_l_"
    )


def test_beam_search_drops_a_word_that_is_not_finished(tokenizer, word_list):
    decoder = BeamDecoder(tokenizer, word_list=word_list, beam_size=1)  # keeps only the path inside "cat"

    assert decoder.decode(make_log_probs(tokenizer, "cut|ca")) == "cut"
    assert decoder.decode(make_log_probs(tokenizer, "ca")) == ""


def test_beam_search_of_blanks_is_empty(tokenizer, word_list):
    decoder = BeamDecoder(tokenizer, word_list=word_list)

    assert decoder.decode(make_log_probs(tokenizer, "____")) == ""
    assert decoder.align(make_log_probs(tokenizer, "")).shape == (0,)


@pytest.mark.parametrize(("cat", "cut", "likelier"), [("-0.5", "-1.5", "cat"), ("-1.5", "-0.5", "cut")])
def test_ngram_chooses_the_likelier_of_two_words_that_sound_the_same(tokenizer, write_arpa, cat, cut, likelier):
    log_probs = make_log_probs(tokenizer, "cat", also={1: ("u", 0.0)})

    assert BeamDecoder(tokenizer, ngram=write_arpa(cat, cut)).decode(log_probs) == likelier


@pytest.mark.parametrize(("cat", "cut", "likelier"), [("-0.5", "-1.5", "cat"), ("-1.5", "-0.5", "cut")])
def test_ngram_chooses_between_words_of_a_word_list(tokenizer, word_list, write_arpa, cat, cut, likelier):
    log_probs = make_log_probs(tokenizer, "cat", also={1: ("u", 0.0)})

    decoder = BeamDecoder(tokenizer, word_list=word_list, ngram=write_arpa(cat, cut))
    assert decoder.decode(log_probs) == likelier


def test_lm_weight_says_how_much_the_ngram_counts(tokenizer, write_arpa):
    # The audio prefers "cut" by 1, the n-gram "cat" by 1 in log10.
    log_probs = make_log_probs(tokenizer, "cut", also={1: ("a", -1.0)})

    decoded = [
        BeamDecoder(tokenizer, ngram=write_arpa(), lm_weight=weight).decode(log_probs) for weight in (0, 0.5, 1.5, 5)
    ]
    assert decoded == ["cut", "cut", "cat", "cat"]


def test_ngram_is_outweighed_by_clear_speech(tokenizer, write_arpa):
    log_probs = make_log_probs(tokenizer, "cut")

    assert BeamDecoder(tokenizer, ngram=write_arpa()).decode(log_probs) == "cut"


def test_word_list_with_ngram_recognises_a_word_that_the_ngram_lacks(tokenizer, word_list, write_arpa):
    decoder = BeamDecoder(tokenizer, word_list=word_list, ngram=write_arpa())

    assert decoder.decode(make_log_probs(tokenizer, "cat|al_l")) == "cat all"


def test_word_score_favours_more_words(tokenizer, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("into\nin\nto\n", encoding="utf-8")
    log_probs = make_log_probs(tokenizer, "in_to", also={2: ("|", -1.0)})

    assert BeamDecoder(tokenizer, word_list=path).decode(log_probs) == "into"
    assert BeamDecoder(tokenizer, word_list=path, word_score=2.0).decode(log_probs) == "in to"


def test_beam_search_joins_jamo_to_syllables(tmp_path):
    jamo = unicodedata.normalize("NFD", "한국")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", "|", *sorted(set(jamo))])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "words.txt").write_text("한국\n", encoding="utf-8")
    tokenizer = JamoCTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)
    log_probs = make_log_probs(tokenizer, jamo[:5] + jamo[1], also={5: (jamo[5], -1.0)})

    assert BeamDecoder(tokenizer, word_list=tmp_path / "words.txt").decode(log_probs) == "한국"


def test_build_decoder_is_greedy_without_files(tokenizer, word_list):
    assert build_decoder(DecodingArguments(), tokenizer) is None
    assert isinstance(build_decoder(DecodingArguments(word_list=str(word_list)), tokenizer), BeamDecoder)


def test_beam_decoder_refuses_no_file_and_no_beam(tokenizer, word_list):
    with pytest.raises(ValueError, match="`word_list` or `ngram` must be given"):
        BeamDecoder(tokenizer)
    with pytest.raises(ValueError, match="`beam_size` must be at least 1, got 0"):
        BeamDecoder(tokenizer, word_list=word_list, beam_size=0)


def test_word_list_is_normalised_and_has_each_word_once(word_list):
    assert read_word_list(word_list) == ["cat", "cut", "all"]


def test_word_list_is_normalised_as_the_model_s_transcripts(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("ISI\nİz\n", encoding="utf-8")
    assert read_word_list(path, partial(normalize_text, language="tr")) == ["ısı", "iz"]
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps(build_vocabulary(["ısı iz"])), encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(str(vocabulary), bos_token=None, eos_token=None)
    set_language(tokenizer, ["tr"])
    decoder = BeamDecoder(tokenizer, word_list=path)
    assert decoder.decode(make_log_probs(tokenizer, "ısı_")) == "ısı"


def test_read_word_list_names_file_and_line_of_what_is_wrong(tmp_path):
    path = tmp_path / "words.txt"
    with pytest.raises(ValueError, match="`word_list` must be a readable file, got .*words.txt .No such file"):
        read_word_list(path)
    path.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ValueError, match="`word_list` must be UTF-8 text, got line 2 of .*words.txt"):
        read_word_list(path)
    path.write_text("fine\ntwo words\n", encoding="utf-8")
    with pytest.raises(ValueError, match="one word a line, got 'two words' in line 2 of .*words.txt"):
        read_word_list(path)
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a word, got the empty file .*words.txt"):
        read_word_list(path)


def test_read_arpa_words_leaves_the_marks_out(write_arpa):
    assert read_arpa_words(write_arpa()) == ["cat", "cut"]


def test_read_arpa_words_names_file_and_line_of_what_is_wrong(tmp_path, write_arpa):
    with pytest.raises(ValueError, match="got 'often.*in line 9 of .*words.arpa"):
        read_arpa_words(write_arpa(cat="often"))
    other = tmp_path / "other.arpa"
    other.write_text("cat\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"got {other} without a line \\data\\")):
        read_arpa_words(other)
    other.write_text("\\data\\\nngram 1=0\n\n\\1-grams:\n\n\\end\\\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must have a section .*1-grams: with words, got none in .*other.arpa"):
        read_arpa_words(other)


def test_beam_decoder_names_the_line_of_a_wrong_ngram_further_down(tokenizer, tmp_path, write_arpa):
    path = tmp_path / "broken.arpa"
    with open(write_arpa(), encoding="utf-8") as file:
        path.write_text(file.read().replace("-0.3\tcut", "x\tcut"), encoding="utf-8")

    with pytest.raises(ValueError, match="`ngram` must be a whole ARPA file, got line 14 of .*broken.arpa"):
        BeamDecoder(tokenizer, ngram=path)


def test_words_that_cannot_be_spelled_are_left_out_and_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        spellings = spell_words(["cat", "naïve", "42"], tokenizer, name="words.txt")

    assert list(spellings) == ["cat"]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 words in words.txt have characters outside the model's vocabulary and are left out, 'naïve' first."
    ]


def test_spell_words_refuses_a_list_of_which_nothing_is_left(tokenizer):
    with pytest.raises(ValueError, match="words.txt must have a word in the model's characters, got none of 1"):
        spell_words(["42"], tokenizer, name="words.txt")
