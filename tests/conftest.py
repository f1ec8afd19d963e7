"""Fixtures that several test files share: a tiny recogniser, its adapters, recordings, and real speech."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the libraries read it: no test may wait for a network

import numpy as np
import pytest
import soundfile
import torch
from transformers import Wav2Vec2CTCTokenizer

from modeling import (
    DeepSpeech2Config,
    DeepSpeech2FeatureExtractor,
    DeepSpeech2ForCTC,
    DeepSpeech2Processor,
    SpeechAdapterConfig,
)
from modeling.adapters import save_adapter

ROOT = Path(__file__).parents[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz'"


@pytest.fixture(scope="session")
def fsdd_folder() -> Path:
    """Real recordings of spoken digits, beside the repository."""
    folder = ROOT.parent / "shared" / "data" / "fsdd"
    if not (folder / "metadata.csv").is_file():
        pytest.skip("the Free Spoken Digit Dataset is not laid out in ../shared/data/fsdd")
    return folder


@pytest.fixture(scope="session")
def tiny_processor(tmp_path_factory: pytest.TempPathFactory) -> DeepSpeech2Processor:
    """Features of 16 mel bins; blank 0, unknown 1, word delimiter 2, then a to z and the apostrophe."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", "|", *LETTERS])}
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.json"
    path.write_text(json.dumps(vocabulary), encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(str(path), bos_token=None, eos_token=None)
    return DeepSpeech2Processor(DeepSpeech2FeatureExtractor(feature_size=16), tokenizer)


@pytest.fixture
def tiny_model(tiny_processor: DeepSpeech2Processor) -> DeepSpeech2ForCTC:
    """A recogniser of one layer, random and always the same, in evaluation mode."""
    return _make_model(len(tiny_processor.tokenizer))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_processor: DeepSpeech2Processor) -> str:
    """Folder of the tiny recogniser and its processor."""
    folder = tmp_path_factory.mktemp("base")
    _make_model(len(tiny_processor.tokenizer)).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory, tiny_processor: DeepSpeech2Processor) -> dict[str, str]:
    """Folders of two adapters of the tiny recogniser, `alice` (mlp) and `bob` (bottleneck), that change its output."""
    folders = {}
    for name, kind in (("alice", "mlp"), ("bob", "bottleneck")):
        model = _make_model(len(tiny_processor.tokenizer))
        model.add_adapter(SpeechAdapterConfig(kind=kind, hidden_sizes=[8]), name)
        with torch.no_grad():
            for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
                parameter.normal_()
        folders[name] = str(tmp_path_factory.mktemp(name))
        save_adapter(model, folders[name], name)
    return folders


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of noise in four formats, rates, durations and numbers of channels, by format."""
    folder = tmp_path_factory.mktemp("recordings")
    paths = {}
    for index, (suffix, rate, channels) in enumerate(
        [("wav", 16_000, 1), ("flac", 22_050, 2), ("ogg", 44_100, 1), ("mp3", 48_000, 2)]
    ):
        seconds = 0.7 + 0.3 * index
        samples = 0.1 * np.random.default_rng(index).standard_normal((round(seconds * rate), channels))
        paths[suffix] = str(folder / f"noise.{suffix}")
        soundfile.write(paths[suffix], samples, rate)
    return paths


def _make_model(vocab_size: int) -> DeepSpeech2ForCTC:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DeepSpeech2Config(
            num_mel_bins=16, conv_channels=4, hidden_size=16, num_hidden_layers=1, vocab_size=vocab_size
        )
        model = DeepSpeech2ForCTC(config).eval()
        # A fresh classifier says nearly the same everywhere; a louder one says different letters.
        model.classifier[1].weight.data.mul_(20)
    return model
