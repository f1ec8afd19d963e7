"""Where adapters act: the layer around a module of the base, the rows of each adapter, and what is padding.

Modules are shared by all threads, so nothing about a call is kept in them:

    adapters_off, adapter_rows    say in a context variable what holds for the calls of one thread or task
    SpeechAdapterLayer            reads it in `forward`; PEFT's own layers in `disable_adapters` and in a hook
    ClipOwners, FrameLengths      note what a running call was given, for its thread
"""

import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationMixin

from .adapter_blocks import NAMED_BLOCKS, make_block
from .adapter_config import SpeechAdapterConfig

logger = logging.getLogger(__name__)

# A row of `adapter_rows` with this name runs the base alone; PEFT's own word for it.
BASE = "__base__"
SHARED_NAME = "speech_adapter_calls"
CLIP_MASK = "feature_attention_mask"
TOWER_PARTS = ("audio_tower", "multi_modal_projector")
AUDIO_INPUTS = ("input_features", "input_values")
COUNTER = "_get_feat_extract_output_lengths"

# A block and the rows of the batch that it acts on: all, a run of rows, or any.
Group = tuple[nn.Module, slice | list[int]]


def check_adapter_name(name: str) -> str:
    """
    Returns `name` if it may name an adapter: it becomes a module's name and a folder's.

    Raises:
        ValueError: It is not 1 to 64 letters, digits, `_` or `-`, or is an attribute of `nn.ModuleDict`.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,64}", name):
        raise ValueError(
            f"`adapter_name` must be 1 to 64 letters, digits, '_' or '-', got {name!r}. Dots and slashes would make "
            "it a path."
        )
    if hasattr(nn.ModuleDict, name) or name == BASE:
        raise ValueError(f"`adapter_name` must not be the reserved word {name!r}. Choose another name.")
    return name


def find_adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of `model` that hold adapters of any PEFT method."""
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter belongs to an adapter of any PEFT method, by its name in the model."""
    prefixes = (*PEFT_TYPE_TO_PREFIX_MAPPING.values(), "modules_to_save")
    return any(part.startswith(prefixes) for part in name.split("."))


def find_active_adapters(model: nn.Module, *, even_if_off: bool = False) -> list[str]:
    """Returns the names of the adapters that act on the output of `model`, in order, or would if they were on."""
    names: dict[str, None] = {}
    for layer in find_adapter_layers(model):
        if isinstance(layer, BaseTunerLayer) and (even_if_off or not layer.disable_adapters):
            available = layer._get_available_adapters()
            names.update(dict.fromkeys(name for name in layer.active_adapters if name in available))
    return list(names)


def _list_adapters(layer: nn.Module) -> set[str]:
    return layer._get_available_adapters() if isinstance(layer, BaseTunerLayer) else set(layer._adapters)


def remove_empty_layers(model: nn.Module, kind: type[nn.Module] | None = None) -> None:
    """Puts the base's own modules back where a layer of PEFT, of class `kind` if given, has no adapter left."""
    for module in model.modules():
        for name, child in module.named_children():
            while is_empty_layer(child, kind):
                child = child.base_layer if isinstance(child, BaseTunerLayer) else child.original_module
                setattr(module, name, child)


