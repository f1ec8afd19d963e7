"""Any number of adapters in a folder, the last used ones in memory, one for each row of a batch.

What a call of [`AdapterStore.rows`] does for each adapter of a batch:

    in memory        its files are as they were                            nothing is read
    used before      the files are as they were when they were checked     one read into blocks that are there
    never used       all checks of `load_speech_adapter`                   files, base, fit, and effect

The tensors of a slot are views of one piece of memory, in the order in which safetensors writes them: a file is read
into it as it is, by one system call. Files of another precision or order, and other devices, take a copy more.
"""

import copy
import difflib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, ProcessorMixin

from modeling.adapter_config import SPEECH_ADAPTER
from modeling.adapter_layer import (
    BASE,
    FrameLengths,
    SpeechAdapterLayer,
    check_adapter_name,
    is_empty_layer,
    remove_empty_layers,
    serve_rows,
)
from modeling.adapter_loading import (
    ADAPTER_WEIGHTS_NAME,
    SavedAdapter,
    check_effect,
    check_tensors,
    compare_bases,
    inject_empty,
    name_on_disk,
    read_adapter,
)
from modeling.files import PENDING_FOLDER
from modeling.fingerprint import find_version, fingerprint_base, fingerprint_processor

# Entries of a configuration that make no other modules and no other outputs.
FREE_ENTRIES = {"auto_mapping", "base_fingerprint", "base_mismatch_allowed", "base_model_name_or_path", "dropout"}
FREE_ENTRIES |= {"inference_mode", "peft_version", "revision", "task_type"}
LENGTH_BYTES = 8  # in front of a safetensors header
# A model may have several stores, and one place in it only one layer at a time.
MOUNTING = threading.RLock()


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


class Slot:
    """
    Memory for one adapter of a configuration, and its modules.

    Args:
        templates: Blocks without memory, by the names of the modules that they adapt.
        device: Where the base is.
    """

    @torch.inference_mode(False)  # a slot outlives the batch that needs it first
    def __init__(self, templates: Mapping[str, nn.Module], device: torch.device):
        shapes = list_tensors(templates)
        order = sorted(shapes, key=lambda name: (-shapes[name].dtype.itemsize, name))  # as safetensors
        ends = torch.tensor([shapes[name].nbytes for name in order]).cumsum(0).tolist()
        self.content = torch.empty(ends[-1], dtype=torch.uint8, device=device)
        self.layout = {name: [end - shapes[name].nbytes, end] for name, end in zip(order, ends, strict=True)}
        self.tensors = {
            name: self.content[begin:end].view(shapes[name].dtype).view(shapes[name].shape)
            for name, (begin, end) in self.layout.items()
        }
        self.blocks: dict[str, nn.Module] = {}
        for module, template in templates.items():
            block = copy.deepcopy(template)
            views = {name: self.tensors[_name_tensor(module, name)] for name in block.state_dict()}
            block.load_state_dict(views, assign=True)
            self.blocks[module] = block.requires_grad_(False).eval()
        self.num_users = 0  # open batches; a slot in use is not given to another adapter

    def read(self, known: "KnownFiles") -> bool:
        """Reads weights that have been checked before; false if the files are no longer those that were checked."""
        path, layout = f"{known.folder}/{ADAPTER_WEIGHTS_NAME}", self.layout
        try:
            if self.content.device.type == "cpu" and known.layout == layout:
                with open(path, "rb", buffering=0) as file:
                    file.seek(known.begin)
                    if file.readinto(memoryview(self.content.numpy())) != len(self.content):
                        return False
            else:
                for name, tensor in load_file(path).items():
                    self.tensors[name].copy_(tensor)
        except (OSError, ValueError):
            return False
        return stat_files(known.folder) == known.states


