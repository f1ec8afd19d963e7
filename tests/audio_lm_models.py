"""Tiny encoders and language models of real classes, random and always the same, for audio language models."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from speech_models import BYTES, make_whisper_processor
from transformers import (
    HubertConfig,
    HubertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from modeling import AudioLMForConditionalGeneration, AudioLMProcessor

RATE = 16_000
WIDTH = 32
ENCODERS = ("whisper", "hubert", "wav2vec2", "wavlm")
LANGUAGE_MODELS = ("llama", "mistral", "qwen2")
CHAT = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
WAVES = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "initializer_range": 0.2,
    "layerdrop": 0.0, "mask_time_length": 2,
}  # fmt: skip
TEXTS = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 64, "initializer_range": 0.4, "max_position_embeddings": 512,
}  # fmt: skip


def make_tokenizer() -> Qwen2Tokenizer:
    """Returns a tokenizer of bytes whose end token pads too, with a template of chats but no placeholder."""
    tokenizer = Qwen2Tokenizer(
        vocab=BYTES | {"<|endoftext|>": len(BYTES)}, merges=[], eos_token="<|im_end|>", pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def make_encoder_base(kind: str) -> PreTrainedModel:
    """Returns what a checkpoint of this family holds: of Whisper the decoder too."""
    if kind == "whisper":
        return WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=40, num_mel_bins=16, d_model=WIDTH, encoder_layers=2, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
                max_source_positions=100, max_target_positions=24, init_std=0.2, pad_token_id=0, bos_token_id=1,
                eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
            )
        )  # fmt: skip
    if kind == "hubert":
        return HubertModel(HubertConfig(**WAVES, feat_extract_norm="group"))
    if kind == "wav2vec2":
        stable = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
        return Wav2Vec2Model(Wav2Vec2Config(**WAVES, **stable))
    return WavLMModel(WavLMConfig(**WAVES, feat_extract_norm="layer", num_buckets=32, max_bucket_distance=64))


def make_language_model(kind: str, *, tie: bool = False) -> PreTrainedModel:
    """Returns a causal language model whose vocabulary ends where the tokenizer's does."""
    tokenizer = make_tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    ids |= {"bos_token_id": None, "tie_word_embeddings": tie}
    make: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXTS, **ids)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**TEXTS, **ids, sliding_window=64)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXTS, **ids)),
    }
    return make[kind]()


@cache
def save_bases(folder: Path) -> dict[str, str]:
    """Returns the folders of all tiny bases, by family, after writing them below `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in ENCODERS:
            make_encoder_base(kind).save_pretrained(folder / kind)
            whisper = make_whisper_processor(chunk_seconds=2).feature_extractor
            waves = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=kind != "hubert")
            (whisper if kind == "whisper" else waves).save_pretrained(folder / kind)
        for kind in LANGUAGE_MODELS:
            make_language_model(kind, tie=kind == "qwen2").save_pretrained(folder / kind)
            make_tokenizer().save_pretrained(folder / kind)
    return {kind: str(folder / kind) for kind in (*ENCODERS, *LANGUAGE_MODELS)}


def join(
    bases: dict[str, str], encoder: str = "whisper", llm: str = "llama", *, projector: dict | None = None, **options
) -> AudioLMForConditionalGeneration:
    """Returns an audio language model of two tiny bases, its projector loud and always the same."""
    options["projector"] = {"initializer_range": 0.3} | (projector or {})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AudioLMForConditionalGeneration.from_encoder_and_lm(bases[encoder], bases[llm], **options)


def make_processor(model: AudioLMForConditionalGeneration) -> AudioLMProcessor:
    """Returns the processor of a model from [`join`]."""
    return AudioLMProcessor.from_model(model)


def make_clip(seconds: float, seed: int = 0) -> np.ndarray:
    """Returns noise `(samples,)` at 16 kHz."""
    samples = np.random.default_rng(seed).normal(size=round(seconds * RATE))
    return (0.1 * samples).astype(np.float32)


def make_conversation(clip: np.ndarray | None, question: str = "What?", answer: str | None = "ok") -> list[dict]:
    """Returns a question about a clip and, unless it is None, the answer."""
    audio = [] if clip is None else [{"type": "audio", "audio": clip}]
    messages = [{"role": "user", "content": [*audio, {"type": "text", "text": question}]}]
    return messages + ([] if answer is None else [{"role": "assistant", "content": answer}])
