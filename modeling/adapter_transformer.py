"""The transformer kind of adapter: layers that look at a whole clip and change every frame a little.

    x + scale * gate(x) * norm(linear(layers(x + positions)))

`norm` starts at zero, so the adapter starts as nothing; see [`TransformerBlock`] for why there. A block is for tower
features of one width, 25 to 50 frames a second, and leaves what comes after them alone.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .adapter_config import SpeechAdapterConfig


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


@dataclass(frozen=True)
class RecordedMaps:
    """What a thread wants of its calls: a place for maps, and whether they have attention."""

    maps: list[AdapterMaps]
    with_attention: bool


def make_positions(num_frames: int, width: int, device: torch.device) -> torch.Tensor:
    """
    Returns sines and cosines `(frames, width)` that tell frames apart; made anew for each batch, never stored.

    Source: Vaswani et al. (arXiv 1706.03762), section 3.5; sines in the first half of the channels as in Whisper.

    Example:

    ```python
    >>> import torch
    >>> from modeling.adapter_transformer import make_positions

    >>> make_positions(2, 4, torch.device("cpu"))
    tensor([[0.0000, 0.0000, 1.0000, 1.0000],
            [0.8415, 0.0100, 0.5403, 0.9999]])

    ```
    """
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=device, dtype=torch.float32) * (-math.log(10_000) / half))
    angles = torch.arange(num_frames, device=device, dtype=torch.float32).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


class TransformerLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + ffn(norm(x)): `(batch, frames, hidden)` to the same."""

    def __init__(self, width: int, config: SpeechAdapterConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, config.ffn_size),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.ffn_size, width),
        )
        self.dropout = nn.Dropout(config.dropout)
        self.attention_dropout = config.dropout

    def forward(
        self,
        hidden_states: torch.Tensor,
        is_frame: torch.Tensor | None = None,
        attentions: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`is_frame` `(batch, frames)` is true where there is no padding; `attentions` gets this layer's, if given."""
        attended = self._attend(self.attention_norm(hidden_states), is_frame, attentions)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.ffn(self.ffn_norm(hidden_states)))

    def _attend(
        self,
        hidden_states: torch.Tensor,
        is_frame: torch.Tensor | None,
        attentions: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        batch, frames, width = hidden_states.shape
        projected = self.query_key_value(hidden_states).view(batch, frames, 3, self.num_heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # each (batch, heads, frames, width / heads)
        mask = None if is_frame is None else is_frame[:, None, None]  # (batch, 1, 1, frames): for every query
        if attentions is not None:
            attentions.append(_attention_weights(query, key, mask).detach())
        dropout = self.attention_dropout if self.training else 0.0
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.attention_output(attended.transpose(1, 2).reshape(batch, frames, width))


def _attention_weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)


class TransformerBlock(nn.Module):
    """
    Residual branch of the transformer kind: `(batch, frames, hidden)` to the change of each frame.

    At the start the output norm's weight and bias are zero and nothing else is: the change is zero, bit for bit, and
    the first step's gradient reaches the norm. From the second step on it reaches every part. A zero scale as well
    would stop it for good.

        preset        layers  heads  FFN   dropout  gate  parameters at width 1280   of the original
        lightweight   1       4      1024  .1       no    10,829,825                  9,187,585
        standard      2       8      2048  .1       yes   26,902,017                 30,742,017
        heavy         4       16     4096  .15      yes   71,501,825                 75,341,825

    The original learns a table of 3000 positions (3,840,000 parameters), where these are sines and cosines, and its
    lightweight has neither positions nor output projection and norm (1,642,240). Everything else is alike.

    Args:
        width: Of the frames (`hidden`).
        config: Of kind `"transformer"`.

    Raises:
        ValueError: The heads do not divide the width.

    Example:

    ```python
    >>> import torch
    >>> from modeling import SpeechAdapterConfig
    >>> from modeling.adapter_transformer import TransformerBlock

    >>> with torch.device("meta"):
    ...     block = TransformerBlock(1280, SpeechAdapterConfig(kind="transformer", preset="lightweight"))
    >>> sum(parameter.numel() for parameter in block.parameters())
    10829825

    ```
    """

    kind = "transformer"

    def __init__(self, width: int, config: SpeechAdapterConfig):
        super().__init__()
        if width % config.num_heads:
            raise ValueError(
                f"`num_heads` must divide the width of the wrapped module, {width}, got {config.num_heads}. Choose "
                "another number of heads."
            )
        self.use_positions = config.use_positions
        self.layers = nn.ModuleList(TransformerLayer(width, config) for _ in range(config.num_layers))
        self.output = nn.Linear(width, width)
        self.output_norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, width) if config.use_gate else None
        self.scale = nn.Parameter(torch.full((1,), float(config.scale_init)))
        self.recordings: dict[int, RecordedMaps] = {}  # of threads
        nn.init.zeros_(self.output_norm.weight)
        nn.init.zeros_(self.output_norm.bias)

    @property
    def last_layer(self) -> nn.Module:
        """The layer that is zero at the start."""
        return self.output_norm

    def forward(self, hidden_states: torch.Tensor, frame_lengths: torch.Tensor | None = None) -> torch.Tensor:
        """
        Returns the change that belongs to each frame; zero where there is padding, which no frame looks at either.

        Args:
            hidden_states: Frames `(batch, frames, hidden)`, in the block's own precision.
            frame_lengths: Frames that are no padding, `(batch,)`. Default: all.
        """
        num_frames, width = hidden_states.shape[1:]
        is_frame = _find_frames(frame_lengths, num_frames, hidden_states.device)
        states = hidden_states
        if self.use_positions:
            states = states + make_positions(num_frames, width, states.device).to(states.dtype)
        if self.layers[0].gradient_checkpointing and torch.is_grad_enabled():
            # Reentrant checkpointing gives no gradient behind inputs that need none, and a frozen tower's need none.
            states = states if states.requires_grad else states.detach().requires_grad_()
        recording = self.recordings.get(threading.get_ident()) if self.recordings else None
        attentions = [] if recording is not None and recording.with_attention else None
        for layer in self.layers:
            states = layer(states, is_frame, attentions)
        change = self.output_norm(self.output(states))
        gates = None if self.gate is None else torch.sigmoid(self.gate(hidden_states))
        if recording is not None:
            recorded_gates = None if gates is None else gates.detach()
            recording.maps.append(AdapterMaps(tuple(attentions or ()), recorded_gates, frame_lengths))
        change = self.scale * (change if gates is None else gates * change)
        return change if is_frame is None else change.masked_fill(~is_frame.unsqueeze(-1), 0)

    @contextmanager
    def record_maps(self, *, with_attention: bool = True) -> Iterator[list[AdapterMaps]]:
        """
        Gives a list that has, after each call of this thread inside, the attention and gates of that call.

        Args:
            with_attention: Also the attention, which is computed once more for it and is large:
                `layers * batch * heads * frames * frames` numbers.

        Example:

        ```python
        >>> import torch
        >>> from modeling import SpeechAdapterConfig
        >>> from modeling.adapter_transformer import TransformerBlock

        >>> block = TransformerBlock(8, SpeechAdapterConfig(kind="transformer", num_layers=1, num_heads=2, ffn_size=4))
        >>> with block.record_maps() as maps:
        ...     _ = block(torch.zeros(3, 5, 8))
        >>> maps[0].attentions[0].shape, maps[0].gates.shape
        (torch.Size([3, 2, 5, 5]), torch.Size([3, 5, 8]))

        ```
        """
        thread, maps = threading.get_ident(), []
        before = self.recordings.get(thread)
        self.recordings[thread] = RecordedMaps(maps, with_attention)
        try:
            yield maps
        finally:
            self.recordings.pop(thread)
            if before is not None:
                self.recordings[thread] = before


def _find_frames(frame_lengths: torch.Tensor | None, num_frames: int, device: torch.device) -> torch.Tensor | None:
    """True for frames `(batch, frames)`, or `None` where there is no padding: attention without a mask is faster."""
    if frame_lengths is None:
        return None
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # what is traced must hold for all lengths
    if not is_traced and bool((frame_lengths >= num_frames).all()):
        return None
    lengths = frame_lengths.to(device).clamp(min=1)  # attention needs a frame to look at, even in an empty row
    return torch.arange(num_frames, device=device) < lengths.unsqueeze(1)
