"""
What a base and its processor are, in a few lines of JSON: an adapter carries it and fits nothing else.

A fingerprint of version 2 has, all of them strict:

    version         2
    architecture    class and type of the model
    num_parameters  how many numbers its parameters have, tied ones once
    shapes          16 hexadecimal digits over the shapes of all weights, sorted
    tensors         a record for each weight, in the order of the shapes and, where they are equal, of the modules
    weights         32 hexadecimal digits over the digests in `tensors`, to be read by people; `None` if some lack
    dtype           precisions of the parameters, to be read by people
    vocabulary      32 hexadecimal digits over every token and its number
    features        settings of the feature extractor

Names of parameters are in none of them. `tensors` is base64 of records of 19 bytes, little-endian:

    form      1 byte     0: not known, 1: fp32, bf16, integers and other exact ones, 2: fp16, 3: quantised
    numel     4 bytes    number of values, at most 2^32 - 1
    digest    4 bytes    of the values rounded to bf16, of fp16 as they are
    rms       4 bytes    fp32: root of the mean square of the values of at most 64 rows
    sketch    3 x 2      fp16: the same rows times random signs, divided by their norm

Two weights of form 1 are the same if their digests are: fp32 and bf16 of one checkpoint have one digest. What has been
rounded to fp16 or quantised has another; such weights are the same if their sketches and norms are, up to what that
rounding does. A sketch is a random projection: if x % of a matrix changes, so does about x % of its sketch.

Adapters saved before have a fingerprint without a version: names and bytes of all weights in one digest, that holds
for one precision. It is still computed, for them alone.
"""

import base64
import hashlib
import json
import logging
import math
import struct
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import ProcessorMixin

from .adapter_layer import is_adapter_parameter

logger = logging.getLogger(__name__)

VERSION = 2
MAX_MESSAGE = 2_000  # characters of differences that a message shows
# Attribute of a model whose weights are partly on the disk: records of those, by name.
CHECKPOINT_RECORDS = "checkpoint_records"
# Entries of a feature extractor that tell of its code and not of the features.
CODE_ENTRIES = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}
# Entries that are there for people.
INFORMATIVE_ENTRIES = {"dtype", "weights"}

UNKNOWN, EXACT, HALF, QUANTIZED = range(4)
RECORD = struct.Struct("<BI4sf3e")
EMPTY_RECORD = RECORD.pack(UNKNOWN, 0, b"", 0, 0, 0, 0)
NUM_SIGNS = 3
PIECE_VALUES = 1 << 20  # values that are rounded at once
SKETCHED_ROWS = 64
# Relative change that rounding leaves in a sketch: fp16 against bf16 or fp32 up to 0.1 %, and the sketch's own 0.05 %;
# NF4 and FP4 9 to 12 %, the less regularly the fewer values there are.
HALF_TOLERANCE = 0.003
QUANTIZED_TOLERANCE = (0.2, 5.0)  # and this, divided by the root of the number of values
NUM_DEVIATIONS = 3
HALF_RESOLUTION = 1e-6  # smaller numbers are not kept by fp16
# Module names that PEFT and torch.compile put around a base's own.
WRAPPER_NAMES = {"base_layer", "original_module", "_orig_mod"}
# Initialisations of LoRA that leave the weights of the base as they are; others put a part of them into the adapter.
HARMLESS_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Weights are summed in blocks of this many 64-bit words, small enough for a processor's cache.
BLOCK_WORDS = 16_384
WORD_BYTES = 8
# Blocks that are multiplied at once.
BLOCKS_AT_ONCE = 16
# Two fixed pseudo-random factors for each word of a block; shake_256 gives the same on every machine.
FACTORS = torch.frombuffer(
    bytearray(hashlib.shake_256(b"speech adapters").digest(2 * WORD_BYTES * BLOCK_WORDS)), dtype=torch.int64
).view(2, BLOCK_WORDS)


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
        return math.prod(self.shape)


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
        return partial(read_offloaded, full_name, hooks) if is_offloaded else None
    if is_quantized:
        return partial(_dequantize, module, value) if _can_dequantize(module, value) else None
    is_whole = type(value.data) is torch.Tensor and not hasattr(value, "ds_id")
    return value.detach if is_whole else None


