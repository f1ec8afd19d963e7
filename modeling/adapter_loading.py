"""Loading an adapter: on its own base only, with exactly its own tensors, and not without effect.

Whatever is refused leaves the model as it was. The order, cheapest and safest first:

    files        whole, safetensors, small, configuration of the right types      `read_adapter`
    base         fingerprint in the file against the model's                      `check_base`
    fit          names and shapes of the tensors, without memory for weights      `check_fit`
    weights      read, and finite in the precisions of file and model             `check_finite`
    injection    transformers' own `load_adapter`
    effect       one small batch with the adapter on and off                      `check_effect`
"""

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.loading_report import LoadStateDictInfo

from .active_adapters import check_adapter_name, find_adapter_layers, is_adapter_parameter
from .adapter_files import FINGERPRINT_ENTRY, MISMATCH_ENTRY, SavedAdapter, name_on_disk, read_adapter, shorten
from .adapter_probe import check_effect
from .base_weights import changes_base, find_device, find_hooks, find_weights
from .fingerprint import check_fingerprints, find_version, fingerprint_base, fingerprint_processor, list_differences
from .module_patterns import bounded_patterns

logger = logging.getLogger(__name__)

SPEECH_ADAPTER_TYPE = "SPEECH_ADAPTER"


def load_speech_adapter(
    model: PreTrainedModel,
    path_or_repo: str,
    adapter_name: str,
    *,
    is_trainable: bool = False,
    allow_base_mismatch: bool = False,
    processor: ProcessorMixin | None = None,
    probe_inputs: Mapping[str, torch.Tensor] | None = None,
    load_config: object | None = None,
    **hub_kwargs,
) -> object:
    """
    Adds a saved adapter of any PEFT method to `model` and activates it, or leaves the model as it was.

    Args:
        model: The adapter's base, of this project or a stock class.
        path_or_repo: Folder, or name on the Hub.
        adapter_name: Its name in the model.
        is_trainable: Leave its parameters trainable.
        allow_base_mismatch: Load it on another base than its own; its configuration then says so.
        processor: Of the model; its vocabulary and feature settings are compared too.
        probe_inputs: A batch of one, for models that no probe can be made for from their configuration.
        load_config: From `from_pretrained`.
        hub_kwargs: `revision`, `token`, `subfolder`, `cache_dir`, `local_files_only` and the like.

    Returns:
        transformers' account of loading.

    Raises:
        ValueError: The name is taken or not allowed; the files are missing, damaged or not to be trusted; the adapter
            was made for another base; its tensors are not exactly those of its configuration; or its weights are not
            zero and yet the model says the same with and without it.
    """
    if not isinstance(model, PeftAdapterMixin):
        raise ValueError(f"`model` must be a transformers model, got a {type(model).__name__}. Load into its base.")
    if check_adapter_name(adapter_name) in getattr(model, "peft_config", {}):
        raise ValueError(f"`adapter_name` must be new, got {adapter_name!r}, which is loaded. Choose another name.")
    saved = read_adapter(path_or_repo, **hub_kwargs)
    is_mismatch = check_base(saved, model, processor, allow_base_mismatch=allow_base_mismatch)
    names = check_fit(saved, model, adapter_name)
    config = saved.checked_config()
    with restored_on_error(model, _find_weights_at_risk(model, config, names)):
        loaded = _inject(saved, model, adapter_name, config, is_trainable=is_trainable, load_config=load_config)
        setattr(config, FINGERPRINT_ENTRY, saved.base_fingerprint)
        setattr(config, MISMATCH_ENTRY, saved.base_mismatch_allowed or is_mismatch)
        check_finite(saved, model, adapter_name)
        check_effect(model, adapter_name, probe_inputs)
    return loaded


def check_base(
    saved: SavedAdapter, model: nn.Module, processor: ProcessorMixin | None, *, allow_base_mismatch: bool
) -> bool:
    """
    Returns whether `saved` was made for another base than `model`, as [`compare_bases`].

    Raises:
        ValueError: It was, and that is not allowed.
    """
    ours = {}
    if saved.base_fingerprint is not None:
        ours = fingerprint_base(model, find_version(saved.base_fingerprint))
        ours |= fingerprint_processor(processor) if processor else {}
    return compare_bases(saved, ours, allow_base_mismatch=allow_base_mismatch)


