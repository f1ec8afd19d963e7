"""The module that stands in a model where adapters act: the base's own module and the adapters around it."""

from collections.abc import Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .active_adapters import check_adapter_name
from .adapter_blocks import make_block
from .adapter_calls import SHARED
from .adapter_config import SpeechAdapterConfig
from .frame_lengths import FrameLengths

# A block and the rows of the batch that it acts on: all, a run of rows, or any.
Group = tuple[nn.Module, slice | list[int]]


class SpeechAdapterLayer(nn.Module, BaseTunerLayer):
    """
    Wraps a module whose widths are known with named adapters, at most one of them active.

    The base module runs once on all rows; adapters act on its input and output, a group of rows at a time when
    [`adapter_rows`] asks for it. It leaves its place in the model with its last adapter.
    """

    adapter_layer_names = ("speech_adapter_blocks",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SpeechAdapterConfig):
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        # Parent and name, as the tuner replaces modules.
        self.place: tuple[nn.Module, str] | None = None
        # Of the running batch, where an adapter must know what is padding.
        self.frame_lengths: FrameLengths | None = None
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
        if not self.speech_adapter_blocks and self.place is not None:
            self._leave(*self.place)

    def release_frame_lengths(self) -> None:
        """Takes away what the adapters here had set up in the model to know what is padding."""
        if self.frame_lengths is not None:
            self.frame_lengths.release()
            self.frame_lengths = None

    def _leave(self, parent: nn.Module, name: str) -> None:
        while (module := getattr(parent, name)) is not self:
            if not hasattr(module, "base_layer"):
                return  # somebody else has put another module there
            parent, name = module, "base_layer"  # a layer of another PEFT method stands around this one
        setattr(parent, name, self.base_layer)

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
        lengths = self._find_lengths(groups, len(hidden_states))
        hidden_states = self._adapt_rows(before, hidden_states, hidden_states, lengths)
        output = self.base_layer(hidden_states, *args, **kwargs)
        if not behind:
            return output
        inputs = (hidden_states, *args, *kwargs.values())
        return self._adapt_rows(behind, hidden_states, output, lengths, inputs=inputs)

    def _find_lengths(self, groups: list[Group], num_rows: int) -> torch.Tensor | None:
        """Returns how many frames of each row are no padding, where an adapter that acts asks for it."""
        is_asked = self.frame_lengths is not None and any(block.kind == "transformer" for block, _ in groups)
        return self.frame_lengths.repeated(num_rows) if is_asked else None

    def _is_fresh(self, output: torch.Tensor, inputs: Sequence[object]) -> bool:
        """Whether the base's `output` may be overwritten: no gradient, input, weight or hook needs it as it is."""
        # Exporters and compilers have tensors without memory, and make this decision themselves.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if torch.is_grad_enabled() or any(module._forward_hooks for module in self.base_layer.modules()):
            return False
        others = [*inputs, *self.base_layer.parameters(), *self.base_layer.buffers()]
        places = {other.untyped_storage().data_ptr() for other in others if isinstance(other, torch.Tensor)}
        return output.untyped_storage().data_ptr() not in places

    def _group_rows(self, adapter_names: Sequence[str] | None) -> list[Group]:
        if adapter_names is None:
            block = self.find_block(self._single_active_adapter())
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
            return self._adapt(groups[0][0], source, target, lengths)
        adapted = target if inputs is not None and self._is_fresh(target, inputs) else target.clone()
        for block, rows in groups:
            change = self._change(block, source[rows], target[rows], None if lengths is None else lengths[rows])
            if block.kind == "replacement":
                adapted[rows] = change
            else:
                adapted[rows] += change
        return adapted

    def _single_active_adapter(self) -> str | None:
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

    def adapt_frames(
        self, hidden_states: torch.Tensor, output: torch.Tensor, frames_of: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """
        Returns what `forward` gives where the base's `output` is known, for frames of several rows without padding.

        Args:
            hidden_states: Input of the base `(frames, in_features)`.
            output: Output of the base `(frames, out_features)`.
            frames_of: Which frames belong to which adapter, each to one. Default: the active one acts on all.

        Raises:
            ValueError: An adapter looks at whole rows, or changes the base's input.
        """
        if self.disable_adapters:
            return output
        if frames_of is None:
            return self._adapt_known(self._single_active_adapter(), hidden_states, output)
        adapted = [
            self._adapt_known(name, hidden_states.index_select(0, frames), output.index_select(0, frames))
            for name, frames in frames_of.items()
        ]
        return torch.cat(adapted).index_select(0, torch.cat(list(frames_of.values())).argsort())

    def _adapt_known(self, name: str | None, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if (block := self.find_block(name)) is None:
            return output
        if block.kind == "transformer" or block.position == "before":
            raise ValueError(
                f"`frozen_states` must go with adapters that change the output of their module frame by frame, got "
                f"{name!r}, a {block.kind} that changes rows of frames or its module's input. Give `input_features`."
            )
        return self._adapt(block, hidden_states, output)

    def _adapt(
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
