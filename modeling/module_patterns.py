"""Regular expressions of unknown origin against module names, in bounded time."""

import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft import PeftConfig
from torch import nn

try:  # transformers requires it
    import regex
except ImportError:
    regex = None

# Entries of configurations that PEFT matches against whole names.
WHOLE_NAME_ENTRIES = ("target_modules", "exclude_modules")
# Entries that it matches in forms of its own, as keys or in a list.
OTHER_ENTRIES = ("layers_pattern", "rank_pattern", "alpha_pattern")
# A regular expression with at most so many of these characters, and no repeated group, takes at most quadratic time.
REPEATING = re.compile(r"[*+?{]")
REPEATED_GROUP = re.compile(r"\)[*+?{]")
MAX_REPEATS = 2
COUNTS = re.compile(r"\{(\d*),?(\d*)\}")
MAX_COUNTS = 1_000
MAX_PATTERN = 10_000  # characters
PATTERN_SECONDS = 5  # for all names together
SHOWN = 200  # characters of a pattern in a message


@contextmanager
def bounded_patterns(config: PeftConfig, model: nn.Module) -> Iterator[None]:
    """
    Inside, the patterns of `config` take PEFT no longer than their length says, and match what they matched before.

    Python's `re`, with which PEFT matches, can take for ever and has no time limit; `regex` has one. It finds the
    names that a pattern means, and PEFT gets these names in its place.

    Raises:
        ValueError: A pattern is invalid, takes too long, is not simple where only a simple one may be, or
            `target_modules` matches nothing.
    """
    before = {}
    names = [name for name, _ in model.named_modules() if name]
    try:
        for entry in OTHER_ENTRIES:
            for pattern in _list_patterns(getattr(config, entry, None)):
                _check_simple(entry, pattern)
        for entry in WHOLE_NAME_ENTRIES:
            pattern = getattr(config, entry, None)
            if isinstance(pattern, str) and not is_simple(_check_valid(entry, pattern)):
                matched = match_names(entry, pattern, names)
                before[entry] = pattern
                setattr(config, entry, "|".join(map(re.escape, matched)) or None)
                if entry == "target_modules" and not matched:
                    raise ValueError(f"`{entry}` must match a module of the model, got {pattern[:SHOWN]!r}.")
        yield
    finally:
        for entry, pattern in before.items():
            setattr(config, entry, pattern)


def match_names(entry: str, pattern: str, names: Sequence[str]) -> list[str]:
    """
    Returns the names that a regular expression matches as a whole.

    Args:
        entry: What it is in a configuration, for messages.
        pattern: The regular expression.
        names: Names of modules.

    Raises:
        ValueError: It takes longer than `PATTERN_SECONDS`, counts too far, or cannot be bounded because `regex` is not
            installed.
    """
    if regex is None:
        _check_simple(entry, pattern)
        return [name for name in names if re.fullmatch(pattern, name)]
    counts = [max(1, *(int(count or 0) for count in pair)) for pair in COUNTS.findall(pattern)]
    if math.prod(counts) > MAX_COUNTS:  # one in the other, they are written out before the time begins to count
        raise ValueError(f"`{entry}` must not count to more than {MAX_COUNTS} in braces, got {pattern[:SHOWN]!r}.")
    end = time.monotonic() + PATTERN_SECONDS
    try:
        compiled = regex.compile(pattern)
        return [name for name in names if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 1e-3))]
    except TimeoutError as error:
        raise ValueError(
            f"`{entry}` must be matched in {PATTERN_SECONDS} seconds, got {pattern[:SHOWN]!r}. Name the modules, or "
            "repeat single characters only."
        ) from error
    except (regex.error, RecursionError, OverflowError) as error:  # there are expressions that `re` alone takes
        raise _invalid(entry, pattern, error) from error


def is_simple(pattern: str) -> bool:
    """Whether a valid regular expression cannot take more than quadratic time."""
    return len(REPEATING.findall(pattern)) <= MAX_REPEATS and not REPEATED_GROUP.search(pattern)


def _list_patterns(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [str(pattern) for pattern in value or ()]


def _check_simple(entry: str, pattern: str) -> None:
    if not is_simple(_check_valid(entry, pattern)):
        raise ValueError(
            f"`{entry}` must repeat single characters only, at most {MAX_REPEATS} times, got {pattern[:SHOWN]!r}. "
            "Name the modules."
        )


def _check_valid(entry: str, pattern: str) -> str:
    try:
        if len(pattern) > MAX_PATTERN:
            raise OverflowError(f"{len(pattern)} characters")
        re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise _invalid(entry, pattern, error) from error
    return pattern


def _invalid(entry: str, pattern: str, error: Exception) -> ValueError:
    return ValueError(f"`{entry}` must be names or a regular expression, got {str(pattern)[:SHOWN]!r} ({error}).")
