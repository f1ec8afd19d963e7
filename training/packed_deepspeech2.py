"""What stands behind the frozen part of DeepSpeech2, on the frames of a batch without padding."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from modeling.adapters import SpeechAdapterLayer
from training.frozen_part import FrozenPrefix
from training.packed_ctc import packed_ctc, packed_linear_ctc
from training.packed_frames import PackedOrder


class PackedBatch:
    """
    States that the frozen part of a model has made, on their way through the rest of the model.

    Args:
        prefix: The frozen part.
        states: `hidden_states`, `base_output` or both, each packed `(frames, width)`, in any precision.
        lengths: Frames of each row `(batch,)`, longest first.
        adapter_names: The adapter of each row. Default: the active one, if any.

    Raises:
        ValueError: The states are not those of the prefix, their frames do not add up to the lengths, or there is not
            one speech adapter of this model a row.
    """

    def __init__(
        self,
        prefix: FrozenPrefix,
        states: Mapping[str, torch.Tensor],
        lengths: torch.Tensor,
        adapter_names: Sequence[str] | None = None,
    ):
        self.model, self.stages = prefix.model, prefix.model.stages()
        self.prefix, self.adapter_names = prefix, adapter_names
        self._check_states(states, lengths)
        # Saving states for the backward pass takes tensors that were not made in inference mode.
        states = {name: value.clone() if value.is_inference() else value for name, value in states.items()}
        self.order = PackedOrder(lengths, next(iter(states.values())).device)
        self.hidden_states, self.base_output = states.get("hidden_states"), states.get("base_output")
        if self.hidden_states is not None:
            self.hidden_states = self.hidden_states.to(self.model.dtype)
        if adapter_names is not None:
            self._check_adapter_names()

    def compute_losses(self, labels: torch.Tensor) -> torch.Tensor:
        """
        Returns the CTC loss of each adapter's rows `(adapters,)`, or of all rows `(1,)` without `adapter_names`.

        Args:
            labels: Classes `(batch, tokens)`, -100 beyond a transcript's end.
        """
        hidden_states, base_output = self._reach_classifier()
        if self.adapter_names is None:
            return self._loss(None, hidden_states, base_output, labels, self.order.lengths).unsqueeze(0)
        losses = []
        for name, rows in self._rows_of.items():
            frames = self._frames_of[name]
            own = [None if value is None else value.index_select(0, frames) for value in (hidden_states, base_output)]
            losses.append(self._loss(name, *own, labels[rows.to(labels.device)], self.order.lengths[rows.cpu()]))
        return torch.stack(losses)

    def compute_logits(self) -> torch.Tensor:
        """Returns the logits of all frames `(frames, vocab_size)`."""
        return self._run_classifier(*self._reach_classifier(), self._frames_of)

    @cached_property
    def _rows_of(self) -> dict[str, torch.Tensor]:
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(self.adapter_names):
            rows.setdefault(name, []).append(row)
        return {name: torch.tensor(own, device=self.order.device) for name, own in rows.items()}

    @cached_property
    def _frames_of(self) -> dict[str, torch.Tensor] | None:
        """The frames of each adapter, in the order that they would have in a batch of its own rows."""
        if self.adapter_names is None:
            return None
        numbers = {name: number for number, name in enumerate(self._rows_of)}
        number_of_row = torch.tensor([numbers[name] for name in self.adapter_names], device=self.order.device)
        number_of_frame = number_of_row[self.order.rows]
        frames = number_of_frame.argsort(stable=True).split(number_of_frame.bincount().tolist())
        return dict(zip(numbers, frames, strict=True))

    def _check_states(self, states: Mapping[str, torch.Tensor], lengths: torch.Tensor) -> None:
        names, needed = set(states), set(self.prefix.states)
        if names != needed and not names == {"hidden_states"} < needed:  # an MLP can run its base itself
            raise ValueError(
                f"`frozen_states` must be what the model needs at {self.prefix.name}, {sorted(needed)}, got "
                f"{sorted(names)}. Build the cache anew."
            )
        num_frames = {len(value) for value in states.values()}
        if num_frames != {int(lengths.sum())}:
            raise ValueError(
                f"`logits_lengths` must add up to the frames of `frozen_states`, got {int(lengths.sum())} and "
                f"{sorted(num_frames)}. Pack them without padding."
            )

    def _check_adapter_names(self) -> None:
        layers = [layer for layer in self.stages.values() if isinstance(layer, SpeechAdapterLayer)]
        known = {name for layer in layers for name in layer.speech_adapter_blocks}
        if len(self.adapter_names) != len(self.order.lengths) or not known.issuperset(self.adapter_names):
            raise ValueError(
                f"`adapter_names` must be one speech adapter of this model a row, got {list(self.adapter_names)} for "
                f"{len(self.order.lengths)} rows. Add those that are missing."
            )

    def _reach_classifier(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Runs what stands before the classifier; returns the classifier's input and, if known, its base's output."""
        hidden_states, base_output = self.hidden_states, self.base_output
        names, first = list(self.stages), self.prefix.name
        for name in names[names.index(first) : -1]:
            if name not in (first, "encoder.rnn_layers.0"):
                hidden_states = self.model.encoder.dropout(hidden_states)
            hidden_states, base_output = self._run_layer(self.stages[name], hidden_states, base_output), None
        return hidden_states, base_output

    def _run_layer(
        self, layer: nn.Module, hidden_states: torch.Tensor | None, base_output: torch.Tensor | None
    ) -> torch.Tensor:
        is_adapted = isinstance(layer, SpeechAdapterLayer)
        if base_output is None:
            base = layer.get_base_layer() if is_adapted else layer
            base_output = base.run_packed(PackedSequence(hidden_states, torch.tensor(self.order.batch_sizes))).data
        return self._adapt(layer, hidden_states, base_output, self._frames_of) if is_adapted else base_output

    def _adapt(
        self,
        layer: SpeechAdapterLayer,
        hidden_states: torch.Tensor | None,
        base_output: torch.Tensor,
        frames_of: Mapping[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        base_output = base_output.to(self.model.dtype)
        # Where the input is not known, no adapter looks at it.
        return adapt_frames(layer, base_output if hidden_states is None else hidden_states, base_output, frames_of)

    def _loss(
        self,
        name: str | None,
        hidden_states: torch.Tensor | None,
        base_output: torch.Tensor | None,
        labels: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        config = self.model.config
        ctc = {"blank": config.pad_token_id, "reduction": config.ctc_loss_reduction}
        linear = self._find_last_linear(name, hidden_states, base_output)
        if linear is not None:
            features, weight, bias, constant_logits = linear
            return packed_linear_ctc(features, weight, bias, labels, lengths, constant_logits=constant_logits, **ctc)
        frames_of = None if name is None else {name: torch.arange(int(lengths.sum()), device=self.order.device)}
        return packed_ctc(self._run_classifier(hidden_states, base_output, frames_of), labels, lengths, **ctc)

    def _find_last_linear(
        self, name: str | None, hidden_states: torch.Tensor | None, base_output: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
        """Returns features, weight, bias and constant addend of the map that gives the logits, if there is such."""
        layer, block = self.model.classifier, None
        is_adapted = isinstance(layer, SpeechAdapterLayer)
        base = layer.get_base_layer() if is_adapted else layer
        if is_adapted and not layer.disable_adapters:
            block = layer.find_block(layer.find_active_adapter() if name is None else name)
        if block is None:
            if hidden_states is None or not isinstance(base, nn.Sequential) or type(base[-1]) is not nn.Linear:
                return None
            return _run_all_but_last(base, hidden_states), base[-1].weight, base[-1].bias, None
        if block.kind == "mlp" and base_output is None:
            base_output = base(hidden_states)
        is_constant = block.kind == "mlp" and not base_output.requires_grad
        if not is_constant and block.kind != "replacement":
            return None
        features = _run_all_but_last(block, hidden_states.to(block[-1].weight.dtype))
        return features, block[-1].weight, block[-1].bias, base_output if is_constant else None

    def _run_classifier(
        self,
        hidden_states: torch.Tensor | None,
        base_output: torch.Tensor | None,
        frames_of: Mapping[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        layer = self.model.classifier
        if not isinstance(layer, SpeechAdapterLayer):
            return layer(hidden_states)
        if base_output is None:
            base_output = layer.get_base_layer()(hidden_states)
        return self._adapt(layer, hidden_states, base_output, frames_of)


def _run_all_but_last(modules: nn.Sequential, hidden_states: torch.Tensor) -> torch.Tensor:
    for module in list(modules)[:-1]:
        hidden_states = module(hidden_states)
    return hidden_states


def adapt_frames(
    layer: SpeechAdapterLayer,
    hidden_states: torch.Tensor,
    output: torch.Tensor,
    frames_of: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Returns what `layer` gives where its base's `output` is known, for frames of several rows without padding.

    Args:
        layer: With adapters.
        hidden_states: Input of the base `(frames, in_features)`.
        output: Output of the base `(frames, out_features)`.
        frames_of: Which frames belong to which adapter, each to one. Default: the active one acts on all.

    Raises:
        ValueError: An adapter looks at whole rows, or changes the base's input.
    """
    if layer.disable_adapters:
        return output
    if frames_of is None:
        return _adapt_known(layer, layer.find_active_adapter(), hidden_states, output)
    adapted = [
        _adapt_known(layer, name, hidden_states.index_select(0, frames), output.index_select(0, frames))
        for name, frames in frames_of.items()
    ]
    return torch.cat(adapted).index_select(0, torch.cat(list(frames_of.values())).argsort())


def _adapt_known(
    layer: SpeechAdapterLayer, name: str | None, hidden_states: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    if (block := layer.find_block(name)) is None:
        return output
    if block.kind == "transformer" or block.position == "before":
        raise ValueError(
            f"`frozen_states` must go with adapters that change the output of their module frame by frame, got "
            f"{name!r}, a {block.kind} that changes rows of frames or its module's input. Give `input_features`."
        )
    return layer.adapt(block, hidden_states, output)
