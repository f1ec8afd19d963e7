"""Which adapters a model has, which of them act, and on which rows of a batch; for every PEFT method."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .adapter_calls import SHARED, Call, pass_names
from .clip_owners import clips_followed, has_clips, is_in_tower
from .generate_rows import follow_generate

# A row of `adapter_rows` with this name runs the base alone; PEFT's own word for it.
BASE = "__base__"


def check_adapter_name(name: str) -> str:
    """
    Returns `name` if it may name an adapter: it becomes a module's name and a folder's.

    Raises:
        ValueError: It is not 1 to 64 letters, digits, `_` or `-`, or is an attribute of `nn.ModuleDict`.

    Example:

    ```python
    >>> from modeling.adapters import check_adapter_name

    >>> check_adapter_name("alice")
    'alice'

    ```
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,64}", name):
        raise ValueError(
            f"`adapter_name` must be 1 to 64 letters, digits, '_' or '-', got {name!r}. Dots and slashes would make "
            "it a path."
        )
    if hasattr(nn.ModuleDict, name) or name == BASE:
        raise ValueError(f"`adapter_name` must not be the reserved word {name!r}. Choose another name.")
    return name


def find_adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of `model` that hold adapters of any PEFT method."""
    return [module for module in model.modules() if _holds_adapters(module)]


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter belongs to an adapter of any PEFT method, by its name in the model."""
    prefixes = (*PEFT_TYPE_TO_PREFIX_MAPPING.values(), "modules_to_save")
    return any(part.startswith(prefixes) for part in name.split("."))


def find_active_adapters(model: nn.Module, *, even_if_off: bool = False) -> list[str]:
    """
    Returns the names of the adapters that act on the output of `model`, in order and once each.

    Args:
        model: Any module, with adapters or without.
        even_if_off: Also count adapters that are switched off for now.
    """
    names: dict[str, None] = {}
    for layer in find_adapter_layers(model):
        if isinstance(layer, BaseTunerLayer) and (even_if_off or not layer.disable_adapters):
            available = layer._get_available_adapters()
            names.update(dict.fromkeys(name for name in layer.active_adapters if name in available))
    return list(names)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """
    Runs the base alone inside, in this thread or task only.

    Unlike `disable_adapters`, it leaves `requires_grad` as it is, and other threads use the adapters meanwhile.
    """
    with SHARED.opened(dict.fromkeys(find_adapter_layers(model), Call(names=None))):
        yield


@contextmanager
def adapter_rows(model: nn.Module, adapter_names: Sequence[str] | None) -> Iterator[None]:
    """
    Gives every row of a batch its own adapter inside, in `forward` and `generate`, LoRA included.

    It holds for this thread or task alone, so threads may each give their own names to one model. A thread that is
    started inside does not take them along: enter it in that thread, or start the thread with `contextvars`.
    A clip of a prompt has the adapter of its prompt.

    Args:
        model: A model with adapters, in evaluation mode.
        adapter_names: One name a row, `"__base__"` for none; `None` changes nothing. A module that is called by itself
            takes a name for each of its own rows, an audio tower one a clip.

    Raises:
        ValueError: The model is training, a name is unknown, adapters are off, or a layer cannot tell rows apart; or
            (in the call) the number of names does not fit the rows, or `generate` would mix rows up.

    Example:

    ```python
    with adapter_rows(model, ["alice", "bob", "__base__"]):
        logits = model(**batch_of_three).logits
    ```
    """
    if adapter_names is None:
        yield
        return
    with serve_rows(model, adapter_names, {}):
        yield


@contextmanager
def serve_rows(
    model: nn.Module, adapter_names: Sequence[str], blocks: Mapping[nn.Module, Mapping[str, nn.Module]]
) -> Iterator[None]:
    """As [`adapter_rows`], with `blocks` that are lent to layers under names of adapters."""
    if model.training:
        raise ValueError("`adapter_names` works for inference only. Call `model.eval()` first.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {layer: name for name, layer in model.named_modules() if _holds_adapters(layer)}
    adapters_of = {layer: _list_adapters(layer) | set(blocks.get(layer, ())) for layer in layers}
    known, names = {BASE}.union(*adapters_of.values()), tuple(adapter_names)
    if unknown := sorted(set(names) - known):
        raise ValueError(f"`adapter_names` must be loaded adapters ({', '.join(sorted(known))}), got {unknown}.")
    tells_clips = has_clips(base)
    calls = {base: Call(names)}
    for layer, name in layers.items():
        if mentioned := adapters_of[layer] & set(names):
            _check_tells_rows(layer, name, mentioned)
            calls[layer] = Call(names, blocks.get(layer, {}), is_of_clips=tells_clips and is_in_tower(name))
        else:
            calls[layer] = Call(names=None)
    _follow_rows(base, layers)
    with SHARED.opened(calls), clips_followed(base, lambda: _has_names(base, names)):
        yield


def _follow_rows(base: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Lets, once and for all, `generate` tell layers about rows, and PEFT's own layers hear of them."""
    follow_generate(base)
    for layer in layers:
        if not hasattr(layer, "speech_adapter_blocks") and pass_names not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(pass_names, with_kwargs=True)


def _has_names(base: nn.Module, names: tuple[str, ...]) -> bool:
    call = SHARED.find(base)
    return call is not None and call.names is names


def _holds_adapters(module: nn.Module) -> bool:
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _list_adapters(layer: nn.Module) -> set[str]:
    return layer._get_available_adapters() if isinstance(layer, BaseTunerLayer) else set(layer._adapters)


def _check_tells_rows(layer: nn.Module, name: str, mentioned: set[str]) -> None:
    if layer.disable_adapters:
        raise ValueError(
            f"`adapter_names` must be used while adapters are on, got {sorted(mentioned)} and {name} off. "
            "Call `model.enable_adapters()`, or leave `adapters_off`."
        )
    if not hasattr(layer, "_mixed_batch_forward") and not hasattr(layer, "speech_adapter_blocks"):
        raise ValueError(
            f"`adapter_names` must be adapters of a method that tells rows apart, got {sorted(mentioned)} at {name}, "
            f"a {type(layer).__module__}.{type(layer).__name__}. Use `set_adapter` and a batch for each."
        )
