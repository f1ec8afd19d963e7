"""The weights of a model's base, wherever they are: in memory, offloaded, quantised, and under any wrapper."""

import sys
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .active_adapters import is_adapter_parameter

# Module names that PEFT and torch.compile put around a base's own.
WRAPPER_NAMES = {"base_layer", "original_module", "_orig_mod"}
# Initialisations of LoRA that leave the weights of the base as they are; others put a part of them into the adapter.
HARMLESS_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class BaseWeight:
    """
    A parameter or persistent buffer of a base.

    Args:
        name: In the base without any wrapper.
        shape: As the architecture has it; of a quantised weight that of the weight and not of its packed form.
        dtype: Of the tensor as it is kept.
        is_parameter: And no buffer.
        is_quantized: Whether its values are those of a quantisation.
        read: Gives the values; `None` if they are not to be had.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    is_quantized: bool
    read: Callable[[], torch.Tensor] | None

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)


def find_base(model: nn.Module) -> nn.Module:
    """Returns the model inside a `PeftModel` or a compiled one, or `model` itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def list_base_weights(model: nn.Module) -> list[BaseWeight]:
    """
    Returns every weight of the base of `model` once, in the order of its modules; a tied weight under its first name.

    Weights that an offloading hook of accelerate keeps are read through it. Those that the initialisation of a LoRA
    has taken a part from (PiSSA, OLoRA and the like) cannot be had.
    """
    model = find_base(model)
    hooks = find_hooks(model)
    changed = _find_changed_layers(model)
    owned = [
        (f"{prefix}.{name}" if prefix else name, module, name, value, is_parameter)
        for prefix, module in model.named_modules()
        for name, value, is_parameter in _own_tensors(module)
    ]
    owned = [entry for entry in owned if not is_adapter_parameter(entry[0])]
    is_repeated = _find_repeated(model, {_unwrap(entry[0]): entry[3] for entry in owned})
    weights, seen = [], set()
    for full_name, module, name, value, is_parameter in owned:
        if id(value) in seen or _unwrap(full_name) in is_repeated:
            continue
        seen.add(id(value))
        shape = _find_shape(module, name, value)
        is_quantized = _is_quantized(module, name, value)
        is_lost = name == "weight" and id(module) in changed
        read = None if is_lost else _find_reader(module, value, full_name, hooks, is_quantized=is_quantized)
        weights.append(BaseWeight(_unwrap(full_name), shape, value.dtype, is_parameter, is_quantized, read))
    return weights


def _find_repeated(model: nn.Module, tensors: dict[str, torch.Tensor]) -> set[str]:
    """The names that are tied to another one; offloading makes a tensor without memory of each of the two."""
    tied = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    known = [(name, tensors[name], tensors[other]) for name, other in tied if tensors.keys() >= {name, other}]
    return {name for name, ours, theirs in known if ours is theirs or (ours.is_meta and theirs.is_meta)}


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """The parameters and persistent buffers of a module itself; of a quantised one its weight and bias alone."""
    is_packed = _is_packed(module)
    if is_packed and "weight" not in module._parameters:  # packed into parts with names of the library's own
        yield "weight", torch.empty(0, dtype=torch.uint8, device="meta"), True
    kept = module._buffers.keys() - module._non_persistent_buffers_set
    buffers = {name: value for name, value in module._buffers.items() if name in kept}
    for name, value in (module._parameters | buffers).items():
        if isinstance(value, torch.Tensor) and (not is_packed or name in ("weight", "bias")):
            yield name, value, name in module._parameters


def _is_packed(module: nn.Module) -> bool:
    """Whether a linear module keeps its weight in another form than a matrix of floating point numbers."""
    widths = [getattr(module, name, None) for name in ("in_features", "out_features")]
    is_linear = all(type(width) is int for width in widths)
    if not is_linear or isinstance(module, BaseTunerLayer) or next(module.children(), None) is not None:
        return False
    weight = module._parameters.get("weight")
    if weight is None:  # a norm of weights keeps them in two floating point parameters
        others = (value for name, value in module._parameters.items() if name != "bias" and value is not None)
        return not any(value.is_floating_point() for value in others)
    return not weight.is_floating_point() or hasattr(weight, "quant_state")


def _is_quantized(module: nn.Module, name: str, value: torch.Tensor) -> bool:
    return name == "weight" and (_is_packed(module) or _is_quantized_tensor(value))


def _is_quantized_tensor(value: torch.Tensor) -> bool:
    return type(value.data) is not torch.Tensor and not hasattr(value.data, "full_tensor")


