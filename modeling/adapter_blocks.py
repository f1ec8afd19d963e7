"""The parts of a speech adapter that train: small maps from a module's input or output to a change of its output."""

import math

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .adapter_config import RESIDUAL_KINDS, SpeechAdapterConfig

# Module under which a model keeps its adapters by name.
NAMED_BLOCKS = "speech_adapter_blocks"


class MLPBlock(nn.Sequential):
    """Linear, ReLU, dropout for each hidden width, then Linear: `(batch, frames, in)` to `(batch, frames, out)`."""

    def __init__(self, in_features: int, out_features: int, config: SpeechAdapterConfig):
        layers: list[nn.Module] = []
        for size in config.hidden_sizes:
            layers += [nn.Linear(in_features, size), nn.ReLU(), nn.Dropout(config.dropout)]
            in_features = size
        super().__init__(*layers, nn.Linear(in_features, out_features))
        self.kind = config.kind
        if config.kind == "mlp":
            _zero(self.last_layer)

    @property
    def last_layer(self) -> nn.Module:
        """The layer that is zero at the start of a residual adapter."""
        return self[-1]


class BottleneckBlock(nn.Sequential):
    """Residual branch of Houlsby et al. (arXiv 1902.00751): norm, down, ReLU, dropout, up; `up` starts at zero."""

    def __init__(self, out_features: int, config: SpeechAdapterConfig):
        size = config.hidden_sizes[0]
        down = [nn.LayerNorm(out_features), nn.Linear(out_features, size), nn.ReLU(), nn.Dropout(config.dropout)]
        super().__init__(*down, nn.Linear(size, out_features))
        self.kind = config.kind
        _zero(self.last_layer)

    @property
    def last_layer(self) -> nn.Module:
        """The layer that is zero at the start of a residual adapter."""
        return self[-1]


def _zero(layer: nn.Module) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def make_positions(num_frames: int, width: int, device: torch.device) -> torch.Tensor:
    """
    Returns sines and cosines `(frames, width)` that tell frames apart; made anew for each batch, never stored.

    Source: Vaswani et al. (arXiv 1706.03762), section 3.5; sines in the first half of the channels as in Whisper.

    Example:

    ```python
    >>> import torch
    >>> from modeling.adapter_blocks import make_positions

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

    def forward(self, hidden_states: torch.Tensor, is_frame: torch.Tensor | None = None) -> torch.Tensor:
        """`is_frame` `(batch, frames)` is true where there is no padding."""
        hidden_states = hidden_states + self.dropout(self._attend(self.attention_norm(hidden_states), is_frame))
        return hidden_states + self.dropout(self.ffn(self.ffn_norm(hidden_states)))

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """Returns query, key and value `(3, batch, heads, frames, width / heads)` of projected frames."""
        batch, frames = projected.shape[:2]
        return projected.view(batch, frames, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def _attend(self, hidden_states: torch.Tensor, is_frame: torch.Tensor | None) -> torch.Tensor:
        query, key, value = self.split_heads(self.query_key_value(hidden_states))
        mask = None if is_frame is None else is_frame[:, None, None]  # (batch, 1, 1, frames): for every query
        dropout = self.attention_dropout if self.training else 0.0
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.attention_output(attended.transpose(1, 2).reshape(hidden_states.shape))


class TransformerBlock(nn.Module):
    """
    Residual branch of the transformer kind: `(batch, frames, hidden)` to the change of each frame.

        scale * gate(x) * norm(linear(layers(x + positions)))

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
    >>> from modeling.adapter_blocks import TransformerBlock

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
        _zero(self.output_norm)

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
        for layer in self.layers:
            states = layer(states, is_frame)
        change = self.output_norm(self.output(states))
        change = self.scale * (change if self.gate is None else torch.sigmoid(self.gate(hidden_states)) * change)
        return change if is_frame is None else change.masked_fill(~is_frame.unsqueeze(-1), 0)


def _find_frames(frame_lengths: torch.Tensor | None, num_frames: int, device: torch.device) -> torch.Tensor | None:
    """True for frames `(batch, frames)`, or `None` where there is no padding: attention without a mask is faster."""
    if frame_lengths is None:
        return None
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # what is traced must hold for all lengths
    if not is_traced and bool((frame_lengths >= num_frames).all()):
        return None
    lengths = frame_lengths.to(device).clamp(min=1)  # attention needs a frame to look at, even in an empty row
    return torch.arange(num_frames, device=device) < lengths.unsqueeze(1)


def find_widths(module: nn.Module) -> tuple[int | None, int | None]:
    """
    Returns the last axis of what `module` takes and of what it gives, `None` where it does not say.

    It says so itself, as a linear map does, or is a norm of the last axis or a module around one linear map.
    """
    if len(shape := getattr(module, "normalized_shape", ())) == 1:
        return shape[0], shape[0]
    maps = [part for part in module.children() if hasattr(part, "in_features")]
    part = maps[0] if len(maps) == 1 and not hasattr(module, "out_features") else module
    return getattr(part, "in_features", None), getattr(part, "out_features", None)


def make_block(base: nn.Module, config: SpeechAdapterConfig) -> nn.Module:
    """
    Returns the block of a fresh adapter around `base`; its `position` says what it changes.

    That is the input of the base (`"before"`), its output (`"after"`), or its output as the input has it (`"beside"`).

    Raises:
        ValueError: The widths of `base` are unknown or do not suit the configuration.
    """
    position = (config.position or "after") if config.kind in RESIDUAL_KINDS else "beside"
    in_features, out_features = find_widths(base)
    if (position != "after" and in_features is None) or (position != "before" and out_features is None):
        raise ValueError(
            f"`target_modules` must name modules with `in_features` and `out_features`, got a {type(base).__name__}. "
            "Name the linear map or the block before it."
        )
    width = in_features if position == "before" else out_features
    if config.kind == "transformer":
        block = TransformerBlock(width, config)
    elif config.kind == "bottleneck":
        block = BottleneckBlock(width, config)
    else:
        block = MLPBlock(in_features, out_features, config)
    block.position = position
    return block
