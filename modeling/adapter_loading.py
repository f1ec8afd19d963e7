"""Loading an adapter: whole files, on its own base only, with exactly its own tensors, and not without effect.

Whatever is refused leaves the model as it was. The order, cheapest and safest first:

    files        whole, safetensors, small, configuration of the right types      `read_adapter`
    base         fingerprint in the file against the model's                      `check_base`
    fit          names and shapes of the tensors, without memory for weights      `inject_empty`
    weights      read, and finite in the precisions of file and model             `fill_adapter`, `check_finite`
    effect       one small batch with the adapter on and off                      `check_effect`
"""

import copy
import json
import logging
import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import PeftConfig, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.hub import cached_file, resolve_revision
from transformers.utils.loading_report import LoadStateDictInfo

from .adapter_config import SPEECH_ADAPTER, bounded_patterns
from .adapter_layer import check_adapter_name, find_adapter_layers, is_adapter_parameter
from .fingerprint import (
    changes_base,
    check_fingerprints,
    find_device,
    find_hooks,
    find_version,
    find_weights,
    fingerprint_base,
    fingerprint_processor,
    list_differences,
)

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# Where PEFT would look for weights that are a pickle; reading one runs whatever program it holds.
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
# Entry of the configuration, or of the weights' metadata for PEFT methods whose configuration takes no more entries.
FINGERPRINT_ENTRY = "base_fingerprint"
MISMATCH_ENTRY = "base_mismatch_allowed"
# Sizes that no adapter's file has; one of unknown origin must not take the memory that it asks for.
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 2 << 20  # about 20,000 tensors
MAX_DEPTH = 20  # of brackets
MAX_SHOWN = 300  # characters of a file's content in a message
LENGTH_BYTES = 8  # in front of a safetensors header
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}

# Complete files on their way into the folder above; they count as being there already.
PENDING_FOLDER = ".moving"
# Holds the inode of the folder that it is in: whatever else has such a name, our writer did not leave it here.
MARK_NAME = ".journal"

PROBE_FRAMES = 50  # half a second of features at 10 ms
PROBE_CLIP_FRAMES = 100  # a second, of which an audio language model's tower leaves a quarter
PROBE_SAMPLES = 8_000  # half a second at 16 kHz
PROBE_TOKENS = 8
NOISE_FACTOR = 10  # an effect is so many times larger than the difference of two runs without it
RESOLUTION = 16 * torch.finfo(torch.float32).eps  # and than this share of the largest output


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


def locate_base(name: str | None) -> str | None:
    """
    Returns the name of a base as an adapter keeps it: a folder's absolute path, which nobody can take for a name on
    the Hub and which is found from everywhere; other names as they are.

    Example:

    ```python
    >>> from modeling.adapter_loading import locate_base

    >>> locate_base("me/base"), locate_base("/").startswith("/")
    ('me/base', True)

    ```
    """
    if not name:
        return name
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.isdir(path) else name


def name_on_disk(key: str) -> str:
    """
    Returns the name in a file of an adapter's tensor: as in a `PeftModel`, and as if the adapter were the only one.

    Example:

    ```python
    >>> from modeling.adapter_loading import name_on_disk

    >>> name_on_disk("classifier.base_layer.1.lora_A.weight")  # a speech adapter wraps the classifier as well
    'base_model.model.classifier.1.lora_A.weight'

    ```
    """
    return "base_model.model." + key.removeprefix("base_model.model.").replace(".base_layer.", ".")


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
    with refuse_unreadable(path_or_repo, Path(path_or_repo) / str(hub_kwargs.get("subfolder") or "")):
        config_path, weights_path = _find_files(path_or_repo, hub_kwargs)
        settings = read_adapter_config(config_path)
        file = open_weights(weights_path)  # stays the same file whatever is saved in its place
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


