"""The training path of the recurrent layers is the GRU of torch to the last digits of float64, on real frames only."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from training.objectives.recognition import CTCObjective
from training.packed_frames import PackedOrder
from training.recurrence import GRURecurrence, ReverseRows, quick_recurrences, run_bidirectional_gru

LENGTHS = torch.tensor([7, 5, 5, 1])


@pytest.fixture
def gru() -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(6, 5, batch_first=True, bidirectional=True).double()


def make_frames() -> torch.Tensor:
    """The 18 packed frames of four rows."""
    frames = torch.randn(18, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return frames.requires_grad_()


def run_ours(gru: nn.GRU, frames: torch.Tensor) -> torch.Tensor:
    return run_bidirectional_gru(gru, frames, PackedOrder(LENGTHS))


def run_torch(gru: nn.GRU, frames: torch.Tensor) -> torch.Tensor:
    return gru(PackedSequence(frames, torch.tensor([4, 3, 3, 3, 3, 1, 1])))[0].data


def test_order_of_frames_is_that_of_a_packed_sequence():
    order = PackedOrder(LENGTHS)
    names = torch.arange(28).view(4, 7)  # of row and frame
    packed = pack_padded_sequence(names, LENGTHS, batch_first=True)

    assert order.batch_sizes == packed.batch_sizes.tolist() == [4, 3, 3, 3, 3, 1, 1]
    assert (order.rows * 7 + order.steps).tolist() == packed.data.tolist()
    assert order.pad(packed.data.unsqueeze(-1), -1).squeeze(-1).T.tolist() == [
        [0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, -1, -1], [14, 15, 16, 17, 18, -1, -1], [21, -1, -1, -1, -1, -1, -1]
    ]  # fmt: skip


def test_reversed_order_runs_every_row_backwards():
    order = PackedOrder(torch.tensor([3, 2]))
    assert [list("aAbBc")[frame] for frame in order.reverse] == list("cBbAa")
    assert order.reverse[order.reverse].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("lengths", [[2, 3], [2, 0], []])
def test_lengths_that_are_not_sorted_or_below_one_are_refused(lengths):
    with pytest.raises(ValueError, match=r"`logits_lengths` must be at least 1 and the longest first, got \["):
        PackedOrder(torch.tensor(lengths, dtype=torch.long))


def test_states_equal_those_of_the_packed_gru(gru):
    frames = make_frames()
    torch.testing.assert_close(run_ours(gru, frames), run_torch(gru, frames), atol=1e-12, rtol=0)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_gradients_equal_those_of_the_packed_gru(gru, is_frozen):
    gru.requires_grad_(not is_frozen)
    gradients = []
    for run in (run_ours, run_torch):
        frames = make_frames()
        weights = torch.randn(18, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        loss = (run(gru, frames) * weights).sum()
        trained = [frames, *(parameter for parameter in gru.parameters() if parameter.requires_grad)]
        gradients.append(torch.autograd.grad(loss, trained))

    assert len(gradients[0]) == (1 if is_frozen else 9)
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_recurrence_has_the_gradient_of_its_own_values():
    generator = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in [(2, 6, 6), (2, 2, 6), (2, 1, 6)]
    ]
    assert torch.autograd.gradcheck(GRURecurrence.apply, (*inputs, [3, 2, 1]))


def test_reversed_frames_have_the_gradient_of_their_own_values():
    order = PackedOrder(torch.tensor([3, 2])).reverse
    frames = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: ReverseRows.apply(values, order), frames)


def test_only_real_frames_are_computed(gru):
    def count(lengths: list[int]) -> int:
        frames = torch.zeros(sum(lengths), 6, dtype=torch.float64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            run_bidirectional_gru(gru, frames, PackedOrder(torch.tensor(lengths))).sum().backward()
        return counter.get_total_flops()

    # Two directions of three gates, from 6 inputs and 5 states: forward, for the inputs, and for the weights.
    assert count([7, 5, 5, 1]) == 18 * 3 * 2 * 2 * 3 * 5 * (6 + 5)


def test_frozen_weights_get_no_gradient_computed(gru):
    gru.requires_grad_(False)
    frames = torch.zeros(18, 6, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        run_ours(gru, frames).sum().backward()
    assert counter.get_total_flops() == 18 * 2 * 2 * 2 * 3 * 5 * (6 + 5)


def test_layers_in_training_and_in_evaluation_are_one_function(tiny_model, monkeypatch):
    layers = []

    def count(gru, *args):
        layers.append(gru)
        return run_bidirectional_gru(gru, *args)

    monkeypatch.setattr("training.recurrence.run_bidirectional_gru", count)
    num_layers, weights = tiny_model.config.num_hidden_layers, dict(tiny_model.named_parameters())
    batch = {
        "input_features": torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(4)),
        "attention_mask": (torch.arange(30) < torch.tensor([[21], [30]])).long(),
        "labels": torch.tensor([[1, 2], [3, 4]]),
    }
    objective = CTCObjective(tiny_model)
    objective(**batch)["loss"].backward()
    gradients = {name: weight.grad.clone() for name, weight in weights.items()}
    assert len(layers) == num_layers
    with torch.no_grad():
        loss = objective(**batch)["loss"]
    tiny_model.zero_grad()
    output = tiny_model(**batch)
    output.loss.backward()
    assert len(layers) == num_layers  # no more: torch's own layers ran

    torch.testing.assert_close(loss, output.loss.detach(), atol=1e-5, rtol=1e-5)
    for name, weight in weights.items():
        assert (gradients[name] - weight.grad).norm() <= 1e-3 * weight.grad.norm()
    with quick_recurrences(tiny_model):
        quick = tiny_model(**batch).logits
    assert len(layers) == 2 * num_layers
    torch.testing.assert_close(quick, output.logits, atol=1e-5, rtol=1e-5)
