"""Real speech: a translation model as it is and with an adapter, beside a Whisper's own translation of the same clips.

python -m benchmarks.speech_translation --model outputs/s2st --dataset prompts_es_en --whisper openai/whisper-base

The corpus has columns text and target_text and splits train and test, such as telephone prompts that a person read.
The adapter learns from the first half, all three translate the other. Figures and words of a number count as the same,
and so do letters with and without their accents: the references are written both ways.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoProcessor, WhisperForConditionalGeneration
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from benchmarks.results_file import store_result
from data.audio import SAMPLING_RATE, read_audio
from data.corpora import load_corpus
from data.metrics import score_by_speaker
from data.score_text import find_score_normalizer
from data.spoken_numbers import spell_english, spell_spanish
from data.translation_metrics import score_bleu
from publishing.report import format_table
from recipes.evaluate_s2st import main as evaluate_s2st
from training.launch import run_recipe

LANGUAGE = "spanish"  # of the speech, as Whisper calls it
NUM_EPOCHS = 40  # over a few minutes of speech


def write_spelled(dataset: str, path: Path) -> str:
    """Writes a corpus as a manifest whose figures are words, as the model's vocabulary has them, and names it."""
    corpus = load_corpus(dataset, required_columns=("text", "target_text"))
    columns = {"text": spell_spanish, "target_text": spell_english}
    lines = ["\t".join(("audio", *columns, "split"))]
    for row in corpus:
        texts = [spell_figures(row[column], spell) for column, spell in columns.items()]
        lines.append("\t".join((row["audio"]["path"], *texts, row["split"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def spell_figures(text: str, spell: Callable[[int], str]) -> str:
    """Returns a text on one line with its figures as words, long ones digit by digit."""
    parts = re.split(r"(\d+)", " ".join(text.split()))
    spelled = [" ".join(map(spell, map(int, part if len(part) > 3 else [part]))) for part in parts[1::2]]
    return "".join(word for pair in zip_longest(parts[::2], spelled, fillvalue="") for word in pair)


def train_adapter(options: argparse.Namespace, dataset: str, folder: Path) -> None:
    """Trains the adapter, unless an earlier run has."""
    if (folder / "adapter_config.json").exists():
        return
    run_recipe(
        "train_s2st",
        start="transfer",
        encoder_steps=0,
        checkpoint=options.model,
        adapter_kind=options.adapter_kind,
        adapter_size=options.adapter_size,
        dataset=dataset,
        language=["es", "en"],
        num_train_epochs=options.num_epochs,
        per_device_train_batch_size=8,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        num_time_masks=1,
        max_time_mask_frames=30,
        num_mel_masks=1,
        max_mel_mask_bins=15,
        eval_strategy="no",
        output_dir=folder,
    )


def translate_with_echostream(
    options: argparse.Namespace, dataset: str, folder: Path
) -> dict[str, list[tuple[str, str]]]:
    """Returns transcript and translation of each clip, of the model as it is and with its adapter."""
    output = folder / "scores.json"
    evaluate_s2st(
        ["--model_name_or_path", options.model, "--adapter", str(folder), "--dataset", dataset,
         "--split", "test", "--num_beams", str(options.num_beams), "--output_file", str(output)]
    )  # fmt: skip
    utterances = json.loads(output.read_text(encoding="utf-8"))["utterances"]
    return {
        f"EchoStream, {state}": [(row[state]["transcript"], row[state]["mt_text"]) for row in utterances]
        for state in ("unadapted", "adapted")
    }


@torch.inference_mode()
def translate_with_whisper(name: str, corpus: Dataset) -> list[tuple[str, str]]:
    """Returns transcript and translation of each clip by a Whisper that knows several languages."""
    model = WhisperForConditionalGeneration.from_pretrained(name, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    rows = []
    for audio in tqdm(corpus["audio"], desc=name, unit="clip"):
        features = processor(read_audio(audio), sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
        texts = []
        for task in ("transcribe", "translate"):
            tokens = model.generate(features, task=task, language=LANGUAGE)
            texts.append(processor.batch_decode(tokens, skip_special_tokens=True)[0])
        rows.append(tuple(texts))
    return rows


def score_rows(rows: Sequence[tuple[str, str]], corpus: Dataset, normalize: Callable[[str], str]) -> dict[str, float]:
    """Returns WER of the transcripts and BLEU and chrF of the translations, which `normalize` makes comparable."""
    plain = BasicTextNormalizer(remove_diacritics=True)  # accents are often missing in the prompts
    transcripts = [plain(transcript) for transcript, _ in rows]
    references = [plain(text) for text in corpus["text"]]
    wer = score_by_speaker(transcripts, references, [""] * len(rows))["overall"]["wer"]
    translations = [normalize(translation) for _, translation in rows]
    scores = score_bleu(translations, [normalize(text) for text in corpus["target_text"]])
    return {"WER %": 100 * wer, "BLEU": scores["bleu"], "chrF": scores["chrf"]}


def summarize(rows: list[dict]) -> str:
    """Returns the rows as a table."""
    return format_table(
        [{name: f"{value:.1f}" if isinstance(value, float) else value for name, value in row.items()} for row in rows]
    )


def main() -> None:
    """Measures and stores the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="EchoStream that recipes/train_s2st.py made.")
    parser.add_argument("--dataset", required=True, help="Corpus with splits train and test.")
    parser.add_argument("--whisper", default="openai/whisper-base", help="Whisper that knows several languages.")
    parser.add_argument("--adapter_kind", default="bottleneck", choices=("bottleneck", "lora"))
    parser.add_argument("--adapter_size", type=int, default=32)
    parser.add_argument("--num_epochs", type=int, default=NUM_EPOCHS)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/speech_translation"))
    options = parser.parse_args()
    folder = options.output_dir / f"{options.adapter_kind}_{options.adapter_size}"
    dataset = write_spelled(options.dataset, options.output_dir / "spelled.tsv")
    corpus = load_corpus(dataset, split="test", required_columns=("text", "target_text"))
    train_adapter(options, dataset, folder)
    systems = translate_with_echostream(options, dataset, folder)
    systems[Path(options.whisper).name] = translate_with_whisper(options.whisper, corpus)
    processor = AutoProcessor.from_pretrained(options.whisper, trust_remote_code=False)
    normalize = find_score_normalizer(processor.tokenizer, "en")
    rows = [
        {"system": name, "clips": len(said), **score_rows(said, corpus, normalize)} for name, said in systems.items()
    ]
    table = summarize(rows)
    print(table)
    store_result("speech_translation", rows, table, source=__file__)


if __name__ == "__main__":
    main()
