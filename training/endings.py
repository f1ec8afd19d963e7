"""How a recipe ends when it fails: with one clear line where the user can act, with a traceback where none can."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]
ARGUMENTS_FILE = ROOT / "training" / "arguments.py"
# Exit codes: argparse's own of a wrong command line, and of what the system refused.
WRONG_INPUT, REFUSED_BY_SYSTEM = 2, 1
# Set to 1, it shows the traceback of every error.
TRACEBACK_VARIABLE = "RECIPE_TRACEBACK"


def run_main(main: Callable[[], int | None]) -> None:
    """
    Ends the process with what `main` returns as exit code, or with one line on standard error.

    One line and exit code 2 for an error that this project raised on purpose about what a user passed, or that the
    command line caused anywhere; one line and exit code 1 for what the system refused, such as a file or the network.
    What is unexpected keeps its traceback, and so does everything with `RECIPE_TRACEBACK=1`.

    Under `accelerate launch --quiet` the line is the last one too. Without `--quiet`, accelerate adds a traceback of
    its own launcher; with several processes, torchrun adds one in either case (accelerate 1.15, torch 2.13).
    """
    try:
        code = main()
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1" or not is_expected(error):
            raise
        print(f"error: {describe_error(error)}", file=sys.stderr)
        code = REFUSED_BY_SYSTEM if isinstance(error, OSError) else WRONG_INPUT
    sys.exit(code)


def is_expected(error: ValueError | OSError) -> bool:
    """Returns whether `error` is about what the user passed or what the system refused, rather than a fault here."""
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if any(Path(frame.filename) == ARGUMENTS_FILE for frame in frames):
        return True  # libraries judge values of flags too
    return _is_own(error.__traceback__) and frames[-1].line.startswith("raise")


def _is_own(trace: TracebackType) -> bool:
    """Whether the innermost frame is of this project and not of what is installed inside its folder."""
    while trace.tb_next:
        trace = trace.tb_next
    path = Path(trace.tb_frame.f_code.co_filename)
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts


def describe_error(error: ValueError | OSError) -> str:
    """Returns what is wrong in one line."""
    return " ".join(str(error).split()) or type(error).__name__