def _find_shape(module: nn.Module, name: str, value: torch.Tensor) -> tuple[int, ...]:
    if name == "weight" and _is_packed(module):
        return module.out_features, module.in_features
    return tuple(getattr(value, "ds_shape", value.shape))  # DeepSpeed keeps a part of it here


def _find_reader(
    module: nn.Module, value: torch.Tensor, full_name: str, hooks: list[tuple[str, object]], *, is_quantized: bool
) -> Callable[[], torch.Tensor] | None:
    if value.is_meta:
        is_offloaded = not is_quantized and any(_is_under(full_name, prefix) for prefix, _ in hooks)
        return partial(_read_offloaded, full_name, hooks) if is_offloaded else None
    if is_quantized:
        return partial(_dequantize, module, value) if _can_dequantize(module, value) else None
    is_whole = type(value.data) is torch.Tensor and not hasattr(value, "ds_id")
    return value.detach if is_whole else None


def find_hooks(model: nn.Module) -> list[tuple[str, object]]:
    """Returns accelerate's hooks that keep weights outside of `model`, each with its module's name."""
    return [(name, hook) for name, module in model.named_modules() for hook in _offloading_hooks(module)]


def _unwrap(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


def _is_under(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


def _offloading_hooks(module: nn.Module) -> Iterator[object]:
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and isinstance(getattr(one, "weights_map", None), Mapping):
            yield one


def _read_offloaded(name: str, hooks: list[tuple[str, object]]) -> torch.Tensor:
    """
    Returns what accelerate has taken out of the model.

    Raises:
        ValueError: No hook has it.
    """
    for prefix, hook in reversed(hooks):  # the innermost first
        if _is_under(name, prefix):
            with suppress(KeyError):
                return hook.weights_map[name.removeprefix(prefix).removeprefix(".")].detach()
    raise ValueError(f"`model` must have its weights in memory or where accelerate put them, got none for {name!r}.")


def read_offloaded(model: nn.Module, name: str) -> torch.Tensor:
    """
    Returns the weight `name` of `model` that accelerate keeps outside of it.

    Raises:
        ValueError: It keeps no such weight.
    """
    return _read_offloaded(name, find_hooks(model))


def find_device(model: nn.Module) -> torch.device:
    """Returns where `model` runs; where all of it is offloaded, that is not where its first parameter is."""
    devices = {parameter.device for parameter in model.parameters()}
    device = next(iter(parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    hooks = find_hooks(model)
    places = [torch.device(hook.execution_device) for _, hook in hooks if hook.execution_device is not None]
    return places[0] if places else next((place for place in devices if place.type != "meta"), device)


def changes_base(config: object) -> bool:
    """Whether adding an adapter of this configuration changes weights of the base, as PiSSA and OLoRA do."""
    return getattr(config, "init_lora_weights", None) not in HARMLESS_INITIALIZATIONS


def find_weights(model: nn.Module, module_names: Container[str]) -> list[nn.Parameter]:
    """Returns the parameters `weight` of the modules with these names, without any wrapper's."""
    named = (
        (_unwrap(name), module) for name, module in model.named_modules() if not isinstance(module, BaseTunerLayer)
    )
    weights = (module._parameters.get("weight") for name, module in named if name in module_names)
    return [weight for weight in weights if weight is not None]


def _find_changed_layers(model: nn.Module) -> set[int]:
    """The ids of the modules of the base whose weight an adapter's initialisation has changed."""
    names = {name for name, config in getattr(model, "peft_config", {}).items() if changes_base(config)}
    layers = (layer for layer in model.modules() if names and isinstance(layer, BaseTunerLayer))
    return {id(layer.get_base_layer()) for layer in layers if names & layer._get_available_adapters()}


def _can_dequantize(module: nn.Module, weight: torch.Tensor) -> bool:
    if (state := getattr(weight, "quant_state", None)) is not None:
        # Of the form for CPUs with AVX512-BF16, which the first evaluation may have made of it, there is no way back.
        return "bitsandbytes" in sys.modules and not getattr(state, "packing_format_for_cpu", False)
    return _find_scales(module, weight) is not None or _is_quantized_tensor(weight)


def _find_scales(module: nn.Module, weight: torch.Tensor) -> torch.Tensor | None:
    scales = getattr(weight, "SCB", None)
    return getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales


def _dequantize(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The matrix that a weight of bitsandbytes, or of a library with tensors of its own, stands for."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, state)
    if (scales := _find_scales(module, weight)) is not None:
        return weight.data.float() * (scales.float() / 127).unsqueeze(1)
    return weight.data.dequantize()
