"""Modules in their places: copies of a model that share its tensors, and adapter layers that are empty."""

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.overrides import TorchFunctionMode


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


def is_empty_layer(module: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Whether a module is a layer of PEFT, of class `kind` if given, that has no adapter left."""
    if kind is not None and not isinstance(module, kind):
        return False
    if isinstance(module, AuxiliaryTrainingWrapper):
        return not module._adapters
    return isinstance(module, BaseTunerLayer) and not module._get_available_adapters()


def remove_empty_layers(model: nn.Module, kind: type[nn.Module] | None = None) -> None:
    """Puts the base's own modules back where a layer of PEFT has no adapter left."""
    for module in model.modules():
        for name, child in module.named_children():
            while is_empty_layer(child, kind):
                child = child.base_layer if isinstance(child, BaseTunerLayer) else child.original_module
                setattr(module, name, child)


def find_module(model: nn.Module, name: str, kind: type[BaseTunerLayer]) -> nn.Module:
    """Returns the module that has this name once [`remove_empty_layers`] has been at the model."""
    module = model
    for part in name.split(".") if name else ():
        module = getattr(module, part)
        while is_empty_layer(module, kind):
            module = module.base_layer
    return module
