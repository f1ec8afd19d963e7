"""Scores a recogniser, with or without an adapter: WER and CER by speaker and overall.

python recipes/evaluate_asr.py --model_name_or_path BASE --adapter ALICE --dataset DATA --speaker_id alice
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import ProcessorMixin

from data.asr import UtteranceDataset, decode_clips
from data.corpora import load_corpus, select_speakers
from data.metrics import format_score_table
from modeling.files import write_whole
from recipes.arguments import parse_arguments
from recipes.beam_search import DecodingArguments, build_decoder
from recipes.decoding import evaluate_dataset, load_recognizer

ADAPTER_NAME = "adapter"  # any name will do for the only one


@dataclass
class EvaluateArguments:
    """What is evaluated, and on what."""

    model_name_or_path: str = field(metadata={"help": "Base recogniser: a folder or a Hub name."})
    dataset: str = field(metadata={"help": "synthetic, a folder, a manifest or a Hub name."})
    adapter: str | None = field(default=None, metadata={"help": "Adapter of this base: a folder or a Hub name."})
    split: str = field(default="test", metadata={"help": "Split of the dataset."})
    speaker_id: list[str] | None = field(default=None, metadata={"help": "Speakers to evaluate; default: all."})
    concatenate_min: int = field(default=1, metadata={"help": "Fewest clips of a speaker joined to an utterance."})
    concatenate_max: int = field(default=1, metadata={"help": "Most clips of a speaker joined to an utterance."})
    seed: int = field(default=0, metadata={"help": "Draws which clips are joined."})
    batch_size: int = field(default=16, metadata={"help": "Utterances recognised together."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the scores; it is replaced."})


def load_utterances(
    arguments: EvaluateArguments, processor: ProcessorMixin, samples_per_logit: int
) -> UtteranceDataset:
    """Returns the utterances that `arguments` name."""
    needs_speakers = bool(arguments.speaker_id) or arguments.concatenate_max > 1
    columns = ("audio", "text", "speaker_id") if needs_speakers else ("audio", "text")
    corpus = load_corpus(arguments.dataset, split=arguments.split, required_columns=columns)
    if arguments.speaker_id:
        corpus = select_speakers(corpus, arguments.speaker_id)
    is_joined = arguments.concatenate_max > 1
    clips = decode_clips(corpus, processor, samples_per_logit=samples_per_logit, is_joined=is_joined)
    concatenate = (arguments.concatenate_min, arguments.concatenate_max)
    return UtteranceDataset(clips, processor, concatenate=concatenate, seed=arguments.seed)


def main(argv: list[str] | None = None) -> None:
    # Arguments
    arguments, decoding = parse_arguments(EvaluateArguments, DecodingArguments, argv=argv)

    # Model and adapter
    adapters = {ADAPTER_NAME: arguments.adapter} if arguments.adapter else {}
    model, processor = load_recognizer(arguments.model_name_or_path, adapters)
    decoder = build_decoder(decoding, processor.tokenizer)

    # Data
    dataset = load_utterances(arguments, processor, samples_per_logit=model.config.inputs_to_logits_ratio)

    # Evaluate
    scores = evaluate_dataset(model, processor, dataset, batch_size=arguments.batch_size, decoder=decoder)

    # Write
    if not PartialState().is_main_process:
        return
    print(format_score_table(scores))
    if arguments.output_file:
        source = {
            "model": arguments.model_name_or_path,
            "adapter": arguments.adapter,
            "dataset": arguments.dataset,
            "split": arguments.split,
        }
        path = Path(arguments.output_file)
        with write_whole(path.parent) as folder:
            (folder / path.name).write_text(json.dumps({**scores, **source}, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
