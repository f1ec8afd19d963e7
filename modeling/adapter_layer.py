"""The module that stands in a model where adapters act: the base's own module and the adapters around it."""

from collections.abc import Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .active_adapters import check_adapter_name
from .adapter_blocks import make_block
from .adapter_config import SpeechAdapterConfig


class SpeechAdapterLayer(nn.Module, BaseTunerLayer):
    """
    Wraps a module that has `in_features` and `out_features` with named adapters, at most one of them active.

    The base module runs once on all rows; adapters act on its input and output, a group of rows at a time when
    [`adapter_rows`] asks for it.
    """

    adapter_layer_names = ("speech_adapter_blocks",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SpeechAdapterConfig):
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        # Blocks that an `AdapterStore` lends while it serves a batch: no part of the model, never saved with it.
        self.served_blocks: dict[str, nn.Module] = {}
        self.speech_adapter_blocks = nn.ModuleDict()
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SpeechAdapterConfig) -> None:
        """Adds the adapter `adapter_name`, on the base's device."""
        check_adapter_name(adapter_name)
        base = self.get_base_layer()
        if not hasattr(base, "out_features"):
            raise ValueError(
                f"`target_modules` must name modules with `in_features` and `out_features`, got a "
                f"{type(base).__name__}. Name the linear map or the block before it."
            )
        self.speech_adapter_blocks[adapter_name] = make_block(base, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        # A wrapped block has no `weight` of its own, and adapters stay in fp32 over a base in half precision.
        parameter = next(base_layer.parameters(), None)
        return (None if parameter is None else parameter.device), None

    def merge(self, *_args, **_kwargs) -> None:
        raise ValueError("Speech adapters are not linear and cannot be merged into the base. Keep them beside it.")

    def unmerge(self) -> None:
        """There is nothing to take back: speech adapters are never merged."""

    def forward(self, hidden_states: torch.Tensor, *args, adapter_names: Sequence[str] | None = None, **kwargs):
        output = self.base_layer(hidden_states, *args, **kwargs)
        if self.disable_adapters:
            return output
        if adapter_names is None:
            return self._adapt(self._single_active_adapter(), hidden_states, output)
        if len(set(adapter_names)) == 1:
            return self._adapt(adapter_names[0], hidden_states, output)
        adapted = torch.empty_like(output)
        for name in dict.fromkeys(adapter_names):
            rows = torch.tensor(
                [row for row, other in enumerate(adapter_names) if other == name], device=output.device
            )
            adapted.index_copy_(0, rows, self._adapt(name, hidden_states[rows], output[rows]))
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
        return self.served_blocks.get(name)

    def adapt_frames(
        self, hidden_states: torch.Tensor, output: torch.Tensor, frames_of: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """
        Returns what `forward` gives where the base's `output` is known, for frames of several rows without padding.

        Args:
            hidden_states: Input of the base `(frames, in_features)`.
            output: Output of the base `(frames, out_features)`.
            frames_of: Which frames belong to which adapter. Default: the active one acts on all.
        """
        if self.disable_adapters:
            return output
        if frames_of is None:
            return self._adapt(self._single_active_adapter(), hidden_states, output)
        adapted = output.clone()
        for name, frames in frames_of.items():
            adapted = adapted.index_copy(0, frames, self._adapt(name, hidden_states[frames], output[frames]))
        return adapted

    def _adapt(self, name: str | None, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if (block := self.find_block(name)) is None:
            return output
        source = output if block.kind == "bottleneck" else hidden_states
        delta = block(source.to(block[-1].weight.dtype)).to(output.dtype)
        return delta if block.kind == "replacement" else output + delta