def list_tensors(blocks: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Returns the tensors of an adapter's blocks by the names that they have on disk."""
    return {
        _name_tensor(module, name): value
        for module, block in blocks.items()
        for name, value in block.state_dict().items()
    }


def _name_tensor(module: str, parameter: str) -> str:
    return name_on_disk(f"{module}.speech_adapter_blocks.{parameter}")


@dataclass(frozen=True)
class KnownFiles:
    """
    The files of an adapter as they were when they were last checked.

    Args:
        key: What its configuration says.
        folder: Where they lie.
        states: Of configuration and weights, see [`stat_files`].
        begin: Byte of the first tensor.
        layout: Where each tensor lies behind that, if its type is the slots'.
    """

    key: str
    folder: str
    states: tuple[tuple[int, ...], ...] | None
    begin: int
    layout: dict[str, list[int]]


def stat_files(folder: str) -> tuple[tuple[int, ...], ...] | None:
    """Returns what tells whether the files of an adapter have changed; `None` if they are not all in place."""
    try:
        found = [os.stat(f"{folder}/{name}") for name in (CONFIG_NAME, ADAPTER_WEIGHTS_NAME)]
    except OSError:
        return None
    if os.path.lexists(f"{folder}/{PENDING_FOLDER}"):
        return None
    return tuple((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) for status in found)


def describe_files(key: str, folder: str, states: tuple | None, tensors: Mapping[str, torch.Tensor]) -> KnownFiles:
    """Returns where the tensors of an adapter lie whose files safetensors has read, and so found to be whole."""
    if states is None:
        return KnownFiles(key, folder, None, 0, {})
    with open(f"{folder}/{ADAPTER_WEIGHTS_NAME}", "rb") as file:
        num_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        entries = json.loads(file.read(num_bytes))
    layout = {name: entries[name]["data_offsets"] for name in tensors}
    sizes = {name: end - begin for name, (begin, end) in layout.items()}
    is_alike = all(sizes[name] == tensor.nbytes for name, tensor in tensors.items())
    return KnownFiles(key, folder, states, LENGTH_BYTES + num_bytes, layout if is_alike else {})


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
    needs_frame_lengths: bool = False
    num_users: int = 0

    @contextmanager
    def mounted(self, model: nn.Module) -> Iterator[None]:
        """
        Puts the layer into its place in `model` while a batch of any thread needs it.

        Raises:
            ValueError: Something else stands there.
        """
        with MOUNTING:
            now = self.parent._modules.get(self.child)
            if now is not (self.layer if self.num_users else self.original):
                raise ValueError(
                    f"`model` must not get or lose adapters while a store serves it, got a {type(now).__name__} at "
                    f"{self.module_name}. Close the store first."
                )
            setattr(self.parent, self.child, self.layer)
            if self.needs_frame_lengths and self.layer.frame_lengths is None:
                self.layer.frame_lengths = FrameLengths()
                self.layer.frame_lengths.follow(model, self.module_name)
            self.num_users += 1
        try:
            yield
        finally:
            with MOUNTING:
                self.num_users -= 1
                if not self.num_users:
                    if not self.layer.needs_frame_lengths:
                        self.layer.release_frame_lengths()
                    setattr(self.parent, self.child, self.original)


class AdapterStore:
    """
    Serves a folder of speech adapters, each in a sub-folder of its name, to the rows of batches.

    The model is as it was outside [`AdapterStore.rows`]: its modules, names, outputs and what it saves. Threads may
    use a store at the same time, each with rows of its own. An adapter that is saved again is read again at its next
    use; the base must not change.

    Args:
        model: The adapters' base, in evaluation mode and on its device.
        folder: The adapters, of any configurations.
        capacity: Adapters that stay in memory, and that a batch may have.
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
        self._templates: dict[str, dict[str, nn.Module]] = {}  # an adapter's blocks without memory, by configuration
        self._proven: set[str] = set()  # configurations with an adapter that has been seen to act
        self._mounts: dict[str, Mount] = {}  # by module name
        self._known: dict[str, KnownFiles] = {}  # adapters that have been checked
        self._slots: OrderedDict[str, Slot] = OrderedDict()  # least recently used first
        self._lock = threading.RLock()  # of all that is above

    @property
    def names(self) -> list[str]:
        """Names of the adapters in the folder, sorted; as many as there are now."""
        return list_adapter_names(self.folder)

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters in memory, from the least to the most recently used."""
        with self._lock:
            return list(self._slots)

    def __contains__(self, name: str) -> bool:
        return _is_adapter(self.folder, name)

    def close(self) -> None:
        """Lets the memory of the adapters go; the store can be used again."""
        with self._lock:
            self._slots, self._known, self._mounts, self._templates = OrderedDict(), {}, {}, {}
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
            blocks: dict[SpeechAdapterLayer, dict[str, nn.Module]] = {}
            for name in wanted:
                slot, mounts = stack.enter_context(self._in_use(name))
                for module, mount in mounts.items():
                    if mount.layer not in blocks:
                        stack.enter_context(mount.mounted(self.model))
                    blocks.setdefault(mount.layer, {})[name] = slot.blocks[module]
            stack.enter_context(serve_rows(self.model, adapter_names, blocks))
            yield

    @contextmanager
    def _in_use(self, name: str) -> Iterator[tuple[Slot, dict[str, Mount]]]:
        """Gives the slot of adapter `name`, which keeps it inside, and the places where it acts."""
        with self._lock:
            slot = self._find_slot(name)
            slot.num_users += 1
            mounts = {module: self._mounts[module] for module in slot.blocks}
        try:
            yield slot, mounts
        finally:
            with self._lock:
                slot.num_users -= 1

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
        files = self._known.get(name)
        if files is None or files.states is None or stat_files(files.folder) != files.states:
            return self._load_checked(name)
        if (slot := self._slots.get(name)) is None:
            slot = self._take(files.key)
            if not slot.read(files):
                return self._load_checked(name)
            self._slots[name] = slot
        self._slots.move_to_end(name)
        return slot

    def _take(self, key: str) -> Slot:
        """Returns a slot for another adapter: a new one while there is room, then the one of the longest ago."""
        if len(self._slots) < self.capacity:
            return self._make_slot(key)
        for name, slot in self._slots.items():
            if not slot.num_users:
                is_alike = self._known[name].key == key
                del self._slots[name]
                return slot if is_alike else self._make_slot(key)
        raise ValueError(
            f"`capacity` must be at least the number of adapters in use at once, got {self.capacity}. Raise it, or "
            "close an open `rows`."
        )

    def _make_slot(self, key: str) -> Slot:
        templates, device = self._templates[key], self.model.device
        num_bytes = sum(tensor.nbytes for tensor in list_tensors(templates).values())
        is_cuda = device.type == "cuda"
        memory = torch.cuda.mem_get_info(device)[1] if is_cuda else psutil.virtual_memory().total
        if self.capacity * num_bytes > memory:
            raise ValueError(
                f"`capacity` must be a number of adapters that fit into memory, got {self.capacity} of {num_bytes} "
                "bytes. Lower it."
            )
        return Slot(templates, device)

    @torch.no_grad()
    def _load_checked(self, name: str) -> Slot:
        """Reads an adapter that is not known, or not in its present state, with all checks."""
        self._slots.pop(name, None)
        self._known.pop(name, None)
        folder = locate_adapter(self.folder, name)
        states = stat_files(folder)
        saved = read_adapter(folder)
        if saved.config.peft_type != SPEECH_ADAPTER:
            raise ValueError(
                f"`folder` must hold speech adapters, got {folder}, which is {saved.config.peft_type.value}. Load it "
                "into the model itself."
            )
        version = find_version(saved.base_fingerprint or {})
        if version not in self._fingerprints:  # once: it reads every weight of the base
            of_processor = fingerprint_processor(self._processor) if self._processor else {}
            self._fingerprints[version] = fingerprint_base(self.model, version) | of_processor
        compare_bases(saved, self._fingerprints[version], allow_base_mismatch=self._allow_base_mismatch)
        key = _describe_config(saved)
        twin, layers = (None, {}) if key in self._proven else inject_into_copy(self.model, saved, name)
        if key not in self._templates:
            self._add_templates(
                key, saved, {module: layer.speech_adapter_blocks[name] for module, layer in layers.items()}
            )
        check_tensors(saved, list_tensors(self._templates[key]))
        weights, slot = saved.tensors, self._take(key)
        for tensor_name, tensor in slot.tensors.items():
            tensor.copy_(weights[tensor_name])
        if twin is not None:  # the probe of `load_speech_adapter`, until one that is not zero has passed it
            for module, layer in layers.items():
                layer.speech_adapter_blocks[name], layer._active_adapter = slot.blocks[module], [name]
            check_effect(twin, name)
            if any(block.last_layer.weight.any() for block in slot.blocks.values()):
                self._proven.add(key)
        if states is not None and stat_files(folder) != states:  # somebody is writing it
            return self._load_checked(name)
        self._slots[name] = slot
        self._known[name] = describe_files(key, folder, states, slot.tensors)
        return slot

    def _add_templates(self, key: str, saved: SavedAdapter, blocks: dict[str, nn.Module]) -> None:
        for name, block in blocks.items():
            if name not in self._mounts:  # where two configurations meet, one layer serves both
                parent_name, _, child = name.rpartition(".")
                parent, original = (find_module(self.model, place) for place in (parent_name, name))
                layer = original
                if not isinstance(original, SpeechAdapterLayer):
                    with torch.device("meta"):
                        layer = SpeechAdapterLayer(original, "template", saved.checked_config())
                    del layer.speech_adapter_blocks["template"]
                    layer._active_adapter, layer.training = [], False
                self._mounts[name] = Mount(layer, parent, child, original, name)
            self._mounts[name].needs_frame_lengths |= block.kind == "transformer"
        self._templates[key] = blocks


def inject_into_copy(
    model: nn.Module, saved: SavedAdapter, adapter_name: str
) -> tuple[nn.Module, dict[str, SpeechAdapterLayer]]:
    """
    Returns a copy of `model` with an adapter of the configuration of `saved`, without memory, and its layers by name.

    Other threads, which may be serving batches, see nothing of it.

    Raises:
        ValueError: As [`inject_empty`].
    """
    with MOUNTING:
        twin = copy_modules(model)
    remove_empty_layers(twin, SpeechAdapterLayer)
    names = {id(module): name for name, module in twin.named_modules()}
    with torch.random.fork_rng(devices=[]):
        inject_empty(saved, saved.checked_config(), twin, adapter_name)
    layers = [layer for layer in twin.modules() if adapter_name in getattr(layer, "speech_adapter_blocks", ())]
    return twin, {names[id(layer if id(layer) in names else layer.base_layer)]: layer for layer in layers}


class _SharedTensors(TorchFunctionMode):
    """Lets a deep copy keep tensors that are no parameters, such as those that hooks hold for modules on a disk."""

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        if function is torch.Tensor.__deepcopy__:
            return args[0]
        return function(*args, **(kwargs or {}))


def copy_modules(model: nn.Module) -> nn.Module:
    """
    Returns a copy of `model` with modules of its own and the very same memory for weights.

    What is added, replaced or frozen in it does not show in `model`, which other threads may be running.
    """
    memo = {}
    for parameter in model.parameters():
        is_plain = type(parameter) is nn.Parameter  # those of quantised layers hold more than a tensor
        own = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad) if is_plain else parameter
        memo[id(parameter)] = own
    with _SharedTensors():
        return copy.deepcopy(model, memo)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Returns the module of this name, past layers that stand there only while a batch is served."""
    module = model
    for part in name.split(".") if name else ():
        module = getattr(module, part)
        while is_empty_layer(module, SpeechAdapterLayer):
            module = module.base_layer
    return module


def _describe_config(saved: SavedAdapter) -> str:
    """What adapters with the same modules have in common."""
    settings = {key: value for key, value in saved.config.to_dict().items() if key not in FREE_ENTRIES}
    return json.dumps(settings, sort_keys=True, default=sorted)
