"""Which adapters a model has, which of them act, and on which rows of a batch; for every PEFT method."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

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
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


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
    """Runs the base alone inside; unlike `disable_adapters`, it leaves `requires_grad` as it is."""
    layers = find_adapter_layers(model)
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


def _add_adapter_names(_module: nn.Module, args: tuple, kwargs: dict, *, names: Sequence[str]) -> tuple[tuple, dict]:
    rows = len(args[0] if args else next(iter(kwargs.values())))
    # Beam search repeats every row in place: [a, b] becomes [a, a, b, b].
    times, rest = divmod(rows, len(names))
    if rest or not times:
        raise ValueError(f"`adapter_names` must have one name a row, got {len(names)} names for {rows} rows.")
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(times)]}


@contextmanager
def adapter_rows(model: nn.Module, adapter_names: Sequence[str] | None) -> Iterator[None]:
    """
    Gives every row of a batch its own adapter inside, in `forward` and `generate`, LoRA included.

    Args:
        model: A model with adapters, in evaluation mode.
        adapter_names: One name a row, `"__base__"` for none; `None` changes nothing.

    Raises:
        ValueError: The model is training, a name is unknown, or (in the call) their number does not fit the rows.

    Example:

    ```python
    with adapter_rows(model, ["alice", "bob", "__base__"]):
        logits = model(**batch_of_three).logits
    ```
    """
    if adapter_names is None:
        yield
        return
    if model.training:
        raise ValueError("`adapter_names` works for inference only. Call `model.eval()` first.")
    layers = find_adapter_layers(model)
    known = {BASE}
    for layer in layers:
        known |= layer._get_available_adapters() if isinstance(layer, BaseTunerLayer) else set(layer._adapters)
        known |= set(getattr(layer, "served_blocks", ()))
    if unknown := sorted(set(adapter_names) - known):
        raise ValueError(f"`adapter_names` must be loaded adapters ({', '.join(sorted(known))}), got {unknown}.")
    hook = partial(_add_adapter_names, names=list(adapter_names))
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
