"""The audio tower of Whisper and of Qwen2-Audio: run alone, skipped where its output is known, loaded alone.

             tower               adapters act on its output           which goes into
Whisper      model.encoder       after its last norm                  the decoder's cross-attention
Qwen2-Audio  model.audio_tower   before model.multi_modal_projector   the projector and the language model
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2AudioEncoder,
    Qwen2AudioForConditionalGeneration,
    WhisperForConditionalGeneration,
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from modeling.adapter_layer import SpeechAdapterLayer
from modeling.adapters import adapters_off
from recipes.whole_models import load_whole


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


def load_tower_alone(model_name_or_path: str, *, dtype: str = "auto") -> PreTrainedModel:
    """
    Returns a model whose audio tower has its weights and whose other parts take no memory; every parameter is frozen.

    Adapters on the tower's output have the names that they have in the whole model, and load there.

    Args:
        model_name_or_path: Folder or Hub name of the whole model.
        dtype: Of the weights, as in `from_pretrained`.

    Raises:
        ValueError: It is no Whisper or Qwen2-Audio, or lacks weights of its tower.
    """
    config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    family = find_family(config)
    tower_config = getattr(config, "audio_config", config)
    with _without_load_report():
        # Only tensors with a name in the tower are read: the others stay on the disk.
        tower, report = family.tower_class.from_pretrained(
            model_name_or_path,
            config=tower_config,
            dtype=dtype,
            key_mapping={family.tower_keys: ""},
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise ValueError(
            f"`model_name_or_path` must hold a whole audio tower, got {model_name_or_path} without "
            f"{sorted(report['missing_keys'])[:3]}. Fetch it again."
        )
    with torch.device("meta"):
        model = family.model_class(config).to(tower.dtype)
    parent, _, name = family.tower.rpartition(".")
    setattr(model.get_submodule(parent), name, tower)
    model.name_or_path = model_name_or_path
    return model.requires_grad_(False).eval()


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers warns of every tensor that is left on the disk; that is what is wanted here."""
    report = logging.getLogger("transformers")
    level = report.level
    report.setLevel(logging.ERROR)
    try:
        yield
    finally:
        report.setLevel(level)


def add_adapter(model: PreTrainedModel, config: PeftConfig, adapter_name: str) -> None:
    """Adds a fresh adapter, in fp32, to a whole model or to one from [`load_tower_alone`]."""
    model.add_adapter(config, adapter_name)
    cast_adapter_dtype(model, adapter_name)  # LoRA too learns in fp32, over a base in half precision or 4 bits
    for layer in model.modules():
        # PEFT moves a fresh adapter to where its base is; over a part that is not loaded, that is nowhere.
        if isinstance(layer, SpeechAdapterLayer) and next(layer.get_base_layer().parameters()).is_meta:
            layer.update_layer(adapter_name, config)


@torch.no_grad()
def run_tower(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """
    Returns the output `(batch, frames, hidden)` of the frozen tower, as no adapter has seen it.

    Args:
        model: Whole, or from [`load_tower_alone`]; its modes stay as they are.
        batch: `input_features` `(batch, mel, frames)` and their mask.
    """
    tower, mask = find_tower(model), batch.get(find_family(model.config).mask)
    features = batch["input_features"].to(tower.device, tower.dtype)
    training = [module for module in tower.modules() if module.training]  # not all of them are while one trains
    tower.eval()
    try:
        with adapters_off(tower):
            return tower(features, attention_mask=_mask_pairs(tower, features, mask)).last_hidden_state
    finally:
        for module in training:
            module.training = True


def _mask_pairs(tower: PreTrainedModel, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Qwen2-Audio's tower takes a mask of pairs `(batch, 1, frames, frames)`; Whisper's looks at padding too."""
    if not isinstance(tower, Qwen2AudioEncoder):
        return mask
    lengths, _ = tower._get_feat_extract_output_lengths(mask.sum(-1))
    frames = (features.shape[-1] - 2) // 2 + 1
    is_frame = torch.arange(frames, device=features.device) < lengths.to(features.device).unsqueeze(1)
    embeddings = features.new_empty(len(features), frames, 1)
    return create_bidirectional_mask(config=tower.config, inputs_embeds=embeddings, attention_mask=is_frame.long())


@contextmanager
def tower_skipped(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `forward` takes the output of [`run_tower`] as `input_features`; adapters on it act as ever."""
    tower = find_tower(model)

    def forward(input_features: torch.Tensor, attention_mask: torch.Tensor | None = None, **_kwargs):
        del attention_mask  # the layer knows its frames from the model's own call
        layer = getattr(tower, "layer_norm", None)
        if isinstance(layer, SpeechAdapterLayer) and not layer.disable_adapters:
            lengths = layer.frame_lengths and layer.frame_lengths.repeated(len(input_features))
            block = layer.find_block(next(iter(layer.active_adapters), None))
            input_features = input_features if block is None else adapt(block, input_features, lengths)
        return BaseModelOutput(last_hidden_state=input_features)

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward


def adapt(block: nn.Module, features: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """
    Returns a tower's output `(batch, frames, hidden)` as the block of a residual adapter changes it.

    Args:
        block: Of a bottleneck or transformer adapter.
        features: The tower's output.
        lengths: Frames `(batch,)` that are no padding; None if all are.
    """
    states = features.to(block.last_layer.weight.dtype)
    change = block(states, lengths) if block.kind == "transformer" else block(states)
    return features + change.to(features.dtype)


def find_block(model: PreTrainedModel, adapter_name: str) -> nn.Module:
    """
    Returns the block of an adapter on the tower's output.

    Raises:
        ValueError: There is none.
    """
    blocks = [
        block
        for module in model.modules()
        if isinstance(module, SpeechAdapterLayer) and (block := module.find_block(adapter_name)) is not None
    ]
    if len(blocks) != 1:
        raise ValueError(
            f"The model must have one adapter {adapter_name!r} on its tower's output, got {len(blocks)}. Choose the "
            "method domain_adapter or mlp."
        )
    return blocks[0]