def compare_bases(saved: SavedAdapter, ours: dict[str, object], *, allow_base_mismatch: bool) -> bool:
    """
    Returns whether `saved` is of another base than that with the fingerprint `ours`; warns if its files do not say.

    Raises:
        ValueError: It is, and that is not allowed.
    """
    if allow_base_mismatch:
        return bool(saved.base_fingerprint and list_differences(saved.base_fingerprint, ours))
    check_fingerprints(saved.base_fingerprint, ours, saved.source)
    return False


def check_fit(saved: SavedAdapter, model: nn.Module, adapter_name: str) -> list[str]:
    """
    Makes sure that the weights are those of the configuration, before memory is taken for either.

    The adapter is added without memory for its weights and taken away again.

    Returns:
        The names that its tensors have on disk.

    Raises:
        ValueError: A regular expression is invalid or takes too long, no module is wrapped, or tensors are missing,
            too much or of another shape.
    """
    config = saved.checked_config()
    if changes_base(config):
        config.init_lora_weights = True  # same shapes, and the base stays as it is
    with bounded_patterns(config, model):
        restore = remember_modules(model)
        try:
            with without_false_alarms():
                inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage=True)
                state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
            expected = {name_on_disk(key): tuple(value.shape) for key, value in state.items()}
        except Exception as error:  # whatever a configuration of unknown origin makes PEFT stumble over
            raise _misfit(saved, str(error)) from error
        finally:
            restore()
    if saved.config.peft_type == SPEECH_ADAPTER_TYPE:
        check_tensors(saved, expected)
    elif sum(map(_count, expected.values())) > sum(_count(about.shape) for about in saved.header.values()):
        # Names may differ here: transformers renames those of adapters that older versions have saved.
        raise _misfit(saved, "its configuration asks for more weights than the file has")
    return list(expected)


def check_tensors(saved: SavedAdapter, expected: Mapping[str, tuple[int, ...]]) -> None:
    """
    Makes sure that `saved` has the tensors `expected`, name to shape, and no others.

    Raises:
        ValueError: It has not.
    """
    if wrong := sorted(expected.keys() ^ saved.header.keys()):
        raise _wrong_tensors(saved, wrong[0])
    for name, about in saved.header.items():
        if about.shape != expected[name] or not about.dtype.is_floating_point:
            raise _misfit(saved, f"{name!r} is {about.dtype} {about.shape} and should be {expected[name]}")


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _misfit(saved: SavedAdapter, reason: str) -> ValueError:
    return ValueError(f"`adapter` must be an adapter of this base, got {saved.source} ({shorten(reason)}).")


def _wrong_tensors(saved: SavedAdapter, name: str) -> ValueError:
    return ValueError(
        f"`adapter` must hold exactly the tensors of its configuration, got {saved.source} where {shorten(name)!r} is "
        "missing or too much. Save or download it again."
    )


