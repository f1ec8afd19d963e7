"""Configuration of EchoStream."""

from huggingface_hub.dataclasses import strict
from transformers import M2M100Config, PreTrainedConfig

from .configuration_emformer import EmformerConfig

# Sizes by name: what differs from the defaults, of the encoder and of the rest.
SIZES = {
    "mini": (
        {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 512,
            "subsampling_channels": 256,
        },
        {
            "decoder_hidden_size": 128,
            "decoder_intermediate_size": 512,
            "num_decoder_attention_heads": 4,
            "num_mt_layers": 2,
            "num_t2u_layers": 1,
            "num_unit_layers": 1,
        },
    ),
    "base": ({}, {}),
    "streamspeech": ({"num_hidden_layers": 12, "intermediate_size": 2048}, {}),
}
# Names of the encoder's fields that are reachable here too.
ENCODER_FIELDS = (
    "num_mel_bins",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "segment_length",
    "left_context_length",
    "right_context_length",
    "max_memory_size",
)


@strict
class EchoStreamConfig(PreTrainedConfig):
    r"""
    Configuration of [`EchoStreamForSpeechToSpeechTranslation`]. The defaults are those of the size `base`; subwords
    and units are numbered as in StreamSpeech.

    Args:
        encoder_config (`EmformerConfig` or `dict`): The encoder. Its fields for sizes and contexts, such as
            `segment_length` and `max_memory_size`, are reachable here too.
        source_vocab_size (`int`): Subwords of the source language, four special tokens among them.
        vocab_size (`int`): Subwords of the target language, likewise.
        unit_vocab_size (`int`): Classes of units: special ones first, then the units, the blank last by default.
        unit_offset (`int`): Class of unit 0.
        unit_blank_id (`int`, *optional*): Class of the blank among units. Default: the last.
        unit_upsampling (`int`): Frames in which a subword's state may say units; CTC needs more of them than a subword
            has units, which is 8 to 15.
        decoder_hidden_size (`int`): Width of all decoders.
        decoder_intermediate_size (`int`): Width inside their feed-forward networks.
        num_decoder_attention_heads (`int`): Heads a layer; they divide `decoder_hidden_size`.
        num_mt_layers (`int`): Layers of the translation's decoder.
        num_t2u_layers (`int`): Layers between it and the units.
        num_unit_layers (`int`): Layers of the unit decoder.
        dropout (`float`): Dropout of the decoders; the encoder has its own.
        unit_weight, mt_weight, asr_weight, st_weight (`float`): Weights of the losses; 0 leaves one out.
        label_smoothing (`float`): Share of the translation's labels that is spread over all subwords in training.
        blank_token_id (`int`): Blank of both languages' CTC.
        bos_token_id, pad_token_id, eos_token_id, unk_token_id, decoder_start_token_id (`int`): Special subwords.
        max_position_embeddings (`int`): Positions that are computed beforehand; more are computed when needed.

    Example:

    ```python
    >>> from modeling import EchoStreamConfig

    >>> config = EchoStreamConfig.from_size("streamspeech", segment_length=8)
    >>> config.encoder_config.num_hidden_layers, config.segment_length, config.unit_blank_id
    (12, 8, 1004)

    ```
    """

    model_type = "echostream"
    sub_configs_defaults = {"encoder_config": EmformerConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    encoder_config: dict | EmformerConfig | None = None
    source_vocab_size: int = 6004
    vocab_size: int = 6004
    unit_vocab_size: int = 1005
    unit_offset: int = 4
    unit_blank_id: int | None = None
    unit_upsampling: int = 25
    decoder_hidden_size: int = 512
    decoder_intermediate_size: int = 2048
    num_decoder_attention_heads: int = 8
    num_mt_layers: int = 4
    num_t2u_layers: int = 2
    num_unit_layers: int = 2
    dropout: float | int = 0.1
    unit_weight: float | int = 1.0
    mt_weight: float | int = 8.0
    asr_weight: float | int = 4.0
    st_weight: float | int = 4.0
    label_smoothing: float | int = 0.1
    blank_token_id: int = 0
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | None = 2
    unk_token_id: int = 3
    decoder_start_token_id: int | None = 2
    max_position_embeddings: int = 1024
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        if self.unit_blank_id is None:
            self.unit_blank_id = self.unit_vocab_size - 1
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, size: str, *, encoder: dict | None = None, **fields) -> "EchoStreamConfig":
        """
        Returns the configuration of a size by name, with other values where they are given.

        Args:
            size: `"mini"`, `"base"` or `"streamspeech"`.
            encoder: Fields of the encoder.
            fields: Fields of this class; those of the encoder that are reachable here go to it.

        Raises:
            ValueError: An unknown size.
        """
        if size not in SIZES:
            raise ValueError(f"`size` must be one of {', '.join(SIZES)}, got {size!r}.")
        of_encoder, of_rest = SIZES[size]
        reachable = {name: fields.pop(name) for name in ENCODER_FIELDS if name in fields}
        return cls(encoder_config={**of_encoder, **reachable, **(encoder or {})}, **{**of_rest, **fields})

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of the losses that count, by the head's name."""
        weights = {name: getattr(self, f"{name}_weight") for name in ("asr", "st", "mt", "unit")}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def num_units(self) -> int:
        """Units that there are, special classes and blank aside."""
        return self.unit_vocab_size - self.unit_offset - (self.unit_blank_id >= self.unit_offset)

    def make_layer_config(self) -> M2M100Config:
        """Returns the library's configuration of the decoders' layers."""
        config = M2M100Config(
            vocab_size=self.vocab_size,
            d_model=self.decoder_hidden_size,
            decoder_layers=self.num_mt_layers,
            decoder_attention_heads=self.num_decoder_attention_heads,
            encoder_attention_heads=self.num_decoder_attention_heads,
            decoder_ffn_dim=self.decoder_intermediate_size,
            encoder_ffn_dim=self.decoder_intermediate_size,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            activation_dropout=0.0,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            max_position_embeddings=self.max_position_embeddings,
            init_std=self.decoder_hidden_size**-0.5,
            scale_embedding=True,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            decoder_start_token_id=self.decoder_start_token_id,
        )
        config._attn_implementation = self._attn_implementation
        return config

    def validate_architecture(self):
        """Part of the strict validation: refuses sizes and classes of which no model can be built."""
        self.encoder_config.validate()
        for name in (
            "source_vocab_size", "vocab_size", "unit_vocab_size", "unit_upsampling", "decoder_hidden_size",
            "decoder_intermediate_size", "num_decoder_attention_heads", "num_mt_layers", "num_t2u_layers",
            "num_unit_layers",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.decoder_hidden_size % self.num_decoder_attention_heads:
            raise ValueError(
                f"`decoder_hidden_size` must be a multiple of `num_decoder_attention_heads` "
                f"({self.num_decoder_attention_heads}), got {self.decoder_hidden_size}."
            )
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be from 0 to below 1, got {getattr(self, name)}.")
        for name in ("unit_weight", "mt_weight", "asr_weight", "st_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}. 0 leaves the loss out.")

    def validate_classes(self):
        """Part of the strict validation: refuses special classes that are none, or one for two things."""
        for name in ("bos_token_id", "pad_token_id", "eos_token_id", "unk_token_id", "decoder_start_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"`{name}` must be a subword below `vocab_size` ({self.vocab_size}), got {getattr(self, name)}."
                )
        if not 0 <= self.blank_token_id < min(self.source_vocab_size, self.vocab_size):
            raise ValueError(f"`blank_token_id` must be a subword of both languages, got {self.blank_token_id}.")
        if self.blank_token_id in (self.pad_token_id, self.eos_token_id):
            raise ValueError(
                f"`blank_token_id` must be neither `pad_token_id` nor `eos_token_id`, got {self.blank_token_id}. The "
                "blank is what CTC says between labels."
            )
        if not 0 <= self.unit_blank_id < self.unit_vocab_size or self.num_units < 1:
            raise ValueError(
                f"`unit_blank_id` must be a class below `unit_vocab_size` ({self.unit_vocab_size}) beside at "
                f"least one unit from `unit_offset` ({self.unit_offset}) on, got {self.unit_blank_id}."
            )


def _reach_encoder(name: str) -> property:
    def read(self: EchoStreamConfig) -> int:
        return getattr(self.encoder_config, name)

    def write(self: EchoStreamConfig, value: int) -> None:
        setattr(self.encoder_config, name, value)

    return property(read, write, doc=f"The encoder's `{name}`.")


for _name in ENCODER_FIELDS:
    setattr(EchoStreamConfig, _name, _reach_encoder(_name))
