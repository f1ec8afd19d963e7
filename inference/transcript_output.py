"""What transcribe.py writes: a line, a JSON entry or captions for each recording, as soon as it is done."""

import json
import os
import stat
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from data.audio import CHANNEL_NUMBERS, MIX, AudioError, AudioSource, count_channels, open_source, parse_channel
from data.audio_files import STDIN
from inference.decoding import Segment, Transcript
from modeling.files import write_text

ALL_CHANNELS = "all"
TEXT, JSON, SRT, VTT = FORMATS = ("text", "json", "srt", "vtt")
# What stands before all of a format's captions, and between the seconds and their fraction.
CAPTION_STYLES = {SRT: ("", ","), VTT: ("WEBVTT\n\n", ".")}


@dataclass(frozen=True)
class Recording:
    """
    What becomes one transcript: a file, or one channel of it.

    Args:
        file: As the user wrote it.
        file_index: Which of the user's files it is.
        source: As in `read_audio`.
        channel: As in `read_audio`.
    """

    file: str
    file_index: int
    source: AudioSource
    channel: str | int = MIX

    @property
    def name(self) -> str:
        """The file's name, with the channel's if it is one of several."""
        return self.file if self.channel == MIX else f"{self.file}:{self.channel}"


def list_recordings(files: Sequence[str], channel: str) -> list[Recording]:
    """
    Returns what is to be transcribed, one recording a file or, for all channels, one a channel.

    Args:
        files: Paths; "-" is standard input.
        channel: "left", "right", a number from 1, "mix" or "all".

    Raises:
        ValueError: `channel` is none of these, or standard input is named twice.
    """
    if files.count(STDIN) > 1:
        raise ValueError("`files` must name standard input, `-`, once, got it twice. It can be read once.")
    if channel != ALL_CHANNELS:
        parse_channel(channel)
        return [Recording(file, index, file, channel) for index, file in enumerate(files)]
    return [recording for index, file in enumerate(files) for recording in _split_channels(file, index)]


def _split_channels(file: str, index: int) -> list[Recording]:
    try:
        source = file if _can_be_read_again(file) else {"path": file, "bytes": _read_whole(file)}
        num_channels = count_channels(source)
    except AudioError:  # it is named with the others when it is read
        return [Recording(file, index, file)]
    if num_channels == 1:
        return [Recording(file, index, source)]
    names = list(CHANNEL_NUMBERS) if num_channels == len(CHANNEL_NUMBERS) else range(1, num_channels + 1)
    return [Recording(file, index, source, name) for name in names]


def _can_be_read_again(file: str) -> bool:
    try:
        return file != STDIN and not stat.S_ISFIFO(os.stat(file).st_mode)
    except (OSError, ValueError):
        return True  # and fails when it is read


def _read_whole(file: str) -> bytes:
    with open_source(file) as content:
        content.seek(0)
        return content.read()


def write_transcripts(
    results: Iterable[tuple[Recording, str | None, Transcript | AudioError]],
    *,
    style: str,
    has_names: bool,
    path: str | None,
) -> int:
    """
    Writes each transcript when it comes, and what is wrong with a recording to standard error.

    Args:
        results: Recording, its speaker, and what became of it.
        style: text (a line each), json (a list of entries), srt or vtt (captions).
        has_names: Whether a line begins with the recording's name and a tab.
        path: File to write in place of standard output; what is done is there even if an error ends the work.

    Returns:
        Number of recordings that could not be used.
    """
    written: list[str] = []
    write = written.append if path is not None else _print
    num_errors, is_complete, separator, as_json = 0, False, "[\n", style == JSON
    try:
        for recording, speaker, result in results:
            if isinstance(result, AudioError):
                print(f"error: {result}", file=sys.stderr)
                num_errors += 1
            elif as_json:
                write(separator + _format_entry(recording, speaker, result))
                separator = ",\n"
            elif style in CAPTION_STYLES:
                write(format_captions(result.captions, style))
            else:
                write(f"{recording.name}\t{result.text}\n" if has_names else f"{result.text}\n")
        is_complete = True
    finally:
        if as_json:
            write("[]\n" if separator == "[\n" else "\n]\n")
        if path is not None and (is_complete or len(written) > as_json):
            write_text(path, "".join(written))
    return num_errors


def format_captions(captions: Sequence[Segment], style: str) -> str:
    """
    Returns captions as a file of SubRip (srt) or WebVTT (vtt).

    Example:

    ```python
    >>> from inference.decoding import Segment
    >>> from inference.transcript_output import format_captions

    >>> print(format_captions([Segment("turn left", 0.2, 3661.5)], "srt"), end="")
    1
    00:00:00,200 --> 01:01:01,500
    turn left
    <BLANKLINE>

    ```
    """
    head, mark = CAPTION_STYLES[style]
    entries = [
        f"{number}\n{_format_time(caption.start, mark)} --> {_format_time(caption.end, mark)}\n{caption.text}\n\n"
        for number, caption in enumerate(captions, start=1)
    ]
    return head + "".join(entries)


def _format_time(seconds: float, mark: str) -> str:
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{mark}{milliseconds % 1000:03d}"


def _format_entry(recording: Recording, speaker: str | None, said: Transcript) -> str:
    channel = {} if recording.channel == MIX else {"channel": recording.channel}
    entry = {"file": recording.file, **channel, "speaker": speaker, **asdict(said)}
    if not said.segments:
        del entry["segments"]
    text = json.dumps(entry, indent=2, ensure_ascii=False)
    # A name that is no UTF-8 holds surrogates, which JSON writes as escapes.
    return textwrap.indent(text.encode("utf-8", "backslashreplace").decode(), "  ")


def _print(text: str) -> None:
    """Prints `text` as it is: names with the bytes they have, letters that the terminal's encoding lacks as UTF-8."""
    sys.stdout.flush()
    try:
        content = text.encode(sys.stdout.encoding, "surrogateescape")
    except UnicodeEncodeError:
        content = text.encode("utf-8", "surrogateescape")
    sys.stdout.buffer.write(content)
    sys.stdout.flush()
