"""What holds for the calls of one thread or task alone: the adapter of each row, and adapters that are off.

Modules are shared by all threads, so nothing about a call is kept in them. It is in a context variable, which the
layers read:

    SpeechAdapterLayer       in its `forward`
    other layers of PEFT     `disable_adapters` in their property of that name, rows in a hook that stays
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .clip_owners import find_clip_owners

SHARED_NAME = "speech_adapter_calls"


@dataclass(frozen=True)
class Call:
    """
    What the adapters of one layer do in the calls of one context.

    Args:
        names: Adapter of each row; `None` where all are off.
        blocks: Blocks that an [`AdapterStore`] lends to the layer for these calls, by the names of their adapters.
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
        if self.is_of_clips and (owners := find_clip_owners()) is not None and len(self.names) == owners.num_rows:
            if num_rows == len(owners.row_of_clip):
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


def pass_names(layer: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    """Forward pre-hook of PEFT's own layers: hands them the adapter of each row as they take it."""
    call = SHARED.find(layer)
    # A thread that runs while the hook is being put up may call it without `kwargs`, and has no call.
    if call is None or call.is_off or "adapter_names" in kwargs:
        return None
    num_rows = len(args[0] if args else next(iter(kwargs.values())))
    return args, {**kwargs, "adapter_names": call.find_names(num_rows)}
