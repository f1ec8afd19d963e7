"""Answers in JSON, such as the slots of a command: one spelling of each, and how many were given rightly."""

import json
from collections.abc import Mapping, Sequence

FENCES = ("```json", "```")


def canonicalize_json(value: str | Mapping) -> str:
    """
    Returns an object in one spelling: keys in alphabetical order, no line breaks; entries without a value leave.

    Args:
        value: A JSON object, or its text.

    Raises:
        ValueError: It does not parse, or is no object.

    Example:

    ```python
    >>> from data.structured_answers import canonicalize_json

    >>> canonicalize_json('{"size": "small", "roast": "dark roast"}')
    '{"roast": "dark roast", "size": "small"}'

    ```
    """
    slots = value if isinstance(value, Mapping) else _parse_object(value)
    if slots is None:
        raise ValueError(f"must be a JSON object, got {value!r:.80}")
    # A table that keeps objects as columns gives each row all keys.
    return json.dumps({key: slots[key] for key in sorted(slots) if slots[key] is not None}, ensure_ascii=False)


def parse_answer(text: str) -> dict[str, object] | None:
    """Returns the object that an answer holds, also between fences of Markdown; None where it does not parse."""
    text = text.strip()
    if text.startswith(FENCES[1]):
        text = text.removeprefix(FENCES[0]).removeprefix(FENCES[1]).removesuffix(FENCES[1])
    return _parse_object(text)


def _parse_object(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def score_structured(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | int]:
    """
    Scores answers in JSON against references.

    Args:
        answers: As the model wrote them; one that does not parse has all of its reference's slots wrong.
        references: Of each, JSON objects.

    Returns:
        `exact_match`, the share of answers that are their reference, whatever the order of keys; `slot_f1` over all
        pairs of slot and value, with `slot_precision` and `slot_recall`; `unparsable` and `answers`, counts.

    Raises:
        ValueError: They differ in number, there are none, or a reference does not parse.

    Example:

    ```python
    >>> from data.structured_answers import score_structured

    >>> scores = score_structured(['{"size": "small"}', "a latte"], ['{"size": "small"}', '{"drink": "latte"}'])
    >>> scores["exact_match"], scores["slot_precision"], scores["slot_recall"], scores["unparsable"]
    (0.5, 1.0, 0.5, 1)

    ```
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(
            f"`answers` and `references` must be as many and at least one, got {len(answers)} and {len(references)}."
        )
    num_exact = num_unparsable = num_right = num_given = num_wanted = 0
    for answer, reference in zip(answers, references, strict=True):
        wanted, given = _parse_object(reference), parse_answer(answer)
        if wanted is None:
            raise ValueError(f"`references` must be JSON objects, got {reference!r:.80}. Correct the corpus.")
        num_unparsable += given is None
        num_exact += given == wanted
        given_pairs, wanted_pairs = _list_pairs(given or {}), _list_pairs(wanted)
        num_right += len(given_pairs & wanted_pairs)
        num_given, num_wanted = num_given + len(given_pairs), num_wanted + len(wanted_pairs)
    precision, recall = num_right / max(1, num_given), num_right / max(1, num_wanted)
    return {
        "exact_match": num_exact / len(answers),
        "slot_f1": 2 * num_right / max(1, num_given + num_wanted),
        "slot_precision": precision,
        "slot_recall": recall,
        "unparsable": num_unparsable,
        "answers": len(answers),
    }


def _list_pairs(slots: Mapping[str, object]) -> set[tuple[str, str]]:
    return {(key, json.dumps(value, sort_keys=True)) for key, value in slots.items()}


__all__ = ["canonicalize_json", "parse_answer", "score_structured"]
