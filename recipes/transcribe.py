"""Writes down what is said in recordings: any number of files and durations, an adapter for each speaker.

python recipes/transcribe.py --model_name_or_path BASE --adapter alice=ALICE bob=BOB --speaker alice bob a.wav b.mp3
python recipes/transcribe.py --model_name_or_path BASE --adapter_store STORE --speaker alice bob a.wav b.mp3
python recipes/transcribe.py --model_name_or_path EMFORMER --streaming a.wav
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Literal

from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin

from data.audio import AudioError
from data.audio_files import STDIN
from inference.adapter_store import AdapterStore, list_adapter_names, locate_adapter
from inference.beam_search import DecodingArguments
from inference.recognizers import open_recognizer
from inference.transcript_output import CAPTION_STYLES, TEXT, Recording, list_recordings, write_transcripts
from modeling.adapters import BASE, check_adapter_name
from training.arguments import parse_arguments
from training.endings import run_main

BASE_SPEAKERS = ("base", BASE)  # speakers without an adapter
ONLY_ADAPTER = "adapter"  # name of the one that is given without a name
NAMED_ADAPTER = re.compile(r"([^/\\=]+)=(.+)")
# Flags that take several values, and what a value after the first one looks like; anything else is a file.
LIST_FLAGS = {"--adapter": NAMED_ADAPTER, "--speaker": re.compile(r"[\w-]+"), "--files": re.compile(".+")}


@dataclass
class TranscribeArguments:
    """What is transcribed, with what, into what."""

    model_name_or_path: str = field(metadata={"help": "Base recogniser: a folder or a Hub name."})
    files: list[str] = field(
        metadata={
            "help": "Recordings in any format; `-` is standard input, behind `--` stand files alone, "
            "`--files` may be left out."
        }
    )
    adapter: list[str] = field(
        default_factory=list, metadata={"help": "One folder or Hub name for all files, or several NAME=FOLDER."}
    )
    adapter_store: str | None = field(
        default=None, metadata={"help": "Folder with an adapter in a sub-folder of each speaker's name."}
    )
    max_loaded_adapters: int = field(default=64, metadata={"help": "Adapters of the store in memory at once."})
    speaker: list[str] = field(
        default_factory=list, metadata={"help": "Name of an adapter for each file, or `base` for none."}
    )
    allow_base_mismatch: bool = field(
        default=False, metadata={"help": "Take an adapter that was made for another base."}
    )
    language: list[str] | None = field(
        default=None, metadata={"help": "Language code of the speech, such as en, for a Whisper of several languages."}
    )
    format: Literal["text", "json", "srt", "vtt"] = field(
        default="text",
        metadata={"help": "Lines of file, tab and text (the text alone for one file), a list, or a file's captions."},
    )
    channel: str = field(
        default="mix", metadata={"help": "Of each file: mix, left, right, a number from 1, or all, each on its own."}
    )
    batch_size: int = field(default=16, metadata={"help": "Chunks recognised together."})
    chunk_seconds: float = field(default=20.0, metadata={"help": "Longer recordings are heard in such chunks."})
    overlap_seconds: float = field(default=2.0, metadata={"help": "What two chunks share."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Hear each file as if it were spoken now; the text so far goes to standard error."},
    )
    output_file: str | None = field(default=None, metadata={"help": "File to write in place of standard output."})


# Flags that take a value only if it is one of these words.
SWITCHES = {f"--{entry.name}" for entry in fields(TranscribeArguments) if entry.type is bool}
SWITCH_VALUES = ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")
FLAGS = {f"--{entry.name}" for entry in (*fields(TranscribeArguments), *fields(DecodingArguments))} | {"--config"}


def flag_files(tokens: Sequence[str]) -> list[str]:
    """
    Returns the command line with its positional values, the files, behind `--files`, and each list flag once.

    What exists as a file is a file wherever a second value of a flag may stand, and whatever stands behind `--`.

    Example:
        >>> flag_files(["a.wav", "--adapter", "x=out/x", "--adapter", "y=out/y", "--speaker", "x", "y", "b.wav"])
        ['--files', 'a.wav', 'b.wav', '--adapter', 'x=out/x', 'y=out/y', '--speaker', 'x', 'y']
    """
    lists: dict[str, list[str]] = {"--files": []}
    rest, flag, wants_value = [], "", False
    flags_end = tokens.index("--") if "--" in tokens else len(tokens)
    for token in tokens[:flags_end]:
        is_value = wants_value and (flag not in SWITCHES or token.lower() in SWITCH_VALUES)
        if _is_flag(token, is_value):
            flag, equals, value = token.partition("=")
            wants_value = not equals and flag not in ("-h", "--help")
            if flag not in LIST_FLAGS:
                rest.append(token)
            elif equals:
                lists.setdefault(flag, []).append(value)
        elif is_value and flag not in LIST_FLAGS:
            rest.append(token)
            wants_value = False
        elif flag in LIST_FLAGS and (is_value or (LIST_FLAGS[flag].fullmatch(token) and not _is_file(token))):
            lists.setdefault(flag, []).append(token)
            wants_value = False
        else:
            lists["--files"].append(token)
            flag, wants_value = "", False
    files = [*lists["--files"], *tokens[flags_end + 1 :]]
    # The parser takes what begins with a dash for a flag.
    lists["--files"] = [f"./{file}" if file.startswith("-") and file != STDIN else file for file in files]
    flagged = [token for name, values in lists.items() if values for token in (name, *values)]
    return flagged + rest


def _is_flag(token: str, is_value: bool) -> bool:
    """Whether `token` is a flag of this recipe or looks like one and is no file that exists, nor a number."""
    if token == STDIN or not token.startswith("-"):
        return False
    if token.partition("=")[0] in FLAGS:
        return True
    return not _is_file(token) and (token.startswith("--") or not is_value)


def _is_file(token: str) -> bool:
    try:
        return os.path.exists(token) and not os.path.isdir(token)
    except ValueError:  # a zero byte
        return False


def parse_adapters(values: Sequence[str]) -> dict[str, str]:
    """
    Returns the adapters of `--adapter`, name to folder.

    Args:
        values: One folder, or any number of `NAME=FOLDER`.

    Raises:
        ValueError: A name is twice, missing beside others, not allowed, or the word for no adapter.
    """
    if len(values) == 1 and not NAMED_ADAPTER.fullmatch(values[0]):
        return {ONLY_ADAPTER: values[0]}
    adapters: dict[str, str] = {}
    for value in values:
        if not (named := NAMED_ADAPTER.fullmatch(value)):
            raise ValueError(f"`adapter` must be NAME=FOLDER where there are several, got {value!r}. Give it a name.")
        name, folder = named.groups()
        if check_adapter_name(name) in BASE_SPEAKERS:
            raise ValueError(f"`adapter` must not be named {name!r}, which means no adapter. Choose another name.")
        if name in adapters:
            raise ValueError(f"`adapter` must have each name once, got {name!r} twice. Rename one of them.")
        adapters[name] = folder
    return adapters


def choose_adapters(speakers: Sequence[str], adapters: Mapping[str, str], num_files: int) -> list[str]:
    """
    Returns the adapter of each file, `"__base__"` for none.

    Args:
        speakers: Names of adapters or `base`, one a file; none if one adapter, or the base, serves all.
        adapters: Name to folder.
        num_files: Number of files.

    Raises:
        ValueError: There are not as many speakers as files, a speaker has no adapter, or several adapters and no
            speaker are given.
    """
    if not speakers:
        if len(adapters) > 1:
            raise ValueError(
                f"`speaker` must say which of the adapters ({', '.join(adapters)}) each file needs, got none. Give "
                "one a file."
            )
        return list(adapters or [BASE]) * num_files
    if len(speakers) != num_files:
        raise ValueError(
            f"`speaker` must be given once a file, got {len(speakers)} speakers for {num_files} files. Write `base` "
            "for a file without an adapter."
        )
    for speaker in speakers:
        if speaker not in (*adapters, *BASE_SPEAKERS):
            raise ValueError(
                f"`speaker` must be the name of an adapter ({', '.join(adapters) or 'none given'}) or `base`, got "
                f"{speaker!r}. Give its folder with `--adapter {speaker}=FOLDER`."
            )
    return [BASE if speaker in BASE_SPEAKERS else speaker for speaker in speakers]


def choose_from_store(speakers: Sequence[str], folder: str, num_files: int) -> list[str]:
    """
    Returns the adapter of each file, `"__base__"` for none, from a store of any size.

    Args:
        speakers: Names of adapters in the store or `base`, one a file.
        folder: The store.
        num_files: Number of files.

    Raises:
        ValueError: There are not as many speakers as files, the store has no such adapter, or one named `base`.
    """
    if len(speakers) != num_files:
        raise ValueError(
            f"`speaker` must be given once a file with a store, got {len(speakers)} speakers for {num_files} files. "
            "Write `base` for a file without an adapter."
        )
    for speaker in dict.fromkeys(speakers):
        if speaker not in BASE_SPEAKERS:
            try:
                locate_adapter(folder, speaker)
            except ValueError as error:
                raise ValueError(f"`speaker` must be an adapter of `adapter_store` or `base`: {error}") from error
        elif speaker in list_adapter_names(folder):
            raise ValueError(f"`adapter_store` must not hold an adapter {speaker!r}, which means none. Rename it.")
    return [BASE if speaker in BASE_SPEAKERS else speaker for speaker in speakers]


def main(argv: list[str] | None = None) -> int:
    # Arguments
    tokens = flag_files(sys.argv[1:] if argv is None else argv)
    arguments, decoding = parse_arguments(TranscribeArguments, DecodingArguments, argv=tokens)
    adapters = parse_adapters(arguments.adapter)
    adapter_names = choose_for_files(arguments, adapters)
    recordings = list_recordings(arguments.files, arguments.channel)
    if arguments.format in CAPTION_STYLES and len(recordings) > 1:
        raise ValueError(
            f"`format` {arguments.format} is for one recording, got {len(recordings)}. Run the recipe once for each."
        )

    # Model and adapters
    options = {"language": arguments.language, "allow_base_mismatch": arguments.allow_base_mismatch}
    recognizer = open_recognizer(arguments.model_name_or_path, adapters, **options)
    recognizer.set_search(decoding, arguments.chunk_seconds, arguments.overlap_seconds)
    model, processor = recognizer.model, recognizer.processor
    store = open_store(arguments, adapter_names, model, processor) if arguments.adapter_store else None

    # Transcribe
    options = {
        "channels": [recording.channel for recording in recordings],
        "adapter_names": [adapter_names[recording.file_index] for recording in recordings],
        "store": store,
    }
    sources = [recording.source for recording in recordings]
    if arguments.streaming:
        results = recognizer.stream(sources, on_partial=partial(print_partial, recordings), **options)
    else:
        options |= {"batch_size": arguments.batch_size, "needs_times": arguments.format != TEXT}
        results = recognizer.transcribe(sources, **options)

    # Write
    if not PartialState().is_main_process:
        return 1 if any([isinstance(result, AudioError) for result in results]) else 0
    names = arguments.speaker or [None if name in (ONLY_ADAPTER, BASE) else name for name in adapter_names]
    speakers = [names[recording.file_index] for recording in recordings]
    num_errors = write_transcripts(
        zip(recordings, speakers, results, strict=True),
        style=arguments.format,
        has_names=len(recordings) > 1,
        path=arguments.output_file,
    )
    return 1 if num_errors else 0


def print_partial(recordings: Sequence[Recording], index: int, seconds: float, text: str) -> None:
    """Prints what has been said in a recording so far, to standard error: the transcript alone is the output."""
    name = f"{recordings[index].name}\t" if len(recordings) > 1 else ""
    print(f"{name}{seconds:.2f} s\t{text}", file=sys.stderr, flush=True)


def choose_for_files(arguments: TranscribeArguments, adapters: Mapping[str, str]) -> list[str]:
    """
    Returns the adapter of each file, as [`choose_adapters`] or [`choose_from_store`].

    Raises:
        ValueError: As these, or adapters are given as well as a store.
    """
    num_files = len(arguments.files)
    if arguments.adapter_store is None:
        return choose_adapters(arguments.speaker, adapters, num_files)
    if adapters:
        raise ValueError("`adapter` must not be given with `adapter_store`. Put the adapter into the store.")
    return choose_from_store(arguments.speaker, arguments.adapter_store, num_files)


def open_store(
    arguments: TranscribeArguments, adapter_names: Sequence[str], model: PreTrainedModel, processor: ProcessorMixin
) -> AdapterStore:
    """
    Returns the store of adapters; all of `adapter_names` have been read once.

    Raises:
        ValueError: As [`AdapterStore`] and, for any of the adapters, [`AdapterStore.activate`].
    """
    store = AdapterStore(
        model,
        arguments.adapter_store,
        capacity=arguments.max_loaded_adapters,
        processor=processor,
        allow_base_mismatch=arguments.allow_base_mismatch,
    )
    # A damaged adapter is found now and not after hours of audio.
    for name in set(adapter_names) - {BASE}:
        store.activate(name)
    return store


if __name__ == "__main__":
    run_main(main)