def find_hooks(model: nn.Module) -> list[tuple[str, object]]:
    """Returns accelerate's hooks that keep weights outside of `model`, each with its module's name."""
    found = []
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False) and isinstance(getattr(one, "weights_map", None), Mapping):
                found.append((name, one))
    return found


def _unwrap(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


def _is_under(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


def read_offloaded(name: str, hooks: Sequence[tuple[str, object]]) -> torch.Tensor:
    """
    Returns the weight `name` of a model that accelerate keeps outside of it, by the model's [`find_hooks`].

    Raises:
        ValueError: No hook has it.
    """
    for prefix, hook in reversed(hooks):  # the innermost first
        if _is_under(name, prefix):
            with suppress(KeyError):
                return hook.weights_map[name.removeprefix(prefix).removeprefix(".")].detach()
    raise ValueError(f"`model` must have its weights in memory or where accelerate put them, got none for {name!r}.")


def find_device(model: nn.Module) -> torch.device:
    """Returns where `model` runs; where all of it is offloaded, that is not where its first parameter is."""
    devices = [parameter.device for parameter in model.parameters()] or [torch.device("cpu")]
    if devices[0].type == "meta":
        places = [
            torch.device(hook.execution_device) for _, hook in find_hooks(model) if hook.execution_device is not None
        ]
        devices = [*places, *(device for device in devices if device.type != "meta"), *devices]
    return devices[0]


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


def digest_tensors(tensors: dict[str, torch.Tensor]) -> str | None:
    """
    Returns 32 hexadecimal digits over tensors and their names, or `None` if some are not in memory.

    Every byte counts, and so do names, shapes and precisions: the key of what was computed with these weights. Words
    are multiplied by fixed factors and added modulo 2^64. That is bound by memory and works on any device, where a
    cryptographic hash takes the weights to the CPU, and xxh3 does so too and is in no list that transformers or PEFT
    require. It is no defence against a forger.

    Source: multilinear hashing, Lemire and Kaser (arXiv 1202.4961), section 2.
    """
    if any(value.is_meta for value in tensors.values()):
        return None
    digest, sums = hashlib.blake2b(digest_size=16), {}
    for name in sorted(tensors):
        value = tensors[name]
        if id(value) not in sums:  # a tied tensor is read once
            sums[id(value)] = sum_blocks(value).tolist()
        digest.update(repr((name, tuple(value.shape), str(value.dtype), sums[id(value)])).encode())
    return digest.hexdigest()


def sum_blocks(value: torch.Tensor) -> torch.Tensor:
    """
    Returns the two sums modulo 2^64 of each block of a tensor `(blocks, 2)`; of integers, so the same in any order.

    A difference in the upper half of a word shows in the second sum: modulo 2^64 the first may lose it.
    """
    content = value.detach().contiguous().reshape(-1).view(torch.uint8)
    if rest := -len(content) % WORD_BYTES:
        content = nn.functional.pad(content, (0, rest))
    if content.storage_offset() % WORD_BYTES or content.data_ptr() % WORD_BYTES:
        content = content.clone()  # a view that begins between two words
    words, sums = content.view(torch.int64), []
    factors = FACTORS.to(words.device)
    for part in words.split(BLOCK_WORDS * BLOCKS_AT_ONCE):
        whole = len(part) - len(part) % BLOCK_WORDS
        for blocks in (part[:whole].view(-1, BLOCK_WORDS), part[whole:].unsqueeze(0)):
            if blocks.numel():
                lower, upper = factors[:, : blocks.shape[1]]
                sums.append(torch.stack([_multiply(blocks, lower), _multiply(blocks >> 32, upper)], dim=1))
    return torch.cat(sums) if sums else words.new_zeros(0, 2)


def _multiply(blocks: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Returns the sum of each row of `blocks` `(blocks, words)` times `factors` `(words,)` modulo 2^64."""
    if blocks.device.type == "cpu":
        return torch.mv(blocks, factors)  # no memory for the products; torch has it for integers on a CPU alone
    return (blocks * factors).sum(-1)


def fingerprint_base(model: nn.Module, version: int = VERSION) -> dict[str, str | int | None]:
    """
    Returns what the base of `model` is; the same with and without adapters, and after saving and loading.

    Args:
        model: A model, with adapters of any PEFT method or without, or a `PeftModel`. Its weights may be offloaded.
        version: 1 for what adapters saved by earlier versions of this code have.

    Returns:
        The entries from the top of this file that a model gives.

    Example:

    ```python
    >>> import torch
    >>> from torch import nn
    >>> from modeling.fingerprint import fingerprint_base, list_differences

    >>> linear = nn.Linear(2, 3).requires_grad_(False)
    >>> _ = linear.weight.fill_(1), linear.bias.zero_()
    >>> before = fingerprint_base(linear)
    >>> {name: before[name] for name in ("version", "architecture", "dtype", "num_parameters")}
    {'version': 2, 'architecture': 'Linear', 'dtype': 'float32', 'num_parameters': 9}
    >>> list_differences(before, fingerprint_base(linear.to(torch.bfloat16)))
    []
    >>> _ = linear.weight[0, 0].fill_(2)
    >>> list_differences(before, fingerprint_base(linear))[1]
    '1 of 2 tensors differ'

    ```
    """
    model = find_base(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    architecture = type(model).__name__ + (f" ({model_type})" if model_type else "")
    weights = sorted(list_base_weights(model), key=lambda weight: weight.shape)
    parameters = [weight for weight in weights if weight.is_parameter]
    about = {
        "architecture": architecture,
        "dtype": ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in parameters})),
        "num_parameters": sum(weight.numel for weight in parameters),
    }
    if version == 1:
        return about | {"weights": digest_tensors(dict(_named_tensors(model)))}
    of_checkpoint = getattr(model, CHECKPOINT_RECORDS, {})
    records = [_record_weight(weight) or of_checkpoint.get(weight.name, EMPTY_RECORD) for weight in weights]
    shapes = repr([weight.shape for weight in weights]).encode()
    return about | {
        "version": VERSION,
        "shapes": hashlib.blake2b(shapes, digest_size=8).hexdigest(),
        "tensors": base64.b64encode(b"".join(records)).decode(),
        "weights": _digest_records(records, shapes),
    }


def _digest_records(records: list[bytes], shapes: bytes) -> str | None:
    fields = [RECORD.unpack(record) for record in records]
    if any(form == UNKNOWN for form, *_ in fields):
        return None
    return hashlib.blake2b(shapes + b"".join(digest for _, _, digest, *_ in fields), digest_size=16).hexdigest()


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of the base under all names that they have without any wrapper."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        own |= {name: buffer for name, buffer in buffers if name not in module._non_persistent_buffers_set}
        for name, value in own.items():
            full_name = f"{prefix}.{name}" if prefix else name
            if not is_adapter_parameter(full_name):
                yield ".".join(part for part in full_name.split(".") if part not in WRAPPER_NAMES), value


def _record_weight(weight: BaseWeight) -> bytes | None:
    if weight.read is None:
        return None
    value = weight.read()
    rows = value.reshape(split_shape(weight.shape))
    pieces = rows.split(rows_at_once(rows.shape[1])) if rows.numel() else ()
    return record_pieces(weight.shape, pieces, is_quantized=weight.is_quantized)


def split_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the rows and columns as which a tensor is read: its first dimension and all others."""
    num_rows = shape[0] if len(shape) > 1 else 1
    return num_rows, math.prod(shape) // max(num_rows, 1)


def rows_at_once(num_columns: int) -> int:
    """Returns how many rows a piece has; the digest depends on it."""
    return max(1, PIECE_VALUES // max(num_columns, 1))


@torch.no_grad()
def record_pieces(shape: tuple[int, ...], pieces: Iterable[torch.Tensor], *, is_quantized: bool = False) -> bytes:
    """
    Returns the record of a weight that is read a piece at a time.

    Args:
        shape: Of the whole weight.
        pieces: Its rows `(rows, columns)` in order, [`rows_at_once`] in each but the last.
        is_quantized: Whether the values are those of a quantisation.
    """
    num_rows, num_columns = split_shape(shape)
    sketched = torch.arange(min(num_rows, SKETCHED_ROWS)) * num_rows // max(min(num_rows, SKETCHED_ROWS), 1)
    digest, sketch, squares = hashlib.blake2b(digest_size=4), torch.zeros(NUM_SIGNS, dtype=torch.float64), 0.0
    form, begin = EXACT, 0
    for piece in pieces:
        if piece.is_complex():
            piece = torch.view_as_real(piece).flatten(1)
        form = HALF if piece.dtype == torch.float16 else EXACT
        rounded = piece.to(torch.bfloat16) if piece.is_floating_point() and form == EXACT else piece
        digest.update(sum_blocks(rounded).cpu().numpy().tobytes())
        rows = sketched[(sketched >= begin) & (sketched < begin + len(piece))]
        part = piece[(rows - begin).to(piece.device)].float()
        signs = _make_signs("columns", part.shape[1]).to(part.device)
        products = (part @ signs).double().cpu() * _make_signs("rows", num_rows)[rows]
        sketch += products.sum(0)
        squares += float(torch.linalg.vector_norm(part)) ** 2
        begin += len(piece)
    norm = math.sqrt(squares)
    num_sketched = max(len(sketched) * num_columns, 1)
    values = (sketch / norm).tolist() if norm > 0 and math.isfinite(norm) else [0.0] * NUM_SIGNS
    numel = min(math.prod(shape), 2**32 - 1)
    rms = min(norm / math.sqrt(num_sketched), torch.finfo(torch.float32).max)
    return RECORD.pack(QUANTIZED if is_quantized else form, numel, digest.digest(), rms, *values)


@cache
def _make_signs(axis: str, length: int) -> torch.Tensor:
    """Fixed random signs `(length, NUM_SIGNS)`; those of a shorter length are their beginning."""
    content = hashlib.shake_256(f"speech adapters {axis}".encode()).digest(length * NUM_SIGNS)
    bits = torch.frombuffer(bytearray(content), dtype=torch.uint8) & 1 if length else torch.zeros(0)
    return (bits.float() * 2 - 1).view(length, NUM_SIGNS)


def fingerprint_processor(processor: ProcessorMixin) -> dict[str, str | dict[str, object]]:
    """
    Returns what must be the same in a processor for an adapter's inputs and outputs to mean the same.

    Args:
        processor: With a tokenizer, a feature extractor or both.

    Returns:
        `vocabulary` (32 hexadecimal digits over every token and its number) and `features` (settings of the feature
        extractor), each if the processor has such a part.
    """
    fingerprint: dict[str, str | dict[str, object]] = {}
    if (tokenizer := getattr(processor, "tokenizer", None)) is not None:
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])))
        fingerprint["vocabulary"] = hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest()
    if (extractor := getattr(processor, "feature_extractor", None)) is not None:
        settings = {key: value for key, value in extractor.to_dict().items() if key not in CODE_ENTRIES}
        fingerprint["features"] = json.loads(json.dumps(settings, default=str, sort_keys=True))
    return fingerprint


