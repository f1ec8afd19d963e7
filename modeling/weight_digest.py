"""Digests of weights where they are, a block at a time, on any device."""

import hashlib

import torch
from torch import nn

# Weights are summed in blocks of this many 64-bit words, small enough for a processor's cache.
BLOCK_WORDS = 16_384
WORD_BYTES = 8
# Blocks that are multiplied at once.
BLOCKS_AT_ONCE = 16
# Two fixed pseudo-random factors for each word of a block; shake_256 gives the same on every machine.
FACTORS = torch.frombuffer(
    bytearray(hashlib.shake_256(b"speech adapters").digest(2 * WORD_BYTES * BLOCK_WORDS)), dtype=torch.int64
).view(2, BLOCK_WORDS)


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
    digest = hashlib.blake2b(digest_size=16)
    sums: dict[int, list[list[int]]] = {}  # a tied tensor is read once
    for name in sorted(tensors):
        value = tensors[name]
        if id(value) not in sums:
            sums[id(value)] = sum_blocks(value).tolist()
        digest.update(repr((name, tuple(value.shape), str(value.dtype), sums[id(value)])).encode())
    return digest.hexdigest()


def sum_blocks(value: torch.Tensor) -> torch.Tensor:
    """
    Returns the two sums modulo 2^64 of each block of a tensor `(blocks, 2)`; of integers, so the same in any order.

    A difference in the upper half of a word shows in the second sum: modulo 2^64 the first may lose it.
    """
    words = as_words(value)
    factors, upper_factors = FACTORS.to(words.device)
    whole = len(words) - len(words) % BLOCK_WORDS
    sums = []
    for blocks in words[:whole].view(-1, BLOCK_WORDS).split(BLOCKS_AT_ONCE):
        sums.append(torch.stack([multiply(blocks, factors), multiply(blocks >> 32, upper_factors)], dim=1))
    if rest := len(words) - whole:
        last = words[whole:].unsqueeze(0)
        parts = [multiply(last, factors[:rest]), multiply(last >> 32, upper_factors[:rest])]
        sums.append(torch.stack(parts, dim=1))
    return torch.cat(sums) if sums else words.new_zeros(0, 2)


def as_words(value: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a tensor as 64-bit words `(words,)`, filled up with zeros; a copy where they must move."""
    content = value.detach().contiguous().reshape(-1)
    content = content.view(torch.uint8)
    if rest := -len(content) % WORD_BYTES:
        content = nn.functional.pad(content, (0, rest))
    if content.storage_offset() % WORD_BYTES or content.data_ptr() % WORD_BYTES:
        content = content.clone()  # a view that begins between two words
    return content.view(torch.int64)


def multiply(blocks: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Returns the sum of each row of `blocks` `(blocks, words)` times `factors` `(words,)` modulo 2^64."""
    if blocks.device.type == "cpu":
        return torch.mv(blocks, factors)  # no memory for the products; torch has it for integers on a CPU alone
    return (blocks * factors).sum(-1)
