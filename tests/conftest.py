"""Fixtures that several test files share: a tiny recogniser, its adapters, recordings, and real speech."""

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the libraries read it: no test may wait for a network

import csv
import sys
from collections.abc import Callable, Sequence
from unittest.mock import patch

import numpy as np
import pytest
import soundfile
import torch
from audio_lm_models import save_bases
from serving import write_adapter
from spoken_words import write_spoken_words
from transformers import Trainer, Wav2Vec2CTCTokenizer

from data.synthesis import Voice, synthesize
from inference.decoding import split_batches
from modeling import (
    DeepSpeech2Config,
    DeepSpeech2FeatureExtractor,
    DeepSpeech2ForCTC,
    DeepSpeech2Processor,
    SpeechAdapterConfig,
)
from modeling.adapter_files import save_adapter
from recipes.train_ctc import main as train_ctc_main

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
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
                parameter.normal_()
        folders[name] = str(tmp_path_factory.mktemp(name))
        save_adapter(model, folders[name], name)
    return folders


@pytest.fixture(scope="session")
def people(tmp_path_factory, tiny_base) -> Path:
    """A store of four mlp adapters, `ann`, `ben`, `cho` and `dan`; tests must not change it."""
    folder = tmp_path_factory.mktemp("people")
    for seed, name in enumerate(("ann", "ben", "cho", "dan")):
        write_adapter(tiny_base, folder / name, seed, kind="mlp")
    return folder


@pytest.fixture
def store_folder(people, tmp_path) -> Path:
    """A copy of the store that a test may change."""
    return Path(shutil.copytree(people, tmp_path / "store"))


@pytest.fixture
def five_rows() -> dict[str, torch.Tensor]:
    """Five rows of noise of 16 bins, all but the first padded."""
    features = torch.randn(5, 30, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(30) < torch.tensor([30, 17, 24, 29, 12]).unsqueeze(1)
    return {"input_features": features, "attention_mask": mask.long()}


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


@pytest.fixture
def trained_steps(monkeypatch) -> list[int]:
    """Number of every optimizer step that a Trainer begins while the test runs, from 0; a resumed run's go on."""
    steps: list[int] = []
    training_step = Trainer.training_step

    def count(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", count)
    return steps


@pytest.fixture
def heard_batches(monkeypatch) -> list[int]:
    """Number of rows of every batch of chunks that is recognised while the test runs."""
    sizes: list[int] = []

    def count(*args, **kwargs):
        for batch in split_batches(*args, **kwargs):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr("inference.decoding.split_batches", count)
    return sizes


def _run_main(main: Callable[[], None], *tokens: object) -> None:
    with patch.object(sys, "argv", ["recipe.py", *map(str, tokens)]):
        main()


@pytest.fixture(scope="session")
def run_recipe_main() -> Callable[..., None]:
    """Calls a recipe's `main` with a command line."""
    return _run_main


def _write_corpus(folder: Path, voices: dict[str, str], texts: Sequence[str]) -> Path:
    """Two recordings of each text and voice for training, one for testing, at different speeds."""
    folder.mkdir()
    rows = []
    for speaker, voice in voices.items():
        for text in texts:
            for number, rate in enumerate((150, 170, 190)):
                name = f"{speaker}_{text.replace(' ', '_')}_{number}.wav"
                soundfile.write(folder / name, synthesize(text, Voice(speaker, voice, rate)), 16_000)
                rows.append((name, speaker, text, "test" if number == 2 else "train"))
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "speaker_id", "text", "split"), *rows])
    return folder


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a corpus of two synthetic speakers, ann and ben, who say three numbers."""
    voices = {"ann": "en-us+f2", "ben": "en-us+m3"}
    return _write_corpus(tmp_path_factory.mktemp("small") / "corpus", voices, ["one", "two", "three"])


@pytest.fixture(scope="session")
def korean_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a corpus of one Korean synthetic speaker."""
    return _write_corpus(tmp_path_factory.mktemp("korean") / "corpus", {"minjun": "ko+m1"}, ["불 켜 줘", "창문 닫아"])


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Path:
    """Folder of a recogniser that `train_ctc.py` made of ben's recordings in two steps."""
    folder = tmp_path_factory.mktemp("small_base")
    _run_main(
        train_ctc_main, "--dataset", small_corpus, "--exclude_speakers", "ann", "--num_mel_bins", 16,
        "--hidden_size", 8, "--num_hidden_layers", 1, "--max_steps", 2, "--save_strategy", "no",
        "--pause_share", 0, "--room_share", 0, "--device_share", 0,
        "--output_dir", folder,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def audio_lm_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny encoders and language models, by family."""
    return save_bases(tmp_path_factory.mktemp("audio_lm_bases"))


@pytest.fixture(scope="session")
def spoken_words(tmp_path_factory) -> Path:
    """Folder of a spoken toy task: which of four words is said."""
    return write_spoken_words(tmp_path_factory.mktemp("spoken") / "words")


@pytest.fixture(scope="session")
def few_words(tmp_path_factory) -> Path:
    """The same of one voice."""
    return write_spoken_words(tmp_path_factory.mktemp("spoken") / "few", num_voices=1)