def _find_files(path_or_repo: str | Path, hub_kwargs: Mapping[str, object]) -> tuple[Path, Path]:
    if Path(path_or_repo).exists():
        return find_adapter_files(Path(path_or_repo) / str(hub_kwargs.get("subfolder") or ""))
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


def find_adapter_files(folder: str | Path) -> tuple[Path, Path]:
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


@contextmanager
def refuse_unreadable(source: str | Path, folder: str | Path | None = None) -> Iterator[None]:
    """Keeps writers of `folder` waiting, `source` if not given, and says of files what they cannot be read for."""
    try:
        with reading(folder or source):
            yield
    except OSError as error:
        raise ValueError(f"`adapter` must be files that can be read, got {source} ({error}). Allow it.") from error


def read_adapter_config(path: Path) -> dict:
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


def open_weights(path: Path) -> safe_open:
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


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Keeps other processes from committing files to `folder` meanwhile, where the file system has locks."""
    with locked(Path(folder), is_shared=True):
        yield


def find_whole(folder: str | Path, name: str) -> Path:
    """
    Returns where the newest whole file `name` of `folder` is, or where it would be if there is none; moves nothing.

    Raises:
        ValueError: `folder` has files on their way that [`write_whole`] did not leave there, such as a link.
    """
    pending = find_pending(Path(folder))
    return pending / name if pending and (pending / name).exists() else Path(folder) / name


def find_pending(folder: Path) -> Path | None:
    pending = folder / PENDING_FOLDER
    try:
        is_ours = _is_ours(pending)
    except (FileNotFoundError, NotADirectoryError):  # there is nothing, or somebody has just finished
        return None
    if not is_ours:
        raise ValueError(
            f"`folder` must not hold {PENDING_FOLDER}, which no writer of this machine left there, got {pending}. "
            "Remove it, or move its files where they belong."
        )
    return pending


def _is_ours(folder: Path) -> bool:
    """Whether a writer has made this very folder: a copy, a link or a download has another inode than its mark."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        return False
    names = os.listdir(folder)
    if not names:  # made and not yet marked, or all moved
        return True
    is_marked = MARK_NAME in names and all(stat.S_ISREG(os.lstat(folder / name).st_mode) for name in names)
    return is_marked and (folder / MARK_NAME).read_bytes() == make_mark(folder)


def make_mark(folder: Path) -> bytes:
    return f"{os.lstat(folder).st_ino}\n".encode()


