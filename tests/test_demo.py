"""The demo shows language: for each voice what was said, what the base heard and what it hears now."""

import pytest

from data.corpora import load_corpus
from inference.recognizers import open_recognizer
from recipes.demo import Heard, format_sentences, hear_sentences, pick_misheard

RIGHT, MISSED, MENDED, WORSE = (
    Heard("open it", "open it", "open it"),
    Heard("call ann", "call and", "call an"),
    Heard("stop", "shop", "stop"),
    Heard("one", "one", "won"),
)


@pytest.fixture(scope="module")
def heard(tiny_base, tiny_adapters, small_corpus):
    adapters = {"ann": tiny_adapters["alice"], "ben": tiny_adapters["bob"]}
    return hear_sentences(tiny_base, adapters, dataset=str(small_corpus))


def test_each_speaker_is_heard_without_and_with_the_own_adapter(heard, tiny_base, tiny_adapters, small_corpus):
    corpus = load_corpus(str(small_corpus), split="test", required_columns=("audio", "text", "speaker_id"))
    assert list(heard) == ["ann", "ben"]
    for speaker, adapter in zip(heard, tiny_adapters.values(), strict=True):
        rows = [row for row in corpus if row["speaker_id"] == speaker]
        assert [sentence.said for sentence in heard[speaker]] == [row["text"] for row in rows]
        for adapters, name in (({}, "before"), ({"x": adapter}, "now")):
            transcripts = open_recognizer(tiny_base, adapters).transcribe([row["audio"]["path"] for row in rows])
            assert [getattr(sentence, name) for sentence in heard[speaker]] == [one.text for one in transcripts]
    assert all(sentence.before != sentence.now for sentences in heard.values() for sentence in sentences)


def test_sentences_that_the_base_misheard_come_first_whatever_became_of_them():
    assert pick_misheard([RIGHT, MISSED, WORSE, MENDED, MISSED, MENDED]) == [MISSED, MENDED, MISSED]
    assert pick_misheard([RIGHT, WORSE, MENDED]) == [MENDED, RIGHT, WORSE]


def test_sentences_stand_below_each_other():
    assert format_sentences({"ann": [MENDED], "ben": [MISSED]}) == (
        "ann:\n\n  said    stop\n  before  shop\n  now     stop\n\n"
        "ben:\n\n  said    call ann\n  before  call and\n  now     call an"
    )