# What features come with, and not what they are: with a transformer adapter, their mask.
FORM_ENTRIES = {"return_attention_mask"}


def find_version(fingerprint: dict[str, object]) -> int:
    """Returns the version in which a base must be described to be compared with `fingerprint`: 1, or the newest."""
    return VERSION if "version" in fingerprint else 1


def list_differences(theirs: dict[str, object], ours: dict[str, object]) -> list[str]:
    """
    Returns a line for each entry that both fingerprints have and that differs, with both sides.

    Example:

    ```python
    >>> from modeling.fingerprint import list_differences

    >>> list_differences({"dtype": "float32", "features": {"hop": 160}}, {"dtype": "float16", "features": {"hop": 80}})
    ["dtype: 'float32' / 'float16'", 'features.hop: 160 / 80']

    ```
    """
    lines = []
    ignored = INFORMATIVE_ENTRIES if "version" in theirs else set()
    for key in sorted((theirs.keys() & ours.keys()) - ignored, key=str):
        left, right = theirs[key], ours[key]
        if key == "tensors":
            if different := _compare_tensors(left, right):
                digests = [side.get("weights") for side in (theirs, ours)]
                lines.append(f"weights: {digests[0]!r} / {digests[1]!r}")
                lines += [different] if theirs.get("shapes") == ours.get("shapes") else []
        elif isinstance(left, dict) and isinstance(right, dict):
            known = (left.keys() | right.keys()) - FORM_ENTRIES
            names = sorted(name for name in known if left.get(name) != right.get(name))
            lines += [f"{key}.{name}: {left.get(name)!r} / {right.get(name)!r}" for name in names]
        elif left != right and None not in (left, right):
            lines.append(f"{key}: {left!r} / {right!r}")
    return lines


