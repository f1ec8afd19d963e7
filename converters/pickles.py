"""Weights out of pickled checkpoints, without running what they say.

A checkpoint that was saved as a whole model names the classes of its code, and `pickle` would import and call whatever
it names. Here a name is either on a short list of tensor makers, or of a package that the caller names, whose objects
become inert [`LegacyModule`]s; every other name ends the reading.
"""

import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

# Packages whose classes become stand-ins; none of their code is imported for it.
STAND_IN_PACKAGES = ("torch.nn", "kospeech")
# Entries of a training checkpoint that may hold the model.
MODEL_ENTRIES = ("model_state_dict", "state_dict", "model")
DATA_PARALLEL_PREFIX = "module."
# KoSpeech's names of the weights of this project's DeepSpeech2; what follows them is equal.
KOSPEECH_NAMES = {
    "encoder.conv.layers.": "conv.conv.sequential.",
    "encoder.rnn_layers.": "rnn_layers.",
    "classifier.0.": "fc.0.",
    "classifier.1.": "fc.1.linear.",
}
NUM_NAMED = 12  # names that an error message lists
MAX_SHOWN = 300  # characters of a file's content in a message
MAX_ITEMS = 1_000_000  # of containers that a pickle makes of others
MAX_SHARING = 4  # tensors over one memory


class RefusedGlobalError(ValueError):
    """A pickle names something that no checkpoint of weights needs."""


class LegacyModule:
    """Keeps the attributes of a pickled layer; it has no methods to call."""

    attributes: dict[str, Any]
    # The older format carries each class's code, and torch would write a patch against it if this were true.
    dump_patches = False

    def __new__(cls, *_, **__):
        module = super().__new__(cls)
        module.attributes = {}
        return module

    def __setstate__(self, state: Any) -> None:
        # Kept aside, not as attributes of this object, so that a pickle cannot replace anything of it.
        self.attributes = state if isinstance(state, dict) else {}


