"""The benchmark of coffee orders: words in their time, slots matched in text, and the table of rows."""

import json

import numpy as np
import pytest

from benchmarks.audio_lm import ROWS, build_lexicon, match_slots, read_texts, summarize
from benchmarks.audio_lm_memory import MODES, measure
from benchmarks.whisper_words import align_tokens, drop_repeats, join_words, write_words


def test_tokens_are_aligned_along_the_cheapest_path():
    costs = np.ones((3, 7))
    for token, frames in enumerate(([0, 1], [2, 3, 4], [5, 6])):
        costs[token, frames] = -1
    assert align_tokens(costs) == [(0, 2), (2, 5), (5, 7)]


def test_pieces_become_words_that_do_not_go_back():
    words = join_words([" light", "-", "ro", "ast", " mocha"], [(0, 10), (9, 12), (12, 20), (20, 30), (25, 50)])
    assert words == [
        {"text": " light-roast", "timestamp": [0.0, 0.6]},
        {"text": " mocha", "timestamp": [0.5, 1.0]},
    ]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Make me a mocha. Make me a mocha. Make me", "Make me a mocha."),
        ("Brew a small espresso. Brew a small espresso with", "Brew a small espresso."),
        ("A latte, please. With milk.", "A latte, please. With milk."),
    ],
)
def test_what_is_said_again_and_again_is_kept_once(text, kept):
    assert drop_repeats(text) == kept


def test_a_file_of_words_that_is_there_is_left_as_it_is(tmp_path):
    file = tmp_path / "words.jsonl"
    line = {"audio": "a.wav", "chunks": [{"text": " A", "timestamp": [0, 1]}, {"text": " latte", "timestamp": [1, 2]}]}
    file.write_text(json.dumps(line) + "\n")
    write_words("no such model", "no such corpus", file, language="en", splits=["train"])
    assert read_texts(file) == {"a.wav": "A latte"}


def test_a_value_is_matched_once_and_the_longest_first():
    lexicon = build_lexicon([{"size": "medium", "roast": "medium roast", "milk": "skim milk"}, {"milk": "milk"}])
    assert match_slots("a medium medium roast with skim milk", lexicon) == {
        "roast": "medium roast", "milk": "skim milk", "size": "medium",
    }  # fmt: skip
    assert match_slots("a medium roast with milk", lexicon) == {"roast": "medium roast", "milk": "milk"}


def test_the_table_has_a_line_a_row_and_the_published_figures():
    scores = {"eval_exact_match": 0.5, "eval_slot_f1": 0.75, "eval_unparsable": 2}
    facts = {"trainable_parameters": 1234, "peak_bytes": 2**30, "train_runtime": 90.0, "epochs": 2.0}
    rows = [{"row": name, **scores, **facts} for name in ROWS] + [{"row": "x", **scores}]
    lines = summarize(rows).split("\n")
    assert len(lines) == 2 + len(rows) + 2
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["projector alone", "1,234", "1.0 GiB", "2", "1.5", "50.0%", "75.0%", "2"]
    assert lines[-1].endswith("Google Dialogflow 82.5%, IBM Watson 96.0%, Microsoft LUIS 93.0%, Rhino 99.0%.")


def test_memory_by_mode_is_that_of_its_parameters():
    rows = {name: measure("base", name) for name in ("projector alone", "full LLM")}
    llm, projector = 134_515_008, 8 * 512 * 576 + 576 + 576 * 576 + 576
    assert rows["projector alone"]["trainable"] == projector
    assert rows["full LLM"]["trainable"] == projector + llm
    assert rows["full LLM"]["gradients"] == 4 * (projector + llm)
    assert set(rows) < set(MODES)
