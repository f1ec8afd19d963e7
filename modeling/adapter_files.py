"""Adapters on disk: what is written, and what is checked before a file of unknown origin is trusted."""

import copy
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize_tensors
from torch import nn
from transformers import ProcessorMixin
from transformers.utils.hub import cached_file, resolve_revision

from .active_adapters import find_active_adapters
from .base_weights import find_base, read_offloaded
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
# Sizes that no adapter's file has; one of unknown origin must not take the memory that it asks for.
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 2 << 20  # about 20,000 tensors
MAX_DEPTH = 20  # of brackets
MAX_SHOWN = 300  # characters of a file's content in a message
LENGTH_BYTES = 8  # in front of a safetensors header
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}


def shorten(content: object) -> str:
    """Returns `content` in as many characters as a message may have of it."""
    text = str(content)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SavedAdapter:
    """
    An adapter that was read from its files, which hold nothing but numbers and settings.

    Args:
        source: Folder or Hub name that it came from.
        folder: Where its configuration lies on this machine.
        config: Its configuration.
        file: Of its weights, open.
        header: Types and shapes of its weights, under the names that they have on disk.
        base_fingerprint: What its base was, as [`fingerprint_base`] and [`fingerprint_processor`]; `None` if unknown.
        base_mismatch_allowed: Whether it has been put on another base on purpose.
    """

    source: str
    folder: str
    config: PeftConfig
    file: safe_open
    header: dict[str, TensorHeader]
    base_fingerprint: dict[str, object] | None
    base_mismatch_allowed: bool

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """
        Its weights, read at the first use, all of them finite, in fp32 too.

        Raises:
            ValueError: A number is NaN, infinite or too large.
        """
        return _read_tensors(self.file, self.folder)

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
            state[key] = read_offloaded(model, key)
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


