"""The audio tower of Whisper and of Qwen2-Audio: run alone, skipped where its output is known, loaded alone.

             tower               adapters act on its output           which goes into
Whisper      model.encoder       after its last norm                  the decoder's cross-attention
Qwen2-Audio  model.audio_tower   before model.multi_modal_projector   the projector and the language model
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn
from transformers import AutoConfig, PreTrainedModel, Qwen2AudioEncoder
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput

from inference.audio_models import find_family, find_tower
from modeling.adapter_layer import SpeechAdapterLayer
from modeling.adapters import adapters_off
from modeling.audio_encoders import quiet_load_report


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
    with quiet_load_report():
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
            input_features = input_features if block is None else apply_block(block, input_features, lengths)
        return BaseModelOutput(last_hidden_state=input_features)

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward


def apply_block(block: nn.Module, features: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
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


def find_tower_block(model: PreTrainedModel, adapter_name: str) -> nn.Module:
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
            "method domain_adapter or bottleneck."
        )
    return blocks[0]
