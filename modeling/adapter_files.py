"""Adapters written to disk with what they fit, and described; needed to save one, so it does not travel with one."""

import copy
import json
import os
from math import prod
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save as serialize_tensors
from torch import nn
from transformers import ProcessorMixin

from .adapter_layer import find_active_adapters
from .adapter_loading import (
    ADAPTER_WEIGHTS_NAME,
    FINGERPRINT_ENTRY,
    MISMATCH_ENTRY,
    find_adapter_files,
    locate_base,
    name_on_disk,
    open_weights,
    read_adapter_config,
    refuse_unreadable,
)
from .adapters import find_adapter_code
from .files import write_whole
from .fingerprint import find_base, find_hooks, fingerprint_base, fingerprint_processor, read_offloaded

# Entries of a fingerprint that the processor gives; a save without one keeps them.
PROCESSOR_ENTRIES = ("vocabulary", "features")


def save_adapter(
    model: nn.Module,
    save_directory: str | Path,
    adapter_name: str | None = None,
    *,
    processor: ProcessorMixin | None = None,
) -> None:
    """
    Writes one adapter of `model`, of any PEFT method: `adapter_config.json` and `adapter_model.safetensors`.

    Both files appear whole and together or not at all. They hold the fingerprint of the base and nothing else of it.

    Args:
        model: A model with adapters.
        save_directory: The folder; made if it does not exist.
        adapter_name: Which adapter. Default: the active one.
        processor: Of the base; its vocabulary and feature settings become part of the fingerprint.

    Raises:
        ValueError: There is no such adapter, or none or several are active and none is named.
    """
    name = _name_to_save(model, adapter_name)
    tensors = {name_on_disk(key): value.detach().cpu().contiguous() for key, value in _read_state(model, name).items()}
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    base = find_base(model)
    config.base_model_name_or_path = locate_base(config.base_model_name_or_path)
    if config.revision is None and not os.path.isabs(config.base_model_name_or_path or os.sep):
        config.revision = getattr(getattr(base, "config", None), "_commit_hash", None)
    entries = _base_entries(config, model, processor)
    metadata = {"format": "pt"}
    if hasattr(type(config), FINGERPRINT_ENTRY):
        vars(config).update(entries)
    else:
        metadata |= {key: json.dumps(value, sort_keys=True) for key, value in entries.items()}
    auto_mapping = None if config.task_type else describe_class(type(base))
    with write_whole(save_directory) as folder:
        (folder / ADAPTER_WEIGHTS_NAME).write_bytes(serialize_tensors(tensors, metadata=metadata))
        config.save_pretrained(str(folder), auto_mapping_dict=auto_mapping)


def _read_state(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors, wherever accelerate may keep them."""
    state = model.state_dict()
    for key, value in state.items():
        if value.is_meta and adapter_name in key.split("."):
            state[key] = read_offloaded(key, find_hooks(model))
    return get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False)


def describe_class(model_class: type) -> dict[str, str]:
    """
    Returns the class that `AutoPeftModel` makes a base with, as PEFT writes it.

    A class that is not of transformers is not to be imported where an adapter is loaded; its Auto class finds it.

    Example:

    ```python
    >>> from modeling import DeepSpeech2ForCTC
    >>> from modeling.adapter_files import describe_class

    >>> describe_class(DeepSpeech2ForCTC)
    {'base_model_class': 'AutoModelForCTC', 'parent_library': 'transformers'}

    ```
    """
    is_foreign = not model_class.__module__.startswith("transformers.")
    if is_foreign and (auto_class := getattr(model_class, "_auto_class", None)):
        return {"base_model_class": auto_class, "parent_library": "transformers"}
    return {"base_model_class": model_class.__name__, "parent_library": model_class.__module__}


def _base_entries(config: PeftConfig, model: nn.Module, processor: ProcessorMixin | None) -> dict[str, object]:
    before = getattr(config, FINGERPRINT_ENTRY, None) or {}
    from_processor = fingerprint_processor(processor) if processor else {}
    kept = {key: before[key] for key in PROCESSOR_ENTRIES if key in before}
    return {
        FINGERPRINT_ENTRY: kept | from_processor | fingerprint_base(model),
        MISMATCH_ENTRY: getattr(config, MISMATCH_ENTRY, False),
    }


def _name_to_save(model: nn.Module, adapter_name: str | None) -> str:
    known = list(getattr(model, "peft_config", {}))
    names = [adapter_name] if adapter_name else find_active_adapters(model, even_if_off=True)
    if len(names) != 1 or names[0] not in known:
        raise ValueError(f"`adapter_name` must be one of the model's adapters ({', '.join(known)}), got {names}.")
    return names[0]


def describe_adapter(folder: str | Path) -> dict[str, object]:
    """
    Returns what the adapter in `folder` is; reads its configuration and the header of its weights, no weights.

    Args:
        folder: Output of [`save_adapter`] or of any PEFT method's `save_pretrained`.

    Returns:
        `kind` (of a speech adapter, else the PEFT method, such as `"lora"`), `hidden_sizes` (`None` where the method
        has none), `target_modules` (sorted names or a regular expression), `base` (its name or `None`), `parameters`
        (their number), `bytes` (of the file of weights) and `dtype` (as in safetensors, `"F32"`; several are joined
        by a comma).

    Raises:
        ValueError: A file is missing or damaged, or the configuration is no adapter's.
    """
    with refuse_unreadable(folder):
        config_path, weights_path = find_adapter_files(folder)
        config = read_adapter_config(config_path)
        file = open_weights(weights_path)
        num_bytes = weights_path.stat().st_size
    parts = [file.get_slice(name) for name in file.keys()]
    shapes, dtypes = [part.get_shape() for part in parts], [part.get_dtype() for part in parts]
    targets = config.get("target_modules")
    return {
        "kind": config.get("kind") or config["peft_type"].lower(),
        "hidden_sizes": config.get("hidden_sizes"),
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "base": config.get("base_model_name_or_path"),
        "parameters": sum(map(prod, shapes)),
        "bytes": num_bytes,
        "dtype": ",".join(sorted(set(dtypes))),
    }


def save_adapter_code(folder: str | Path) -> None:
    """
    Copies the code of the adapters into `folder`, the output of [`save_adapter`].

    The adapter of a stock model then loads in two lines where this project is not installed:

    Args:
        folder: Of an adapter.

    Example:

    ```python
    get_class_from_dynamic_module("adapters.SpeechAdapterConfig", "me/adapter")
    model = WhisperForConditionalGeneration.from_pretrained("me/adapter")
    ```
    """
    with write_whole(folder) as scratch:
        for path in find_adapter_code():
            (scratch / path.name).write_bytes(path.read_bytes())
