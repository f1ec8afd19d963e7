import doctest

import pytest

from data import metrics
from data.metrics import CharacterErrorRate, WordErrorRate, format_score_table, score_by_speaker


def test_word_error_rate_counts_each_error_and_pools_them():
    scores = WordErrorRate().compute(
        predictions=["turn the light on", "go", "stop now"], references=["turn on the light", "go home", "stop"]
    )

    # "on" is moved: one deletion and one insertion; "home" is missing; "now" is too much: 4 errors on 7 words.
    assert scores == {"wer": 4 / 7, "substitutions": 0, "insertions": 2, "deletions": 2, "words": 7}


def test_character_error_rate_counts_the_space_as_a_character():
    scores = CharacterErrorRate().compute(predictions=["ab cx"], references=["ab cd"])

    assert scores == {"cer": 1 / 5, "substitutions": 1, "insertions": 0, "deletions": 0, "characters": 5}


@pytest.mark.parametrize("metric", [WordErrorRate, CharacterErrorRate])
def test_doubled_spaces_are_no_error(metric):
    scores = metric().compute(predictions=[" a  b "], references=["a b"])

    assert scores["insertions"] == scores["substitutions"] == scores["deletions"] == 0


def test_words_heard_in_an_empty_reference_are_insertions():
    scores = WordErrorRate().compute(predictions=["a b", "c d"], references=["", "c d"])

    assert (scores["wer"], scores["insertions"], scores["words"]) == (1.0, 2, 2)


@pytest.mark.parametrize("metric", [WordErrorRate, CharacterErrorRate])
def test_error_rate_refuses_empty_references_alone(metric):
    with pytest.raises(ValueError, match="`references` must have a word in some row, got 2 empty ones"):
        metric().compute(predictions=["a", ""], references=["", " "])


def test_score_by_speaker_scores_the_whole_and_each_speaker():
    scores = score_by_speaker(["a b", "a x", "c", "y"], ["a b", "a b", "c d", "z"], ["ann", "ben", "ann", ""])

    assert scores["overall"] == {
        "wer": 3 / 7, "cer": 4 / 10, "substitutions": 2, "insertions": 0, "deletions": 1, "words": 7, "characters": 10,
        "utterances": 4, "rate": "wer",
    }  # fmt: skip
    assert {name: (entry["wer"], entry["utterances"]) for name, entry in scores["speakers"].items()} == {
        "ann": (1 / 4, 2),
        "ben": (1 / 2, 1),
    }


@pytest.mark.parametrize(
    ("references", "language", "rate"),
    [
        (["turn on", "off"], None, "wer"),
        (["打开灯", "关灯"], None, "cer"),
        (["เปิด ไฟ"], None, "cer"),
        (["불 켜 줘"], None, "wer"),
        (["turn on"], "ja", "cer"),
    ],
)
def test_characters_judge_where_no_spaces_part_words(references, language, rate):
    scores = score_by_speaker(references, references, ["ann"] * len(references), language=language)
    assert (scores["overall"]["rate"], scores["speakers"]["ann"]["rate"]) == (rate, rate)


def test_a_speaker_whose_references_are_empty_has_no_rate_and_ends_nothing(caplog):
    scores = score_by_speaker(["a", "b", "c"], ["a", "", " "], ["ann", "ben", "ben"])
    assert (scores["overall"]["wer"], list(scores["speakers"])) == (2.0, ["ann"])
    assert "No reference of these speakers has a word, so that they have no rate: ben." in caplog.text


def test_score_by_speaker_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="must be as many, got 2, 1 and 1"):
        score_by_speaker(["a", "b"], ["a"], ["ann"])


def test_format_score_table_aligns_its_columns_with_the_whole_last():
    table = format_score_table(score_by_speaker(["a b", "x"], ["a b", "c"], ["a long name", "ben"])).splitlines()

    assert [line.split("  ")[0] for line in table] == ["speaker", "a long name", "ben", "overall"]
    assert len({len(line) for line in table}) == 1
    assert table[-1].split() == ["overall", "2", "3", "33.33", "25.00", "1", "0", "0"]


def test_examples_of_the_metrics_run():
    assert doctest.testmod(metrics) == doctest.TestResults(failed=0, attempted=5)
