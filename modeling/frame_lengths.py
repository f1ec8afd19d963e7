"""How many frames of each row are no padding, where a model does not say so to the module that an adapter wraps."""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

# Of audio language models, whose `attention_mask` is the text's, and of audio models.
FEATURE_MASKS = ("feature_attention_mask", "attention_mask")
AUDIO_INPUTS = ("input_features", "input_values")
COUNTER = "_get_feat_extract_output_lengths"


class FrameLengths:
    """
    Follows the calls of a model and tells the lengths of the batch that runs, at the rate of the audio tower's output.

    Hooks on a model and on its parts that take a mask of the features set the lengths for the time of a call:

        Qwen2-Audio   the model's `feature_attention_mask`, in `forward` and `generate`
        Whisper       the model's `attention_mask` in `forward`, the encoder's in `generate`, which calls the encoder
                      alone; without a mask, as its processor has it, all frames count

    The tower's own `_get_feat_extract_output_lengths` turns frames of features into frames of the tower. There is no
    reference to the model, so that copies and pickles of either hold what they should.
    """

    def __init__(self):
        self.lengths: torch.Tensor | None = None
        self.outer: list[torch.Tensor | None] = []  # of the calls around the one that runs
        self.handles: list = []

    def follow(self, model: nn.Module, module_name: str) -> None:
        """
        Starts to follow `model` for its module `module_name`.

        Raises:
            ValueError: No part of the model around the module takes a mask of the features whose frames it can count.
        """
        names = module_name.split(".")
        parts = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
        parts = [part for part in parts if _find_mask_argument(part) and _find_counter(part)]
        if not parts:
            raise ValueError(
                f"`target_modules` must name modules inside an audio model for a transformer, got {module_name} "
                f"of a {type(model).__name__}, which cannot tell a row's frames from padding. Choose another kind."
            )
        for part in parts:
            enter = partial(self._enter, argument=_find_mask_argument(part))
            self.handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
            self.handles.append(part.register_forward_hook(self._leave, always_call=True))

    def release(self) -> None:
        """Ends following."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def repeated(self, rows: int) -> torch.Tensor | None:
        """
        Returns the lengths for a batch of `rows` rows, `None` if all frames count.

        Where a row stands for several, as in beam search, they follow one another: [a, b] becomes [a, a, b, b].
        """
        if self.lengths is None:
            return None
        times, rest = divmod(rows, len(self.lengths))
        # Whisper drops rows of a long recording that are done, and not those of its mask: then all frames count.
        return None if rest or not times else self.lengths.repeat_interleave(times)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict, *, argument: str) -> None:
        mask = kwargs.get(argument)
        if mask is None and args:
            mask = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get(argument)
        self.outer.append(self.lengths)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:  # a tower's own may be of pairs of frames
            lengths = _find_counter(module)(mask.sum(-1))
            self.lengths = lengths[-1] if isinstance(lengths, tuple) else lengths  # the last: after the pooling

    def _leave(self, _module: nn.Module, _args: tuple, _output: object) -> None:
        self.lengths = self.outer.pop()


def _find_mask_argument(module: nn.Module) -> str | None:
    arguments = inspect.signature(module.forward).parameters
    names = [name for name in FEATURE_MASKS if name in arguments]
    is_audio = getattr(module, "main_input_name", None) in AUDIO_INPUTS
    return names[0] if names and (is_audio or names[0] == FEATURE_MASKS[0]) else None


def _find_counter(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]] | None:
    """The method of `module` or a part of it that counts the tower's frames from those of the features."""
    parts = (part for part in module.modules() if hasattr(part, COUNTER))
    return getattr(next(parts, None), COUNTER, None)
