"""Converts KoSpeech's pickled files, without KoSpeech and without running what they say.

A recogniser and its vocabulary become a folder for `from_pretrained`:

python recipes/convert_kospeech.py --checkpoint model.pt --vocabulary vocab.csv --output_dir outputs/kospeech

An adapter file becomes an adapter folder of a converted base, and an adapter folder becomes such a file:

python recipes/convert_kospeech.py --adapter_checkpoint alice.pt --model_name_or_path outputs/kospeech \\
    --output_dir outputs/alice
python recipes/convert_kospeech.py --adapter outputs/alice --output_file alice.pt
"""

from dataclasses import dataclass, field

from converters.kospeech import convert_adapter, convert_recognizer, export_adapter
from training.arguments import parse_arguments
from training.endings import run_main

# What can be converted, and the arguments that each needs.
PARTNERS = {
    "checkpoint": ("vocabulary", "output_dir"),
    "adapter_checkpoint": ("model_name_or_path", "output_dir"),
    "adapter": ("output_file",),
}


@dataclass
class ConversionArguments:
    """What is converted: a checkpoint, an adapter file or an adapter folder."""

    checkpoint: str | None = field(default=None, metadata={"help": "KoSpeech's DeepSpeech2, saved by torch."})
    vocabulary: str | None = field(default=None, metadata={"help": "Its vocabulary: CSV with columns id, char, freq."})
    num_mel_bins: int | None = field(
        default=None, metadata={"help": "Feature bins of the checkpoint. Default: the usual number that fits it."}
    )
    adapter_checkpoint: str | None = field(default=None, metadata={"help": "KoSpeech's adapter file to convert."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Converted base of the adapter file: a folder or a Hub name."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Folder of a replacement adapter to convert back."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the model or the adapter."})
    output_file: str | None = field(default=None, metadata={"help": "KoSpeech's adapter file to write."})

    def __post_init__(self):
        given = [name for name in PARTNERS if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"One of {', '.join(PARTNERS)} must be given, got {' and '.join(given) or 'none'}.")
        for partner in PARTNERS[given[0]]:
            if not getattr(self, partner):
                raise ValueError(f"`{partner}` must be given with `{given[0]}`, got none.")


def main() -> None:
    """Runs the conversion that the arguments name."""
    (arguments,) = parse_arguments(ConversionArguments)
    if arguments.checkpoint:
        convert_recognizer(
            arguments.checkpoint,
            vocabulary=arguments.vocabulary,
            output_dir=arguments.output_dir,
            num_mel_bins=arguments.num_mel_bins,
        )
    elif arguments.adapter_checkpoint:
        convert_adapter(
            arguments.adapter_checkpoint,
            model_name_or_path=arguments.model_name_or_path,
            output_dir=arguments.output_dir,
        )
    else:
        export_adapter(arguments.adapter, output_file=arguments.output_file)
    print(f"Wrote {arguments.output_dir or arguments.output_file}.")


if __name__ == "__main__":
    run_main(main)
