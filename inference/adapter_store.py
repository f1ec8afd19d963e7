"""Any number of adapters in a folder, the last used ones in memory, one for each row of a batch.

What a call of [`AdapterStore.rows`] does for each adapter of a batch:

    in memory        its files are as they were                            nothing is read
    used before      the files are as they were when they were checked     one read into a row of a table
    never used       all checks of `load_speech_adapter`                   files, base, fit, and effect
"""

import difflib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from inference.adapter_table import CONFIG_NAME, AdapterTable, Files, Slot, read_fields, stat_files
from modeling.active_adapters import BASE, check_adapter_name, serve_rows
from modeling.adapter_files import ADAPTER_WEIGHTS_NAME, SavedAdapter, read_adapter
from modeling.adapter_layer import SpeechAdapterLayer
from modeling.adapter_loading import (
    SPEECH_ADAPTER_TYPE,
    check_fit,
    check_tensors,
    compare_bases,
    without_false_alarms,
)
from modeling.adapter_probe import check_effect
from modeling.files import PENDING_FOLDER, find_whole
from modeling.fingerprint import find_version, fingerprint_base, fingerprint_processor
from modeling.frame_lengths import FrameLengths
from modeling.module_places import copy_modules, find_module, remove_empty_layers

MAX_TABLES = 8  # configurations in one store
# Entries of a configuration that make no other modules and no other outputs.
FREE_ENTRIES = {"auto_mapping", "base_fingerprint", "base_mismatch_allowed", "base_model_name_or_path", "dropout"}
FREE_ENTRIES |= {"inference_mode", "peft_version", "revision", "task_type"}
# A model may have several stores, and one place in it only one layer at a time.
MOUNTING = threading.RLock()
TEMPLATE = "store_template"  # name of the adapter that is injected to see what an adapter of a configuration is


