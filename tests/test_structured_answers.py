"""Answers in JSON: one spelling, and scores that drop nothing."""

import pytest

from data.structured_answers import canonicalize_json, parse_answer, score_structured


def test_objects_that_mean_the_same_are_spelt_the_same():
    spelt = canonicalize_json('{"size": "small",\n "drink": "café"}')
    assert (
        spelt
        == canonicalize_json({"drink": "café", "roast": None, "size": "small"})
        == '{"drink": "café", "size": "small"}'
    )


@pytest.mark.parametrize("value", ["a latte", "[1]", '{"size": ', "3"])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(ValueError, match="must be a JSON object, got"):
        canonicalize_json(value)


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ('{"a": 1}', {"a": 1}),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ('```\n{"a": 1}\n```', {"a": 1}),
        ('{"a": 1} and more', None),
        ("", None),
        ("[" * 100_000, None),
    ],
)
def test_answers_are_parsed_or_are_none(answer, parsed):
    assert parse_answer(answer) == parsed


def test_scores_count_pairs_of_slot_and_value():
    references = ['{"drink": "latte", "size": "small"}', '{"drink": "mocha"}', '{"drink": "tea"}']
    answers = ['{"size": "small", "drink": "latte"}', '{"drink": "mocha", "size": "large"}', "I like tea"]
    scores = score_structured(answers, references)
    # 3 right of 4 given, of 4 wanted; the answer that does not parse is wrong, not left out.
    assert scores == {
        "exact_match": 1 / 3, "slot_f1": 6 / 8, "slot_precision": 3 / 4, "slot_recall": 3 / 4, "unparsable": 1,
        "answers": 3,
    }  # fmt: skip


def test_a_value_of_another_type_is_another_value():
    assert score_structured(['{"shots": 2}'], ['{"shots": "2"}'])["slot_f1"] == 0


def test_a_reference_that_does_not_parse_is_refused():
    with pytest.raises(ValueError, match="`references` must be JSON objects, got 'tea'"):
        score_structured(["{}"], ["tea"])


def test_answers_and_references_must_be_as_many():
    with pytest.raises(ValueError, match="must be as many and at least one, got 1 and 2"):
        score_structured(["{}"], ["{}", "{}"])