class TensorMaker:
    """A function that a pickle may call. Without a `__dict__`, so that a pickle cannot alter it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("A checkpoint must not alter the functions that it calls.")


def _view_storage(
    storage: torch.storage.TypedStorage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> torch.Tensor:
    # `as_strided` checks the bounds; `set_` with a size would enlarge the storage to whatever the file claims.
    whole = torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
    tensor = whole.as_strided(size, stride, offset)
    if tensor.numel() > whole.numel():
        raise ValueError(f"a tensor of shape {tuple(size)} over {whole.numel()} stored numbers")
    return tensor


def _take_parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    return data


GLOBALS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": TensorMaker(_view_storage),
    "torch._utils._rebuild_tensor": TensorMaker(_view_storage),
    "torch._utils._rebuild_parameter": TensorMaker(_take_parameter),
    "torch.device": torch.device,
}
CONTAINERS = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
    **{f"builtins.{kind.__name__}": kind for kind in (dict, list, set, tuple)},
}


class _RestrictedUnpickler(pickle._Unpickler):
    """
    Takes the names above, and as much memory as the file has bytes.

    The unpickler of the standard library that is written in Python: the one in C takes memory for the number that a
    pickle gives to an object, whatever it is.
    """

    path: Path
    stand_ins: tuple[str, ...]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._num_items, self._storages = 0, {}

    def find_class(self, module: str, name: str) -> Any:
        # Pickles of protocol 2 have Python 2's name of this module.
        full_name = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full_name in GLOBALS:
            return GLOBALS[full_name]
        if full_name in CONTAINERS:
            return TensorMaker(partial(self._make_container, CONTAINERS[full_name]))
        if module in self.stand_ins or module.startswith(tuple(f"{name}." for name in self.stand_ins)):
            return LegacyModule
        others = ", ".join(name for name in self.stand_ins if name != "torch.nn")
        raise RefusedGlobalError(
            f"`{self.path}` must hold tensors and layers of torch or objects of {others} only, got the global "
            f"{full_name[:MAX_SHOWN]!r}. Nothing of it was run; use a file from a source that you trust."
        )

    def _make_container(self, kind: type, *args: Any) -> Any:
        self._num_items += sum(len(arg) for arg in args)
        if self._num_items > MAX_ITEMS:
            raise ValueError(f"copies of more than {MAX_ITEMS} items")
        return kind(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "persistent_load":  # torch's function, which makes a storage of as many bytes as it is told
            value = partial(self._load_storage, value)
        super().__setattr__(name, value)

    def _load_storage(self, load: Callable, identity: Any) -> Any:
        if isinstance(identity, tuple) and len(identity) > 4 and identity[0] == "storage":
            _, kind, key, _, numel, *_ = identity
            self._storages[key] = numel * torch._utils._element_size(kind.dtype)
            asked, has = sum(self._storages.values()), self.path.stat().st_size
            if asked > has:
                raise ValueError(f"storages of {asked} bytes in a file of {has}")
        return load(identity)


def _make_pickle_module(path: Path, stand_ins: tuple[str, ...]) -> SimpleNamespace:
    """Returns what `torch.load` needs of a pickle module, restricted to the names above."""
    unpickler = type("RestrictedUnpickler", (_RestrictedUnpickler,), {"path": path, "stand_ins": stand_ins})

    def load(file: BinaryIO, **kwargs) -> Any:
        return unpickler(file, **kwargs).load()

    return SimpleNamespace(__name__="restricted_pickle", Unpickler=unpickler, load=load)


def _check_is_plain_checkpoint(path: Path) -> None:
    """Refuses the archives that `torch.load` hands over to other readers, which run code or unpack files."""
    if not path.is_file():
        raise ValueError(f"A checkpoint must be a file, got {path}, which does not exist.")
    if tarfile.is_tarfile(path):
        raise ValueError(f"`{path}` must be written by `torch.save`, got a tar archive..")
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip and any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(path).infolist()):
        raise ValueError(f"`{path}` must be written by `torch.save`, got a compressed archive.")
    if is_zip and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise ValueError(f"`{path}` must hold weights, got a TorchScript program. Save its `state_dict()` instead.")


def read_legacy_pickle(path: str | Path, *, stand_ins: tuple[str, ...] = STAND_IN_PACKAGES) -> Any:
    """
    Returns what `torch.save` wrote into `path`, tensors on the CPU and layers as [`LegacyModule`]s; runs none of it.

    Both of torch's formats are read, the zip file and the older sequence of pickles.

    Args:
        path: The file.
        stand_ins: Packages whose objects become inert [`LegacyModule`]s.

    Raises:
        ValueError: There is no such file, it names a global outside the list above, or it is damaged.
    """
    path = Path(path)
    try:
        _check_is_plain_checkpoint(path)
        # Through a file object: by its name, torch would read a `.safetensors` file in another way.
        with path.open("rb") as file, warnings.catch_warnings():
            # Of the older format: that a stand-in's code is not the saved class's.
            warnings.simplefilter("ignore")
            module = _make_pickle_module(path, stand_ins)
            return torch.load(file, map_location="cpu", pickle_module=module, weights_only=False)
    except RefusedGlobalError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(
            f"`{path}` must be a whole file of `torch.save`, got one that fails: {str(error)[:MAX_SHOWN]}"
        ) from error


def _iterate_tensors(root: LegacyModule) -> Iterator[tuple[str, torch.Tensor]]:
    """Gives the entries of the `state_dict` that the layer `root` would have; a shared layer under one name."""
    pending: list[tuple[str, LegacyModule]] = [("", root)]
    seen: set[int] = set()
    while pending:
        prefix, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        unsaved = module.attributes.get("_non_persistent_buffers_set", ())
        for group in ("_parameters", "_buffers"):
            for name, value in _get_mapping(module, group).items():
                if isinstance(value, torch.Tensor) and name not in unsaved:
                    yield f"{prefix}{name}", value
        for name, child in _get_mapping(module, "_modules").items():
            if isinstance(child, LegacyModule):
                pending.append((f"{prefix}{name}.", child))


def _get_mapping(module: LegacyModule, name: str) -> Mapping:
    value = module.attributes.get(name)
    return value if isinstance(value, Mapping) else {}


def find_state_dict(checkpoint: Any) -> dict[str, torch.Tensor]:
    """
    Returns the tensors by name of a pickled model, of a `state_dict`, or of a training checkpoint that has either.

    The prefix `module.` of a model that was trained in parallel is taken away.

    Args:
        checkpoint: What [`read_legacy_pickle`] returned.

    Raises:
        ValueError: It holds no tensors by name.
    """
    if isinstance(checkpoint, Mapping):
        entry = next((checkpoint[name] for name in MODEL_ENTRIES if name in checkpoint), checkpoint)
    else:
        entry = checkpoint
    if isinstance(entry, LegacyModule):
        state = dict(_iterate_tensors(entry))
    elif isinstance(entry, Mapping):
        state = {name: value for name, value in entry.items() if isinstance(value, torch.Tensor)}
    else:
        state = {}
    if not state or not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"A checkpoint must hold a model or its tensors by name, got a {type(entry).__name__} without them. "
            f"In a dictionary, they are looked for under {', '.join(MODEL_ENTRIES)}."
        )
    if all(name.startswith(DATA_PARALLEL_PREFIX) for name in state):
        state = {name.removeprefix(DATA_PARALLEL_PREFIX): value for name, value in state.items()}
    _check_size(state)
    # Copies, because the weights of a recurrent layer may be views of one storage.
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def _check_size(state: Mapping[str, torch.Tensor]) -> None:
    """Makes sure that copies of the tensors, which may be views of one memory, do not take many times as much."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    asked, has = sum(tensor.nbytes for tensor in state.values()), sum(storages.values())
    if asked > MAX_SHARING * has:
        raise ValueError(
            f"A checkpoint must not use its weights more than {MAX_SHARING} times, got tensors of {asked} bytes over "
            f"{has} stored ones. Fetch the file from a source that you trust."
        )


