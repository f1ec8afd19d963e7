"""Adapters of one configuration in one table of memory: a row each, and a file becomes a row in one read.

    file    length of the header | header | weights, one tensor after the other
                                          | copied as they are, by one system call
    row                                   | weights, one tensor after the other

A slot is a row and modules whose parameters are views of it: filling the row changes the modules, and nothing is
copied, allocated or looked up by name. Files of another precision or order go through a buffer.
"""

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from modeling.adapter_files import ADAPTER_WEIGHTS_NAME, SavedAdapter, TensorHeader, name_on_disk
from modeling.files import PENDING_FOLDER

CONFIG_NAME = "adapter_config.json"
ROW_ALIGNMENT = 64  # bytes: a cache line
LENGTH_BYTES = 8  # in front of a safetensors header


@dataclass(frozen=True)
class Field:
    """Where a tensor lies: `num_bytes` bytes from `begin` on."""

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def view(self, content: torch.Tensor) -> torch.Tensor:
        """Returns the tensor in `content` `(bytes,)`; a copy if it lies where its type may not."""
        part = content[self.begin : self.begin + self.num_bytes]
        is_aligned = part.storage_offset() % self.dtype.itemsize == 0
        return (part if is_aligned else part.clone()).view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Files:
    """
    The files of an adapter as they were when they were last read and checked.

    Args:
        folder: Where they lie.
        states: Of configuration and weights, device, inode, bytes and time of the last change; see [`stat_files`].
        header: First bytes of the weights, up to the first tensor.
        fields: Where the tensors lie behind the header.
    """

    folder: str
    states: tuple[tuple[int, ...], ...]
    header: bytes
    fields: dict[str, Field]


def stat_files(folder: str) -> tuple[tuple[int, ...], ...] | None:
    """Returns what tells whether the files of an adapter have changed; `None` if they are not all in place."""
    try:
        states = tuple(_describe(os.stat(f"{folder}/{name}")) for name in (CONFIG_NAME, ADAPTER_WEIGHTS_NAME))
    except OSError:
        return None
    return None if os.path.lexists(f"{folder}/{PENDING_FOLDER}") else states


