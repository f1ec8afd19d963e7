"""Instructions about recordings with their answers: tables, JSON lines of chats, or transcripts, as conversations.

a table           audio, instruction, response          one turn a row
a chat, JSONL     {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}, ...]}, ...]}
a corpus          audio, text                           the instruction is to transcribe
any other column  audio, slots                          `response_column`; JSON in one spelling
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash
from datasets import Dataset, Features, Value

from .corpora import DEFAULT_SPLIT, UNDECODED_AUDIO, load_corpus
from .left_out import report_left_out
from .prompts import DEFAULT_INSTRUCTION
from .rows import RowError, Source, is_empty, read_recording
from .structured_answers import canonicalize_json

TEXT, JSON = "text", "json"
ROLES = ("system", "user", "assistant")
FOLDER_MANIFEST = "metadata.jsonl"


@dataclass(frozen=True)
class Conversation:
    """
    Turns about recordings, the last one an answer.

    Args:
        name: What messages call it.
        messages: `{"role", "content"}` of each turn; content is a list of `{"type": "audio"}`, one a clip in order,
            and `{"type": "text", "text": ...}`.
        clips: Undecoded recordings `{"path", "bytes"}`, in the order in which the turns name them.
    """

    name: str
    messages: tuple[Mapping, ...]
    clips: tuple[Mapping, ...]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1]["content"][0]["text"]

    @property
    def prompt(self) -> tuple[Mapping, ...]:
        """The turns before the last answer."""
        return self.messages[:-1]


def make_turn(role: str, text: str, *, num_clips: int = 0) -> dict:
    """
    Returns a turn: clips first, then the words.

    Example:

    ```python
    >>> from data.instructions import make_turn

    >>> make_turn("user", "Who speaks?", num_clips=1)["content"]
    [{'type': 'audio'}, {'type': 'text', 'text': 'Who speaks?'}]

    ```
    """
    return {"role": role, "content": [{"type": "audio"}] * num_clips + [{"type": "text", "text": text}]}


def load_conversations(
    dataset: str,
    *,
    split: str,
    instruction: str | None = None,
    response_column: str | None = None,
    response_format: str = TEXT,
    system: str | None = None,
    dataset_config: str | None = None,
    text_column: str | None = None,
    channel: str = "mix",
) -> list[Conversation]:
    """
    Returns the conversations of one split.

    Args:
        dataset: As for [`load_corpus`], or a file of JSON lines with `messages`, or a folder with such a one.
        split: Rows whose column `split` has this value; rows that name none are "train".
        instruction: What is asked where a row has no instruction of its own. Default: to transcribe, if the answers
            are transcripts.
        response_column: Column of the answers. Default: `response`, else the transcripts.
        response_format: `"json"` gives the answers one spelling, by [`canonicalize_json`]; `"text"` leaves them.
        system: What a system's turn says, before all others of a conversation that has none.
        dataset_config, text_column, channel: As for [`load_corpus`].

    Raises:
        ValueError: As [`load_corpus`], there is no instruction, or more than 5 % of the rows cannot be used: fewer are
            left out, counted and named in a warning.
    """
    if response_format not in (TEXT, JSON):
        raise ValueError(f"`response_format` must be one of {TEXT}, {JSON}, got {response_format!r}.")
    manifest = find_chats(dataset)
    if manifest is not None:
        rows = _iterate_chats(manifest, split)
    else:
        columns = ("audio",) if response_column is None else ("audio", response_column)
        source = {"dataset_config": dataset_config, "text_column": text_column, "channel": channel}
        corpus = load_corpus(dataset, split=split, required_columns=columns, **source)
        rows = _iterate_rows(corpus, dataset, instruction, response_column)
    conversations, reasons = [], []
    for conversation in rows:
        if isinstance(conversation, Conversation):
            try:
                conversations.append(_finish(conversation, response_format, system))
                continue
            except RowError as error:
                conversation = str(error)
        reasons.append(conversation)
    left_out = {"what": "rows cannot be used", "remedy": "Correct them or remove the rows."}
    report_left_out(reasons, len(conversations) + len(reasons), **left_out)
    if not conversations:
        raise ValueError(
            f"`dataset` must have conversations in split {split!r}, got none in {dataset}. Choose another."
        )
    return conversations


def find_chats(dataset: str) -> Path | None:
    """Returns the file of JSON lines with `messages` that `dataset` names, if it does."""
    path = Path(os.path.expanduser(dataset))
    path = path / FOLDER_MANIFEST if path.is_dir() else path
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        is_chat = "messages" in json.loads(first)
    except (json.JSONDecodeError, TypeError):
        return None  # what is wrong with it the tables say
    return path if is_chat else None


def _iterate_chats(path: Path, split: str) -> Iterator[Conversation | str]:
    """Yields conversations, or what is wrong with a line."""
    folder = Path(os.path.abspath(path.parent))
    source = Source(path.name, partial(iter, ()), folders=(folder,), roots=(folder,), is_trusted=True)
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
                raise RowError(f"`messages` of {where} must be a list of turns, got {line!r:.80}")
            if row.get("split", DEFAULT_SPLIT) == split:
                yield _read_chat(row["messages"], where, source)
        except json.JSONDecodeError as error:
            yield f"{where} must be JSON, got {line!r:.80} ({error})"
        except RowError as error:
            yield str(error)


def _read_chat(messages: Sequence[object], where: str, source: Source) -> Conversation:
    turns, clips = [], []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise RowError(f"`role` of a turn in {where} must be one of {', '.join(ROLES)}, got {role!r}")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts:
            raise RowError(f"`content` of a turn in {where} must be text or a list of parts, got {content!r:.80}")
        for part in parts:
            if isinstance(part, dict) and part.get("type") == "audio" and role != "assistant":
                place = part.get("audio", part.get("path"))
                clips.append(read_recording({"audio": place}, f"`audio` of {where}", source))
            elif not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise RowError(f"A part of a turn in {where} must be text or a user's audio, got {part!r:.80}")
        parts = [part if part["type"] == "text" else {"type": "audio"} for part in parts]
        turns.append({"role": role, "content": parts})
    if not turns or turns[-1]["role"] != "assistant" or len(turns[-1]["content"]) != 1:
        raise RowError(f"The last turn of {where} must be an answer of the assistant in one text")
    return Conversation(where, tuple(turns), tuple(clips))


def _iterate_rows(
    corpus: Dataset, name: str, instruction: str | None, response_column: str | None
) -> Iterator[Conversation | str]:
    """Yields a conversation of one turn for each row, or what is wrong with it."""
    column = response_column or ("response" if "response" in corpus.column_names else "text")
    if column not in corpus.column_names:
        raise ValueError(
            f"`response_column` must name the answers in {name}, got none, and neither `response` nor `text` is "
            "there. Name the column."
        )
    has_own = "instruction" in corpus.column_names
    if instruction is None and not has_own and column != "text":
        raise ValueError(
            f"`instruction` must say what is asked for the answers in `{column}` of {name}, got none. Give the flag "
            "or a column `instruction`."
        )
    for number, row in enumerate(corpus, start=1):
        where = row["audio"]["path"] or f"row {number} of {name}"
        asked = row["instruction"] if has_own and not is_empty(row["instruction"]) else instruction
        answer = row[column]
        if is_empty(answer):
            yield f"`{column}` of {where} must not be empty, got {answer!r}"
            continue
        asked = DEFAULT_INSTRUCTION if asked is None else asked
        answer = json.dumps(answer, ensure_ascii=False) if isinstance(answer, Mapping | list) else str(answer)
        turns = (make_turn("user", asked, num_clips=1), make_turn("assistant", answer))
        yield Conversation(where, turns, (row["audio"],))


def _finish(conversation: Conversation, response_format: str, system: str | None) -> Conversation:
    messages = list(conversation.messages)
    if response_format == JSON:
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                try:
                    answer = canonicalize_json(message["content"][0]["text"])
                except ValueError as error:
                    raise RowError(f"The answer of {conversation.name} {error}") from error
                messages[place] = make_turn("assistant", answer)
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, make_turn("system", system))
    return Conversation(conversation.name, tuple(messages), conversation.clips)


def list_clips(conversations: Sequence) -> Dataset:
    """
    Returns the clips of conversations or transcripts as a corpus: `audio`, undecoded, and `conversation`, a number.

    The fingerprint follows the files' sizes and times of change, as that of [`load_corpus`] does.
    """
    rows = [(number, clip) for number, conversation in enumerate(conversations) for clip in conversation.clips]
    digest = xxhash.xxh3_128()
    for number, clip in rows:
        content = clip["bytes"]
        if content is None:
            status = os.stat(clip["path"])
            content = repr((clip["path"], status.st_size, status.st_mtime_ns)).encode()
        digest.update(f"{number} {len(content)} ".encode() + content)
    features = Features({"audio": UNDECODED_AUDIO, "conversation": Value("int64")})
    return Dataset.from_generator(
        lambda: ({"audio": clip, "conversation": number} for number, clip in rows),
        features=features,
        fingerprint=digest.hexdigest(),
    )


__all__ = ["JSON", "TEXT", "Conversation", "find_chats", "list_clips", "load_conversations", "make_turn"]
