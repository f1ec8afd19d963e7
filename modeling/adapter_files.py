"""Adapters on disk: what is written, and what is checked before a file of unknown origin is trusted."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize_tensors
from torch import nn
from transformers import ProcessorMixin
from transformers.utils.hub import cached_file, resolve_revision

from .active_adapters import find_active_adapters
from .files import find_whole, reading, write_whole
from .fingerprint import fingerprint_base, fingerprint_processor

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# Where PEFT would look for weights that are a pickle; reading one runs whatever program it holds.
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
# Entry of the configuration, or of the weights' metadata for PEFT methods whose configuration takes no more entries.
FINGERPRINT_ENTRY = "base_fingerprint"
MISMATCH_ENTRY = "base_mismatch_allowed"
# Entries of a fingerprint that the processor gives; a save without one keeps them.
PROCESSOR_ENTRIES = ("vocabulary", "features")


@dataclass(frozen=True)
class SavedAdapter:
    """
    An adapter that was read from its files, which hold nothing but numbers and settings.

    Args:
        source: Folder or Hub name that it came from.
        folder: Where its configuration lies on this machine.
        config: Its configuration.
        tensors: Its weights, all of them finite, under the names that they have on disk.
        base_fingerprint: What its base was, as [`fingerprint_base`] and [`fingerprint_processor`]; `None` if unknown.
        base_mismatch_allowed: Whether it has been put on another base on purpose.
    """

    source: str
    folder: str
    config: PeftConfig
    tensors: dict[str, torch.Tensor]
    base_fingerprint: dict[str, object] | None
    base_mismatch_allowed: bool

    def checked_config(self) -> PeftConfig:
        """Returns a copy of the configuration that goes into any model unchecked: its loader has compared the base."""
        config = copy.deepcopy(self.config)
        if hasattr(type(config), FINGERPRINT_ENTRY):
            setattr(config, FINGERPRINT_ENTRY, None)
        return config


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
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {name_on_disk(key): value.detach().cpu().contiguous() for key, value in state.items()}
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    entries = _base_entries(config, model, processor)
    metadata = {"format": "pt"}
    if hasattr(type(config), FINGERPRINT_ENTRY):
        vars(config).update(entries)
    else:
        metadata |= {key: json.dumps(value, sort_keys=True) for key, value in entries.items()}
    with write_whole(save_directory) as folder:
        (folder / ADAPTER_WEIGHTS_NAME).write_bytes(serialize_tensors(tensors, metadata=metadata))
        config.save_pretrained(str(folder))


def _base_entries(config: PeftConfig, model: nn.Module, processor: ProcessorMixin | None) -> dict[str, object]:
    before = getattr(config, FINGERPRINT_ENTRY, None) or {}
    from_processor = fingerprint_processor(processor) if processor else {}
    kept = {key: before[key] for key in PROCESSOR_ENTRIES if key in before}
    return {
        FINGERPRINT_ENTRY: kept | from_processor | fingerprint_base(model),
        MISMATCH_ENTRY: getattr(config, MISMATCH_ENTRY, False),
    }


def name_on_disk(key: str) -> str:
    """
    Returns the name in a file of an adapter's tensor: as in a `PeftModel`, and as if the adapter were the only one.

    Example:

    ```python
    >>> from modeling.adapters import name_on_disk

    >>> name_on_disk("classifier.base_layer.1.lora_A.weight")  # a speech adapter wraps the classifier as well
    'base_model.model.classifier.1.lora_A.weight'

    ```
    """
    return "base_model.model." + key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _name_to_save(model: nn.Module, adapter_name: str | None) -> str:
    known = list(getattr(model, "peft_config", {}))
    names = [adapter_name] if adapter_name else find_active_adapters(model, even_if_off=True)
    if len(names) != 1 or names[0] not in known:
        raise ValueError(f"`adapter_name` must be one of the model's adapters ({', '.join(known)}), got {names}.")
    return names[0]


def read_adapter(path_or_repo: str | Path, **hub_kwargs) -> SavedAdapter:
    """
    Reads an adapter of any PEFT method and trusts nothing in it; no model is needed.

    Args:
        path_or_repo: Folder, or name on the Hub.
        hub_kwargs: `revision`, `token`, `subfolder`, `cache_dir`, `local_files_only` and the like.

    Raises:
        ValueError: A file is missing or damaged, the weights are pickled, or not finite, or the configuration is no
            adapter's or has values of wrong types.
    """
    with reading(Path(path_or_repo) / str(hub_kwargs.get("subfolder") or "")):
        config_path, weights_path = _find_files(path_or_repo, hub_kwargs)
        settings = _read_config(config_path)
        tensors, metadata = _read_tensors(weights_path)
    entries = {key: settings.get(key, metadata.get(key)) for key in (FINGERPRINT_ENTRY, MISMATCH_ENTRY)}
    fingerprint, is_mismatch_allowed = entries[FINGERPRINT_ENTRY], entries[MISMATCH_ENTRY] or False
    if not isinstance(fingerprint, (dict, type(None))) or not isinstance(is_mismatch_allowed, bool):
        raise ValueError(f"`adapter` must have a fingerprint that is a JSON object, got {entries} in {path_or_repo}.")
    config = _make_config(settings, config_path)
    return SavedAdapter(str(path_or_repo), str(config_path.parent), config, tensors, fingerprint, is_mismatch_allowed)


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
    with reading(folder):
        config_path, weights_path = _find_in_folder(folder)
        config = _read_config(config_path)
        shapes, dtypes = _read_header(weights_path)
        num_bytes = weights_path.stat().st_size
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


def _find_files(path_or_repo: str | Path, hub_kwargs: Mapping[str, object]) -> tuple[Path, Path]:
    if Path(path_or_repo).exists():
        return _find_in_folder(Path(path_or_repo) / str(hub_kwargs.get("subfolder") or ""))
    options = {key: value for key, value in hub_kwargs.items() if value is not None}
    for_revision = {key: options[key] for key in ("token", "local_files_only", "cache_dir") if key in options}
    try:
        # Both files come from one commit, even if the repository changes in between.
        options["revision"] = resolve_revision(str(path_or_repo), options.get("revision"), **for_revision)
        paths = [cached_file(str(path_or_repo), name, **options) for name in (CONFIG_NAME, ADAPTER_WEIGHTS_NAME)]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`adapter` must be an adapter of this base, got {path_or_repo}, which is no folder and no repository "
            f"with {CONFIG_NAME} and {ADAPTER_WEIGHTS_NAME} ({error}). Correct the name."
        ) from error
    return Path(paths[0]), Path(paths[1])


def _find_in_folder(folder: str | Path) -> tuple[Path, Path]:
    config_path, weights_path = find_whole(folder, CONFIG_NAME), find_whole(folder, ADAPTER_WEIGHTS_NAME)
    if config_path.is_file() and not weights_path.is_file() and (Path(folder) / PICKLED_WEIGHTS_NAME).exists():
        raise ValueError(
            f"`adapter` must have its weights in {ADAPTER_WEIGHTS_NAME}, got the pickle {PICKLED_WEIGHTS_NAME} in "
            f"{folder}. Pickles can run any program and are not read; ask for the weights as safetensors."
        )
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ValueError(f"`adapter` must be a folder with {path.name}, got {folder}, which has none.")
    return config_path, weights_path


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, brackets without end
        raise ValueError(f"`adapter` must have a JSON file as configuration, got {path}: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"`adapter` must have `peft_type` in its configuration, got none in {path}. Save it again.")
    return config


def _make_config(settings: dict, path: Path) -> PeftConfig:
    settings = {key: value for key, value in settings.items() if key != "runtime_config"}
    if settings["peft_type"] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"`peft_type` must be a method of this PEFT, got {settings['peft_type']!r} in {path}.")
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        names = settings.get(key)
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if names is not None and not is_list and not isinstance(names, str):
            raise ValueError(f"`{key}` must be a list of names or a regular expression, got {names!r} in {path}.")
    try:
        return PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**settings))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"`adapter` must have a configuration of its method, got {path}: {error}") from error


def _read_header(path: Path) -> tuple[list[list[int]], list[str]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]
            return [part.get_shape() for part in slices], [part.get_dtype() for part in slices]
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The weights, checked to be finite, and the metadata's entries; safetensors bounds both by the file's size."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            entries = {key: (file.metadata() or {}).get(key, "null") for key in (FINGERPRINT_ENTRY, MISMATCH_ENTRY)}
        metadata = {key: json.loads(value) for key, value in entries.items()}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"`adapter` must have finite weights, got NaN or infinity in {name!r} of {path}.")
    return tensors, metadata


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"`adapter` must have whole weights, got a damaged {path}: {error}. Fetch it again.")
