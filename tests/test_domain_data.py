"""Clips of two domains: chosen, read, paired and cut, and what is wrong with them is named."""

import logging

import numpy as np
import pytest
from datasets import Dataset

from data.corpora import load_corpus
from data.domain_clips import decode_domain, find_cuts, list_cuts, match_pairs, select_domain, split_long

RATE = 16_000


def make_clips(**columns: list) -> Dataset:
    """Clips as from `decode_domain`, of silence where no samples are given."""
    count = len(columns["pair_id"])
    defaults = {"name": [f"{row}.wav" for row in range(count)], "text": ["one"] * count, "instruction": [""] * count}
    columns = defaults | {"speaker_id": ["ann"] * count, "samples": [[0.0] * 4] * count} | columns
    columns.setdefault("num_samples", [len(samples) for samples in columns["samples"]])
    return Dataset.from_dict(columns)


@pytest.fixture
def corpus() -> Dataset:
    """Four rows of two domains."""
    return Dataset.from_dict({"domain": ["microphone", "ldv"] * 2, "text": ["one", "one", "two", "two"]})


def test_a_domain_is_chosen_by_its_column(corpus):
    assert select_domain(corpus, "ldv", flag="target_domain")["text"] == ["one", "two"]


def test_a_domain_without_data_is_named_with_those_that_have_some(corpus):
    with pytest.raises(ValueError, match=r"`target_domain` must be one of .*\(ldv, microphone\), got 'throat'"):
        select_domain(corpus, "throat", flag="target_domain")


def test_a_corpus_without_domains_is_refused_with_the_way_to_simulate_one(corpus):
    with pytest.raises(ValueError, match="`domain` must be a column .* `--simulate_domain ldv`"):
        select_domain(corpus.remove_columns("domain"), "ldv", flag="target_domain")


def test_clips_are_read_with_their_answers(small_corpus):
    corpus = load_corpus(str(small_corpus), split="test")
    clips = decode_domain(corpus, sampling_rate=RATE)
    assert clips["text"] == corpus["text"]
    assert clips["name"] == [audio["path"] for audio in corpus["audio"]]
    assert clips["num_samples"] == [len(samples) for samples in clips["samples"]]
    assert set(clips["instruction"]) == set(clips["pair_id"]) == {""}


def test_an_answer_stands_before_a_transcript_and_has_its_question(small_corpus):
    corpus = load_corpus(str(small_corpus), split="test")
    corpus = corpus.add_column("response", [f"It is {text}." for text in corpus["text"]])
    clips = decode_domain(corpus.add_column("instruction", ["Which?"] * len(corpus)), sampling_rate=RATE)
    assert clips[0]["text"] == f"It is {corpus[0]['text']}."
    assert set(clips["instruction"]) == {"Which?"}


def test_cells_without_a_value_are_empty_and_not_the_word_none(small_corpus):
    corpus = load_corpus(str(small_corpus), split="test").remove_columns("speaker_id")
    for name in ("instruction", "speaker_id", "pair_id"):
        corpus = corpus.add_column(name, [None, *["given"] * (len(corpus) - 1)])
    clips = decode_domain(corpus, sampling_rate=RATE)
    assert [clips[0][name] for name in ("instruction", "speaker_id", "pair_id")] == [""] * 3
    assert [clips[1][name] for name in ("instruction", "speaker_id", "pair_id")] == ["given"] * 3


def test_clips_without_an_answer_are_named_unless_none_is_needed(small_corpus):
    corpus = load_corpus(str(small_corpus), split="test").remove_columns("text")
    with pytest.raises(ValueError, match=r"`text` \(or `response`\) must be given for every clip, got none for .*wav"):
        decode_domain(corpus, sampling_rate=RATE)
    assert set(decode_domain(corpus, sampling_rate=RATE, needs_text=False)["text"]) == {""}


def test_a_transcript_without_a_word_is_no_answer(small_corpus):
    corpus = load_corpus(str(small_corpus), split="test")
    corpus = corpus.remove_columns("text").add_column("text", ["..."] + ["one"] * (len(corpus) - 1))
    with pytest.raises(ValueError, match=r"`text` .* must be given for every clip, got none for [^;]*wav\. Write"):
        decode_domain(corpus, sampling_rate=RATE)


def test_a_transcript_that_is_too_short_for_its_clip_is_warned_of(small_corpus, caplog):
    corpus = load_corpus(str(small_corpus), split="test")
    texts = ["a", *["a sentence that is read quickly"] * (len(corpus) - 1)]
    decode_domain(corpus.remove_columns("text").add_column("text", texts), sampling_rate=RATE)
    assert f"1 of {len(corpus)} clips have fewer than" in caplog.text
    assert f"{corpus[0]['audio']['path']} (1 characters in" in caplog.text
    caplog.clear()
    decode_domain(corpus.add_column("response", texts), sampling_rate=RATE)  # an answer may be short
    assert not caplog.text


