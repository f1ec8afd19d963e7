"""Instructions with answers, from tables, chats in JSON lines and transcripts: what is read, what is refused."""

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.instructions import find_chats, list_clips, load_conversations, make_turn
from data.prompts import DEFAULT_INSTRUCTION

SLOTS = '{"size": "small", "drink": "latte"}'


def write_clip(path: Path, seconds: float = 0.3, seed: int = 0) -> Path:
    samples = np.random.default_rng(seed).normal(size=round(seconds * 16_000))
    soundfile.write(path, 0.1 * samples, 16_000)
    return path


def write_table(folder: Path, columns: tuple[str, ...], rows: list[tuple]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, *_ in rows:
        write_clip(folder / name)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", *columns), *rows])
    return folder


def write_chats(folder: Path, lines: list[dict | str]) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "chats.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(folder / "chats.jsonl")


def make_chat(*files: str, answer: object = "ok", **entries: object) -> dict:
    parts = [{"type": "audio", "audio": file} for file in files] + [{"type": "text", "text": "Which?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **entries}


def test_a_transcript_is_the_answer_to_the_request_to_transcribe(tmp_path):
    folder = write_table(tmp_path / "asr", ("text",), [("a.wav", "one two")])
    (conversation,) = load_conversations(str(folder), split="train")
    assert conversation.answer == "one two"
    assert conversation.prompt == (make_turn("user", DEFAULT_INSTRUCTION, num_clips=1),)
    assert conversation.clips[0]["path"] == str(folder / "a.wav")


def test_slots_are_spelt_alike_and_asked_for_by_the_instruction(tmp_path):
    folder = write_table(tmp_path / "slots", ("slots", "split"), [("a.wav", SLOTS, "test"), ("b.wav", SLOTS, "train")])
    options = {"response_column": "slots", "response_format": "json", "instruction": "Slots?", "system": "Be brief."}
    (conversation,) = load_conversations(str(folder), split="test", **options)
    assert conversation.answer == '{"drink": "latte", "size": "small"}'
    assert [turn["role"] for turn in conversation.messages] == ["system", "user", "assistant"]
    assert conversation.prompt[1]["content"][1]["text"] == "Slots?"


def test_a_rows_own_instruction_goes_before_the_flag(tmp_path):
    rows = [("a.wav", "What is it?", "a dog"), ("b.wav", "", "a cat")]
    folder = write_table(tmp_path / "own", ("instruction", "response"), rows)
    first, second = load_conversations(str(folder), split="train", instruction="Say it.")
    assert first.prompt[0]["content"][1]["text"] == "What is it?"
    assert second.prompt[0]["content"][1]["text"] == "Say it."


def test_chats_of_several_turns_and_clips_keep_their_order(tmp_path):
    write_clip(tmp_path / "a.wav"), write_clip(tmp_path / "b.wav")
    more = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "no"}]
    chat = make_chat("b.wav", "a.wav")
    path = write_chats(tmp_path, [{"messages": chat["messages"] + more}, make_chat("a.wav", split="test")])
    (conversation,) = load_conversations(path, split="train")
    assert [Path(clip["path"]).name for clip in conversation.clips] == ["b.wav", "a.wav"]
    assert [turn["role"] for turn in conversation.messages] == ["user", "assistant", "user", "assistant"]
    assert conversation.answer == "no"
    assert len(load_conversations(path, split="test")) == 1


def test_a_table_in_json_lines_is_no_chat(tmp_path):
    write_clip(tmp_path / "a.wav")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"audio": "a.wav", "instruction": "What?", "response": "ok"}) + "\n")
    assert find_chats(str(path)) is None
    assert load_conversations(str(path), split="train")[0].answer == "ok"


def test_a_few_unusable_lines_are_left_out_counted_and_named(tmp_path, caplog):
    write_clip(tmp_path / "a.wav")
    path = write_chats(tmp_path, [make_chat("a.wav")] * 40 + [make_chat("missing.wav"), "{"])
    with caplog.at_level(logging.WARNING):
        assert len(load_conversations(path, split="train")) == 40
    assert "2 of 42 rows cannot be used: `audio` of line 41 of chats.jsonl must be an existing file" in caplog.text
    assert "line 42 of chats.jsonl must be JSON" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (make_chat("missing.wav"), "`audio` of line 1 of chats.jsonl must be an existing file, got 'missing.wav'"),
        ({"messages": "hello"}, "`messages` of line 1 of chats.jsonl must be a list of turns"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "`role` of a turn in line 1 of chats.jsonl must be one of"),
        ({"messages": [{"role": "user", "content": 3}]}, "`content` of a turn in line 1 of chats.jsonl must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "must be text or a user's audio, got"),
        ({"messages": [{"role": "user", "content": "x"}]}, "must be an answer of the assistant in one text"),
        ({"messages": []}, "The last turn of line 1 of chats.jsonl must be an answer"),
    ],
)
def test_many_unusable_lines_are_an_error_that_names_them(tmp_path, line, message):
    path = write_chats(tmp_path, [line])
    with pytest.raises(ValueError, match=message):
        load_conversations(path, split="train")


def test_references_that_do_not_parse_are_named(tmp_path):
    folder = write_table(tmp_path / "slots", ("slots",), [("a.wav", "a latte")])
    with pytest.raises(ValueError, match=r"The answer of .*a.wav must be a JSON object, got 'a latte'"):
        load_conversations(
            str(folder), split="train", response_column="slots", response_format="json", instruction="?"
        )


def test_an_empty_answer_is_named(tmp_path):
    folder = write_table(tmp_path / "asr", ("text",), [("a.wav", " ")])
    with pytest.raises(ValueError, match=r"`text` of .*a.wav must not be empty"):
        load_conversations(str(folder), split="train")


def test_answers_that_are_no_transcripts_need_an_instruction(tmp_path):
    folder = write_table(tmp_path / "slots", ("slots",), [("a.wav", SLOTS)])
    with pytest.raises(ValueError, match="`instruction` must say what is asked for the answers in `slots`"):
        load_conversations(str(folder), split="train", response_column="slots")


def test_a_table_without_answers_is_refused(tmp_path):
    folder = write_table(tmp_path / "bare", ("speaker_id",), [("a.wav", "ann")])
    with pytest.raises(ValueError, match="`response_column` must name the answers"):
        load_conversations(str(folder), split="train")


def test_a_split_that_is_not_there_is_refused(tmp_path):
    write_clip(tmp_path / "a.wav")
    path = write_chats(tmp_path, [make_chat("a.wav")])
    with pytest.raises(ValueError, match="`dataset` must have conversations in split 'test', got none"):
        load_conversations(path, split="test")


def test_a_format_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`response_format` must be one of text, json, got 'yaml'"):
        load_conversations(str(tmp_path), split="train", response_format="yaml")


def test_the_fingerprint_of_clips_follows_their_files(tmp_path):
    write_clip(tmp_path / "a.wav")
    path = write_chats(tmp_path, [make_chat("a.wav")])
    before = list_clips(load_conversations(path, split="train"))
    assert before._fingerprint == list_clips(load_conversations(path, split="train"))._fingerprint
    write_clip(tmp_path / "a.wav", seconds=0.4, seed=1)
    assert before._fingerprint != list_clips(load_conversations(path, split="train"))._fingerprint
    assert before["conversation"][:] == [0]
