"""Whisper and Qwen2-Audio: where their parts are, and how a whole model is loaded."""

from dataclasses import dataclass

import torch
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2AudioEncoder,
    Qwen2AudioForConditionalGeneration,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from modeling.whole_models import load_whole


@dataclass(frozen=True)
class Family:
    """
    Where the parts of a family of models are.

    Args:
        model_class: The whole model.
        tower_class: Its audio tower.
        tower: Name of the tower in the model.
        tower_keys: Regular expression of what stands before the tower's names in a checkpoint, whole or of the body.
        projector: Regular expression over the linear maps between tower and text.
        text_attention: Regular expression over the queries and values of the text's self-attention.
        mask: Name of the mask of the features.
    """

    model_class: type[PreTrainedModel]
    tower_class: type[PreTrainedModel]
    tower: str
    tower_keys: str
    projector: str
    text_attention: str
    mask: str


FAMILIES = {
    # Whisper has no projector; the keys and values of the cross-attention are what its text reads of the audio.
    "whisper": Family(
        WhisperForConditionalGeneration,
        WhisperEncoder,
        tower="model.encoder",
        tower_keys=r"^(model\.)?encoder\.",
        projector=r"model\.decoder\.layers\.\d+\.encoder_attn\.[kv]_proj",
        text_attention=r"model\.decoder\.layers\.\d+\.self_attn\.[qv]_proj",
        mask="attention_mask",
    ),
    "qwen2_audio": Family(
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioEncoder,
        tower="model.audio_tower",
        tower_keys=r"^(model\.)?audio_tower\.",
        projector=r"model\.multi_modal_projector\.linear",
        text_attention=r"model\.language_model\.layers\.\d+\.self_attn\.[qv]_proj",
        mask="feature_attention_mask",
    ),
}


def find_family(config: PretrainedConfig) -> Family:
    """
    Returns the family of a model.

    Raises:
        ValueError: It is none of those that a domain can be adapted in.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"`model_name_or_path` must be a Whisper or a Qwen2-Audio, got a model of type {config.model_type!r}."
        )
    return FAMILIES[config.model_type]


def find_tower(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the audio tower of `model`."""
    return model.get_submodule(find_family(model.config).tower)


def load_model(
    model_name_or_path: str, *, dtype: str = "auto", load_in_4bit: bool = False, device_map: object = None
) -> PreTrainedModel:
    """
    Returns a whole Whisper or Qwen2-Audio, every parameter frozen.

    Args:
        model_name_or_path: Folder or Hub name.
        dtype: Of its weights, as in `from_pretrained`.
        load_in_4bit: Quantise the weights to NF4 while loading.
        device_map: As in `from_pretrained`.

    Raises:
        ValueError: It is no such model.
    """
    family = find_family(AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False))
    options: dict[str, object] = {"dtype": dtype, "device_map": device_map}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model = load_whole(family.model_class, model_name_or_path, **options).requires_grad_(False)
    for module in model.modules():
        # On a CPU with AVX512-BF16 an evaluation repacks 4-bit weights, and gradients behind them are zero ever after
        # (bitsandbytes 0.50).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if module.bias is not None:
                # The first `forward` would do so, and the base would be another by its fingerprint.
                module.bias.data = module.bias.data.to(module.compute_dtype)
    return model
