"""Arguments of the recipes: dataclasses, on the command line and in a YAML file alike."""

import difflib
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from training.processes import choose_device, describe_processes, join_processes

logger = logging.getLogger(__name__)

NULL_TAG = "tag:yaml.org,2002:null"


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
        if isinstance(training_args, TrainingArguments) and state.is_main_process:
            logger.warning("Runs as %s.", describe_processes(state, training_args.mixed_precision))
    return tuple(arguments)


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
