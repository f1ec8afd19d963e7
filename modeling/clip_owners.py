"""Which prompt each clip of audio belongs to: Qwen2-Audio's batches have prompts, and its tower has a row a clip.

prompts  "a [clip 0] b [clip 1]"   "[clip 2]"         rows of the batch  0, 1
tower     clip 0, clip 1,           clip 2            row of each clip   0, 0, 1
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from .frame_lengths import find_counter

MASK_NAME = "feature_attention_mask"
TOWER_PARTS = ("audio_tower", "multi_modal_projector")
_of_thread = threading.local()  # of the calls that run, the outermost first


@dataclass(frozen=True)
class ClipOwners:
    """
    The clips of one call.

    Args:
        model: Has `_get_feat_extract_output_lengths`, itself or in a part.
        input_ids: Prompts `(batch, tokens)`, a placeholder for each frame of a clip, or for each clip.
        mask: Frames of features that are no padding `(clips, frames)`.
    """

    model: nn.Module
    input_ids: torch.Tensor
    mask: torch.Tensor

    @property
    def num_rows(self) -> int:
        """Number of prompts."""
        return len(self.input_ids)

    @cached_property
    def row_of_clip(self) -> list[int]:
        """
        The prompt of each clip.

        Raises:
            ValueError: The placeholders are not those of whole clips.
        """
        counts = (self.input_ids == self.model.config.audio_token_id).sum(-1).tolist()
        lengths = find_counter(self.model)(self.mask.sum(-1))
        lengths = (lengths[-1] if isinstance(lengths, tuple) else lengths).tolist()
        if sum(counts) != sum(lengths) and sum(counts) == len(lengths):
            lengths = [1] * len(lengths)  # a placeholder a clip, which the model widens itself
        rows, clips = [], iter(lengths)
        for row, count in enumerate(counts):
            while count > 0 and (length := next(clips, None)) is not None:
                rows.append(row)
                count -= length
            if count:
                break
        if len(rows) != len(lengths):
            raise ValueError(
                f"`input_ids` must have placeholders for whole clips, got {counts} in its rows, clips of {lengths}. "
                "Make both with this checkpoint's own processor."
            )
        return rows


def find_clip_owners() -> ClipOwners | None:
    """Returns the clips of the model that runs in this thread, `None` if it has none."""
    calls = getattr(_of_thread, "calls", ())
    return calls[-1] if calls else None


def is_in_tower(module_name: str) -> bool:
    """Whether a module has a row for each clip, by its name in a model whose batches have prompts."""
    return any(part in module_name.split(".") for part in TOWER_PARTS)


def has_clips(model: nn.Module) -> bool:
    """Whether batches of `model` have prompts with clips."""
    arguments = inspect.signature(model.forward).parameters
    return MASK_NAME in arguments and "input_ids" in arguments


@contextmanager
def clips_followed(model: nn.Module, is_mine: Callable[[], bool]) -> Iterator[None]:
    """
    Notes the clips of each call of `model` inside.

    Args:
        model: Hooks are on those of its parts that get prompts and clips.
        is_mine: Whether a call is of the context that asked for it; other threads may call the model meanwhile.
    """
    handles = []
    for part in model.modules() if has_clips(model) else ():
        if hasattr(part, "main_input_name") and has_clips(part):
            handles.append(part.register_forward_pre_hook(partial(_enter, is_mine=is_mine), with_kwargs=True))
            handles.append(part.register_forward_hook(partial(_leave, is_mine=is_mine), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_clip_owners(model: nn.Module, arguments: Mapping[str, object]) -> ClipOwners | None:
    """Returns the clips among the arguments of a call of `model`, if there are some."""
    input_ids, mask = arguments.get("input_ids"), arguments.get(MASK_NAME)
    return None if input_ids is None or mask is None else ClipOwners(model, input_ids, mask)


def _enter(model: nn.Module, args: tuple, kwargs: dict | None = None, *, is_mine: Callable[[], bool]) -> None:
    if not is_mine():  # nor are there `kwargs` for a thread that runs while the hook is being put up
        return
    arguments = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
    if (owners := read_clip_owners(model, arguments)) is not None:
        _of_thread.calls = (*getattr(_of_thread, "calls", ()), owners)


def _leave(model: nn.Module, _args: tuple, _output: object, *, is_mine: Callable[[], bool]) -> None:
    calls = getattr(_of_thread, "calls", ())
    if is_mine() and calls and calls[-1].model is model:
        _of_thread.calls = calls[:-1]