def locate_base(name: str | None) -> str | None:
    """
    Returns the name of a base as an adapter keeps it: a folder's absolute path, which nobody can take for a name on
    the Hub and which is found from everywhere; other names as they are.

    Example:

    ```python
    >>> from modeling.adapter_files import locate_base

    >>> locate_base("me/base"), locate_base("/").startswith("/")
    ('me/base', True)

    ```
    """
    if not name:
        return name
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.isdir(path) else name


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
    Reads an adapter of any PEFT method, its weights when they are used, and trusts nothing in it; no model is needed.

    Args:
        path_or_repo: Folder, or name on the Hub.
        hub_kwargs: `revision`, `token`, `subfolder`, `cache_dir`, `local_files_only` and the like.

    Raises:
        ValueError: A file is missing, damaged, too large or not to be read, the weights are pickled, or the
            configuration is no adapter's or has values of wrong types.
    """
    try:
        with reading(Path(path_or_repo) / str(hub_kwargs.get("subfolder") or "")):
            config_path, weights_path = _find_files(path_or_repo, hub_kwargs)
            settings = _read_config(config_path)
            file = _open_weights(weights_path)  # stays the same file whatever is saved in its place
    except OSError as error:
        raise _unreadable(path_or_repo, error) from error
    header, metadata = _read_header(file, weights_path)
    entries = {key: settings.get(key, metadata.get(key)) for key in (FINGERPRINT_ENTRY, MISMATCH_ENTRY)}
    fingerprint, is_mismatch_allowed = entries[FINGERPRINT_ENTRY], entries[MISMATCH_ENTRY] or False
    if not isinstance(fingerprint, (dict, type(None))) or not isinstance(is_mismatch_allowed, bool):
        raise ValueError(
            f"`adapter` must have a fingerprint that is a JSON object, got {shorten(fingerprint)} and "
            f"{shorten(repr(is_mismatch_allowed))} in {path_or_repo}."
        )
    config = _make_config(settings, config_path)
    folder = str(config_path.parent)
    return SavedAdapter(str(path_or_repo), folder, config, file, header, fingerprint, is_mismatch_allowed)


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
    try:
        with reading(folder):
            config_path, weights_path = _find_in_folder(folder)
            config = _read_config(config_path)
            file = _open_weights(weights_path)
            num_bytes = weights_path.stat().st_size
    except OSError as error:
        raise _unreadable(folder, error) from error
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
        reason = shorten(" ".join(str(error).split()))
        raise ValueError(
            f"`adapter` must be an adapter of this base, got {path_or_repo}, which is no folder and no repository to "
            f"be read with {CONFIG_NAME} and {ADAPTER_WEIGHTS_NAME} ({reason}). {_advise(error)}"
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


def _advise(error: BaseException | None) -> str:
    """What a person can do about a repository that could not be read, by the errors behind `error`."""
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return "Ask for access on its page on the Hub, and log in (`hf auth login`) or give `token`."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "Correct the name; if it is private, log in (`hf auth login`) or give `token` of somebody with access."
    if any(isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403) for cause in causes):
        return "The Hub refused the token; log in again (`hf auth login`) or give another `token`."
    if constants.HF_HUB_OFFLINE:
        return "It is not in the cache and HF_HUB_OFFLINE is set: go online once, or correct the name."
    if any(isinstance(cause, (LocalEntryNotFoundError, ConnectionError, TimeoutError)) for cause in causes):
        return "It is not in the cache and the Hub cannot be reached: go online, or correct the name."
    return "Correct the name."


def _unreadable(source: str | Path, error: OSError) -> ValueError:
    return ValueError(f"`adapter` must be files that can be read, got {source} ({error}). Allow it.")


def _read_config(path: Path) -> dict:
    num_bytes = path.stat().st_size
    if num_bytes > MAX_CONFIG_BYTES:
        raise ValueError(
            f"`adapter` must have a configuration of at most {MAX_CONFIG_BYTES} bytes, got {num_bytes} in {path}."
        )
    try:
        config = _parse_json(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, brackets without end, NaN
        raise ValueError(f"`adapter` must have a JSON file as configuration, got {path}: {shorten(error)}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"`adapter` must have `peft_type` in its configuration, got none in {path}. Save it again.")
    return config


def _parse_json(text: str) -> object:
    """
    Returns what a JSON text says, with finite numbers and not too many brackets in each other.

    Raises:
        ValueError: It says something else.
    """
    content = json.loads(text, parse_constant=_refuse_number, parse_float=_parse_float)
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} brackets in each other")
        inner = [value for value in level if isinstance(value, (dict, list))]
        level = [part for value in inner for part in (value.values() if isinstance(value, dict) else value)]
    return content


def _refuse_number(text: str) -> float:
    raise ValueError(f"{shorten(text)} is no finite number")


def _parse_float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def _make_config(settings: dict, path: Path) -> PeftConfig:
    settings = {key: value for key, value in settings.items() if key != "runtime_config"}
    if settings["peft_type"] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"`peft_type` must be a method of this PEFT, got {shorten(settings['peft_type'])!r} in {path}."
        )
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        names = settings.get(key)
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if names is not None and not is_list and not isinstance(names, str):
            raise ValueError(
                f"`{key}` must be a list of names or a regular expression, got {shorten(repr(names))} in {path}."
            )
    try:
        return PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**settings))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError) as error:
        reason = shorten(error)
        raise ValueError(f"`adapter` must have a configuration of its method, got {path}: {reason}") from error


def _open_weights(path: Path) -> safe_open:
    """The file of weights, none of them read; safetensors bounds them by the file's size."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if MAX_HEADER_BYTES < header_bytes < path.stat().st_size:
        raise ValueError(
            f"`adapter` must have a header of at most {MAX_HEADER_BYTES} bytes, got {header_bytes} in {path}. No "
            "adapter has so many tensors."
        )
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_header(file: safe_open, path: Path) -> tuple[dict[str, TensorHeader], dict[str, object]]:
    """Types and shapes of the weights, and the metadata's entries."""
    header, texts = {}, file.metadata() or {}
    for name in file.keys():
        part = file.get_slice(name)
        header[name] = TensorHeader(DTYPES.get(part.get_dtype(), torch.uint8), tuple(part.get_shape()))
    try:
        return header, {key: _parse_json(texts.get(key, "null")) for key in (FINGERPRINT_ENTRY, MISMATCH_ENTRY)}
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def _read_tensors(file: safe_open, source: str) -> dict[str, torch.Tensor]:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name, tensor in tensors.items():
        value = tensor.float() if tensor.dtype == torch.float64 else tensor
        if value.is_floating_point() and not torch.isfinite(value).all():
            where = f"{shorten(name)!r} of {source}"
            raise ValueError(f"`adapter` must have finite weights, got NaN or infinity in {where}.")
    return tensors


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"`adapter` must have whole weights, got a damaged {path}: {shorten(error)}. Fetch it again.")
