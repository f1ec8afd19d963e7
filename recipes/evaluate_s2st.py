"""Scores a translation model: WER of what it hears, BLEU and chrF of what it means, errors of its units, its health.

python recipes/evaluate_s2st.py --model_name_or_path outputs/s2st --dataset outputs/units_es --output_file scores.json

With --adapter: without it and with it, side by side.
"""

import json
import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin

from data.annotations import STYLES
from data.corpora import DEFAULT_SPLIT
from data.text import find_language
from data.translation_metrics import score_bleu
from data.translation_utterances import TranslationUtterances, read_translations
from inference.translation_scoring import Translation, load_translator, score_translations, translate_dataset
from modeling.adapters import adapters_off
from modeling.files import write_text
from publishing.report import format_table
from training.arguments import parse_arguments
from training.corpus_arguments import load_split
from training.endings import run_main
from training.health import HealthMeter, find_alarms
from training.translation import make_label_space

logger = logging.getLogger(__name__)

ADAPTER_NAME = "adapter"
IN_PERCENT = ("wer", "cer", "unit_error_rate", "share")  # ends of the names of figures from 0 to 1


@dataclass
class EvaluateTranslationArguments:
    """What is evaluated, and on what."""

    model_name_or_path: str = field(metadata={"help": "Translation model: a folder or a Hub name."})
    dataset: str = field(
        metadata={"help": "synthetic_s2st/es or /ko, a folder, a manifest (.tsv as StreamSpeech's) or a Hub name."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Adapter of this model: a folder or a Hub name."})
    allow_base_mismatch: bool = field(
        default=False, metadata={"help": "Take an adapter that was made for another base; it is recorded."}
    )
    split: str = field(default="test", metadata={"help": "Split of the dataset."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the transcripts. Default: text."})
    transcript_style: str = field(
        default="plain", metadata={"help": "What in a transcript is no speech.", "choices": list(STYLES)}
    )
    channel: str = field(default="mix", metadata={"help": "Of every recording: mix, left, right or a number from 1."})
    num_beams: int = field(default=1, metadata={"help": "Beams of the translation's search; 1 is greedy."})
    num_unit_beams: int = field(default=1, metadata={"help": "Beams of the search over units."})
    batch_size: int = field(default=16, metadata={"help": "Utterances translated together."})
    output_file: str | None = field(
        default=None, metadata={"help": "JSON file for scores, health and every translation; it is replaced."}
    )


def load_scored_rows(
    arguments: EvaluateTranslationArguments, model: PreTrainedModel, processor: ProcessorMixin
) -> TranslationUtterances:
    """Returns the utterances that `arguments` name."""
    corpus = load_split(arguments, arguments.split, required_columns=("audio", "text", "target_text"))
    if arguments.split == DEFAULT_SPLIT:
        logger.warning("`split` is %r, which recipes train on: such scores say nothing of new speech.", DEFAULT_SPLIT)
    clips = read_translations(corpus, processor, make_label_space(model.config), is_evaluation=True)
    return TranslationUtterances(clips, processor)


def evaluate_state(
    arguments: EvaluateTranslationArguments,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: TranslationUtterances,
) -> tuple[dict[str, float], list[Translation]]:
    """Returns scores and health figures of the model as it is, and what it says."""
    meter = HealthMeter()
    translations = translate_dataset(
        model,
        processor,
        dataset,
        batch_size=arguments.batch_size,
        num_beams=arguments.num_beams,
        num_unit_beams=arguments.num_unit_beams,
        observe=meter.update,
    )
    scores = score_translations(translations, dataset, processor, unit_offset=model.config.unit_offset)
    return scores | meter.compute(), translations


def format_figures(figures: dict[str, dict[str, float]]) -> str:
    """Returns the figures of each state of the model as a table, rates in percent."""
    rows = []
    for name in next(iter(figures.values())):
        is_rate = name.endswith(IN_PERCENT)
        cells = {
            state: f"{100 * of_state[name]:.2f} %" if is_rate else f"{of_state[name]:.2f}"
            for state, of_state in figures.items()
        }
        rows.append({"figure": name.replace("_", " "), **cells})
    return format_table(rows)


def write_evaluation(
    arguments: EvaluateTranslationArguments,
    figures: dict[str, dict[str, float]],
    translations: dict[str, list[Translation]],
    dataset: TranslationUtterances,
    processor: ProcessorMixin,
) -> None:
    """Writes figures, alarms, the signatures of BLEU and chrF, and what was said of every utterance."""
    references = dataset.target_references
    language = find_language(processor.target_tokenizer)
    signatures = {
        name: value
        for name, value in score_bleu(references, references, language=language).items()
        if name.endswith("signature")
    }
    utterances = [
        {"name": dataset.names[row], "text": dataset.references[row], "target_text": references[row]}
        | {state: asdict(of_state[row]) for state, of_state in translations.items()}
        for row in range(len(dataset))
    ]
    content = {
        "figures": figures,
        "alarms": {state: find_alarms(of_state) for state, of_state in figures.items()},
        **signatures,
        "arguments": asdict(arguments),
        "utterances": utterances,
    }
    write_text(arguments.output_file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    # Arguments
    (arguments,) = parse_arguments(EvaluateTranslationArguments, argv=argv)

    # Model and adapter
    adapters = {ADAPTER_NAME: arguments.adapter} if arguments.adapter else {}
    model, processor = load_translator(
        arguments.model_name_or_path, adapters, allow_base_mismatch=arguments.allow_base_mismatch
    )

    # Data
    dataset = load_scored_rows(arguments, model, processor)

    # Evaluate
    states = {"unadapted": adapters_off(model), "adapted": nullcontext()} if adapters else {"model": nullcontext()}
    figures, translations = {}, {}
    for state, context in states.items():
        with context:
            figures[state], translations[state] = evaluate_state(arguments, model, processor, dataset)

    # Write
    if PartialState().is_main_process:
        print(format_figures(figures))
        for alarm in find_alarms(figures[state]):
            logger.warning("%s", alarm)
        if arguments.output_file:
            write_evaluation(arguments, figures, translations, dataset, processor)


if __name__ == "__main__":
    run_main(main)
