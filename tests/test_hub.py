"""Pushing: what leaves the machine and what does not, checked on a Hub that the real client talks to."""

import json
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from minihub import MiniHub
from transformers import WhisperConfig, WhisperForConditionalGeneration

from modeling import SpeechAdapterConfig
from modeling.adapters import save_adapter
from recipes.hub import HubTarget, adapter_code, check_target, collect_files, main, push_folder, take_hub_target
from recipes.personalize import main as personalize_main
from recipes.trainer import RecipeTrainingArguments

TOKEN = "hf_very_secret_token"


def connect(patch: pytest.MonkeyPatch, hub: MiniHub) -> None:
    """Sends the client of this process to `hub` with its user's token."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", hub.token)
    patch.setenv("NO_PROXY", "127.0.0.1")


def train_and_push(patch: pytest.MonkeyPatch, base: Path, corpus: Path, output_dir: Path) -> Path:
    """Pushes `base`, a branch of it with a silent classifier, and an adapter for ann, also as a private copy."""
    main([str(base), "--hub_model_id", "me/base"])
    silent = output_dir.parent / "silent"
    from transformers import AutoModelForCTC

    model = AutoModelForCTC.from_pretrained(base)
    model.classifier[1].weight.data.zero_()
    model.save_pretrained(silent)
    main([str(silent), "--hub_model_id", "me/base", "--hub_revision", "zeros"])
    flags = ["--model_name_or_path", base, "--dataset", corpus, "--speaker_id", "ann", "--base_eval_speakers", "ben"]
    flags += ["--adapter_hidden_sizes", 4, "--max_steps", 3, "--learning_rate", "1e-1", "--save_strategy", "steps"]
    flags += ["--save_steps", 2, "--output_dir", output_dir, "--language", "en", "--dataset_licence", "cc0-1.0"]
    flags += ["--push_to_hub", "--hub_model_id", "ann", "--hub_base_model_id", "me/base"]
    with patch.context() as context:
        context.setattr(sys, "argv", ["recipes/personalize.py", *map(str, flags)])
        personalize_main()
    main([str(output_dir), "--hub_model_id", "me/secret", "--hub_base_model_id", "me/base", "--hub_private_repo"])
    return output_dir


def push_stock_model(folder: Path) -> tuple[Path, Path]:
    """Pushes a tiny Whisper and an adapter of it; returns their folders."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "vocab_size": 20}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(max_source_positions=10, max_target_positions=10, suppress_tokens=None,
                           begin_suppress_tokens=None, **sizes, **tokens)  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.save_pretrained(folder / "stock")
    push_folder(folder / "stock", HubTarget("me/stock"))
    model.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[4], target_modules=["proj_out"]), "eve")
    for name, parameter in model.named_parameters():
        if "speech_adapter" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, folder / "stock_adapter", "eve")
    target = check_target(HubTarget("me/stock-adapter", base_model_id="me/stock"), needs_base=True)
    push_folder(folder / "stock_adapter", target)
    return folder / "stock", folder / "stock_adapter"
