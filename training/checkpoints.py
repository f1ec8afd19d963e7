"""Checkpoints of a training: whether one is whole, and which one a resumed run starts from."""

import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Returns the checkpoints in `folder`, the newest first."""
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {path: int(match[1]) for path in found if (match := re.search(r"-(\d+)$", path.name))}
    return sorted(steps, key=steps.get, reverse=True)


def list_model_weights(checkpoint: Path) -> list[Path]:
    """Returns the files of weights that a checkpoint of a whole model must have, by its index if it has one."""
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if (checkpoint / SAFE_WEIGHTS_NAME).exists() or not index.exists():
        return [checkpoint / SAFE_WEIGHTS_NAME]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [checkpoint / name for name in sorted(set(names))]


def find_checkpoint_damage(checkpoint: Path, list_weights: Callable[[Path], Iterable[Path]]) -> str | None:
    """
    Returns what of a checkpoint is missing or cut off, None if it is whole; says nothing of the training's state.

    Args:
        checkpoint: Its folder.
        list_weights: Returns the safetensors files that a checkpoint must have.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{TRAINER_STATE_NAME} is missing or cut off"
    try:
        for path in list_weights(checkpoint):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return f"weights are missing or cut off ({error})"
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, "rng_state*.pth"):
        for path in checkpoint.glob(name):
            if path.is_file() and not zipfile.is_zipfile(path):  # the index of torch's files is at their end
                return f"{path.name} is cut off"
    return None


def find_checkpoint(
    wanted: str | Path | bool | None,
    folder: str | Path,
    *,
    list_weights: Callable[[Path], Iterable[Path]],
    state_names: Sequence[str],
) -> Path | None:
    """
    Returns the checkpoint that a run starts from: the one named, or the newest whole one; None to start anew.

    What is passed over is logged, and that nothing was found.

    Args:
        wanted: As `resume_from_checkpoint`.
        folder: Where the run's checkpoints are.
        list_weights: As for [`find_checkpoint_damage`].
        state_names: Files of the training's state that a checkpoint must have.

    Raises:
        ValueError: The checkpoint named is not whole, or it or all that are whole lack a state.
    """
    if not wanted:
        return None
    candidates = list_checkpoints(folder) if wanted is True else [Path(wanted)]
    passed_over = []
    for checkpoint in candidates:
        missing = [name for name in state_names if not (checkpoint / name).exists()]
        if damage := find_checkpoint_damage(checkpoint, list_weights):
            passed_over.append((checkpoint, damage))
        elif missing:
            passed_over.append((checkpoint, f"no {', '.join(missing)}"))
        else:
            for path, reason in passed_over:
                logger.warning("%s is passed over (%s); the run goes on from %s.", path, reason, checkpoint.name)
            return checkpoint
    stateless = [(path, reason) for path, reason in passed_over if reason.startswith("no ")]
    if stateless:
        raise ValueError(
            f"`resume_from_checkpoint` must have the state of the training, got {stateless[0][0]} with "
            f"{stateless[0][1]}: `save_only_model` or another number of processes made it. Give "
            "`--resume_without_state` to go on from its weights with a fresh optimizer and schedule."
        )
    if wanted is not True:
        raise ValueError(
            f"`resume_from_checkpoint` must be a whole checkpoint, got {wanted}, of which {passed_over[0][1]}. Name "
            "another one, or give true for the newest whole one."
        )
    found = "; ".join(f"of {path.name} {reason}" for path, reason in passed_over)
    logger.warning("No whole checkpoint is in %s%s; the run starts anew.", folder, f" ({found})" if found else "")
    return None