def check_fingerprints(theirs: dict[str, object] | None, ours: dict[str, object], source: str) -> None:
    """
    Makes sure that an adapter was made for a base; warns if its files do not say so.

    Args:
        theirs: Fingerprint that the adapter carries.
        ours: That of the base, in the version that [`find_version`] says.
        source: Where the adapter comes from, for messages.

    Raises:
        ValueError: The base is another one.
    """
    if theirs is None:
        logger.warning("%s does not say which base it was made for; it is loaded unchecked.", source)
        return
    if differences := list_differences(theirs, ours):
        raise ValueError(
            f"`adapter` must be used with the base that it was made for, got {source}, made for another (its base / "
            f"this one): {'; '.join(differences)[:MAX_MESSAGE]}. Load its own base, or insist with "
            "`--allow_base_mismatch` (in Python `load_speech_adapter(..., allow_base_mismatch=True)`)."
        )
    num_unknown, num_weights = count_unknown(theirs, ours)
    if num_unknown == num_weights:
        logger.warning(
            "%s was made for a base of this architecture and size; whether with the same weights is not known.", source
        )


def count_unknown(theirs: dict[str, object], ours: dict[str, object]) -> tuple[int, int]:
    """Returns of how many weights the values cannot be compared, and how many there are."""
    if "version" not in theirs:
        is_unknown = theirs.get("weights") is None or ours.get("weights") is None
        return int(is_unknown), 1
    pairs = list(zip(_read_records(theirs.get("tensors")), _read_records(ours.get("tensors")), strict=False))
    return sum(UNKNOWN in (left[0], right[0]) for left, right in pairs), len(pairs)


