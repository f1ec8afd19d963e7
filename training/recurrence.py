"""A bidirectional GRU over packed frames, for training on a CPU.

torch's GRU multiplies, on a CPU, one small matrix a frame and direction and accumulates the weights' gradient at
every frame; over packed rows it also fills a gradient of the whole batch at every frame (torch 2.13). The same
arithmetic in fewer operations, both directions in one product and the weights' gradient in one at the end, takes a
third of the time. Each step computes only the rows that still have a frame.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from training.packed_frames import PackedOrder


class GRURecurrence(torch.autograd.Function):
    """
    The recurrent part of a GRU, for independent directions side by side.

    With input gates a, hidden gates b = h[t-1] W + c and the logistic function s:

        r = s(a_r + b_r),  z = s(a_z + b_z),  n = tanh(a_n + r b_n),  h[t] = n + z (h[t-1] - n)

    Source: `torch.nn.GRU`.
    """

    @staticmethod
    def forward(
        ctx, input_gates: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, batch_sizes: Sequence[int]
    ) -> torch.Tensor:
        """
        Args:
            input_gates: Packed frames `(directions, frames, 3 * hidden)`, in the order r, z, n.
            weight: `(directions, hidden, 3 * hidden)`.
            bias: `(directions, 1, 3 * hidden)`.
            batch_sizes: Rows that have a frame at each step, never more than at the step before.

        Returns:
            States of the packed frames `(directions, frames, hidden)`.
        """
        hidden = weight.shape[1]
        directions, frames, _ = input_gates.shape
        states, candidate, hidden_candidate = (input_gates.new_empty(directions, frames, hidden) for _ in range(3))
        reset_update = input_gates.new_empty(directions, frames, 2 * hidden)
        previous = input_gates.new_zeros(directions, batch_sizes[0], hidden)
        for now, rows in _list_steps(batch_sizes):
            previous = previous[:, :rows]
            hidden_gates = torch.baddbmm(bias, previous, weight)  # (directions, rows, 3 * hidden)
            torch.add(input_gates[:, now, : 2 * hidden], hidden_gates[..., : 2 * hidden], out=reset_update[:, now])
            reset, update = reset_update[:, now].sigmoid_().chunk(2, dim=-1)
            hidden_candidate[:, now] = hidden_gates[..., 2 * hidden :]
            torch.addcmul(input_gates[:, now, 2 * hidden :], reset, hidden_candidate[:, now], out=candidate[:, now])
            torch.lerp(candidate[:, now].tanh_(), previous, update, out=states[:, now])
            previous = states[:, now]
        ctx.batch_sizes = batch_sizes
        ctx.save_for_backward(states, reset_update, candidate, hidden_candidate, weight)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, reset_update, candidate, hidden_candidate, weight = ctx.saved_tensors
        hidden, trains_weight = weight.shape[1], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        reset, update = reset_update.chunk(2, dim=-1)
        previous = _shift_states(states, ctx.batch_sizes)
        # Derivatives that need no recurrence, for all frames at once.
        by_candidate = (1 - update) * (1 - candidate.square())
        by_update = (previous - candidate) * update * (1 - update)
        by_reset = hidden_candidate * reset * (1 - reset)
        input_gates = states.new_empty(*states.shape[:-1], 3 * hidden)
        hidden_gates = torch.empty_like(input_gates if trains_weight else input_gates[:, : ctx.batch_sizes[0]])
        carried, weight_t = torch.zeros_like(states[:, : ctx.batch_sizes[0]]), weight.transpose(1, 2)
        for now, rows in reversed(list(_list_steps(ctx.batch_sizes))):
            state = carried[:, :rows] + gradient[:, now]  # rows that end before have no gradient yet
            grad_reset, grad_update, grad_candidate = input_gates[:, now].chunk(3, dim=-1)
            torch.mul(state, by_candidate[:, now], out=grad_candidate)
            torch.mul(grad_candidate, by_reset[:, now], out=grad_reset)
            torch.mul(state, by_update[:, now], out=grad_update)
            gates = hidden_gates[:, now] if trains_weight else hidden_gates[:, :rows]
            gates[..., : 2 * hidden] = input_gates[:, now, : 2 * hidden]
            torch.mul(grad_candidate, reset[:, now], out=gates[..., 2 * hidden :])
            carried[:, :rows] = torch.baddbmm(state.mul_(update[:, now]), gates, weight_t)
        weight_gradient = previous.transpose(1, 2) @ hidden_gates if ctx.needs_input_grad[1] else None
        bias_gradient = hidden_gates.sum(1, keepdim=True) if ctx.needs_input_grad[2] else None
        return input_gates, weight_gradient, bias_gradient, None


class ReverseRows(torch.autograd.Function):
    """Packed frames `(frames, width)` with every row turned around; `order` is its own inverse."""

    @staticmethod
    def forward(ctx, frames: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        return frames.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.index_select(0, *ctx.saved_tensors), None


def run_bidirectional_gru(gru: nn.GRU, frames: torch.Tensor, order: PackedOrder) -> torch.Tensor:
    """
    Returns what `gru` gives for packed frames: `(frames, 2 * hidden)`.

    Args:
        gru: One bidirectional layer with biases.
        frames: `(frames, in_features)`.
        order: Which frame is which.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = (
        torch.stack([forward, backward])
        for forward, backward in zip(gru._flat_weights[:4], gru._flat_weights[4:], strict=True)
    )
    both = torch.stack([frames, ReverseRows.apply(frames, order.reverse)])  # (directions, frames, in_features)
    gates = torch.baddbmm(bias_ih.unsqueeze(1), both, weight_ih.transpose(1, 2))
    states = GRURecurrence.apply(gates, weight_hh.transpose(1, 2), bias_hh.unsqueeze(1), order.batch_sizes)
    forward, backward = states.unbind(0)
    return torch.cat([forward, ReverseRows.apply(backward, order.reverse)], dim=-1)