@contextmanager
def locked(path: Path, *, is_shared: bool = False, is_waiting: bool = True) -> Iterator[None]:
    """
    Locks a file or a folder against others for as long as this process lives; leaves no file.

    It goes on without where there is nothing to lock, or the file system has no locks.

    Raises:
        BlockingIOError: Another has the lock, and `is_waiting` is false.
    """
    with ExitStack() as stack:
        try:
            if fcntl:
                file = os.open(path, os.O_RDONLY)
                stack.callback(os.close, file)
                kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
                fcntl.flock(file, kind if is_waiting else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield


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
    ours = {}
    if saved.base_fingerprint is not None:
        ours = fingerprint_base(model, find_version(saved.base_fingerprint))
        ours |= fingerprint_processor(processor) if processor else {}
    is_mismatch = compare_bases(saved, ours, allow_base_mismatch=allow_base_mismatch)
    config = saved.checked_config()
    config.inference_mode = not is_trainable
    with restored_on_error(model) as (restore, at_risk):
        names = inject_empty(saved, config, model, adapter_name)
        if changes_base(config) or names != saved.header.keys():
            restore()
            if changes_base(config):
                modules = {re.sub(r"^base_model\.model\.|\.lora_.*", "", name) for name in names}
                at_risk += [(weight, weight.detach().clone()) for weight in find_weights(model, modules)]
            loaded = _load_as_transformers(saved, config, model, adapter_name, load_config)
        else:
            loaded = fill_adapter(saved, model, adapter_name)
        if not is_trainable:
            model.eval()
            for layer in find_adapter_layers(model):
                layer.requires_grad_(False)
        setattr(config, FINGERPRINT_ENTRY, saved.base_fingerprint)
        setattr(config, MISMATCH_ENTRY, saved.base_mismatch_allowed or is_mismatch)
        check_finite(saved, model, adapter_name)
        check_effect(model, adapter_name, probe_inputs)
    return loaded


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


def inject_empty(saved: SavedAdapter, config: PeftConfig, model: nn.Module, adapter_name: str) -> set[str]:
    """
    Adds an adapter of `config` to `model`, without memory for its weights, and compares it with the file's header.

    Where its initialisation would change the base, it is added without that.

    Returns:
        The names that its tensors have on disk.

    Raises:
        ValueError: A regular expression is invalid or takes too long, no module is wrapped, or tensors are missing,
            too much or of another shape.
    """
    if is_changing := changes_base(config):
        config = copy.copy(config)
        config.init_lora_weights = True  # same shapes, and the base stays as it is
    with bounded_patterns(config, model):
        try:
            with without_false_alarms():
                inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage=True)
                state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        except Exception as error:  # whatever a configuration of unknown origin makes PEFT stumble over
            raise _misfit(saved, str(error)) from error
    expected = {name_on_disk(key): value for key, value in state.items()}
    if not (config.peft_type == SPEECH_ADAPTER or is_changing) and expected.keys() != saved.header.keys():
        # transformers renames the tensors of adapters that older versions have saved.
        if _count_values(expected.values()) > _count_values(saved.header.values()):
            raise _misfit(saved, "its configuration asks for more weights than the file has")
    else:
        check_tensors(saved, expected)
    return set(expected)


