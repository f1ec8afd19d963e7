"""What a transformer adapter looks at and lets through, recorded call by call."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from modeling.adapter_blocks import TransformerBlock, TransformerLayer


@dataclass(frozen=True)
class AdapterMaps:
    """
    What a transformer adapter looked at and let through in one call.

    Args:
        attentions: A tensor a layer, `(batch, heads, frames, frames)`: how much a frame (third axis) looks at each
            (fourth); its last axis sums to 1. Empty if not asked for.
        gates: From 0 to 1, `(batch, frames, hidden)`; `None` for a block without gates.
        frame_lengths: Frames that are no padding, `(batch,)`; `None` if all are.
    """

    attentions: tuple[torch.Tensor, ...]
    gates: torch.Tensor | None
    frame_lengths: torch.Tensor | None


@contextmanager
def record_maps(block: TransformerBlock, *, with_attention: bool = True) -> Iterator[list[AdapterMaps]]:
    """
    Gives a list that has, after each call of `block` by this thread inside, the attention and gates of that call.

    Args:
        block: Of an adapter.
        with_attention: Also the attention, which is computed once more for it and is large:
            `layers * batch * heads * frames * frames` numbers.

    Example:

    ```python
    >>> import torch
    >>> from modeling import SpeechAdapterConfig
    >>> from modeling.adapter_blocks import TransformerBlock
    >>> from publishing.adapter_maps import record_maps

    >>> block = TransformerBlock(8, SpeechAdapterConfig(kind="transformer", num_layers=1, num_heads=2, ffn_size=4))
    >>> with record_maps(block) as maps:
    ...     _ = block(torch.zeros(3, 5, 8))
    >>> maps[0].attentions[0].shape, maps[0].gates.shape
    (torch.Size([3, 2, 5, 5]), torch.Size([3, 5, 8]))

    ```
    """
    thread, maps, parts = threading.get_ident(), [], AdapterMaps((), None, None)

    def is_mine() -> bool:
        return threading.get_ident() == thread

    def note_gates(_gate: torch.nn.Module, _args: tuple, output: torch.Tensor) -> None:
        nonlocal parts
        if is_mine():
            parts = replace(parts, gates=torch.sigmoid(output).detach())

    def note_attention(layer: TransformerLayer, args: tuple, _output: torch.Tensor) -> None:
        nonlocal parts
        if is_mine():
            is_frame = args[1] if len(args) > 1 else None
            parts = replace(parts, attentions=(*parts.attentions, _find_attention(layer, args[0], is_frame)))

    def begin(_block: TransformerBlock, args: tuple) -> None:
        nonlocal parts
        if is_mine():
            parts = AdapterMaps((), None, args[1] if len(args) > 1 else None)

    def end(*_call: object) -> None:
        if is_mine():
            maps.append(parts)

    handles = [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
    if block.gate is not None:
        handles.append(block.gate.register_forward_hook(note_gates))
    if with_attention:
        handles += [layer.register_forward_hook(note_attention) for layer in block.layers]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _find_attention(
    layer: TransformerLayer, hidden_states: torch.Tensor, is_frame: torch.Tensor | None
) -> torch.Tensor:
    query, key, _ = layer.split_heads(layer.query_key_value(layer.attention_norm(hidden_states)))
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if is_frame is not None:
        scores = scores.masked_fill(~is_frame[:, None, None], -math.inf)  # no query looks at padding
    return scores.softmax(-1)
