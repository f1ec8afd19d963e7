"""Where audio comes from: a path, a pipe, standard input or bytes, each as one file that can be read twice."""

import io
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

STDIN = "-"  # a file of that name is "./-"
PIPE_MEMORY_BYTES = 2**26  # what comes through a pipe is kept in memory up to 64 MiB, then on the disk
MAX_NAME_CHARACTERS = 200  # of a name in a message

AudioSource = str | os.PathLike | bytes | Mapping


class AudioError(ValueError):
    """A recording that cannot be used; the message names the file, what is wrong with it, and the remedy."""


class Window(io.RawIOBase):
    """
    A part of a file as a file of its own, behind a header that replaces the one on the disk.

    Decoders call this from C, where an exception is lost: a failed read ends the file and stays in `error`.

    Args:
        file: Binary file.
        start: First byte of the part.
        end: First byte behind it.
        header: Bytes that stand before the part.
    """

    def __init__(self, file: BinaryIO, start: int, end: int, *, header: bytes = b""):
        super().__init__()
        self._file, self._start, self._header, self._position = file, start, header, 0
        self.num_bytes = len(header) + end - start
        self.error: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        content = self._header[self._position : self._position + len(view)]
        wanted = min(len(view), self.num_bytes - self._position) - len(content)
        if wanted > 0:
            try:
                self._file.seek(self._start + self._position + len(content) - len(self._header))
                content += self._file.read(wanted)
            except OSError as error:
                self.error = error
        view[: len(content)] = content
        self._position += len(content)
        return len(content)


def name_source(source: AudioSource) -> str:
    """Returns what messages call `source`: printable, and the end of it where it is long."""
    if isinstance(source, Mapping):
        source = source.get("path") or "audio"
    name = "audio" if isinstance(source, bytes) else os.fspath(source)
    # A name on the disk may be no text: its bytes are shown.
    name = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return name if len(name) <= MAX_NAME_CHARACTERS else f"...{name[-MAX_NAME_CHARACTERS:]}"


def open_source(source: AudioSource) -> BinaryIO:
    """
    Opens what holds a recording; a pipe is read to its end first.

    Args:
        source: A path, "-" for standard input, the bytes of a file, or the `{"path", "bytes"}` dict of an undecoded
            `datasets.Audio` column.

    Raises:
        AudioError: There is neither a path nor bytes, no file at the path, none that may be read, or it is empty.
    """
    name = name_source(source)
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise AudioError(f"`{name}` must have a path or bytes, got neither. Give one of them.")
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else _open_path(os.fspath(source), name)
        if not file.seek(0, os.SEEK_END):
            file.close()
            raise AudioError(f"`{name}` must be audio, got an empty file. Copy or record it again.")
    except FileNotFoundError as error:
        raise AudioError(f"`{name}` must be a file, got none at that path. Correct the path.") from error
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"`{name}` must be a file that can be read, got ({reason}). Correct the path.") from error
    return file


def _open_path(path: str, name: str) -> BinaryIO:
    if path == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise AudioError(f"`{name}` must be audio on standard input, got a terminal. Pipe a recording into it.")
        return _read_pipe(sys.stdin.buffer)
    if "\0" in path:
        raise AudioError(f"`{name}` must be a file, got a name with a zero byte. Correct the path.")
    mode = os.stat(path).st_mode
    if stat.S_ISFIFO(mode):
        with open(path, "rb") as pipe:
            return _read_pipe(pipe)
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device"
        raise AudioError(f"`{name}` must be a file, got {kind}. Correct the path.")
    return Path(path).open("rb")


def _read_pipe(pipe: BinaryIO) -> BinaryIO:
    file = tempfile.SpooledTemporaryFile(max_size=PIPE_MEMORY_BYTES)  # noqa: SIM115  (the caller closes it)
    shutil.copyfileobj(pipe, file)
    return file