def load_legacy_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Returns the tensors by name of a pickled checkpoint: a whole model, in `DataParallel` or not, or its `state_dict`.

    Args:
        path: A file that `torch.save` wrote.

    Raises:
        ValueError: The file is missing, damaged, without weights, or names something other than tensors and layers
            of torch or KoSpeech; nothing of it is run.
    """
    return find_state_dict(read_legacy_pickle(path))


def to_kospeech_name(name: str) -> str:
    """
    Returns KoSpeech's name of a weight of [`DeepSpeech2ForCTC`].

    Example:
        >>> to_kospeech_name("classifier.1.weight")
        'fc.1.linear.weight'
    """
    ours = next(ours for ours in KOSPEECH_NAMES if name.startswith(ours))
    return KOSPEECH_NAMES[ours] + name.removeprefix(ours)


def get_adapter_shapes(widths: Sequence[int]) -> dict[str, torch.Size]:
    """
    Returns the shapes of an adapter's weights by name: each linear map but the last is followed by ReLU and dropout.

    Args:
        widths: Of the input, the hidden layers and the output.

    Example:
        >>> get_adapter_shapes([8, 2])
        {'0.weight': torch.Size([2, 8]), '0.bias': torch.Size([2])}
        >>> list(get_adapter_shapes([8, 4, 2]))
        ['0.weight', '0.bias', '3.weight', '3.bias']
    """
    shapes = {}
    for layer, (in_features, out_features) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        shapes[f"{3 * layer}.weight"] = torch.Size([out_features, in_features])
        shapes[f"{3 * layer}.bias"] = torch.Size([out_features])
    return shapes


def list_names(names: Sequence[str]) -> str:
    """Returns the first names of a list, for a message."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return (", ".join(name[:MAX_SHOWN] for name in names[:NUM_NAMED]) or "none") + more


def check_legacy_tensors(
    argument: str,
    path: str | Path,
    *,
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, torch.Size],
    layout: str = "KoSpeech's",
) -> None:
    """
    Makes sure that a file's weights are all there, and no others.

    Args:
        argument: The flag that named the file, for messages.
        path: The file.
        tensors: Its weights by name.
        shapes: The shapes that they must have.
        layout: Whose names these are, for messages.

    Raises:
        ValueError: A name is missing or left over, a shape is another one, or a number is not finite; all are named.
    """
    missing, leftover = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or leftover:
        raise ValueError(
            f"`{argument}` must have the weights of {layout} layout, got {path} with missing names: "
            f"{list_names(missing)}; leftover names: {list_names(leftover)}. It was made for another architecture."
        )
    others = [
        f"{name} of {tuple(tensors[name].shape)}, not {tuple(shape)}"
        for name, shape in sorted(shapes.items())
        if tensors[name].shape != shape
    ]
    if others:
        raise ValueError(
            f"`{argument}` must have the shapes of {layout} layout, got {path} with {list_names(others)}. "
            "It was made for another architecture."
        )
    if broken := [name for name in sorted(tensors) if not tensors[name].isfinite().all()]:
        raise ValueError(
            f"`{argument}` must hold finite numbers, got NaN or infinity in {path}: {list_names(broken)}. "
            "Its training diverged; take an earlier file."
        )