def is_empty_layer(module: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Whether a module is a layer of PEFT, of class `kind` if given, that has no adapter left."""
    is_layer = isinstance(module, kind or (BaseTunerLayer, AuxiliaryTrainingWrapper))
    return is_layer and not _list_adapters(module)


# What a call of a model was given, for the thread that runs it: who follows the call, the module, the value. Not a
# context variable, which no compiler or exporter can follow: nothing is awaited within a call.
_of_thread = threading.local()


def _list_running() -> tuple[tuple[object, nn.Module, object], ...]:
    return getattr(_of_thread, "calls", ())


def _find_running(follower: object) -> object:
    """Returns what `follower` has noted of the innermost call of this thread, `None` if there is nothing."""
    return next((value for owner, _, value in reversed(_list_running()) if owner is follower), None)


def _begin_call(follower: object, module: nn.Module, value: object) -> None:
    _of_thread.calls = (*_list_running(), (follower, module, value))


def _end_call(follower: object, module: nn.Module) -> None:
    calls = _list_running()
    for place in range(len(calls) - 1, -1, -1):
        if calls[place][0] is follower and calls[place][1] is module:
            _of_thread.calls = (*calls[:place], *calls[place + 1 :])
            return


def _bind_arguments(module: nn.Module, args: tuple, kwargs: dict) -> Mapping[str, object]:
    return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments if args else kwargs


def _find_counter(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]] | None:
    """Returns the method of `module` or a part of it that counts the tower's frames from those of the features."""
    return getattr(next((part for part in module.modules() if hasattr(part, COUNTER)), None), COUNTER, None)


def _count_frames(module: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """Frames of a tower's output for each row of a mask of its features; the last count, after the pooling."""
    lengths = _find_counter(module)(mask.sum(-1))
    return lengths[-1] if isinstance(lengths, tuple) else lengths


@dataclass(frozen=True)
class ClipOwners:
    """
    Which prompt each clip of a call belongs to: Qwen2-Audio's batches have prompts, and its tower has a row a clip.

    prompts  "a [clip 0] b [clip 1]"   "[clip 2]"         rows of the batch  0, 1
    tower     clip 0, clip 1,           clip 2            row of each clip   0, 0, 1

    Args:
        model: Has `_get_feat_extract_output_lengths`, itself or in a part.
        input_ids: Prompts `(batch, tokens)`, a placeholder for each frame of a clip, or for each clip.
        mask: Frames of features that are no padding `(clips, frames)`.
    """

    model: nn.Module
    input_ids: torch.Tensor
    mask: torch.Tensor

    @cached_property
    def row_of_clip(self) -> list[int]:
        """
        The prompt of each clip.

        Raises:
            ValueError: The placeholders are not those of whole clips.
        """
        counts = (self.input_ids == self.model.config.audio_token_id).sum(-1).tolist()
        lengths = _count_frames(self.model, self.mask).tolist()
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


def _has_clips(model: nn.Module) -> bool:
    """Whether batches of `model` have prompts with clips."""
    return {CLIP_MASK, "input_ids"} <= inspect.signature(model.forward).parameters.keys()


def _read_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipOwners | None:
    """Returns the clips among the arguments of a call of `model`, if there are some."""
    input_ids, mask = arguments.get("input_ids"), arguments.get(CLIP_MASK)
    return None if input_ids is None or mask is None else ClipOwners(model, input_ids, mask)


@contextmanager
def _clips_followed(model: nn.Module, is_mine: Callable[[], bool]) -> Iterator[None]:
    """Notes the clips of each call of `model` inside; `is_mine` tells calls of this context from other threads'."""

    def begin(part: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        # There are no `kwargs` for a thread that runs while the hook is being put up.
        if is_mine() and (owners := _read_clips(part, _bind_arguments(part, args, kwargs))) is not None:
            _begin_call(ClipOwners, part, owners)

    def end(part: nn.Module, _args: tuple, _output: object) -> None:
        if is_mine():
            _end_call(ClipOwners, part)

    handles = []
    for part in model.modules() if _has_clips(model) else ():
        if hasattr(part, "main_input_name") and _has_clips(part):
            handles.append(part.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(part.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Call:
    """
    What the adapters of one layer do in the calls of one context.

    Args:
        names: Adapter of each row; `None` where all are off.
        blocks: Blocks that an adapter store lends to the layer for these calls, by the names of their adapters.
        repeats: How often rows may follow one another in place of one: beams, and sequences to return.
        is_of_clips: The layer has a row for each clip of audio, and a row of the batch may have several clips.
        may_lose_rows: Rows may be fewer than names, which are all alike.
    """

    names: tuple[str, ...] | None
    blocks: Mapping[str, nn.Module] = field(default_factory=dict)
    repeats: frozenset[int] = frozenset({1})
    is_of_clips: bool = False
    may_lose_rows: bool = False

    @property
    def is_off(self) -> bool:
        """Whether the base runs alone."""
        return self.names is None

    def find_names(self, num_rows: int) -> list[str]:
        """
        Returns the adapter of each of `num_rows` rows.

        Raises:
            ValueError: There is not one name a row; or a row of clips, whose rows of the batch are not known.
        """
        owners = _find_running(ClipOwners) if self.is_of_clips else None
        if owners is not None and len(self.names) == len(owners.input_ids) and num_rows == len(owners.row_of_clip):
            return [self.names[row] for row in owners.row_of_clip]
        times, rest = divmod(num_rows, len(self.names))
        if not rest and times in self.repeats:
            return [name for name in self.names for _ in range(times)]  # [a, b] becomes [a, a, b, b]
        if self.may_lose_rows:
            return [self.names[0]] * num_rows
        unit = "clip in the audio tower" if self.is_of_clips else "row"
        raise ValueError(
            f"`adapter_names` must have one name a {unit}, got {len(self.names)} names for {num_rows} rows."
        )


class SharedCalls:
    """
    The calls of all contexts; one object for all copies of this file in a process.

    Args:
        num_open: How many there are in all contexts. While there are none, nothing else is looked at: a layer costs
            one comparison, and compilers and exporters, which cannot follow context variables, see none.
    """

    def __init__(self):
        self.num_open = 0
        self.lock = threading.Lock()
        self.of_context: ContextVar[Mapping[nn.Module, Call] | None] = ContextVar(SHARED_NAME, default=None)

    def find(self, module: nn.Module) -> Call | None:
        """Returns what holds for `module` in this context, if anything."""
        if not self.num_open:
            return None
        calls = self.of_context.get()
        return None if calls is None else calls.get(module)

    @contextmanager
    def opened(self, calls: Mapping[nn.Module, Call]) -> Iterator[None]:
        """Lets `calls` hold for their modules inside, beside what holds already."""
        before = self.of_context.get()
        mine = {**(before or {}), **calls}
        with self.lock:
            self.num_open += 1
        self.of_context.set(mine)
        try:
            yield
            if self.of_context.get() is not mine:
                raise RuntimeError(
                    "`adapter_rows` and `adapters_off` must be left in the context in which they were entered, and in "
                    "the opposite order. Do not `yield` from within: other adapters may have acted."
                )
        finally:
            self.of_context.set(before)
            with self.lock:
                self.num_open -= 1


def _share() -> SharedCalls:
    """Returns the one object, and lets the layers of every PEFT method ask it whether they are off."""
    if SHARED_NAME not in vars(BaseTunerLayer):
        setattr(BaseTunerLayer, SHARED_NAME, SharedCalls())
        # They know one flag, which would switch them off for every thread (peft 0.21).
        BaseTunerLayer.disable_adapters = AuxiliaryTrainingWrapper.disable_adapters = property(_is_off)
    return vars(BaseTunerLayer)[SHARED_NAME]


def _is_off(layer: nn.Module) -> bool:
    call = SHARED.find(layer)
    return layer._disable_adapters or (call is not None and call.is_off)


SHARED = _share()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """
    Runs the base alone inside, in this thread or task only.

    Unlike `disable_adapters`, it leaves `requires_grad` as it is, and other threads use the adapters meanwhile.
    """
    with SHARED.opened(dict.fromkeys(find_adapter_layers(model), Call(names=None))):
        yield


@contextmanager
def adapter_rows(model: nn.Module, adapter_names: Sequence[str] | None) -> Iterator[None]:
    """
    Gives every row of a batch its own adapter inside, in `forward` and `generate`, LoRA included.

    It holds for this thread or task alone, so threads may each give their own names to one model. A thread that is
    started inside does not take them along: enter it in that thread, or start the thread with `contextvars`.
    A clip of a prompt has the adapter of its prompt.

    Args:
        model: A model with adapters, in evaluation mode.
        adapter_names: One name a row, `"__base__"` for none; `None` changes nothing. A module that is called by itself
            takes a name for each of its own rows, an audio tower one a clip.

    Raises:
        ValueError: The model is training, a name is unknown, adapters are off, or a layer cannot tell rows apart; or
            (in the call) the number of names does not fit the rows, or `generate` would mix rows up.

    Example:

    ```python
    with adapter_rows(model, ["alice", "bob", "__base__"]):
        logits = model(**batch_of_three).logits
    ```
    """
    if adapter_names is None:
        yield
        return
    with serve_rows(model, adapter_names, {}):
        yield


@contextmanager
def serve_rows(
    model: nn.Module, adapter_names: Sequence[str], blocks: Mapping[nn.Module, Mapping[str, nn.Module]]
) -> Iterator[None]:
    """As [`adapter_rows`], with `blocks` that are lent to layers under names of adapters."""
    if model.training:
        raise ValueError("`adapter_names` works for inference only. Call `model.eval()` first.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    of_layers, names = set(find_adapter_layers(model)), tuple(adapter_names)
    layers = {module: name for name, module in model.named_modules() if module in of_layers}
    adapters_of = {layer: _list_adapters(layer) | set(blocks.get(layer, ())) for layer in layers}
    known = {BASE}.union(*adapters_of.values())
    if unknown := sorted(set(names) - known):
        raise ValueError(f"`adapter_names` must be loaded adapters ({', '.join(sorted(known))}), got {unknown}.")
    has_clips, calls = _has_clips(base), {base: Call(names)}
    for layer, name in layers.items():
        calls[layer] = Call(names=None)
        if mentioned := adapters_of[layer] & set(names):
            _check_tells_rows(layer, name, mentioned)
            is_of_clips = has_clips and any(part in TOWER_PARTS for part in name.split("."))
            calls[layer] = Call(names, blocks.get(layer, {}), is_of_clips=is_of_clips)
        if not hasattr(layer, NAMED_BLOCKS) and _pass_names not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_pass_names, with_kwargs=True)  # once and for all
    if isinstance(base, GenerationMixin) and "generate" not in vars(base):
        base.generate = partial(_generate, base)  # likewise
    with SHARED.opened(calls), _clips_followed(base, lambda: getattr(SHARED.find(base), "names", None) is names):
        yield


def _pass_names(layer: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    """Forward pre-hook of PEFT's own layers: hands them the adapter of each row as they take it."""
    call = SHARED.find(layer)
    # A thread that runs while the hook is being put up may call it without `kwargs`, and has no call.
    if call is None or call.is_off or "adapter_names" in kwargs:
        return None
    num_rows = len(args[0] if args else next(iter(kwargs.values())))
    return args, {**kwargs, "adapter_names": call.find_names(num_rows)}


def _check_tells_rows(layer: nn.Module, name: str, mentioned: set[str]) -> None:
    if layer.disable_adapters:
        raise ValueError(
            f"`adapter_names` must be used while adapters are on, got {sorted(mentioned)} and {name} off. "
            "Call `model.enable_adapters()`, or leave `adapters_off`."
        )
    if not hasattr(layer, "_mixed_batch_forward") and not hasattr(layer, NAMED_BLOCKS):
        raise ValueError(
            f"`adapter_names` must be adapters of a method that tells rows apart, got {sorted(mentioned)} at {name}, "
            f"a {type(layer).__module__}.{type(layer).__name__}. Use `set_adapter` and a batch for each."
        )


def _generate(model: nn.Module, *args, **kwargs) -> object:
    """As the model's own, which repeats rows for beams and, in Whisper, drops those that are done."""
    generate, call = partial(type(model).generate, model), SHARED.find(model)
    if call is None or call.is_off:
        return generate(*args, **kwargs)
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)

    def read(name: str) -> object:
        values = (kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None))
        return next((value for value in values if value is not None), None)

    beams, sequences = read("num_beams") or 1, read("num_return_sequences") or 1
    owners = _read_clips(model, kwargs) if max(beams, sequences) > 1 else None
    if owners is not None and owners.row_of_clip != list(range(len(owners.input_ids))):
        raise ValueError(
            f"`num_beams` and `num_return_sequences` must be 1 for prompts of several clips, got "
            f"{max(beams, sequences)}: transformers repeats each clip in its place and mixes up the clips of a "
            "prompt. Leave them out."
        )
    may_lose_rows = hasattr(model, "generate_with_fallback") and len(set(call.names)) == 1
    if hasattr(model, "generate_with_fallback") and not may_lose_rows:
        features = kwargs.get("input_features", args[0] if args else None)
        _check_keeps_rows(model, call, features, read("return_timestamps") or read("return_token_timestamps"), kwargs)
    changes = {"repeats": frozenset({1, beams, sequences, beams * sequences}), "may_lose_rows": may_lose_rows}
    of_context = SHARED.of_context.get()
    calls = {module: replace(other, **changes) for module, other in of_context.items() if other.names is call.names}
    with SHARED.opened(calls):
        return generate(*args, **kwargs)


def _check_keeps_rows(
    model: nn.Module, call: Call, features: torch.Tensor | None, has_timestamps: object, kwargs: Mapping[str, object]
) -> None:
    """Makes sure that Whisper drops no rows, which is right only if all have the same adapter."""
    limit, temperature = 2 * model.config.max_source_positions, kwargs.get("temperature")  # the encoder halves frames
    num_frames = 0 if features is None else features.shape[-1]
    reasons = {
        f"{num_frames} frames, above {limit}": num_frames > limit,
        "timestamps": has_timestamps,
        "several temperatures": isinstance(temperature, (list, tuple)) and len(temperature) > 1,
    }
    if features is not None and (reason := next((reason for reason, is_given in reasons.items() if is_given), None)):
        raise ValueError(
            f"`adapter_names` must be the same for all rows where Whisper drops rows that are done, got "
            f"{sorted(set(call.names))} with {reason}. Cut recordings into pieces of at most {limit} frames, without "
            "timestamps and with one `temperature`, or call `generate` for each adapter."
        )


class FrameLengths:
    """
    Follows the calls of a model and tells the lengths of the batch that runs, at the rate of the audio tower's output.

    Hooks on a model and on its parts that take a mask of the features set the lengths for the time of a call:

        Qwen2-Audio   the model's `feature_attention_mask`, in `forward` and `generate`
        Whisper       the model's `attention_mask` in `forward`, the encoder's in `generate`, which calls the encoder
                      alone; without a mask, as its processor has it, all frames count

    There is no reference to the model, so that copies and pickles of either hold what they should.
    """

    def __init__(self):
        self.handles: list = []
        self.has_warned = False

    @property
    def lengths(self) -> torch.Tensor | None:
        """Frames of each row of the call that runs in this thread `(batch,)`; `None` if all frames count."""
        return _find_running(self)

    def follow(self, model: nn.Module, module_name: str) -> None:
        """
        Starts to follow `model` for its module `module_name`.

        Raises:
            ValueError: No part of the model around the module takes a mask of the features whose frames it can count.
        """
        names = module_name.split(".")
        around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
        models = [part for part in around if hasattr(part, "main_input_name")]
        parts = [part for part in around if _find_mask_argument(part) and _find_counter(part)]
        is_of_text = models and models[-1] not in parts and models[-1].main_input_name not in AUDIO_INPUTS
        if not parts or is_of_text:  # in a decoder, rows are of tokens
            raise ValueError(
                f"`target_modules` must name modules inside an audio model for a transformer, got {module_name} "
                f"of a {type(model).__name__}, which cannot tell a row's frames from padding. Choose another kind."
            )
        for part in parts:
            begin = partial(self._begin, argument=_find_mask_argument(part))
            self.handles.append(part.register_forward_pre_hook(begin, with_kwargs=True))
            self.handles.append(part.register_forward_hook(self._end, always_call=True))

    def release(self) -> None:
        """Ends following."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def repeated(self, num_rows: int) -> torch.Tensor | None:
        """
        Returns the lengths for a batch of so many rows, `None` if all frames count.

        Where a row stands for several, as for several sequences of one, they follow one another: [a, b] becomes
        [a, a, b, b].

        Raises:
            ValueError: The rows are not those of the call, or none runs: gradient checkpointing runs a layer again.
        """
        is_running = any(follower is self for follower, _, _ in _list_running())
        if not is_running and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "`gradient_checkpointing` must be off for a transformer adapter inside a layer that is checkpointed: "
                "when the layer runs again, padding is not known. Wrap a module outside such layers."
            )
        if (lengths := self.lengths) is None:
            if not self.has_warned and not torch.compiler.is_compiling():
                self.has_warned = True
                logger.warning(
                    "A transformer adapter got no `attention_mask` of its features and takes padding for speech. Use "
                    "the processor that was saved with it, or `return_attention_mask=True`."
                )
            return None
        times, rest = divmod(num_rows, len(lengths))
        if rest or not times:
            raise ValueError(
                f"`attention_mask` must have a row for each row of features, got {len(lengths)} for {num_rows} rows. "
                "Give Whisper's `generate` one `temperature`: for a second one it drops rows."
            )
        return lengths.repeat_interleave(times) if times > 1 else lengths

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict | None = None, *, argument: str) -> None:
        if kwargs is None:  # a thread that runs while the hook is being put up, and needs no lengths
            return
        given, lengths = _bind_arguments(module, args, kwargs), self.lengths
        mask, features = given.get(argument), given.get("input_features")  # (batch, mel, frames), or a tower's states
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:  # a tower's own may be of pairs of frames
            # Whisper's mask of a long recording has not the frames of a piece of it.
            num_mel_bins = getattr(getattr(module, "config", None), "num_mel_bins", None)
            is_other = features is not None and features.shape[1] == num_mel_bins
            is_other = is_other and features.shape[-1] != mask.shape[-1]
            lengths = None if is_other else _count_frames(module, mask)
        _begin_call(self, module, lengths)

    def _end(self, module: nn.Module, _args: tuple, _output: object) -> None:
        _end_call(self, module)


def _find_mask_argument(module: nn.Module) -> str | None:
    """The mask of the features: of an audio language model its own one, whose `attention_mask` is the text's."""
    arguments = inspect.signature(module.forward).parameters
    if CLIP_MASK in arguments:
        return CLIP_MASK
    is_audio = getattr(module, "main_input_name", None) in AUDIO_INPUTS
    return "attention_mask" if is_audio and "attention_mask" in arguments else None


class SpeechAdapterLayer(nn.Module, BaseTunerLayer):
    """
    Wraps a module whose widths are known with named adapters, at most one of them active.

    The base module runs once on all rows; adapters act on its input and output, a group of rows at a time when
    [`adapter_rows`] asks for it. It leaves its place in the model with its last adapter.
    """

    adapter_layer_names = (NAMED_BLOCKS,)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SpeechAdapterConfig):
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.place: tuple[nn.Module, str] | None = None  # parent and name, as the tuner replaces modules
        self.frame_lengths: FrameLengths | None = None  # where an adapter must know what is padding
        self.speech_adapter_blocks = nn.ModuleDict()
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SpeechAdapterConfig) -> None:
        """Adds the adapter `adapter_name`, on the base's device."""
        check_adapter_name(adapter_name)
        self.speech_adapter_blocks[adapter_name] = make_block(self.get_base_layer(), config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def needs_frame_lengths(self) -> bool:
        """Whether an adapter here must know what is padding."""
        return any(block.kind == "transformer" for block in self.speech_adapter_blocks.values())

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes the adapter `adapter_name` away, and what it had set up in the model."""
        super().delete_adapter(adapter_name)
        if not self.needs_frame_lengths:
            self.release_frame_lengths()
        if self.speech_adapter_blocks or self.place is None:
            return
        parent, name = self.place
        while (module := getattr(parent, name)) is not self:
            if not hasattr(module, "base_layer"):
                return  # somebody else has put another module there
            parent, name = module, "base_layer"  # a layer of another PEFT method stands around this one
        setattr(parent, name, self.base_layer)

    def release_frame_lengths(self) -> None:
        """Takes away what the adapters here had set up in the model to know what is padding."""
        if self.frame_lengths is not None:
            self.frame_lengths.release()
            self.frame_lengths = None

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        # A wrapped block has no `weight` of its own, and adapters stay in fp32 over a base in half precision.
        # Over a base without memory (a part that is not loaded) they stay where they were made.
        parameter = next(base_layer.parameters(), None)
        return (None if parameter is None or parameter.is_meta else parameter.device), None

    def merge(self, *_args, **_kwargs) -> None:
        raise ValueError("Speech adapters are not linear and cannot be merged into the base. Keep them beside it.")

    def unmerge(self) -> None:
        """There is nothing to take back: speech adapters are never merged."""

    def forward(self, hidden_states: torch.Tensor, *args, adapter_names: Sequence[str] | None = None, **kwargs):
        if self.disable_adapters:
            return self.base_layer(hidden_states, *args, **kwargs)
        if adapter_names is None and (call := SHARED.find(self)) is not None:
            adapter_names = call.find_names(len(hidden_states))
        groups = self._group_rows(adapter_names)
        before = [group for group in groups if group[0].position == "before"]
        behind = [group for group in groups if group[0].position != "before"]
        is_asked = self.frame_lengths is not None and any(block.kind == "transformer" for block, _ in groups)
        lengths = self.frame_lengths.repeated(len(hidden_states)) if is_asked else None
        hidden_states = self._adapt_rows(before, hidden_states, hidden_states, lengths)
        output = self.base_layer(hidden_states, *args, **kwargs)
        if not behind:
            return output
        inputs = (hidden_states, *args, *kwargs.values())
        return self._adapt_rows(behind, hidden_states, output, lengths, inputs=inputs)

    def _is_fresh(self, output: torch.Tensor, inputs: Sequence[object]) -> bool:
        """Whether the base's `output` may be overwritten: no gradient, input, weight or hook needs it as it is."""
        # Exporters and compilers have tensors without memory, and make this decision themselves.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
            return False
        if any(module._forward_hooks for module in self.base_layer.modules()):
            return False
        others = [*inputs, *self.base_layer.parameters(), *self.base_layer.buffers()]
        places = {other.untyped_storage().data_ptr() for other in others if isinstance(other, torch.Tensor)}
        return output.untyped_storage().data_ptr() not in places

    def _group_rows(self, adapter_names: Sequence[str] | None) -> list[Group]:
        if adapter_names is None:
            block = self.find_block(self.find_active_adapter())
            return [] if block is None else [(block, slice(None))]
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows_of.setdefault(name, []).append(row)
        if len(rows_of) == 1:
            rows_of = {name: slice(None) for name in rows_of}
        groups = [(self.find_block(name), rows) for name, rows in rows_of.items()]
        return [(block, _as_run(rows)) for block, rows in groups if block is not None]

    def _adapt_rows(
        self,
        groups: list[Group],
        source: torch.Tensor,
        target: torch.Tensor,
        lengths: torch.Tensor | None,
        *,
        inputs: Sequence[object] | None = None,
    ) -> torch.Tensor:
        """
        Returns `target`, changed in the rows of each group; `source` is what came into the base.

        Where `target` is the base's output, `inputs` are what the base got: it is overwritten if nobody else has it.
        """
        if not groups:
            return target
        if groups[0][1] == slice(None):
            return self.adapt(groups[0][0], source, target, lengths)
        adapted = target if inputs is not None and self._is_fresh(target, inputs) else target.clone()
        for block, rows in groups:
            change = self._change(block, source[rows], target[rows], None if lengths is None else lengths[rows])
            if block.kind == "replacement":
                adapted[rows] = change
            else:
                adapted[rows] += change
        return adapted

    def find_active_adapter(self) -> str | None:
        """
        Returns the name of the adapter that is active here, if there is one.

        Raises:
            ValueError: There are several.
        """
        names = [name for name in self.active_adapters if name in self.speech_adapter_blocks]
        if len(names) > 1:
            raise ValueError(f"A module can have one active speech adapter, got {names}. Activate one of them.")
        return names[0] if names else None

    def find_block(self, name: str | None) -> nn.Module | None:
        """Returns the block of adapter `name` here, the model's own or a served one, if there is one."""
        if name in self.speech_adapter_blocks:
            return self.speech_adapter_blocks[name]
        call = SHARED.find(self)
        return None if call is None else call.blocks.get(name)

    def adapt(
        self, block: nn.Module, source: torch.Tensor, target: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns `target`, the base's input or output, as `block` changes it."""
        change = self._change(block, source, target, lengths)
        return change if block.kind == "replacement" else target + change

    @staticmethod
    def _change(
        block: nn.Module, source: torch.Tensor, target: torch.Tensor, lengths: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns what `block` adds to `target`, or says in its place."""
        weight = block.last_layer.weight
        dtype = weight.dtype if isinstance(weight, torch.Tensor) else torch.float32  # dynamically quantised
        states = (source if block.position == "beside" else target).to(dtype)
        return (block(states, lengths) if block.kind == "transformer" else block(states)).to(target.dtype)


def _as_run(rows: slice | list[int]) -> slice | list[int]:
    """Rows that follow one another as a slice, which copies nothing."""
    is_run = isinstance(rows, list) and rows[-1] - rows[0] == len(rows) - 1
    return slice(rows[0], rows[-1] + 1) if is_run else rows
