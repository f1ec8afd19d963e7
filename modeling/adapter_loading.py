"""Loading an adapter: on its own base only, with exactly its own tensors, and not without effect.

Whatever is refused leaves the model as it was. The order, cheapest and safest first:

    files        whole, safetensors, finite, configuration of the right types     `read_adapter`
    base         fingerprint in the file against the model's                      `check_base`
    fit          names and shapes of the tensors, without memory for weights      `check_fit`
    injection    transformers' own `load_adapter`
    effect       one small batch with the adapter on and off                      `check_effect`
"""

import copy
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.integrations.peft import PeftAdapterMixin

from .active_adapters import check_adapter_name, is_adapter_parameter
from .adapter_files import FINGERPRINT_ENTRY, MISMATCH_ENTRY, SavedAdapter, name_on_disk, read_adapter
from .adapter_probe import check_effect
from .base_weights import changes_base, find_weights
from .fingerprint import check_fingerprints, find_version, fingerprint_base, fingerprint_processor, list_differences

logger = logging.getLogger(__name__)

SPEECH_ADAPTER_TYPE = "SPEECH_ADAPTER"
# Entries of configurations that PEFT matches as regular expressions against module names.
PATTERN_ENTRIES = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
# A regular expression with at most so many of these characters, and no repeated group, takes at most quadratic time.
BRANCHING = re.compile(r"[*+?{|]")
REPEATED_GROUP = re.compile(r"\)[*+?{]")
MAX_BRANCHES = 2
PATTERN_SECONDS = 5
# Run apart, where it can be stopped: Python's regular expressions have no time limit.
PATTERN_PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        for form in (pattern, f"(.*\\\\.)?({pattern})$", f"(?:^|.*?\\\\.){pattern}\\\\.(?P<idx>\\\\d+)\\\\."):
            re.fullmatch(form, name)
"""


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
    _check_patterns(saved, [name for name, _ in model.named_modules()])
    restore = remember_modules(model)
    config = saved.checked_config()
    if changes_base(config):
        config.init_lora_weights = True  # same shapes, and the base stays as it is
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
    elif sum(map(_count, expected.values())) > sum(value.numel() for value in saved.tensors.values()):
        # Names may differ here: transformers renames those of adapters that older versions have saved.
        raise _misfit(saved, "its configuration asks for more weights than the file has")
    return list(expected)


def check_tensors(saved: SavedAdapter, expected: Mapping[str, tuple[int, ...]]) -> None:
    """
    Makes sure that `saved` has the tensors `expected`, name to shape, and no others.

    Raises:
        ValueError: It has not.
    """
    if wrong := sorted(expected.keys() ^ saved.tensors.keys()):
        raise _wrong_tensors(saved, wrong[0])
    for name, value in saved.tensors.items():
        if tuple(value.shape) != expected[name] or not value.is_floating_point():
            raise _misfit(saved, f"{name!r} is {value.dtype} {tuple(value.shape)} and should be {expected[name]}")


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _misfit(saved: SavedAdapter, reason: str) -> ValueError:
    return ValueError(f"`adapter` must be an adapter of this base, got {saved.source} ({reason}).")


def _wrong_tensors(saved: SavedAdapter, name: str) -> ValueError:
    return ValueError(
        f"`adapter` must hold exactly the tensors of its configuration, got {saved.source} where {name!r} is missing "
        "or too much. Save or download it again."
    )


def _check_patterns(saved: SavedAdapter, module_names: Sequence[str]) -> None:
    patterns: list[str] = []
    for entry in PATTERN_ENTRIES:
        value = getattr(saved.config, entry, None)
        # Lists of targets are names; the other entries hold regular expressions, as keys or in a list.
        if isinstance(value, str) or (value and not entry.endswith("_modules")):
            patterns += [value] if isinstance(value, str) else list(value)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(
                f"`target_modules` must be names or a regular expression, got {pattern!r} in {saved.source} ({error})."
            ) from error
    if all(map(_is_quick, patterns)):
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", PATTERN_PROGRAM],
            input=json.dumps([patterns, module_names]).encode(),
            timeout=PATTERN_SECONDS,
            check=True,
            capture_output=True,
        )
    except subprocess.SubprocessError as error:
        raise ValueError(
            f"`target_modules` must be matched in {PATTERN_SECONDS} seconds, got {patterns} in {saved.source}. Name "
            "the modules, or repeat single characters only."
        ) from error


def _is_quick(pattern: str) -> bool:
    return len(BRANCHING.findall(pattern)) <= MAX_BRANCHES and not REPEATED_GROUP.search(pattern)


def _inject(
    saved: SavedAdapter,
    model: PreTrainedModel,
    adapter_name: str,
    config: PeftConfig,
    *,
    is_trainable: bool,
    load_config: object | None,
) -> object:
    try:
        with without_false_alarms():
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