@contextmanager
def quick_recurrences(model: nn.Module) -> Iterator[None]:
    """
    Makes the bidirectional GRUs of `model` run as above on packed frames, where gradients are wanted on a CPU.

    Under autocast, elsewhere and without gradients they stay torch's own; what is no plain GRU is left alone.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.GRU and module.bidirectional and module.num_layers == 1 and module.bias
    ]
    for layer in layers:
        layer.forward = partial(_run_gru, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _run_gru(gru: nn.GRU, packed: PackedSequence, states: torch.Tensor | None = None) -> tuple:
    is_quick = isinstance(packed, PackedSequence) and states is None and torch.is_grad_enabled()
    if not is_quick or packed.data.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return nn.GRU.forward(gru, packed, states)
    rows = torch.arange(int(packed.batch_sizes[0]))
    order = PackedOrder((packed.batch_sizes.unsqueeze(1) > rows).sum(0))
    frames = run_bidirectional_gru(gru, packed.data, order)
    return PackedSequence(frames, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), None


def _list_steps(batch_sizes: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Yields each step's place among the packed frames and its rows."""
    start = 0
    for rows in batch_sizes:
        yield slice(start, start + rows), rows
        start += rows


def _shift_states(states: torch.Tensor, batch_sizes: Sequence[int]) -> torch.Tensor:
    """Returns the state that each packed frame came from: its row's a step before, zeros at the first step."""
    sizes, first = torch.tensor(batch_sizes, device=states.device), batch_sizes[0]
    # Frame i of a step stands as many places behind its predecessor as the step before had rows.
    places = torch.arange(first, states.shape[1], device=states.device)
    shifted = torch.zeros_like(states)
    shifted[:, first:] = states.index_select(1, places - sizes[:-1].repeat_interleave(sizes[1:]))
    return shifted
