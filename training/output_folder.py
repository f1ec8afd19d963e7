"""The output folder of a run: what it may hold already, and that one run at a time writes to it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import TrainingArguments
from transformers.utils import CONFIG_NAME

from modeling.adapters import ADAPTER_WEIGHTS_NAME
from modeling.files import find_whole, remove_stale_scratch

LOCK_NAME = ".lock"


def check_output_dir(output_dir: str | Path, *, is_resumed: bool, is_model: bool = False) -> None:
    """
    Makes sure that no adapter is overwritten, and that adapter and model do not get into one folder.

    Args:
        output_dir: The folder.
        is_resumed: Whether what a run like this one has left may be there.
        is_model: Whether the run makes a whole model. Default: an adapter.

    Raises:
        ValueError: `output_dir` holds the other kind, or an adapter or a model and the run is not resumed.
    """
    has_adapter = any(find_whole(output_dir, name).exists() for name in (ADAPTER_WEIGHTS_NAME, ADAPTER_CONFIG_NAME))
    has_model = find_whole(output_dir, CONFIG_NAME).exists()
    if has_model if not is_model else has_adapter:
        there, made = ("an adapter", "model") if is_model else ("a model", "adapter")
        raise ValueError(
            f"`output_dir` must not hold {there}, got {output_dir}. Choose a folder for the {made} alone."
        )
    if not is_resumed and (has_adapter or has_model):
        made = "model" if is_model else "adapter"
        raise ValueError(
            f"`output_dir` must not hold another {made}, got {output_dir}. Choose another folder or remove that one."
        )


@contextmanager
def claim_output_dir(arguments: TrainingArguments) -> Iterator[None]:
    """
    Keeps other runs out of `output_dir` meanwhile, and removes what killed runs have left half-written there.

    Raises:
        ValueError: Another run is at it.
    """
    if arguments.process_index:
        yield  # the first process claims it for all
        return
    folder = Path(arguments.output_dir)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(
            f"`output_dir` must not be in use by another run, got {folder}. Wait for it or choose another folder."
        ) from error
    try:
        remove_stale_scratch(folder)
        yield
    finally:
        (folder / LOCK_NAME).unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):  # a run that failed early leaves nothing
                os.rmdir(folder)
