"""Tiny Whisper and Qwen2-Audio models with processors of the real classes and layout, random and always the same."""

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Tokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

WIDTH = 16
MEL_BINS = 16
SECONDS = 2
BYTES = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
WHISPER_END = "<|endoftext|>"
WHISPER_TOKENS = [
    "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>",
    "<|notimestamps|>",
]  # fmt: skip
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]


def make_whisper_processor(*, num_mel_bins: int = MEL_BINS, chunk_seconds: int = SECONDS) -> WhisperProcessor:
    """Returns features of a short window, and a tokenizer of bytes with Whisper's special tokens."""
    tokenizer = WhisperTokenizer(
        vocab=BYTES | {WHISPER_END: len(BYTES)},
        merges=[],
        pad_token=WHISPER_END,
        additional_special_tokens=WHISPER_TOKENS,
    )
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=num_mel_bins, chunk_length=chunk_seconds), tokenizer)


def make_chat_processor(*, num_mel_bins: int = MEL_BINS, chunk_seconds: int = SECONDS) -> Qwen2AudioProcessor:
    """Returns features of a short window, and a tokenizer of bytes with Qwen2-Audio's special tokens and template."""
    tokenizer = Qwen2Tokenizer(
        vocab=BYTES | {"<|endoftext|>": len(BYTES)}, merges=[], additional_special_tokens=CHAT_TOKENS
    )
    extractor = WhisperFeatureExtractor(feature_size=num_mel_bins, chunk_length=chunk_seconds)
    return Qwen2AudioProcessor(extractor, tokenizer)


def make_whisper(processor: WhisperProcessor) -> WhisperForConditionalGeneration:
    """Returns an untrained Whisper of two layers."""
    tokenizer = processor.tokenizer
    special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    special |= {"pad_token_id": tokenizer.pad_token_id}
    special |= {"decoder_start_token_id": tokenizer.convert_tokens_to_ids(WHISPER_TOKENS[0])}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=processor.feature_extractor.feature_size,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=processor.feature_extractor.nb_max_frames // 2,
        max_target_positions=48,
        init_std=0.3,
        **special,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(config).eval()
    no_timestamps = tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    model.generation_config = GenerationConfig(
        **special, is_multilingual=False, no_timestamps_token_id=no_timestamps, max_length=16
    )
    return model


def make_qwen2_audio(processor: Qwen2AudioProcessor) -> Qwen2AudioForConditionalGeneration:
    """Returns an untrained Qwen2-Audio of two layers in its tower and two in its language model."""
    tokenizer, extractor = processor.tokenizer, processor.feature_extractor
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": WIDTH,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": extractor.feature_size,
            "max_source_positions": extractor.nb_max_frames // 2,
            "initializer_range": 0.3,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "vocab_size": len(tokenizer),
            "initializer_range": 0.3,
        },
        audio_token_index=processor.audio_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2AudioForConditionalGeneration(config).eval()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    return model


MAKERS = {
    "whisper": (make_whisper_processor, make_whisper),
    "qwen2_audio": (make_chat_processor, make_qwen2_audio),
}


def save_base(family: str, folder: Path) -> Path:
    """Writes a tiny model of `family` and its processor into `folder`."""
    make_processor, make_model = MAKERS[family]
    processor = make_processor()
    make_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
