"""What a base and its processor are, in a few lines of JSON: an adapter carries it and fits nothing else."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import nn
from transformers import ProcessorMixin

from .active_adapters import is_adapter_parameter

# Weights are summed in blocks of this many 64-bit words, small enough for a processor's cache.
BLOCK_WORDS = 16_384
# Two fixed pseudo-random factors for each word of a block; shake_256 gives the same on every machine.
FACTORS = torch.frombuffer(
    bytearray(hashlib.shake_256(b"speech adapters").digest(2 * 8 * BLOCK_WORDS)), dtype=torch.int64
).view(2, BLOCK_WORDS)
# Module names that PEFT and torch.compile put around a base's own.
WRAPPER_NAMES = {"base_layer", "original_module", "_orig_mod"}
# Attribute of a model whose weights are partly on the disk, with what `digest_parts` says of all of them.
CHECKPOINT_DIGEST = "checkpoint_digest"
# Entries of a feature extractor that tell of its code and not of the features.
CODE_ENTRIES = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}


def fingerprint_base(model: nn.Module) -> dict[str, str | int | None]:
    """
    Returns what the base of `model` is; the same with and without adapters, and after saving and loading.

    Every byte of every parameter and persistent buffer counts. They are summed where they are, a block at a time: each
    word, and its upper half once more, times a fixed factor, modulo 2^64. That is memory-bound and works on any
    device, where a cryptographic hash takes the weights to the CPU and longer than reading them. It tells bases apart
    that differ by training, precision or layout; it is no defence against a forger.

    Args:
        model: A model, with adapters of any PEFT method or without, or a `PeftModel`.

    Returns:
        `architecture` (class and model type), `weights` (32 hexadecimal digits; `None` if some of the weights are not
        in memory and [`digest_parts`] has not read them), `dtype` (of the parameters) and `num_parameters`.

    Source: multilinear hashing, Lemire and Kaser (arXiv 1202.4961), section 2.

    Example:

    ```python
    >>> from torch import nn
    >>> from modeling.fingerprint import fingerprint_base

    >>> linear = nn.Linear(2, 3).requires_grad_(False)
    >>> _ = linear.weight.fill_(1), linear.bias.zero_()
    >>> fingerprint_base(linear)  # doctest: +NORMALIZE_WHITESPACE
    {'architecture': 'Linear', 'weights': 'cdf20ceb2af54a41d21ce449c8c3b13d', 'dtype': 'float32',
     'num_parameters': 9}

    ```
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    tensors = dict(_base_tensors(model))
    parameters = {id(value): value for name, value in model.named_parameters() if not is_adapter_parameter(name)}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return {
        "architecture": type(model).__name__ + (f" ({model_type})" if model_type else ""),
        "weights": digest_tensors(tensors) or getattr(model, CHECKPOINT_DIGEST, None),
        "dtype": ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in parameters.values()})),
        "num_parameters": sum(value.numel() for value in parameters.values()),
    }


def digest_parts(model: nn.Module, read: Callable[[str], Iterator[torch.Tensor]]) -> str:
    """
    Returns the `weights` that [`fingerprint_base`] would give if all of them were in memory; they need not be.

    Args:
        model: With weights in memory or on the meta device.
        read: For the name of a weight that is not in memory, gives its content in order: flat tensors of a multiple of
            `BLOCK_WORDS` words each but the last, in the precision of the model. Raises a KeyError for a name that it
            does not know, such as the second one of a tied weight.

    Raises:
        KeyError: `read` knows a weight under none of its names.
    """
    tensors = dict(_base_tensors(model))
    names_of: dict[int, list[str]] = {}
    for name, value in tensors.items():
        names_of.setdefault(id(value), []).append(name)

    def sum_parts(value: torch.Tensor) -> list[list[int]]:
        """The sums of a weight, wherever it is, under whichever of its names it is known."""
        if not value.is_meta:
            return _sum_blocks(value)
        for name in names_of[id(value)]:
            with suppress(KeyError):
                return [sums for part in read(name) for sums in _sum_blocks(part)]
        raise KeyError(names_of[id(value)][0])

    return _digest_sums(tensors, sum_parts)


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
    for key in sorted(theirs.keys() & ours.keys()):
        left, right = theirs[key], ours[key]
        if isinstance(left, dict) and isinstance(right, dict):
            names = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
            lines += [f"{key}.{name}: {left.get(name)!r} / {right.get(name)!r}" for name in names]
        elif left != right and None not in (left, right):
            lines.append(f"{key}: {left!r} / {right!r}")
    return lines


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of the base under the names that they have without any wrapper."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        own |= {name: buffer for name, buffer in buffers if name not in module._non_persistent_buffers_set}
        for name, value in own.items():
            full_name = f"{prefix}.{name}" if prefix else name
            if not is_adapter_parameter(full_name):
                yield ".".join(part for part in full_name.split(".") if part not in WRAPPER_NAMES), value


def digest_tensors(tensors: dict[str, torch.Tensor]) -> str | None:
    """Returns 32 hexadecimal digits over tensors and their names, or `None` if some are not in memory."""
    if any(value.is_meta for value in tensors.values()):
        return None
    return _digest_sums(tensors, _sum_blocks)


def _digest_sums(tensors: dict[str, torch.Tensor], sum_blocks: Callable[[torch.Tensor], list[list[int]]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    sums: dict[int, list[list[int]]] = {}  # a tied tensor is read once
    for name in sorted(tensors):
        value = tensors[name]
        if id(value) not in sums:
            sums[id(value)] = sum_blocks(value)
        digest.update(repr((name, tuple(value.shape), str(value.dtype), sums[id(value)])).encode())
    return digest.hexdigest()


def _sum_blocks(value: torch.Tensor) -> list[list[int]]:
    """
    For each block of a tensor its two sums modulo 2^64; of integers, so the same in any order.

    A difference in the upper half of a word shows in the second sum: modulo 2^64 the first may lose it.
    """
    content = value.detach().contiguous().reshape(-1).view(torch.uint8)
    if rest := -len(content) % 8:
        content = nn.functional.pad(content, (0, rest))
    factors, upper_factors = FACTORS.to(content.device)
    sums = []
    for words in content.view(torch.int64).split(BLOCK_WORDS):
        sums += [(words * factors[: len(words)]).sum(), ((words >> 32) * upper_factors[: len(words)]).sum()]
    return torch.stack(sums).view(-1, 2).tolist() if sums else []
