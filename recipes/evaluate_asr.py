"""Scores a recogniser, with or without an adapter: WER and CER by speaker and overall.

python recipes/evaluate_asr.py --model_name_or_path BASE --adapter ALICE --dataset DATA --speaker_id alice

With --compare: with the adapter and without, also on the base's own test data; fails where the base has lost.

python recipes/evaluate_asr.py --compare --model_name_or_path BASE --adapter ALICE --dataset DATA --speaker_id alice \\
    --base_dataset DATA --base_speaker_id bob carol --max_regression 0.02
"""

import json
import logging
from dataclasses import dataclass, field, replace
from functools import partial

from accelerate import PartialState
from torch.utils.data import Dataset

from data.annotations import STYLES
from data.corpora import DEFAULT_SPLIT
from data.metrics import format_score_table
from data.speakers import select_speakers
from inference.beam_search import DecodingArguments
from inference.recognizers import Recognizer, open_recognizer
from modeling.adapters import adapters_off
from modeling.files import write_text
from publishing.report import format_table
from training.arguments import parse_arguments
from training.corpus_arguments import load_split
from training.endings import run_main

logger = logging.getLogger(__name__)

ADAPTER_NAME = "adapter"  # any name will do for the only one


@dataclass
class EvaluateArguments:
    """What is evaluated, and on what."""

    model_name_or_path: str = field(metadata={"help": "Base recogniser: a folder or a Hub name."})
    dataset: str = field(metadata={"help": "synthetic, a folder, a manifest or a Hub name."})
    adapter: str | None = field(default=None, metadata={"help": "Adapter of this base: a folder or a Hub name."})
    allow_base_mismatch: bool = field(
        default=False, metadata={"help": "Take an adapter that was made for another base; it is recorded."}
    )
    split: str = field(default="test", metadata={"help": "Split of the dataset."})
    channel: str = field(default="mix", metadata={"help": "Of every recording: mix, left, right or a number from 1."})
    speaker_id: list[str] | None = field(default=None, metadata={"help": "Speakers to evaluate; default: all."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset that has several, such as a language."}
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column of the transcripts. Default: text, sentence, transcription or transcript."},
    )
    transcript_style: str = field(
        default="plain", metadata={"help": "What in a transcript is no speech.", "choices": list(STYLES)}
    )
    language: list[str] | None = field(
        default=None, metadata={"help": "Language code of the transcripts, for a base that was saved without one."}
    )
    concatenate_min: int = field(default=1, metadata={"help": "Fewest clips of a speaker joined to an utterance."})
    concatenate_max: int = field(default=1, metadata={"help": "Most clips of a speaker joined to an utterance."})
    seed: int = field(default=0, metadata={"help": "Draws which clips are joined."})
    batch_size: int = field(default=16, metadata={"help": "Utterances recognised together."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the scores; it is replaced."})
    compare: bool = field(
        default=False, metadata={"help": "Compare the adapter on and off, also on the base's own test data."}
    )
    base_dataset: str | None = field(default=None, metadata={"help": "The base's own data, for --compare."})
    base_split: str = field(default="test", metadata={"help": "Split of base_dataset."})
    base_channel: str = field(default="mix", metadata={"help": "Channel of base_dataset."})
    base_speaker_id: list[str] | None = field(
        default=None, metadata={"help": "Speakers of base_dataset to evaluate; default: all."}
    )
    base_dataset_config: str | None = field(default=None, metadata={"help": "dataset_config of base_dataset."})
    base_text_column: str | None = field(default=None, metadata={"help": "text_column of base_dataset."})
    base_transcript_style: str = field(
        default="plain", metadata={"help": "transcript_style of base_dataset.", "choices": list(STYLES)}
    )
    max_regression: float = field(
        default=0.02,
        metadata={
            "help": "Most WER (CER where no spaces part words) that the adapter may add on base_dataset; 0.02 is "
            "two points."
        },
    )

    def __post_init__(self):
        for name in ("adapter", "base_dataset"):
            if self.compare and not getattr(self, name):
                raise ValueError(f"`{name}` must be given with `compare`, got none. Name it or leave out `compare`.")


def load_utterances(arguments: EvaluateArguments, recognizer: Recognizer) -> Dataset:
    """Returns the utterances that `arguments` name."""
    needs_speakers = bool(arguments.speaker_id) or arguments.concatenate_max > 1
    columns = ("audio", "text", "speaker_id") if needs_speakers else ("audio", "text")
    corpus = load_split(arguments, arguments.split, required_columns=columns)
    if arguments.split == DEFAULT_SPLIT:
        logger.warning("`split` is %r, which recipes train on: such scores say nothing of new speech.", DEFAULT_SPLIT)
    if arguments.speaker_id:
        corpus = select_speakers(corpus, arguments.speaker_id)
    concatenate = (arguments.concatenate_min, arguments.concatenate_max)
    return recognizer.load_utterances(corpus, concatenate=concatenate, seed=arguments.seed)


def compare_adapter(score, target: Dataset, base_domain: Dataset, model) -> dict[str, dict]:
    """
    Returns `{"target": {"on": scores, "off": scores}, "base": likewise}`, overall, with the adapter on and off.

    Args:
        score: Scores a dataset with the model as it is.
        target: What the adapter is for.
        base_domain: What the base was made for.
        model: The model, its adapter on.
    """
    scores = {}
    for name, dataset in (("target", target), ("base", base_domain)):
        scores[name] = {"on": score(dataset)["overall"]}
        with adapters_off(model):
            scores[name]["off"] = score(dataset)["overall"]
    return scores


def format_comparison(scores: dict[str, dict]) -> str:
    """Returns the scores of [`compare_adapter`] as a table; `change` is in points of the rate that judges."""
    rows = []
    for name, pair in scores.items():
        row = {"data": name, "utterances": pair["on"]["utterances"]}
        for rate in ("wer", "cer"):
            row |= {f"{rate.upper()} {state} %": f"{100 * pair[state][rate]:.2f}" for state in ("off", "on")}
        judge = pair["off"]["rate"]
        unit = "" if judge == "wer" else f" {judge.upper()}"
        rows.append(row | {"change": f"{100 * (pair['on'][judge] - pair['off'][judge]):+.2f}{unit}"})
    return format_table(rows)


def write_scores(arguments: EvaluateArguments, scores: dict) -> None:
    """Writes `scores` and what they are of, if a file is asked for."""
    if not arguments.output_file:
        return
    source = {
        "model": arguments.model_name_or_path,
        "adapter": arguments.adapter,
        "dataset": arguments.dataset,
        "split": arguments.split,
    }
    if arguments.compare:
        source |= {"base_dataset": arguments.base_dataset, "base_split": arguments.base_split}
    write_text(arguments.output_file, json.dumps({**scores, **source}, indent=2, ensure_ascii=False) + "\n")


def check_regression(scores: dict[str, dict], max_regression: float) -> None:
    """
    Makes sure that the base has not lost.

    Raises:
        SystemExit: The adapter adds more than `max_regression` to the WER on the base's own data, or to the CER where
            no spaces part words.
    """
    rate = scores["base"]["off"]["rate"]
    regression = scores["base"]["on"][rate] - scores["base"]["off"][rate]
    if regression > max_regression:
        raise SystemExit(
            f"The adapter adds {regression:.4f} to the base's {rate.upper()}, more than `max_regression` "
            f"({max_regression})."
        )


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    # Arguments
    arguments, decoding = parse_arguments(EvaluateArguments, DecodingArguments, argv=argv)

    # Model and adapter
    adapters = {ADAPTER_NAME: arguments.adapter} if arguments.adapter else {}
    options = {"language": arguments.language, "allow_base_mismatch": arguments.allow_base_mismatch}
    recognizer = open_recognizer(arguments.model_name_or_path, adapters, **options)
    recognizer.set_search(decoding)

    # Data
    dataset = load_utterances(arguments, recognizer)
    names = ("dataset", "dataset_config", "text_column", "transcript_style", "channel", "split", "speaker_id")
    base = {name: getattr(arguments, f"base_{name}") for name in names}
    base_dataset = load_utterances(replace(arguments, **base), recognizer) if arguments.compare else None

    # Evaluate
    score = partial(recognizer.score, batch_size=arguments.batch_size)
    scores = compare_adapter(score, dataset, base_dataset, recognizer.model) if arguments.compare else score(dataset)

    # Write
    if PartialState().is_main_process:
        print(format_comparison(scores) if arguments.compare else format_score_table(scores))
        write_scores(arguments, scores)
    if arguments.compare:
        check_regression(scores, arguments.max_regression)


if __name__ == "__main__":
    run_main(main)