def _count_values(tensors: Iterable[torch.Tensor | TensorHeader]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def check_tensors(saved: SavedAdapter, expected: Mapping[str, torch.Tensor]) -> None:
    """
    Makes sure that `saved` has tensors of these names on disk and shapes, and no others.

    Raises:
        ValueError: It has not.
    """
    if wrong := sorted(expected.keys() ^ saved.header.keys()):
        raise _wrong_tensors(saved, wrong[0])
    for name, about in saved.header.items():
        shape = tuple(expected[name].shape)
        if about.shape != shape or about.dtype.is_floating_point != expected[name].dtype.is_floating_point:
            raise _misfit(saved, f"{name!r} is {about.dtype} {about.shape} and should be {shape}")


def _misfit(saved: SavedAdapter, reason: str) -> ValueError:
    return ValueError(f"`adapter` must be an adapter of this base, got {saved.source} ({shorten(reason)}).")


def _wrong_tensors(saved: SavedAdapter, name: str) -> ValueError:
    return ValueError(
        f"`adapter` must hold exactly the tensors of its configuration, got {saved.source} where {shorten(name)!r} is "
        "missing or too much. Save or download it again."
    )


def fill_adapter(saved: SavedAdapter, model: nn.Module, adapter_name: str) -> LoadStateDictInfo:
    """Gives an adapter that [`inject_empty`] has added its weights, where its base runs and in that precision."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {key: saved.tensors[name_on_disk(key)].to(value.dtype) for key, value in state.items()}
    for key, parameter in list(model.named_parameters()):
        if parameter.is_meta and _is_of_adapter(key, adapter_name):
            parent, _, child = key.rpartition(".")
            filled = torch.empty_like(parameter, device=find_device(model))
            setattr(model.get_submodule(parent), child, nn.Parameter(filled, requires_grad=parameter.requires_grad))
    with without_false_alarms():
        set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
    model._hf_peft_config_loaded = True
    for layer in find_adapter_layers(model):
        if isinstance(layer, BaseTunerLayer):
            devices = [hook.execution_device for _, hook in find_hooks(layer) if hook.execution_device is not None]
            if not devices and any(parameter.is_meta for parameter in layer.get_base_layer().parameters()):
                devices = [find_device(model)]  # offloaded, the base is nowhere, and PEFT would send the adapter there
            layer._move_adapter_to_device_of_base_layer(adapter_name, torch.device(devices[0]) if devices else None)
    names = ("missing_keys", "unexpected_keys", "skipped_pp_keys", "mismatched_keys")
    return LoadStateDictInfo(**{name: set() for name in names}, error_msgs=[], conversion_errors={})


def _load_as_transformers(
    saved: SavedAdapter, config: PeftConfig, model: PreTrainedModel, adapter_name: str, load_config: object | None
) -> object:
    """As transformers' `load_adapter`: for initialisations that change the base, and tensors with older names."""
    try:
        with without_false_alarms(), bounded_patterns(config, model):
            loaded = PeftAdapterMixin.load_adapter(
                model,
                saved.folder,  # not looked at: configuration and tensors are given
                adapter_name,
                peft_config=config,
                adapter_state_dict=dict(saved.tensors),
                is_trainable=not config.inference_mode,
                load_config=load_config,
            )
    except Exception as error:
        raise _misfit(saved, str(error)) from error
    missing = {key for key in loaded.missing_keys if _is_of_adapter(key, adapter_name)}
    if wrong := sorted(missing | set(loaded.unexpected_keys)):
        raise _wrong_tensors(saved, wrong[0])
    return loaded


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


@contextmanager
def restored_on_error(
    model: nn.Module,
) -> Iterator[tuple[Callable[[], None], list[tuple[nn.Parameter, torch.Tensor]]]]:
    """
    On an error inside, gives `model` back the modules, adapters, modes and `requires_grad` that it had before.

    It gives a function that does so at once, and a list for weights that get their values back as well.
    """
    restore, at_risk = remember_modules(model), []
    try:
        yield restore, at_risk
    except BaseException:
        restore()
        for weight, value in at_risk:
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


def check_effect(
    model: PreTrainedModel, adapter_name: str, probe_inputs: Mapping[str, torch.Tensor] | None = None
) -> None:
    """
    Makes sure that the adapter acts: with it, one batch comes out clearly more different than twice without it.

    An adapter whose last layers are zero, as at the start of training, may leave everything as it is.

    Args:
        model: With the adapter loaded and active.
        adapter_name: The adapter.
        probe_inputs: Arguments of `forward`. Default: made from the configuration, or no check where none can be.

    Raises:
        ValueError: The outputs are the same and the last layers are not zero; or one of them is NaN.
    """
    last = _last_parameters(model, adapter_name)
    inputs = make_probe_inputs(model) if probe_inputs is None else dict(probe_inputs)
    if inputs is None or not any(parameter.any() for parameter in last):
        logger.debug("Adapter %s is not probed: no inputs can be made, or it is still zero.", adapter_name)
        return
    with _evaluating(model):
        try:
            with _without_adapter(model, adapter_name):
                off, again = _run(model, inputs), _run(model, inputs)
        except Exception as error:
            if probe_inputs is not None:
                raise
            logger.debug("Adapter %s is not probed: the base does not take the inputs (%s).", adapter_name, error)
            return
        if off.isnan().any():
            raise ValueError(
                f"`model` must say numbers, got NaN from the base without {adapter_name!r}. Its weights or its "
                "precision are wrong; no adapter can be tried on it."
            )
        on = _run(model, inputs)
        if on.isnan().any():
            raise ValueError(
                f"`adapter` must let the model say numbers, got NaN with {adapter_name!r}. Train it again."
            )
        if _differs(on, off, again):
            return
        with _made_loud(last):  # rounding may hide what has hardly been trained
            if _differs(_run(model, inputs), off, again):
                return
    raise ValueError(
        f"`adapter` must act on the model, got {adapter_name!r}, with and without which it says the same although its "
        "weights are not zero. Check `target_modules`, and that adapters are not switched off (`enable_adapters`)."
    )


def _run(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs)[0].float()


def _differs(on: torch.Tensor, off: torch.Tensor, again: torch.Tensor) -> bool:
    """Whether an output differs clearly more than two of the base do from each other, and than rounding makes it."""
    if on.shape != off.shape:
        return True
    is_finite = off.isfinite() & again.isfinite() & on.isfinite()
    if not torch.equal(is_finite, off.isfinite()):
        return True
    change, noise, scale = (
        values[is_finite].abs().max().item() if is_finite.any() else 0.0 for values in (on - off, again - off, off)
    )
    return change > NOISE_FACTOR * noise + RESOLUTION * scale


def make_probe_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Returns a random batch of one for `forward`, always the same, or `None` if the model's inputs are not known."""
    config, generator, device = model.config, torch.Generator().manual_seed(0), find_device(model)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, model.dtype)

    num_mel_bins = getattr(config, "num_mel_bins", None)
    if config.model_type == "whisper":
        features = normal(1, num_mel_bins, 2 * config.max_source_positions)  # the encoder halves the frames
        start = torch.tensor([[config.decoder_start_token_id]], device=device)
        return {"input_features": features, "decoder_input_ids": start}
    if config.model_type == "qwen2_audio":
        audio = config.audio_config
        features = normal(1, audio.num_mel_bins, 2 * audio.max_source_positions)
        return {"input_features": features, **_make_audio_prompt(model, features.shape[-1])}
    if config.sub_configs:  # several parts: a batch for one of them tells nothing about an adapter in another
        return None
    if model.main_input_name == "input_features" and num_mel_bins:
        return {"input_features": normal(1, PROBE_FRAMES, num_mel_bins)}
    if model.main_input_name == "input_values":
        return {"input_values": normal(1, PROBE_SAMPLES)}
    if model.main_input_name == "input_ids" and getattr(config, "vocab_size", None):
        return {"input_ids": torch.arange(PROBE_TOKENS, device=device).unsqueeze(0) % config.vocab_size}
    return None