def _compare_tensors(theirs: object, ours: object) -> str | None:
    """How many weights are not the same, in words, or `None` if all are."""
    left, right = _read_records(theirs), _read_records(ours)
    if len(left) != len(right):
        return f"{len(left)} tensors / {len(right)} tensors"
    pairs = list(zip(left, right, strict=True))
    if num_different := sum(not _is_same(*pair) for pair in pairs):
        return f"{num_different} of {len(pairs)} tensors differ"
    # What no quantised weight shows alone, all of them together do.
    excess = [change / _allow(*pair) for pair in pairs if _is_rounded(*pair) for change in _list_changes(*pair)]
    is_apart = excess and sum(value**2 for value in excess) > len(excess)
    return "rounded tensors differ by more than rounding" if is_apart else None


def _read_records(text: object) -> list[tuple]:
    """The records of a fingerprint of unknown origin; none if it is not one."""
    try:
        content = base64.b64decode(text, validate=True)
        return list(RECORD.iter_unpack(content))
    except (TypeError, ValueError, struct.error):
        return []


def _is_same(theirs: tuple, ours: tuple) -> bool:
    if not _is_rounded(theirs, ours):
        return UNKNOWN in (theirs[0], ours[0]) or theirs[2] == ours[2]
    scale = max(theirs[3], ours[3])
    if HALF in (theirs[0], ours[0]) and scale < HALF_RESOLUTION:
        return True
    is_of_one_size = abs(theirs[3] - ours[3]) <= scale * _allow(theirs, ours)
    return is_of_one_size and max(_list_changes(theirs, ours)) <= NUM_DEVIATIONS * _allow(theirs, ours)


def _is_rounded(theirs: tuple, ours: tuple) -> bool:
    """Whether two known weights may be of one checkpoint although their digests differ."""
    forms = {theirs[0], ours[0]}
    return UNKNOWN not in forms and theirs[2] != ours[2] and (QUANTIZED in forms or len(forms) == 2)


def _allow(theirs: tuple, ours: tuple) -> float:
    """How much rounding may change a number of a sketch; one of many may be `NUM_DEVIATIONS` times that."""
    if QUANTIZED not in (theirs[0], ours[0]):
        return HALF_TOLERANCE
    return QUANTIZED_TOLERANCE[0] + QUANTIZED_TOLERANCE[1] / math.sqrt(max(theirs[1], 1))


def _list_changes(theirs: tuple, ours: tuple) -> list[float]:
    return [abs(left - right) for left, right in zip(theirs[4:], ours[4:], strict=True)]