def _describe(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_fields(
    path: str | Path, tensors: Mapping[str, torch.Tensor | TensorHeader]
) -> tuple[bytes, dict[str, Field]]:
    """
    Returns the first bytes of a file of weights, up to the first tensor, and where the tensors lie behind them.

    Args:
        path: A file that safetensors has read, and so found to be whole.
        tensors: What it has read, or the types and shapes of that.
    """
    with open(path, "rb") as file:
        length = file.read(LENGTH_BYTES)
        header = file.read(int.from_bytes(length, "little"))
    entries = json.loads(header)
    fields = {
        name: Field(entries[name]["data_offsets"][0], tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    return length + header, fields


def plan_row(tensors: Mapping[str, torch.Tensor]) -> dict[str, Field]:
    """
    Returns where tensors lie in a row: in the order in which safetensors writes them, so that a file fits as it is.

    Example:

    ```python
    >>> import torch
    >>> from inference.adapter_table import plan_row

    >>> row = plan_row({"up": torch.zeros(2, 3), "down": torch.zeros(3)})
    >>> {name: field.begin for name, field in row.items()}
    {'down': 0, 'up': 12}

    ```
    """
    fields, begin = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        fields[name] = Field(begin, tensors[name].dtype, tuple(tensors[name].shape))
        begin += fields[name].num_bytes
    return fields


class Slot:
    """
    A row of a table, and the modules whose parameters are views of it.

    Args:
        tensors: Views of the row, by the names that the tensors have on disk.
        blocks: Modules by the names of the modules that they adapt.
    """

    def __init__(self, content: torch.Tensor, tensors: dict[str, torch.Tensor], blocks: dict[str, nn.Module]):
        self.content, self.tensors, self.blocks = content, tensors, blocks
        self.bytes = memoryview(content.numpy()) if content.device.type == "cpu" else None
        self.num_users = 0  # open batches; a slot in use is not given to another adapter


class AdapterTable:
    """
    Adapters of one configuration, the most recently used of them in memory.

    Args:
        blocks: An adapter's modules by the names of the modules that they adapt, on the device of the table. Slots
            have copies of them; their own weights are let go.
        capacity: Number of rows. Memory is taken as rows are filled.
        header_bytes: Of the files, up to the first tensor.

    Raises:
        ValueError: The rows do not fit into memory.
    """

    @torch.inference_mode(False)
    def __init__(self, blocks: Mapping[str, nn.Module], capacity: int, header_bytes: int):
        states = {module: block.state_dict() for module, block in blocks.items()}
        tensors = {_name(module, name): state[name] for module, state in states.items() for name in state}
        self.fields = plan_row(tensors)
        self.shapes = {name: field.shape for name, field in self.fields.items()}
        self.adapter_bytes = sum(field.num_bytes for field in self.fields.values())
        self._device = next(iter(tensors.values())).device
        # The system copies a third faster where a byte's place in a cache line is the same in the file and in memory.
        self._begin = header_bytes % ROW_ALIGNMENT if header_bytes % LENGTH_BYTES == 0 else 0
        row_bytes = -(-(self._begin + self.adapter_bytes) // ROW_ALIGNMENT) * ROW_ALIGNMENT
        try:
            self._rows = torch.empty((capacity, row_bytes), dtype=torch.uint8, device=self._device)
        except RuntimeError as error:
            raise ValueError(
                f"`capacity` must be a number of adapters that fit into memory, got {capacity} of {row_bytes} bytes. "
                "Lower it."
            ) from error
        self._templates = {module: _without_weights(block) for module, block in blocks.items()}
        self._buffer: torch.Tensor | None = None  # what a file has that does not fit a row as it is
        self._free = list(range(capacity))[::-1]
        self._unused: list[Slot] = []
        self._slots: OrderedDict[str, Slot] = OrderedDict()  # least recently used first

    @property
    def names(self) -> list[str]:
        """Adapters in memory, least recently used first."""
        return list(self._slots)

    def find(self, name: str) -> Slot | None:
        """Returns the slot of adapter `name` if it is in memory, and counts that as a use."""
        if (slot := self._slots.get(name)) is not None:
            self._slots.move_to_end(name)
        return slot

    def take(self) -> Slot:
        """
        Returns a slot for another adapter: one that is empty, or else the one whose last use is longest ago.

        Raises:
            ValueError: All adapters in memory are in use.
        """
        if self._unused:
            return self._unused.pop()
        if self._free:
            return self._make_slot(self._rows[self._free.pop(), self._begin :][: self.adapter_bytes])
        for name, slot in self._slots.items():
            if not slot.num_users:
                return self._slots.pop(name)
        raise ValueError(
            f"`capacity` must be at least the number of adapters in use at once, got {len(self._rows)}. Raise it, or "
            "close an open `rows`."
        )

    def keep(self, name: str, slot: Slot) -> None:
        """Makes `slot` the one of adapter `name`."""
        self.drop(name)
        self._slots[name] = slot

    def give_back(self, slot: Slot) -> None:
        """Makes `slot` empty."""
        self._unused.append(slot)

    def drop(self, name: str) -> None:
        """Forgets the adapter `name`; a slot in use stays as it is until `release`."""
        slot = self._slots.pop(name, None)
        if slot is not None and not slot.num_users:
            self.give_back(slot)

    def release(self, name: str, slot: Slot) -> None:
        """Ends one use of `slot`, which was the one of adapter `name`."""
        slot.num_users -= 1
        if not slot.num_users and self._slots.get(name) is not slot:
            self.give_back(slot)

    def fill(self, slot: Slot, saved: SavedAdapter) -> None:
        """Copies the weights of `saved`, which must have the tensors of this table, into the row of `slot`."""
        for name, tensor in slot.tensors.items():
            tensor.copy_(saved.tensors[name])

    def read(self, slot: Slot, files: Files) -> bool:
        """
        Reads weights that have been checked before into the row of `slot`.

        Returns:
            Whether the file is still the one that was checked; if not, the row is of no use.
        """
        fits = files.fields == self.fields
        if fits and slot.bytes is not None:
            return _read_checked(files, slot.bytes)
        num_bytes = sum(field.num_bytes for field in files.fields.values())
        if self._buffer is None or len(self._buffer) < num_bytes:
            is_pinned = self._device.type == "cuda"
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        content = self._buffer[:num_bytes]
        if not _read_checked(files, memoryview(content.numpy())):
            return False
        if fits:
            slot.content.copy_(content)
        else:
            for name, tensor in slot.tensors.items():
                tensor.copy_(files.fields[name].view(content))
        return True

    @torch.inference_mode(False)  # a slot outlives the batch that needs it first
    def _make_slot(self, content: torch.Tensor) -> Slot:
        tensors = {name: field.view(content) for name, field in self.fields.items()}
        blocks = {}
        for module, template in self._templates.items():
            block = copy.deepcopy(template)
            views = {name: tensors[_name(module, name)] for name in block.state_dict()}
            block.load_state_dict(views, assign=True)
            blocks[module] = block.requires_grad_(False).eval()
        return Slot(content, tensors, blocks)


def _name(module: str, parameter: str) -> str:
    return name_on_disk(f"{module}.speech_adapter_blocks.{parameter}")


def _without_weights(block: nn.Module) -> nn.Module:
    """`block` with weights that take no memory; buffers that are never saved keep what they hold."""
    meta = {name: value.to("meta") for name, value in block.state_dict().items()}
    block.load_state_dict(meta, assign=True)
    return block


def _read_checked(files: Files, target: memoryview) -> bool:
    """Fills `target` with all that follows the header; false if file or header are not those of `files`."""
    header, expected = bytearray(len(files.header)), len(files.header) + len(target)
    try:
        file = open(f"{files.folder}/{ADAPTER_WEIGHTS_NAME}", "rb", buffering=0)
    except FileNotFoundError:
        return False
    with file:
        if _describe(os.fstat(file.fileno())) != files.states[1]:
            return False
        if (done := file.readinto(header)) != len(header):
            return False
        while count := file.readinto(target[done - len(header) :]):
            done += count
        return done == expected and header == files.header and _describe(os.fstat(file.fileno())) == files.states[1]
