"""Configuration of Emformer."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

SUBSAMPLINGS = ("conv", "stack", "none")
MEMORY_TYPES = ("attention", "mean")
MEMORY_ACTIVATIONS = ("tanh", "clamp")


@strict
class EmformerConfig(PreTrainedConfig):
    r"""
    Configuration of [`EmformerModel`] and [`EmformerForCTC`]. The defaults give EchoStream's encoder: segments of
    160 ms, 1.2 s of left context, no right context, eight memories.

    Args:
        num_mel_bins (`int`): Feature bins a frame; features come every 10 ms.
        subsampling (`str`): How features become the encoder's frames: `"conv"` (causal convolutions of stride 2 with
            gated linear units, as in StreamSpeech), `"stack"` (a linear map, then `subsampling_factor` frames side by
            side, as in torchaudio's RNN-T) or `"none"` (features are the encoder's frames, as wide as it is).
        subsampling_factor (`int`): Frames of features a frame of the encoder; for `"conv"` a power of two.
        subsampling_channels (`int`): Channels between the convolutions, before the gate halves them.
        subsampling_kernel_size (`int`): Frames that each convolution sees.
        hidden_size (`int`): Width of the encoder.
        num_hidden_layers (`int`): Layers.
        num_attention_heads (`int`): Heads a layer; they divide `hidden_size`.
        intermediate_size (`int`): Width inside the feed-forward networks.
        hidden_act (`str`): Activation of the feed-forward networks, by its name in transformers.
        dropout (`float`): Dropout of attention weights, attention outputs and feed-forward networks.
        segment_length (`int`): Frames that are encoded at once, counted after the subsampling like all that follow.
        left_context_length (`int`): Frames before a segment whose keys and values it sees.
        right_context_length (`int`): Frames after a segment that it sees; at most `segment_length`. A stream waits
            for them.
        max_memory_size (`int`): Earlier segments of which a summary is seen, the newest; 0 for no memory bank.
        memory_type (`str`): Where a memory comes from: `"attention"` (the paper's: a summary query of the segment in
            the layer below) or `"mean"` (mean of the segment's own normalised frames in the same layer).
        memory_activation (`str`): What bounds a memory of type `"attention"`: `"tanh"`, or `"clamp"` to +-10.
        layer_norm_eps (`float`): Of the layer norms.
        output_size (`int`, *optional*): Width of a linear map and a layer norm behind the layers, as in torchaudio's
            RNN-T. By default there are none.
        vocab_size (`int`): Classes of [`EmformerForCTC`], the CTC blank among them.
        pad_token_id (`int`): Class of the CTC blank, as in the library's other CTC models.
        inputs_to_logits_ratio (`int`): Audio samples a frame of logits: hop (160 at 16 kHz) times
            `subsampling_factor`. Pipelines derive timestamps from it.
        ctc_loss_reduction (`str`): `"mean"` (an utterance's loss over its label count, averaged over the batch) or
            `"sum"`.

    Example:

    ```python
    >>> from modeling import EmformerConfig

    >>> config = EmformerConfig(segment_length=8, right_context_length=2)
    >>> config.latency_frames  # a frame of the encoder waits for at most so many frames of features, 10 ms each
    40

    ```
    """

    model_type = "emformer"
    keys_to_ignore_at_inference = ["past_key_values", "padding_cache"]

    num_mel_bins: int = 80
    subsampling: str = "conv"
    subsampling_factor: int = 4
    subsampling_channels: int = 1024
    subsampling_kernel_size: int = 5
    hidden_size: int = 256
    num_hidden_layers: int = 16
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "relu"
    dropout: float | int = 0.1
    segment_length: int = 4
    left_context_length: int = 30
    right_context_length: int = 0
    max_memory_size: int = 8
    memory_type: str = "attention"
    memory_activation: str = "tanh"
    layer_norm_eps: float = 1e-5
    output_size: int | None = None
    vocab_size: int = 32
    pad_token_id: int = 0
    inputs_to_logits_ratio: int = 640
    ctc_loss_reduction: str = "mean"

    @property
    def latency_frames(self) -> int:
        """Frames of features, 10 ms each, that a segment and its right context take."""
        return (self.segment_length + self.right_context_length) * self.subsampling_factor

    def validate_architecture(self):
        """Part of the strict validation: refuses sizes of which no model can be built."""
        for name in ("num_mel_bins", "subsampling_factor", "subsampling_channels", "hidden_size", "num_hidden_layers"):
            self._check_at_least(name, 1)
        for name in ("num_attention_heads", "intermediate_size", "vocab_size"):
            self._check_at_least(name, 1)
        for name in ("left_context_length", "right_context_length", "max_memory_size"):
            self._check_at_least(name, 0)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads` ({self.num_attention_heads}), got "
                f"{self.hidden_size}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}.")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be a class below `vocab_size` ({self.vocab_size}), got {self.pad_token_id}. "
                "It is the CTC blank."
            )
        self._check_choice("memory_type", MEMORY_TYPES)
        self._check_choice("memory_activation", MEMORY_ACTIVATIONS)
        self._check_choice("ctc_loss_reduction", ("mean", "sum"))
        check_segment_length(self.segment_length, self.right_context_length)

    def validate_subsampling(self):
        """Part of the strict validation: refuses subsamplings that do not lead to the encoder's width."""
        self._check_choice("subsampling", SUBSAMPLINGS)
        factor = self.subsampling_factor
        if self.subsampling == "conv":
            if factor < 2 or factor & (factor - 1):
                raise ValueError(
                    f"`subsampling_factor` must be a power of two from 2 on for convolutions, got {factor}. Each "
                    "convolution halves the frames."
                )
            if self.subsampling_channels % 2:
                raise ValueError(
                    f"`subsampling_channels` must be even, got {self.subsampling_channels}. A gate halves them."
                )
            self._check_at_least("subsampling_kernel_size", 2)
        elif self.subsampling == "stack" and self.hidden_size % factor:
            raise ValueError(
                f"`hidden_size` must be a multiple of `subsampling_factor` ({factor}) for stacked frames, got "
                f"{self.hidden_size}."
            )
        elif self.subsampling == "none" and (self.num_mel_bins != self.hidden_size or factor != 1):
            raise ValueError(
                f"`num_mel_bins` must be `hidden_size` ({self.hidden_size}) and `subsampling_factor` 1 without "
                f"subsampling, got {self.num_mel_bins} and {factor}."
            )

    def _check_at_least(self, name: str, minimum: int) -> None:
        if getattr(self, name) < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(self, name)}.")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            allowed = " or ".join(f'"{choice}"' for choice in choices)
            raise ValueError(f"`{name}` must be {allowed}, got {getattr(self, name)!r}.")


def check_segment_length(segment_length: int, right_context_length: int) -> None:
    """
    Makes sure that there is a segment, and that its right context lies within the next one.

    Raises:
        ValueError: `segment_length` is under 1, or the right context is longer than a segment.
    """
    if segment_length < 1:
        raise ValueError(f"`segment_length` must be at least 1, got {segment_length}.")
    if right_context_length > segment_length:
        raise ValueError(
            f"`right_context_length` must be at most `segment_length` ({segment_length}), got "
            f"{right_context_length}. Take longer segments or a shorter right context."
        )