def _make_audio_prompt(model: PreTrainedModel, num_frames: int) -> dict[str, torch.Tensor]:
    """A clip of a second and a placeholder for each of its frames in the text, as Qwen2-Audio's processor has them."""
    mask = (torch.arange(num_frames) < PROBE_CLIP_FRAMES).long().unsqueeze(0).to(find_device(model))
    counter = next(part for part in model.modules() if hasattr(part, "_get_feat_extract_output_lengths"))
    _, num_placeholders = counter._get_feat_extract_output_lengths(mask.sum(-1))
    tokens = torch.full((1, int(num_placeholders) + 1), model.config.audio_token_id, device=mask.device)
    tokens[0, -1] = 0  # any word
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "feature_attention_mask": mask}


def _last_parameters(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """Of every block of the adapter, the parameters of the layer that is zero at the start."""
    modules: list[nn.Module] = []
    for layer in find_adapter_layers(model):
        blocks = getattr(layer, "speech_adapter_blocks", {})
        modules += [blocks[adapter_name].last_layer] if adapter_name in blocks else []
        for kind in ("lora_B", "lora_embedding_B"):
            parts = getattr(layer, kind, {})
            modules += [parts[adapter_name]] if adapter_name in parts else []
    tensors = [list(module.parameters()) if isinstance(module, nn.Module) else [module] for module in modules]
    return [parameter for parameters in tensors for parameter in parameters]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was_training:
            module.training = training


@contextmanager
def _without_adapter(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Runs the model with its other active adapters inside."""
    layers = find_adapter_layers(model)
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        if isinstance(layer, BaseTunerLayer):
            layer._active_adapter = [name for name in layer.active_adapters if name != adapter_name]
        else:  # a module kept beside the base's own needs an active adapter
            layer._disable_adapters |= adapter_name in layer.active_adapters
    try:
        yield
    finally:
        for layer, (active, is_off) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, is_off


@contextmanager
def _made_loud(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.mul_(1 / parameter.abs().max().clamp(min=1e-30))
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
