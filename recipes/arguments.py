"""Arguments of the recipes: dataclasses, on the command line and in a YAML file alike."""

import difflib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from data.annotations import STYLES
from recipes.processes import choose_device, describe_processes, join_processes

logger = logging.getLogger(__name__)


@dataclass
class CorpusArguments:
    """Which speech is used and how its clips are joined."""

    dataset: str = field(
        metadata={
            "help": "`synthetic`, a folder with metadata.csv, a manifest (.csv .tsv .jsonl .parquet) or a Hub name."
        }
    )
    transcript_style: str = field(
        default="plain",
        metadata={
            "help": "What in a transcript is no speech: nothing (plain), what stands in brackets, or the marks of a "
            "corpus; kspon takes what was said of KsponSpeech's pairs, kspon_spelling what is written.",
            "choices": list(STYLES),
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    concatenate_min: int = field(default=1, metadata={"help": "Fewest clips of one speaker joined to an utterance."})
    concatenate_max: int = field(default=1, metadata={"help": "Most clips of one speaker joined to an utterance."})

    @property
    def concatenate(self) -> tuple[int, int]:
        """Fewest and most clips of an utterance."""
        return self.concatenate_min, self.concatenate_max


def parse_arguments(*argument_types: type, argv: Sequence[str] | None = None) -> tuple:
    """
    Returns one instance of each dataclass, from `--config FILE.yaml` and flags; a flag overrules the file.

    The file's entries become flags before the user's own, so both have the same types, choices and checks. The
    processes of a launcher are joined on the way, and a training says what it runs on.

    Args:
        argument_types: Dataclasses, as for `HfArgumentParser`.
        argv: Tokens; default: the command line.

    Raises:
        ValueError: The file is missing or not a mapping, a key or flag is unknown, or the processes are not as many as
            the launcher was asked for.
    """
    choose_device()
    parser = HfArgumentParser(argument_types, allow_abbrev=False)
    parser.add_argument("--config", default=None, help="YAML file of flags; a flag given beside it overrules it.")
    tokens = list(sys.argv[1:] if argv is None else argv)
    flags = [flag.lstrip("-") for action in parser._actions for flag in action.option_strings]
    config = _find_config(tokens)
    from_file = read_config(config, known=flags) if config else []
    for token in tokens:
        if token.startswith("--") and token[2:].split("=")[0] not in flags:
            raise ValueError(f"`{token.split('=')[0]}` is not a flag of this recipe.{_suggest(token[2:], flags)}")
    *arguments, _, unknown = parser.parse_args_into_dataclasses([*from_file, *tokens], return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Every value must follow a flag, got {unknown}. `--help` lists the flags.")
    state = join_processes()
    for training_args in arguments:
        if isinstance(training_args, TrainingArguments) and state.is_main_process:
            logger.warning("Runs as %s.", describe_processes(state, training_args.mixed_precision))
    return tuple(arguments)


def _find_config(tokens: list[str]) -> str | None:
    for index, token in enumerate(tokens):
        if token.startswith("--config="):
            return token.removeprefix("--config=")
        if token == "--config" and index + 1 < len(tokens):
            return tokens[index + 1]
    return None


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.split("=")[0], known, n=1)
    return f" Did you mean `{close[0]}`?" if close else " `--help` lists the flags."


def read_config(path: str | Path, *, known: Sequence[str]) -> list[str]:
    """
    Returns the entries of a YAML file as command-line tokens.

    Args:
        path: The file: one mapping of flag to value.
        known: Names of the flags that exist.

    Raises:
        ValueError: The file is missing, no mapping, or has a key that is no flag.

    Example:

    ```yaml
    learning_rate: 1e-4
    concatenate_max: 4
    ```
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`config` must be a YAML file, got {path}, which does not exist.")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"`config` must be a YAML file, got {path}, which does not parse: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"`config` must map flags to values, got a {type(entries).__name__} in {path}.")
    tokens = []
    for key, value in entries.items():
        if key not in known:
            raise ValueError(f"`{key}` in {path} is not a flag of this recipe.{_suggest(str(key), known)}")
        tokens += _to_tokens(key, value)
    return tokens


def _to_tokens(key: str, value) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    # With "=", because argparse takes "-1e-4" after a blank for a flag.
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]
