"""Configuration of audio language models: an encoder, a projector, a causal language model."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

PROJECTOR_TYPES = ("mlp", "stacked_swiglu", "qformer", "linear")
# Values of `encoder_layer` that are no index.
LAST, MIX = "last", "mix"


@strict
class AudioLMConfig(PreTrainedConfig):
    r"""
    Configuration of [`AudioLMForConditionalGeneration`]: any encoder on any causal language model.

    Args:
        audio_config (`PreTrainedConfig | dict`): The encoder's own configuration, of any `model_type`.
        text_config (`PreTrainedConfig | dict`): The language model's own configuration.
        audio_token_id (`int`): Token of the placeholders that audio takes the place of. It may lie beyond the language
            model's vocabulary, whose embeddings stay as they are.
        projector_type (`str`): `"mlp"` (stacked frames, two linear layers; Voxtral), `"stacked_swiglu"` (stacked
            frames, RMSNorm and SwiGLU; Ultravox), `"qformer"` (queries read windows of frames; Granite Speech) or
            `"linear"` (stacked frames, one linear layer).
        projector_hidden_act (`str`): Activation of the projector.
        projector_bias (`bool`): Whether the projector's linear layers have a bias.
        projector_hidden_size (`int`, *optional*): Width inside the projector. Default: that of the language model.
        projector_layers (`int`): Layers of a `"qformer"`.
        projector_heads (`int`): Attention heads of a `"qformer"`.
        window_frames (`int`): Frames of the encoder that become `window_tokens` tokens; the last window of a clip may
            be shorter.
        window_tokens (`int`): Tokens a window; more than 1 with a `"qformer"` only.
        encoder_layer (`int | str`): Which states of the encoder the projector reads: `"last"`, `"mix"` (a learned
            weighted sum of all layers) or an index into its hidden states, 0 being what goes into the first layer.
        min_input_frames (`int`): Frames of features up to which Whisper hears silence behind a clip; 3000, its 30 s,
            is what it was trained with. The silence takes no tokens.

    Example:

    ```python
    >>> from transformers import LlamaConfig, WhisperConfig
    >>> from modeling import AudioLMConfig

    >>> config = AudioLMConfig(audio_config=WhisperConfig(), text_config=LlamaConfig(), audio_token_id=32000)
    >>> config.audio_config.model_type, config.count_tokens(1500)
    ('whisper', 375)

    ```
    """

    model_type = "audio_lm"
    sub_configs_defaults = {
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    audio_token_id: int | None = None
    projector_type: str = "mlp"
    projector_hidden_act: str = "gelu"
    projector_bias: bool = True
    projector_hidden_size: int | None = None
    projector_layers: int = 2
    projector_heads: int = 8
    window_frames: int = 4
    window_tokens: int = 1
    encoder_layer: int | str = LAST
    min_input_frames: int = 0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    def validate_architecture(self):
        """Part of the strict validation: refuses what no model can be built of."""
        if self.projector_type not in PROJECTOR_TYPES:
            raise ValueError(
                f"`projector_type` must be one of {', '.join(PROJECTOR_TYPES)}, got {self.projector_type!r}."
            )
        for name in ("window_frames", "window_tokens", "projector_layers", "projector_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.window_tokens > 1 and self.projector_type != "qformer":
            raise ValueError(
                f"`window_tokens` must be 1 with a projector that stacks frames, got {self.window_tokens} with "
                f"{self.projector_type!r}. Choose fewer `window_frames`, or the projector qformer."
            )
        if self.projector_type == "qformer" and self.projector_width % self.projector_heads:
            raise ValueError(
                f"`projector_heads` must divide the projector's width ({self.projector_width}), got "
                f"{self.projector_heads}."
            )
        layers = self.num_encoder_states
        is_index = isinstance(self.encoder_layer, int) and not isinstance(self.encoder_layer, bool)
        if not (-layers <= self.encoder_layer < layers if is_index else self.encoder_layer in (LAST, MIX)):
            raise ValueError(
                f"`encoder_layer` must be last, mix or an index below {layers}, got {self.encoder_layer!r}. The "
                f"encoder has {layers - 1} layers; 0 is what goes into the first."
            )
        most = 2 * getattr(self.audio_config, "max_source_positions", 0) if self._is_whisper else 0
        if not 0 <= self.min_input_frames <= most:
            raise ValueError(
                f"`min_input_frames` must be 0 to {most}, got {self.min_input_frames}. Only Whisper hears silence, as "
                "far as its positions last."
            )
        if self.audio_token_id is not None and self.audio_token_id < 0:
            raise ValueError(f"`audio_token_id` must be a token's number, got {self.audio_token_id}.")

    @property
    def _is_whisper(self) -> bool:
        return self.audio_config.model_type == "whisper"

    @property
    def num_encoder_states(self) -> int:
        """How many hidden states the encoder has: one a layer, and what goes into the first."""
        config = self.audio_config
        names = ("encoder_layers", "num_hidden_layers")
        return 1 + next((getattr(config, name) for name in names if getattr(config, name, None)), 0)

    @property
    def projector_width(self) -> int:
        """Width inside the projector."""
        return self.projector_hidden_size or self.text_config.hidden_size

    def count_tokens(self, num_frames):
        """
        Returns how many tokens a clip of `num_frames` frames of the encoder becomes; of an int or a tensor.

        Frames short of a window become a whole window: a clip is heard to its end.
        """
        return (num_frames + self.window_frames - 1) // self.window_frames * self.window_tokens
