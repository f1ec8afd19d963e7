"""Arguments of the recipes: dataclasses, on the command line and in a YAML file alike."""

import argparse
import copy
import difflib
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from training.processes import choose_device, describe_processes, join_processes

logger = logging.getLogger(__name__)

# Whose loggers `--log_level` sets; a recipe's own is `__main__`.
ROOMS = ("data", "inference", "modeling", "publishing", "training", "recipes", "__main__")
NULL_TAG = "tag:yaml.org,2002:null"
# Of the Trainer's flags, those that a recipe's `--help` shows: what most runs need.
TRAINER_ESSENTIALS = {
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "use_cpu",
    "seed",
    "eval_strategy",
    "save_strategy",
    "load_best_model_at_end",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
}


class RecipeParser(HfArgumentParser):
    """
    Shows a recipe's own flags with `--help`, and with `--help_all` the Trainer's after them.

    Args:
        argument_types: Dataclasses, as for `HfArgumentParser`.
    """

    def __init__(self, argument_types: Sequence[type]):
        super().__init__(argument_types, allow_abbrev=False, formatter_class=_FlagFormatter)
        self.add_argument("--config", default=None, help="YAML file of flags; a flag given beside it overrules it.")
        self._shows_all = False
        self._trainer_flags = self._separate_trainer_flags(argument_types)
        required = [f"{action.option_strings[0]} {action.dest.upper()}" for action in self._actions if action.required]
        self.usage = " ".join(["%(prog)s [--config FILE.yaml]", *required, "[--flag VALUE ...]"])

    def _separate_trainer_flags(self, argument_types: Sequence[type]) -> argparse._ArgumentGroup | None:
        """Moves what `TrainingArguments` alone declares into a group of its own; none without such arguments."""
        names = {name for argument_type in argument_types for name in list_trainer_flags(argument_type)}
        if not names:
            return None
        self.add_argument(
            "--help_all", action=_ShowAll, nargs=0, dest=argparse.SUPPRESS, help="Show the flags of the Trainer too."
        )
        group = self.add_argument_group("flags of the Trainer, of transformers")
        group._group_actions = [action for action in self._actions if action.dest in names]
        self._optionals._group_actions = [action for action in self._actions if action.dest not in names]
        return group

    def format_help(self) -> str:
        """Returns the help, with the Trainer's flags if they are asked for."""
        groups = self._action_groups
        if not self._shows_all:
            self._action_groups = [group for group in groups if group is not self._trainer_flags]
        try:
            return super().format_help()
        finally:
            self._action_groups = groups


class _FlagFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag by one of its spellings, and its default where it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class _ShowAll(argparse.Action):
    """Prints the help with all flags, and ends."""

    def __call__(self, parser: RecipeParser, *_args, **_kwargs):
        parser._shows_all = True
        parser.print_help()
        parser.exit()


def list_trainer_flags(argument_type: type) -> set[str]:
    """Returns the flags that a dataclass has from `TrainingArguments` as they are, less those that most runs need."""
    if not issubclass(argument_type, TrainingArguments):
        return set()
    ours = [kind for kind in argument_type.__mro__ if issubclass(kind, TrainingArguments)]
    declared = {
        name for kind in ours if kind is not TrainingArguments for name in vars(kind).get("__annotations__", ())
    }
    return {field.name for field in fields(argument_type)} - declared - TRAINER_ESSENTIALS


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
    parser = RecipeParser(argument_types)
    flags = [flag.lstrip("-") for action in parser._actions for flag in action.option_strings]
    tokens = mark_files(sys.argv[1:] if argv is None else argv, known=flags)
    config = _find_config(tokens)
    from_file = read_config_file(config, known=flags) if config else []
    for token in tokens:
        if token.startswith("--") and token[2:].split("=")[0] not in flags:
            raise ValueError(f"`{token.split('=')[0]}` is not a flag of this recipe.{_suggest(token[2:], flags)}")
    *arguments, _, unknown = parser.parse_args_into_dataclasses([*from_file, *tokens], return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Every value must follow a flag, got {unknown}. `--help` lists the flags.")
    state = join_processes()
    for training_args in arguments:
        if isinstance(training_args, TrainingArguments):
            set_log_level(training_args)
        if isinstance(training_args, TrainingArguments) and state.is_main_process:
            logger.warning("Runs as %s.", describe_processes(state, training_args.mixed_precision))
    return tuple(arguments)


def set_log_level(training_args: TrainingArguments) -> None:
    """Has this project heed `--log_level` too: with `error`, neither notes nor warnings are shown."""
    level = logging.NOTSET if training_args.log_level == "passive" else training_args.get_process_log_level()
    for room in ROOMS:
        logging.getLogger(room).setLevel(level)


def mark_files(tokens: Sequence[str], *, known: Sequence[str]) -> list[str]:
    """
    Returns the command line with `./` before each file whose name looks like a flag, and without a `--`.

    Args:
        tokens: The command line.
        known: Names of the flags; behind `--` there are none.
    """
    marked, is_value = [], False
    for token in tokens:
        if token == "--" and not is_value:
            is_value = True
            continue
        is_flag = not is_value and token.lstrip("-").split("=")[0] in known
        marked.append(f"./{token}" if token.startswith("-") and not is_flag and Path(token).exists() else token)
    return marked


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


def read_config_file(path: str | Path, *, known: Sequence[str]) -> list[str]:
    """
    Returns the entries of a YAML file as command-line tokens, each value as it is written.

    Args:
        path: The file: one mapping of flag to value.
        known: Names of the flags that exist.

    Raises:
        ValueError: The file is missing, no mapping, or has a key that is no flag or there twice.

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
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`config` must be a YAML file, got {path}, which does not parse: {error}") from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "single value"
        raise ValueError(f"`config` must map flags to values, got a {kind} in {path}.")
    tokens, seen = [], set()
    for key, value in ((key.value, value) for key, value in node.value):
        if key not in known:
            raise ValueError(f"`{key}` in {path} is not a flag of this recipe.{_suggest(str(key), known)}")
        if key in seen:
            raise ValueError(f"`{key}` must stand in {path} once, got it twice. Remove one.")
        seen.add(key)
        tokens += _to_tokens(key, value)
    return tokens


def _to_tokens(key: str, node: yaml.Node) -> list[str]:
    if isinstance(node, yaml.SequenceNode):
        return [f"--{key}", *(_read_text(item) for item in node.value)]
    if node.tag == NULL_TAG:
        return []
    # With "=", because argparse takes "-1e-4" after a blank for a flag.
    return [f"--{key}={_read_text(node)}"]


def _read_text(node: yaml.Node) -> str:
    """Returns a scalar as it is written: YAML would read a speaker 010 as 8, 1.10 as 1.1, no as false."""
    return node.value if isinstance(node, yaml.ScalarNode) else json.dumps(_read_json(node))


def _read_json(node: yaml.Node) -> object:
    """Returns what a mapping such as `lr_scheduler_kwargs` holds: as in JSON, with text that is not quoted."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: _read_json(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_read_json(item) for item in node.value]
    if node.style is None:
        with suppress(json.JSONDecodeError):
            return json.loads(node.value)
    return node.value
