"""A tiny EchoStream, a batch for all of its heads, and a corpus of a few sentences with units, for tests."""

from pathlib import Path

import soundfile
import torch

from data.synthesis import Voice, synthesize
from modeling import EchoStreamConfig, EchoStreamForSpeechToSpeechTranslation

UNITS = {"unit_vocab_size": 25, "unit_offset": 4}
LENGTHS = torch.tensor([200, 120, 170])


def make_translation_model(*, encoder_fields: dict | None = None, **fields) -> EchoStreamForSpeechToSpeechTranslation:
    """A tiny model, random and always the same, in evaluation mode."""
    encoder = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "subsampling_channels": 16}
    sizes = {"decoder_hidden_size": 24, "decoder_intermediate_size": 32, "num_mt_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = {**sizes, "source_vocab_size": 32, "vocab_size": 40, **UNITS, **fields}
        config = EchoStreamConfig.from_size("mini", encoder={**encoder, **(encoder_fields or {})}, **values)
        return EchoStreamForSpeechToSpeechTranslation(config).eval()


def make_translation_batch() -> dict[str, torch.Tensor]:
    """Three rows of noise, two of them padded, with labels for every head."""
    generator = torch.Generator().manual_seed(1)
    units = torch.randint(4, 24, (3, 30), generator=generator)
    units[1, 20:] = -100
    return {
        "input_features": torch.randn(3, 200, 80, generator=generator),
        "attention_mask": (torch.arange(200) < LENGTHS.unsqueeze(1)).long(),
        "asr_labels": torch.tensor([[4, 5, 6], [7, 7, -100], [8, 9, 4]]),
        "target_labels": torch.tensor([[4, 5, 6, 7], [7, 7, -100, -100], [8, -100, -100, -100]]),
        "unit_labels": units,
    }


def take_row(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """A row of the batch alone, without padding."""
    num_frames = int(LENGTHS[row])
    alone = {"input_features": batch["input_features"][row : row + 1, :num_frames]}
    for name in ("asr_labels", "target_labels", "unit_labels"):
        labels = batch[name][row]
        alone[name] = labels[labels >= 0].unsqueeze(0)
    return alone


SENTENCES = {
    "marque uno": "press one",
    "marque dos": "press two",
    "marque tres": "press three",
    "espere por favor": "please hold",
    "hasta luego": "goodbye",
}
# What makes a model of the recipe tiny.
TINY_FIELDS = (
    "hidden_size=16", "num_hidden_layers=1", "intermediate_size=16", "encoder.subsampling_channels=16",
    "decoder_hidden_size=16", "decoder_intermediate_size=16", "num_mt_layers=1", "unit_upsampling=10",
)  # fmt: skip


def write_translation_corpus(folder: Path, *, language: str = "es", num_units: int = 12) -> Path:
    """
    Writes recordings of five sentences by two voices and their manifest as StreamSpeech's, one voice in each split.

    The units are no recording's: they follow from the sentence alone.
    """
    folder.mkdir(parents=True)
    rows = ["id\taudio\tsrc_text\ttgt_text\ttgt_audio\tspeaker\tsplit"]
    for number, (source, target) in enumerate(SENTENCES.items()):
        units = " ".join(str((number * 5 + place * 3) % num_units) for place in range(8))
        for split, variant in (("train", "f2"), ("train", "m3"), ("test", "m1")):
            name = f"{split}_{variant}_{number}.wav"
            soundfile.write(folder / name, synthesize(source, Voice(variant, f"{language}+{variant}", 170)), 16_000)
            rows.append("\t".join([name, name, source, target, units, variant, split]))
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "manifest.tsv"