def _inject(
    saved: SavedAdapter,
    model: PreTrainedModel,
    adapter_name: str,
    config: PeftConfig,
    *,
    is_trainable: bool,
    load_config: object | None,
) -> object:
    if find_hooks(model):
        return _inject_beside_offloaded(saved, model, adapter_name, config, is_trainable=is_trainable)
    try:
        with without_false_alarms(), bounded_patterns(config, model):
            loaded = PeftAdapterMixin.load_adapter(
                model,
                saved.folder,  # not looked at: configuration and tensors are given
                adapter_name,
                peft_config=config,
                adapter_state_dict=dict(saved.tensors),
                is_trainable=is_trainable,
                load_config=load_config,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise _misfit(saved, str(error)) from error
    missing = {key for key in loaded.missing_keys if _is_of_adapter(key, adapter_name)}
    if wrong := sorted(missing | set(loaded.unexpected_keys)):
        raise _wrong_tensors(saved, wrong[0])
    return loaded


def _inject_beside_offloaded(
    saved: SavedAdapter, model: PreTrainedModel, adapter_name: str, config: PeftConfig, *, is_trainable: bool
) -> LoadStateDictInfo:
    """As transformers' `load_adapter`, which fails where a part of the model is on a disk (5.23)."""
    config.inference_mode = not is_trainable
    tensors = dict(saved.tensors)
    with without_false_alarms(), bounded_patterns(config, model):
        inject_adapter_in_model(config, model, adapter_name)
    model._hf_peft_config_loaded = True
    hooks = {id(layer): hook for layer in find_adapter_layers(model) for _, hook in find_hooks(layer)}
    for layer in find_adapter_layers(model):
        device = getattr(hooks.get(id(layer)), "execution_device", None)
        if device is not None and isinstance(layer, BaseTunerLayer):
            layer._move_adapter_to_device_of_base_layer(adapter_name, torch.device(device))
    for key, parameter in list(model.named_parameters()):
        if _is_of_adapter(key, adapter_name):
            if parameter.is_meta:  # a fresh LoRA is sent where its base is: nowhere
                parent, _, child = key.rpartition(".")
                parameter = nn.Parameter(torch.empty_like(parameter, device=find_device(model)))
                setattr(model.get_submodule(parent), child, parameter)
            name = name_on_disk(key.replace(f".{adapter_name}", "", 1))
            if name not in tensors:
                raise _wrong_tensors(saved, name)
            parameter.data.copy_(tensors.pop(name))
    if tensors:
        raise _wrong_tensors(saved, min(tensors))
    if not is_trainable:
        model.eval()
        for layer in find_adapter_layers(model):
            layer.requires_grad_(False)
    names = ("missing_keys", "unexpected_keys", "skipped_pp_keys", "mismatched_keys")
    return LoadStateDictInfo(**{name: set() for name in names}, error_msgs=[], conversion_errors={})


def check_finite(saved: SavedAdapter, model: nn.Module, adapter_name: str) -> None:
    """
    Makes sure that the adapter's weights are finite in the precision that they have in the model.

    Raises:
        ValueError: One is not; a number of the file may be too large for it.
    """
    for key, parameter in model.named_parameters():
        if _is_of_adapter(key, adapter_name) and not parameter.isfinite().all():
            raise ValueError(
                f"`adapter` must have weights that are finite in {str(parameter.dtype).removeprefix('torch.')}, got "
                f"others in {key!r} of {saved.source}. Its training diverged, or it needs a wider precision."
            )


def _is_of_adapter(key: str, adapter_name: str) -> bool:
    """Whether a parameter is the adapter's: its name follows that of a PEFT container, and may occur elsewhere too."""
    return any(is_adapter_parameter(part) and name == adapter_name for part, name in pairwise(key.split(".")))


@contextmanager
def without_false_alarms() -> Iterator[None]:
    """transformers 5.23 warns that the tensors of adapters loaded before are missing; its answer is read instead."""
    report = logging.getLogger("transformers.integrations.peft")
    level = report.level
    report.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            yield
    finally:
        report.setLevel(level)


def _find_weights_at_risk(model: nn.Module, config: PeftConfig, names: Sequence[str]) -> list[nn.Parameter]:
    """The weights of the base that adding the adapter changes; `names` are those of its tensors on disk."""
    if not changes_base(config):
        return []
    return find_weights(model, {re.sub(r"^base_model\.model\.|\.lora_.*", "", name) for name in names})


@contextmanager
def restored_on_error(model: nn.Module, weights: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """
    On an error inside, gives `model` back the modules, adapters, modes and `requires_grad` that it had before.

    Args:
        model: The model.
        weights: Parameters that get their values back too.
    """
    restore = remember_modules(model)
    values = [weight.detach().clone() for weight in weights]
    try:
        yield
    except BaseException:
        restore()
        for weight, value in zip(weights, values, strict=True):
            weight.data = value
        raise


def remember_modules(model: nn.Module) -> Callable[[], None]:
    """Returns a function that gives `model` back its modules, adapters, modes and `requires_grad` of now."""
    modules = []
    for module in model.modules():
        containers = [value for value in vars(module).values() if isinstance(value, (dict, list, set))]
        modules.append((module, dict(vars(module)), [(value, copy.copy(value)) for value in containers]))
    is_trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for module, attributes, containers in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in containers:  # in place: handles of hooks point to them
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in is_trainable:
            parameter.requires_grad_(requires_grad)

    return restore