def list_adapter_names(folder: str | Path) -> list[str]:
    """
    Returns the sorted names of the adapters in `folder`, one sub-folder each; no file is opened.

    Raises:
        ValueError: There is no such folder.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        raise ValueError(f"`folder` must be a folder of adapters, got {str(folder)!r} ({error.strerror}).") from error
    return sorted(name for name in names if _is_adapter(folder, name))


def _is_adapter(folder: str | Path, name: str) -> bool:
    try:
        check_adapter_name(name)
    except ValueError:
        return False
    return any(os.path.lexists(f"{folder}/{name}/{part}") for part in (CONFIG_NAME, PENDING_FOLDER))


def locate_adapter(folder: str | Path, name: str) -> str:
    """
    Returns the sub-folder of the adapter `name`.

    Raises:
        ValueError: The name may not name an adapter, or there is none; names that are alike are shown.
    """
    if _is_adapter(folder, check_adapter_name(name)):
        return f"{folder}/{name}"
    alike = difflib.get_close_matches(name, list_adapter_names(folder))
    raise ValueError(
        f"`adapter_name` must be an adapter in {folder}, got {name!r}. "
        + (f"Did you mean {' or '.join(map(repr, alike))}?" if alike else "Nothing there has a name like it.")
    )


@dataclass
class Mount:
    """
    A place in the model where adapters act while a batch is served.

    Args:
        layer: Stands there meanwhile.
        parent: Module that has it.
        child: Its name in `parent`.
        original: What stands there otherwise; `layer` itself if the model has adapters of its own there.
        module_name: Whole name of `original`.
        needs_frame_lengths: Whether adapters there must know what is padding.
        num_users: Open batches, of all threads.
    """

    layer: SpeechAdapterLayer
    parent: nn.Module
    child: str
    original: nn.Module
    module_name: str
    needs_frame_lengths: bool
    num_users: int = 0


def find_mounts(model: nn.Module, saved: SavedAdapter) -> tuple[dict[str, Mount], dict[str, nn.Module]]:
    """
    Returns where adapters of the configuration of `saved` act, and one adapter's blocks, both by module name.

    The adapter is injected into a copy of the model's modules, so that other threads see nothing of it.
    """
    twin = _copy_unserved(model)
    names = {id(module): name for name, module in twin.named_modules()}
    with without_false_alarms(), torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(saved.checked_config(), twin, TEMPLATE)
    mounts, blocks = {}, {}
    for layer in [layer for layer in twin.modules() if TEMPLATE in getattr(layer, "speech_adapter_blocks", ())]:
        is_own = id(layer) in names
        name = names[id(layer if is_own else layer.base_layer)]
        parent_name, _, child = name.rpartition(".")
        parent, original = (find_module(model, place, SpeechAdapterLayer) for place in (parent_name, name))
        blocks[name], needs_frame_lengths = layer.speech_adapter_blocks[TEMPLATE], layer.needs_frame_lengths
        if layer.frame_lengths is not None:
            layer.frame_lengths.release()
        if not is_own:
            del layer.speech_adapter_blocks[TEMPLATE]
            layer._active_adapter, layer.frame_lengths, layer.training = [], None, False
            layer.base_layer, layer.place = original, None
        mounts[name] = Mount(original if is_own else layer, parent, child, original, name, needs_frame_lengths)
    return mounts, blocks


class AdapterStore:
    """
    Serves a folder of speech adapters, each in a sub-folder of its name, to the rows of batches.

    The model is as it was outside [`AdapterStore.rows`]: its modules, names, outputs and what it saves. Threads may
    use a store at the same time, each with rows of its own. An adapter that is saved again is read again at its next
    use; the base must not change.

    Args:
        model: The adapters' base, in evaluation mode and on its device.
        folder: The adapters, of one or a few configurations.
        capacity: Adapters of a configuration that stay in memory, and that a batch may have.
        processor: Of the model; its vocabulary and feature settings are compared too.
        allow_base_mismatch: Take adapters that were made for another base.

    Raises:
        ValueError: There is no such folder, or `capacity` is below 1.

    Example:

    ```python
    store = AdapterStore(model, "adapters", capacity=64)
    with store.rows(["alice", "bob", "__base__"]):
        logits = model(**batch_of_three).logits
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: str | Path,
        *,
        capacity: int = 64,
        processor: ProcessorMixin | None = None,
        allow_base_mismatch: bool = False,
    ):
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"`capacity` must be a whole number from 1 on, got {capacity!r}.")
        if not os.path.isdir(folder):
            raise ValueError(f"`folder` must be a folder of adapters, got {str(folder)!r}, which is none.")
        self.model, self.folder, self.capacity = model, str(folder), capacity
        self._processor, self._allow_base_mismatch = processor, allow_base_mismatch
        self._fingerprints: dict[int, dict[str, object]] = {}  # of the base, by version
        self._tables: dict[str, AdapterTable] = {}  # by configuration
        self._proven: set[str] = set()  # configurations with an adapter that has been seen to act
        self._mounts: dict[str, Mount] = {}  # by module name
        self._known: dict[str, tuple[str, Files]] = {}  # adapters that have been checked: configuration and files
        self._lock = threading.RLock()  # of all that is above

    @property
    def names(self) -> list[str]:
        """Names of the adapters in the folder, sorted; as many as there are now."""
        return list_adapter_names(self.folder)

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters in memory; those of a configuration from the least to the most recently used."""
        with self._lock:
            return [name for table in self._tables.values() for name in table.names]

    def __contains__(self, name: str) -> bool:
        return _is_adapter(self.folder, name)

    def close(self) -> None:
        """Lets the memory of the adapters go; the store can be used again."""
        with self._lock:
            self._tables, self._known, self._mounts = {}, {}, {}
            self._proven.clear()

    @contextmanager
    def rows(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """
        Gives every row of a batch its adapter inside, as [`adapter_rows`].

        Args:
            adapter_names: One name a row: an adapter of the store or of the model itself, or `"__base__"` for none.

        Raises:
            ValueError: A name is not known, is one of the store and one of the model, or there are more adapters than
                `capacity`; an adapter is refused, as by [`load_speech_adapter`]; or as by [`adapter_rows`].
        """
        own = set(getattr(self.model, "peft_config", ())) | {BASE}
        wanted = [name for name in dict.fromkeys(adapter_names) if name not in own]
        if both := sorted(name for name in own & set(adapter_names) if name in self):
            raise ValueError(f"`adapter_names` must be clear, got {both[0]!r}, in the model and in {self.folder}.")
        if len(wanted) > self.capacity:
            raise ValueError(
                f"`adapter_names` must have at most {self.capacity} different ones (`capacity`), got {len(wanted)}. "
                "Raise `capacity` or make smaller batches."
            )
        with ExitStack() as stack:
            lent = {name: stack.enter_context(self._in_use(name)) for name in wanted}
            blocks: dict[SpeechAdapterLayer, dict[str, nn.Module]] = {}
            for name, (slot, mounts) in lent.items():
                for module, mount in mounts.items():
                    if mount.layer not in blocks:
                        stack.enter_context(_mounted(mount, self.model))
                    blocks.setdefault(mount.layer, {})[name] = slot.blocks[module]
            stack.enter_context(serve_rows(self.model, adapter_names, blocks))
            yield

    @contextmanager
    def _in_use(self, name: str) -> Iterator[tuple[Slot, dict[str, Mount]]]:
        """Gives the slot of adapter `name`, which keeps it inside, and the places where it acts."""
        with self._lock:
            slot = self._find_slot(name)
            table = self._tables[self._known[name][0]]
            slot.num_users += 1
            mounts = {module: self._mounts[module] for module in slot.blocks}
        try:
            yield slot, mounts
        finally:
            with self._lock:
                table.release(name, slot)

    def activate(self, name: str) -> dict[str, nn.Module]:
        """
        Makes sure that the weights of adapter `name` are in memory, until others need the room.

        Returns:
            Its blocks, by the names of the modules that they adapt.

        Raises:
            ValueError: There is no such adapter, or it is refused, as by [`load_speech_adapter`].
        """
        with self._lock:
            return self._find_slot(name).blocks

    def _find_slot(self, name: str) -> Slot:
        key, files = self._known.get(name, (None, None))
        if files is None or files.states is None or stat_files(files.folder) != files.states:
            return self._load_checked(name)
        table = self._tables[key]
        if (slot := table.find(name)) is not None:
            return slot
        slot = table.take()
        if not table.read(slot, files):
            table.give_back(slot)
            return self._load_checked(name)
        table.keep(name, slot)
        return slot

    @torch.no_grad()
    def _load_checked(self, name: str) -> Slot:
        """Reads an adapter that is not known, or not in its present state, with all checks."""
        self._forget(name)
        folder = locate_adapter(self.folder, name)
        paths = [find_whole(folder, part) for part in (CONFIG_NAME, ADAPTER_WEIGHTS_NAME)]
        states = stat_files(folder)
        saved = read_adapter(folder)
        if saved.config.peft_type != SPEECH_ADAPTER_TYPE:
            raise ValueError(
                f"`folder` must hold speech adapters, got {folder}, which is {saved.config.peft_type.value}. Load it "
                "into the model itself."
            )
        self._check_base(saved)
        key = _describe_config(saved)
        header, fields = read_fields(paths[1], saved.header)
        if key not in self._tables:
            self._add_table(key, saved, len(header))
        table = self._tables[key]
        check_tensors(saved, table.shapes)
        slot = table.take()
        try:
            table.fill(slot, saved)
            self._check_effect(name, key, slot, saved)
        except BaseException:
            table.give_back(slot)
            raise
        if states is not None and stat_files(folder) != states:  # somebody is writing it
            table.give_back(slot)
            return self._load_checked(name)
        table.keep(name, slot)
        self._known[name] = (key, Files(folder, states, header, fields))
        return slot

    def _forget(self, name: str) -> None:
        key, _ = self._known.pop(name, (None, None))
        if key is not None:
            self._tables[key].drop(name)

    def _check_base(self, saved: SavedAdapter) -> None:
        version = find_version(saved.base_fingerprint or {})
        if version not in self._fingerprints:  # once: it reads every weight of the base
            of_processor = fingerprint_processor(self._processor) if self._processor else {}
            self._fingerprints[version] = fingerprint_base(self.model, version) | of_processor
        compare_bases(saved, self._fingerprints[version], allow_base_mismatch=self._allow_base_mismatch)

    def _check_effect(self, name: str, key: str, slot: Slot, saved: SavedAdapter) -> None:
        """The probe of `load_speech_adapter`, until an adapter of the configuration that is not zero has passed it."""
        if key in self._proven:
            return
        twin = _copy_unserved(self.model)
        with without_false_alarms():
            inject_adapter_in_model(saved.checked_config(), twin, name)
        layers = [layer for layer in twin.modules() if name in getattr(layer, "speech_adapter_blocks", ())]
        for layer, block in zip(layers, slot.blocks.values(), strict=True):
            layer.speech_adapter_blocks[name] = block
            layer._active_adapter = [name]
        check_effect(twin, name)
        if any(block.last_layer.weight.any() for block in slot.blocks.values()):
            self._proven.add(key)

    def _add_table(self, key: str, saved: SavedAdapter, header_bytes: int) -> None:
        if len(self._tables) == MAX_TABLES:
            raise ValueError(
                f"`folder` must hold adapters of at most {MAX_TABLES} configurations, got another one in "
                f"{saved.source}. Give each kind and size of adapter a folder of its own."
            )
        twin = _copy_unserved(self.model)
        check_fit(saved, twin, TEMPLATE)
        mounts, blocks = find_mounts(self.model, saved)
        self._tables[key] = AdapterTable(blocks, self.capacity, header_bytes)
        for module, mount in mounts.items():
            known = self._mounts.setdefault(module, mount)  # where two configurations meet, one layer serves both
            known.needs_frame_lengths |= mount.needs_frame_lengths


@contextmanager
def _mounted(mount: Mount, model: nn.Module) -> Iterator[None]:
    """Puts the layer of `mount` into its place while a batch of any thread needs it."""
    with MOUNTING:
        _put(mount, model)
        mount.num_users += 1
    try:
        yield
    finally:
        with MOUNTING:
            mount.num_users -= 1
            if not mount.num_users:
                _take_away(mount)


def _put(mount: Mount, model: nn.Module) -> None:
    now = mount.parent._modules.get(mount.child)
    if now is not (mount.layer if mount.num_users else mount.original):
        raise ValueError(
            f"`model` must not get or lose adapters while a store serves it, got a {type(now).__name__} at "
            f"{mount.module_name}. Close the store first."
        )
    setattr(mount.parent, mount.child, mount.layer)
    if mount.needs_frame_lengths and mount.layer.frame_lengths is None:
        lengths = FrameLengths()
        lengths.follow(model, mount.module_name)
        mount.layer.frame_lengths = lengths


def _take_away(mount: Mount) -> None:
    if mount.layer.frame_lengths is not None and not mount.layer.needs_frame_lengths:
        mount.layer.frame_lengths.release()
        mount.layer.frame_lengths = None
    setattr(mount.parent, mount.child, mount.original)


def _copy_unserved(model: nn.Module) -> nn.Module:
    """Returns a copy of `model` as it is when no batch of any thread is being served."""
    with MOUNTING:
        twin = copy_modules(model)
    remove_empty_layers(twin, SpeechAdapterLayer)
    return twin


def _describe_config(saved: SavedAdapter) -> str:
    """What adapters that fit into one table have in common."""
    settings = {key: value for key, value in saved.config.to_dict().items() if key not in FREE_ENTRIES}
    return json.dumps(settings, sort_keys=True, default=sorted)
