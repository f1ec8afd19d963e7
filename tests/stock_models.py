"""Tiny Whisper and Qwen2-Audio of transformers' own classes, batches for them, and adapters that act in them."""

import torch
from transformers import (
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from modeling import SpeechAdapterConfig
from modeling.adapters import SpeechAdapterLayer, is_adapter_parameter

FRAMES = 40  # of features; both towers take no other number
MEL_LENGTHS = [40, 21, 30]  # of which the rows have so many
TOWER_LENGTHS = {"whisper": [20, 11, 15], "qwen2_audio": [10, 5, 7]}
AUDIO_TOKEN = 39
KINDS = {
    "transformer": {"num_layers": 1, "num_heads": 2, "ffn_size": 8, "dropout": 0.0},
    "bottleneck": {"hidden_sizes": [4], "dropout": 0.0},
    "mlp": {"hidden_sizes": [4], "dropout": 0.0},
}


def make_whisper(attention: str = "sdpa", width: int = 16) -> PreTrainedModel:
    torch.manual_seed(0)
    layers = {"d_model": width, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = WhisperConfig(
        vocab_size=40, num_mel_bins=8, max_source_positions=FRAMES // 2, max_target_positions=24, init_std=1.0,
        suppress_tokens=None, begin_suppress_tokens=None, **layers, **heads, **tokens,
    )  # fmt: skip
    return WhisperForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


def make_qwen2_audio(attention: str = "sdpa", width: int = 16) -> PreTrainedModel:
    torch.manual_seed(0)
    audio = {
        "model_type": "qwen2_audio_encoder", "num_mel_bins": 8, "d_model": width, "encoder_layers": 1,
        "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "max_source_positions": FRAMES // 2,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.5,
    }  # fmt: skip
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO_TOKEN)
    return Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


TOLERANCES = {torch.float32: {"atol": 1e-4, "rtol": 1e-4}, torch.bfloat16: {"atol": 0.1, "rtol": 0.02}}
MAKERS = {"whisper": make_whisper, "qwen2_audio": make_qwen2_audio}
LAYERS = {"whisper": "model.encoder.layer_norm", "qwen2_audio": "model.multi_modal_projector"}


def make_batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Three rows of different lengths, and the start of a text or a question around the placeholders."""
    features = torch.randn(3, 8, FRAMES, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    mask = (torch.arange(FRAMES) < torch.tensor(MEL_LENGTHS).unsqueeze(1)).long()
    if model.config.model_type == "whisper":
        return {"input_features": features, "attention_mask": mask, "decoder_input_ids": torch.tensor([[3, 7]] * 3)}
    rows = [[4] + [AUDIO_TOKEN] * length + [5, 6] for length in TOWER_LENGTHS["qwen2_audio"]]
    ids = torch.tensor([[0] * (13 - len(row)) + row for row in rows])
    text_mask = torch.tensor([[0] * (13 - len(row)) + [1] * len(row) for row in rows])
    return {
        "input_ids": ids, "attention_mask": text_mask, "input_features": features, "feature_attention_mask": mask
    }  # fmt: skip


def configure(kind: str = "transformer", **settings) -> SpeechAdapterConfig:
    return SpeechAdapterConfig(kind=kind, **KINDS[kind] | settings)


def add_trained(model: PreTrainedModel, name: str, config: object) -> None:
    """Adds an adapter that changes the output, as after a training; each name draws other weights."""
    model.add_adapter(config, name)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_adapter_parameter(key) and f".{name}." in key:
                parameter.normal_(std=2.0, generator=generator)
    model.eval()


def find_layer(model: PreTrainedModel) -> SpeechAdapterLayer:
    return model.get_submodule(LAYERS[model.config.model_type])


@torch.no_grad()
def logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits


def generate(model: PreTrainedModel, batch: dict[str, torch.Tensor], **settings) -> list[list[int]]:
    inputs = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    rows = model.generate(**inputs, max_new_tokens=6, do_sample=False, **settings).tolist()
    start = batch["input_ids"].shape[1] if "input_ids" in batch else 0
    return [[token for token in row[start:] if token not in (0, 2)] for row in rows]


def count_hooks(model: PreTrainedModel) -> int:
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())


def train(model: PreTrainedModel, batch: dict[str, torch.Tensor], steps: int) -> set[str]:
    """Trains and returns the names of the parameters that the last step had a gradient for."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    model.train()
    labels = batch.get("input_ids", torch.tensor([[9, 11]] * 3))
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    return {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
