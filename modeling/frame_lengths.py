"""How many frames of each row are no padding, where a model does not say so to the module that an adapter wraps."""

import inspect
import logging
import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

logger = logging.getLogger(__name__)

# Of audio language models, whose `attention_mask` is the text's, and of audio models.
FEATURE_MASKS = ("feature_attention_mask", "attention_mask")
AUDIO_INPUTS = ("input_features", "input_values")
COUNTER = "_get_feat_extract_output_lengths"

# Calls that run in a thread, the outermost first: who follows, the module that runs, the lengths. Not a context
# variable, which no compiler or exporter can follow: nothing is awaited within a call.
_of_thread = threading.local()


class FrameLengths:
    """
    Follows the calls of a model and tells the lengths of the batch that runs, at the rate of the audio tower's output.

    Hooks on a model and on its parts that take a mask of the features set the lengths for the time of a call:

        Qwen2-Audio   the model's `feature_attention_mask`, in `forward` and `generate`
        Whisper       the model's `attention_mask` in `forward`, the encoder's in `generate`, which calls the encoder
                      alone; without a mask, as its processor has it, all frames count

    The tower's own `_get_feat_extract_output_lengths` turns frames of features into frames of the tower. There is no
    reference to the model, so that copies and pickles of either hold what they should, and none to a call, of which
    several threads may have one.
    """

    def __init__(self):
        self.handles: list = []
        self.has_warned = False

    @property
    def lengths(self) -> torch.Tensor | None:
        """Frames of each row of the call that runs in this thread `(batch,)`; `None` if all frames count."""
        return next((lengths for follower, _, lengths in reversed(_list_calls()) if follower is self), None)

    def follow(self, model: nn.Module, module_name: str) -> None:
        """
        Starts to follow `model` for its module `module_name`.

        Raises:
            ValueError: No part of the model around the module takes a mask of the features whose frames it can count.
        """
        names = module_name.split(".")
        around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
        models = [part for part in around if hasattr(part, "main_input_name")]
        parts = [part for part in around if _find_mask_argument(part) and find_counter(part)]
        is_of_text = models and models[-1] not in parts and models[-1].main_input_name not in AUDIO_INPUTS
        if not parts or is_of_text:  # in a decoder, rows are of tokens
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

        Where a row stands for several, as for several sequences of one, they follow one another: [a, b] becomes
        [a, a, b, b].

        Raises:
            ValueError: The rows are not those of the call, or none runs: gradient checkpointing runs a layer again.
        """
        if not any(follower is self for follower, _, _ in _list_calls()) and _is_backward():
            raise ValueError(
                "`gradient_checkpointing` must be off for a transformer adapter inside a layer that is checkpointed: "
                "when the layer runs again, padding is not known. Wrap a module outside such layers."
            )
        lengths = self.lengths
        if lengths is None:
            self._warn()
            return None
        times, rest = divmod(rows, len(lengths))
        if rest or not times:
            raise ValueError(
                f"`attention_mask` must have a row for each row of features, got {len(lengths)} for {rows} rows. Give "
                "Whisper's `generate` one `temperature`: for a second one it drops rows."
            )
        return lengths.repeat_interleave(times) if times > 1 else lengths

    def _warn(self) -> None:
        if not self.has_warned and not torch.compiler.is_compiling():
            self.has_warned = True
            logger.warning(
                "A transformer adapter got no `attention_mask` of its features and takes padding for speech. Use the "
                "processor that was saved with it, or `return_attention_mask=True`."
            )

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict | None = None, *, argument: str) -> None:
        if kwargs is None:  # a thread that runs while the hook is being put up, and needs no lengths
            return
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
        mask, lengths = given.get(argument), self.lengths
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:  # a tower's own may be of pairs of frames
            lengths = find_counter(module)(mask.sum(-1)) if _is_mask_of(module, given, mask) else None
            lengths = lengths[-1] if isinstance(lengths, tuple) else lengths  # the last: after the pooling
        _of_thread.calls = (*_list_calls(), (self, module, lengths))

    def _leave(self, module: nn.Module, _args: tuple, _output: object) -> None:
        calls = _list_calls()
        for place in range(len(calls) - 1, -1, -1):
            if calls[place][0] is self and calls[place][1] is module:
                _of_thread.calls = (*calls[:place], *calls[place + 1 :])
                return


def _list_calls() -> tuple[tuple[FrameLengths, nn.Module, torch.Tensor | None], ...]:
    return getattr(_of_thread, "calls", ())


def _is_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _is_mask_of(module: nn.Module, arguments: dict, mask: torch.Tensor) -> bool:
    """Whether `mask` has the frames of the features: Whisper's of a long recording has not those of a piece of it."""
    features = arguments.get("input_features")  # (batch, mel, frames), or the tower's states
    num_mel_bins = getattr(getattr(module, "config", None), "num_mel_bins", None)
    return features is None or features.shape[1] != num_mel_bins or features.shape[-1] == mask.shape[-1]


def _find_mask_argument(module: nn.Module) -> str | None:
    arguments = inspect.signature(module.forward).parameters
    names = [name for name in FEATURE_MASKS if name in arguments]
    is_audio = getattr(module, "main_input_name", None) in AUDIO_INPUTS
    return names[0] if names and (is_audio or names[0] == FEATURE_MASKS[0]) else None


def find_counter(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]] | None:
    """Returns the method of `module` or a part of it that counts the tower's frames from those of the features."""
    parts = (part for part in module.modules() if hasattr(part, COUNTER))
    return getattr(next(parts, None), COUNTER, None)
