"""Tiny CTC models of transformers' own classes, with random weights and real processors, as folders."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCTC,
    HubertConfig,
    ParakeetCTCConfig,
    ParakeetFeatureExtractor,
    ParakeetProcessor,
    ParakeetTokenizer,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertProcessor,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WavLMConfig,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
LAYER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WAVES = {**LAYER, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WAVES |= {"mask_time_prob": 0.0, "layerdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0}


def _save_letters(folder: Path, letters: str) -> Wav2Vec2CTCTokenizer:
    path = folder / "vocab.json"
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *letters]
    path.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    return Wav2Vec2CTCTokenizer(str(path))


def _make_waves(config_class, norm: str, folder: Path):
    tokenizer = _save_letters(folder, LETTERS.upper())  # as most checkpoints of the Hub
    config = config_class(
        **WAVES, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", vocab_size=len(tokenizer),
        pad_token_id=0, ctc_loss_reduction="mean",
    )  # fmt: skip
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer")
    return config, Wav2Vec2Processor(extractor, tokenizer)


def _make_bert(folder: Path):
    tokenizer = _save_letters(folder, LETTERS)
    config = Wav2Vec2BertConfig(
        **LAYER, feature_projection_input_dim=16, vocab_size=len(tokenizer), pad_token_id=0, layerdrop=0.0,
        add_adapter=True, num_adapter_layers=1, output_hidden_size=16, ctc_loss_reduction="mean",
    )  # fmt: skip
    extractor = SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8, stride=2, padding_value=0.0)
    return config, Wav2Vec2BertProcessor(extractor, tokenizer)


def _make_parakeet(_folder: Path):
    tokens = ["<unk>", "\u2581", *LETTERS, "\u2581the", "\u2581ze", "ro", "one", "<pad>"]
    tokenizer = Tokenizer(models.Unigram([(token, -float(len(token) < 2) - 1) for token in tokens], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = ParakeetTokenizer(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    encoder = {
        **LAYER, "num_mel_bins": 16, "subsampling_conv_channels": 4, "conv_kernel_size": 3, "layerdrop": 0.0,
        "model_type": "parakeet_encoder",
    }  # fmt: skip
    config = ParakeetCTCConfig(
        vocab_size=len(tokenizer), encoder_config=encoder, pad_token_id=tokenizer.pad_token_id,
        ctc_loss_reduction="mean",
    )  # fmt: skip
    return config, ParakeetProcessor(ParakeetFeatureExtractor(feature_size=16), tokenizer)


MAKERS = {
    "wav2vec2": lambda folder: _make_waves(Wav2Vec2Config, "group", folder),
    "hubert": lambda folder: _make_waves(HubertConfig, "layer", folder),
    "wavlm": lambda folder: _make_waves(WavLMConfig, "layer", folder),
    "wav2vec2_bert": _make_bert,
    "parakeet": _make_parakeet,
}


def save_ctc_base(family: str, folder: Path) -> str:
    """Writes a model whose words change with what it hears, and its processor."""
    folder.mkdir(parents=True, exist_ok=True)
    config, processor = MAKERS[family](folder)
    torch.manual_seed(0)
    model = AutoModelForCTC.from_config(config)
    head = getattr(model, "lm_head", None) or model.ctc_head
    with torch.no_grad():
        head.weight.normal_(std=2.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
