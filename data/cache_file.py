"""The file of a feature cache: frames of many utterances in one safetensors file, written as they come and checked."""

import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from safetensors import SafetensorError, safe_open

# Names of the two tables that stand before the states.
TABLES = ("lengths", "starts")
# What safetensors calls the types that the file holds.
TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
# Bytes read at a time.
BLOCK_BYTES = 1 << 20
# The first tensor starts at a multiple of this.
ALIGNMENT_BYTES = 64
# More frames than any file has, and any digest: room for them is kept in the header until they are known.
MOST_FRAMES, ANY_DIGEST = 10**15, "0" * 32


class CacheWriter:
    """
    Writes the frames of one batch after another, in memory that one batch needs; a context manager.

        8 bytes          size of the header, little endian
        header           JSON, then blanks up to the size it was given before the frames were counted
        lengths          frames of each utterance, int64
        starts           where each utterance's frames begin, int64
        hidden_states    `(frames, width)`, the frames of all utterances in the order they were written
        ...              other states likewise; they wait in nameless files until the first is whole

    Args:
        path: File to write; it must not exist. It is whole after [`finish`].
        num_utterances: Number of utterances.
        dtype: Of the stored states, float32 or bfloat16.
        key: What the content depends on.

    Source: safetensors, "Format" (https://github.com/huggingface/safetensors).

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> import torch
    >>> from data.cache_file import CacheWriter, find_cache_damage

    >>> path = Path(tempfile.mkdtemp(), "states.safetensors")
    >>> with CacheWriter(path, num_utterances=2, dtype=torch.float32, key="noise") as writer:
    ...     writer.write([1, 0], {"hidden_states": torch.rand(2, 50, 4)}, torch.tensor([50, 20]))
    ...     writer.finish()
    >>> find_cache_damage(path, "noise", torch.float32), find_cache_damage(path, "speech", torch.float32)
    (None, 'it was made for another key')

    ```
    """

    def __init__(self, path: Path, *, num_utterances: int, dtype: torch.dtype, key: str):
        self.dtype, self.key = dtype, key
        self.tables = {name: torch.zeros(num_utterances, dtype=torch.int64) for name in TABLES}
        self.num_frames, self.widths, self.header_bytes = 0, {}, 0
        self._digests, self._files, self._stack = {}, {}, ExitStack()
        self._path = path

    def __enter__(self) -> "CacheWriter":
        self._file = self._stack.enter_context(self._path.open("xb"))
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def write(self, rows: list[int], states: dict[str, torch.Tensor], lengths: torch.Tensor) -> None:
        """
        Writes the frames of some utterances.

        Args:
            rows: Indices of the utterances.
            states: `(batch, frames, width)` by name; the first call says which names and widths there are.
            lengths: Frames `(batch,)` of each that are not padding.

        Raises:
            ValueError: `states` have other names or widths than before, no frames or too few of them, or a table's
                name.
        """
        widths = {name: value.shape[-1] for name, value in states.items()}
        if not self.widths:
            self._begin(widths)
        fits = all(value.shape[:1] == lengths.shape and value.shape[1] >= lengths.max() for value in states.values())
        if widths != self.widths or not fits:
            raise ValueError(
                f"`run` must return states (batch, frames, width) of the widths {self.widths} and their lengths, got "
                f"{ {name: tuple(value.shape) for name, value in states.items()} } and {lengths.tolist()}."
            )
        for name, value in states.items():
            is_frame = torch.arange(value.shape[1], device=value.device) < lengths.to(value.device).unsqueeze(1)
            content = _to_bytes(value[is_frame].to("cpu", self.dtype))  # (frames of the batch, width)
            self._digests[name].update(content)
            self._files[name].write(content)
        lengths = lengths.to("cpu", torch.int64)
        self.tables["lengths"][rows] = lengths
        self.tables["starts"][rows] = self.num_frames + lengths.cumsum(0) - lengths
        self.num_frames += int(lengths.sum())

    def _begin(self, widths: dict[str, int]) -> None:
        if not widths or widths.keys() & set(TABLES):
            raise ValueError(f"`run` must return states that are not named {' or '.join(TABLES)}, got {[*widths]}.")
        self.widths = widths
        self._digests = {name: xxhash.xxh3_128() for name in widths}
        digests = dict.fromkeys([*self.tables, *widths], ANY_DIGEST)
        self.header_bytes = len(self._make_header(MOST_FRAMES, digests))
        self.header_bytes += -(8 + self.header_bytes) % ALIGNMENT_BYTES
        self._file.seek(8 + self.header_bytes + sum(table.nbytes for table in self.tables.values()))
        first, *others = widths
        folder = self._path.parent
        self._files = {name: self._stack.enter_context(tempfile.TemporaryFile(dir=folder)) for name in others}
        self._files[first] = self._file

    def finish(self) -> None:
        """Puts everything in its place."""
        for name in list(self.widths)[1:]:
            self._files[name].seek(0)
            shutil.copyfileobj(self._files[name], self._file, BLOCK_BYTES)
        digests = {name: xxhash.xxh3_128(_to_bytes(table)) for name, table in self.tables.items()} | self._digests
        header = self._make_header(self.num_frames, {name: value.hexdigest() for name, value in digests.items()})
        self._file.seek(0)
        self._file.write(self.header_bytes.to_bytes(8, "little") + header.ljust(self.header_bytes))
        self._file.writelines(_to_bytes(table) for table in self.tables.values())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _make_header(self, num_frames: int, digests: dict[str, str]) -> bytes:
        shapes = {name: (torch.int64, [len(table)]) for name, table in self.tables.items()}
        shapes |= {name: (self.dtype, [num_frames, width]) for name, width in self.widths.items()}
        header = {"__metadata__": {"key": self.key} | {f"digest of {name}": value for name, value in digests.items()}}
        end = 0
        for name, (dtype, shape) in shapes.items():
            start, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {"dtype": TYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        return json.dumps(header).encode()


def _to_bytes(tensor: torch.Tensor) -> memoryview:
    # NumPy has no bfloat16.
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def find_cache_damage(path: str | Path, key: str, dtype: torch.dtype) -> str | None:
    """
    Returns what is wrong with a cache file, in words, or None if every byte is as it was written.

    The content is read a block at a time, so that a file larger than the memory can be checked.

    Args:
        path: An existing file.
        key: What its content has to depend on.
        dtype: Type that its states have to have.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        return f"it cannot be read: {error}"
    if metadata.get("key") != key:
        return "it was made for another key"
    with Path(path).open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
        header.pop("__metadata__")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            file.seek(8 + header_bytes + start)
            expected_type = TYPE_NAMES[torch.int64 if name in TABLES else dtype]
            if entry["dtype"] != expected_type or _digest_bytes(file, end - start) != metadata.get(
                f"digest of {name}"
            ):
                return f"the checksum of {name!r} is another"
    return None


def _digest_bytes(file: BinaryIO, num_bytes: int) -> str:
    digest = xxhash.xxh3_128()
    while block := file.read(min(BLOCK_BYTES, num_bytes)):
        digest.update(block)
        num_bytes -= len(block)
    return digest.hexdigest()
