"""Says what a checkpoint of speech translation holds, what of it a model would take, and how to start from it.

python recipes/inspect_checkpoint.py outputs/s2st
python recipes/inspect_checkpoint.py streamspeech.pt --config recipes/configs/train_s2st_synthetic.yaml
"""

import argparse
from collections import Counter
from pathlib import Path

import torch

from converters.streamspeech import DECODER_PREFIXES, KINDS, TranslationCheckpoint, read_checkpoint
from modeling import EchoStreamConfig, EchoStreamForSpeechToSpeechTranslation
from publishing.report import format_table
from training.arguments import parse_arguments
from training.endings import run_main
from training.start import StartArguments, StartReport, make_translation_config, plan_loading, recommend_start
from training.translation import TRANSLATION_ARGUMENTS

NUM_SHOWN = 5  # weights of another shape
HEAD_WEIGHTS = {"source_vocab_size": "asr_ctc_decoder.weight", "vocab_size": "st_ctc_decoder.weight"}


def describe_contents(checkpoint: TranslationCheckpoint) -> str:
    """Returns the parts of a checkpoint as a table: how many weights and numbers each has."""
    weights, numbers = Counter(), Counter()
    for name, tensor in checkpoint.state.items():
        part = next((prefix for prefix in DECODER_PREFIXES if name.startswith(prefix)), name.partition(".")[0] + ".")
        weights[part] += 1
        numbers[part] += tensor.numel()
    rows = [
        {"part": part.rstrip("."), "weights": str(count), "numbers": f"{numbers[part]:,}"}
        for part, count in weights.items()
    ]
    return format_table(rows)


def find_config(checkpoint: TranslationCheckpoint, path: str | None) -> EchoStreamConfig:
    """
    Returns the configuration of the model that would start.

    Args:
        checkpoint: Its own configuration is taken if none is named; it tells the vocabularies' sizes.
        path: YAML file of a training, as for `train_s2st.py`.
    """
    if path is None and checkpoint.config is not None:
        return checkpoint.config
    arguments = StartArguments()
    if path is not None:
        arguments = parse_arguments(*TRANSLATION_ARGUMENTS, argv=["--config", path, "--output_dir", "unused"])[0]
    sizes = {
        name: len(checkpoint.state[weight]) for name, weight in HEAD_WEIGHTS.items() if weight in checkpoint.state
    }
    defaults = {"source_vocab_size": arguments.vocab_size, "vocab_size": arguments.vocab_size}
    return make_translation_config(arguments, None, num_units=arguments.num_units, **{**defaults, **sizes})


def describe_plan(report: StartReport) -> str:
    """Returns in one line what a start would load, and the first weights of another shape."""
    line = (
        f"{report.start:<9} {len(report.loaded)} loaded, {len(report.skipped)} skipped, {len(report.mismatched)} of "
        f"another shape, {len(report.fresh)} new"
    )
    shown = [f"          {name}: {shapes}" for name, shapes in list(report.mismatched.items())[:NUM_SHOWN]]
    return "\n".join([line, *shown])


def parse_command(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the checkpoint and the configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="Folder or file of weights.")
    parser.add_argument("--config", help="YAML file of the training that would start. Default: the checkpoint's own.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    arguments = parse_command(argv)

    # Checkpoint
    checkpoint = read_checkpoint(arguments.checkpoint)
    facts = ", ".join(f"{name} {value:g}" for name, value in checkpoint.facts.items())
    print(f"{arguments.checkpoint}: {KINDS[checkpoint.kind]}{f' ({facts})' if facts else ''}")
    print(f"encoder: {checkpoint.encoder_kind or 'none'}\n\n{describe_contents(checkpoint)}\n")

    # Model
    with torch.device("meta"):
        model = EchoStreamForSpeechToSpeechTranslation(find_config(checkpoint, arguments.config))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    print(f"into {'the model of ' + arguments.config if arguments.config else 'its own model or the size mini'}:")
    for start in ("partial", "transfer"):
        print(describe_plan(plan_loading(shapes, checkpoint, start)))

    # Advice
    start, reason = recommend_start(checkpoint, shapes)
    given = "" if start in ("scratch", "resume") else f" --checkpoint {arguments.checkpoint}"
    print(f"\nrecommended: --start {start}{given}\nbecause {reason}.")


if __name__ == "__main__":
    run_main(main)
