"""Which speech a recipe uses, as flags, and its rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data.annotations import STYLES, read_transcripts
from data.corpora import load_corpus


@dataclass
class CorpusArguments:
    """Which speech is used and how its clips are joined."""

    dataset: str = field(
        metadata={
            "help": "`synthetic`, a folder with metadata.csv, a manifest (.csv .tsv .jsonl .parquet) or a Hub name."
        }
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset that has several, such as a language."}
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column of the transcripts. Default: text, sentence, transcription or transcript."},
    )
    transcript_style: str = field(
        default="plain",
        metadata={
            "help": "What in a transcript is no speech: nothing (plain), what stands in brackets, or the marks of a "
            "corpus; kspon takes what was said of KsponSpeech's pairs, kspon_spelling what is written.",
            "choices": list(STYLES),
        },
    )
    channel: str = field(default="mix", metadata={"help": "Of every recording: mix, left, right or a number from 1."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    concatenate_min: int = field(default=1, metadata={"help": "Fewest clips of one speaker joined to an utterance."})
    concatenate_max: int = field(default=1, metadata={"help": "Most clips of one speaker joined to an utterance."})

    @property
    def concatenate(self) -> tuple[int, int]:
        """Fewest and most clips of an utterance."""
        return self.concatenate_min, self.concatenate_max


def load_split(arguments, split: str, *, streaming: bool = False, required_columns: Sequence[str] = ("audio",)):
    """
    Returns the rows of one split with their transcripts in the style that the arguments name.

    Args:
        arguments: With `dataset`, `dataset_config`, `text_column`, `channel` and `transcript_style`.
        split, streaming, required_columns: As for [`load_corpus`].

    Raises:
        ValueError: As [`load_corpus`] and [`read_transcripts`].
    """
    source = {"dataset_config": arguments.dataset_config, "text_column": arguments.text_column}
    options = {"required_columns": required_columns, "streaming": streaming, "channel": arguments.channel}
    corpus = load_corpus(arguments.dataset, split=split, **source, **options)
    return read_transcripts(corpus, arguments.transcript_style, name=f"{arguments.dataset}, split {split}")