def test_pairs_are_brought_into_the_source_s_order():
    source, target = make_clips(pair_id=["a", "b", "c"]), make_clips(pair_id=["c", "a", "b"], text=["C", "A", "B"])
    source, target = match_pairs(source, target)
    assert source["pair_id"] == target["pair_id"] == ["a", "b", "c"]
    assert target["text"] == ["A", "B", "C"]


def test_clips_without_a_partner_are_named_in_either_domain():
    with pytest.raises(ValueError, match="must have a partner in the other domain, got none for 1.wav; 0.wav. Add"):
        match_pairs(make_clips(pair_id=["a", "b"]), make_clips(pair_id=["c", "a"]))


def test_many_clips_without_a_partner_are_counted():
    source, target = make_clips(pair_id=list("abcdefgh")), make_clips(pair_id=["a"])
    with pytest.raises(ValueError, match=r"got none for 1.wav; .*; 5.wav and 2 more. Add"):
        match_pairs(source, target)
    with pytest.raises(ValueError, match=r"got none for 1.wav; .*; 5.wav. Add"):
        match_pairs(make_clips(pair_id=list("abcdef")), target)


def test_pairs_of_different_length_are_named_with_both_lengths():
    target = make_clips(pair_id=["a"], samples=[[0.0] * 5], name=["ldv.wav"])
    with pytest.raises(ValueError, match=r"same number of samples, got 0.wav \(4\) and ldv.wav \(5\)"):
        match_pairs(make_clips(pair_id=["a"]), target)


def test_clips_that_do_not_say_their_pair_are_refused():
    with pytest.raises(ValueError, match="`pair_id` must say which clips are of the same moment, got none for 1.wav"):
        match_pairs(make_clips(pair_id=["a", ""]), make_clips(pair_id=["a", "b"]))


def test_a_pair_given_twice_in_one_domain_is_refused():
    with pytest.raises(ValueError, match="`pair_id` must be given to one clip of a domain, got a more than once"):
        match_pairs(make_clips(pair_id=["a", "a"]), make_clips(pair_id=["a"]))


def test_a_clip_that_fits_is_not_cut():
    assert find_cuts(np.ones(100), 100) == [0, 100]


@pytest.mark.parametrize("num_samples", [101, 250, 999])
def test_parts_fit_and_follow_one_another(num_samples):
    cuts = find_cuts(np.random.default_rng(0).normal(size=num_samples), 100)
    sizes = np.diff(cuts)
    assert (cuts[0], cuts[-1]) == (0, num_samples)
    assert sizes.min() > 0
    assert sizes.max() <= 100


def test_a_clip_is_cut_at_its_quietest_moment():
    samples = np.ones(3 * RATE)
    samples[28_000:28_600] = 0
    assert 28_000 <= find_cuts(samples, 2 * RATE)[1] <= 28_600


def test_long_clips_are_split_with_a_message_and_nothing_is_lost(caplog):
    samples = [np.arange(n, dtype=np.float32).tolist() for n in (30, 250, 40)]
    clips = make_clips(pair_id=["a", "b", "c"], samples=samples)
    with caplog.at_level(logging.WARNING):
        parts = split_long(clips, list_cuts(clips, 100, sampling_rate=10))
    assert "1 of 3 clips are longer than 10 s and are split" in caplog.text
    assert parts["utterance"] == [0, 1, 1, 1, 2]
    assert parts["num_parts"] == [1, 3, 3, 3, 1]
    assert parts["num_samples"] == [len(part) for part in parts["samples"]]
    assert sum(parts["samples"][1:4], []) == samples[1]


def test_partners_are_cut_at_the_same_places():
    generator = np.random.default_rng(0)
    source, target = (make_clips(pair_id=["a"], samples=[generator.normal(size=9_999).tolist()]) for _ in range(2))
    cuts = list_cuts(source, 3_000, sampling_rate=RATE)
    assert list_cuts(target, 3_000, sampling_rate=RATE) != cuts
    assert split_long(source, cuts)["num_samples"] == split_long(target, cuts)["num_samples"]


def test_clips_that_fit_are_left_alone_without_a_word(caplog):
    clips = make_clips(pair_id=["a", "b"])
    with caplog.at_level(logging.WARNING):
        parts = split_long(clips, list_cuts(clips, 4, sampling_rate=RATE))
    assert not caplog.text
    assert parts["utterance"] == [0, 1]
