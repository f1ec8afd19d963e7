"""The training path of the recurrent layers is the GRU of torch, to the last digits of float64."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from modeling.recurrence import GRURecurrence, reverse_frames, run_bidirectional_gru

LENGTHS = torch.tensor([3, 7, 1, 5])


@pytest.fixture
def gru() -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(6, 5, batch_first=True, bidirectional=True).double()


def make_rows() -> torch.Tensor:
    """Four rows of up to 7 frames, with garbage beyond their lengths."""
    rows = torch.randn(4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return rows.requires_grad_()


def run_packed(gru: nn.GRU, rows: torch.Tensor) -> torch.Tensor:
    packed = pack_padded_sequence(rows, LENGTHS, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(gru(packed)[0], batch_first=True, total_length=7)[0]


def test_states_equal_those_of_the_packed_gru(gru):
    rows = make_rows()
    torch.testing.assert_close(run_bidirectional_gru(gru, rows, LENGTHS), run_packed(gru, rows), atol=1e-12, rtol=0)


def test_gradients_equal_those_of_the_packed_gru(gru):
    gradients = []
    for run in (lambda rows: run_bidirectional_gru(gru, rows, LENGTHS), lambda rows: run_packed(gru, rows)):
        rows = make_rows()
        weights = torch.randn(4, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        loss = (run(rows) * weights).sum()
        gradients.append(torch.autograd.grad(loss, [rows, *gru.parameters()]))

    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_padding_comes_out_as_zeros_and_gets_no_gradient(gru):
    rows = make_rows()
    states = run_bidirectional_gru(gru, rows, LENGTHS)
    (gradient,) = torch.autograd.grad(states.sum(), rows)

    for row, frames in enumerate(LENGTHS.tolist()):
        assert states[row, frames:].abs().sum() == 0
        assert gradient[row, frames:].abs().sum() == 0


def test_recurrence_has_the_gradient_of_its_own_values():
    generator = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in [(4, 2, 3, 6), (2, 2, 6), (2, 1, 6)]
    ]
    assert torch.autograd.gradcheck(GRURecurrence.apply, inputs)


def test_layers_in_training_and_in_evaluation_are_one_function(tiny_model):
    batch = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(4))
    with_gradient = tiny_model(batch).logits
    with torch.no_grad():
        without = tiny_model(batch).logits

    assert with_gradient.requires_grad
    torch.testing.assert_close(with_gradient.detach(), without, atol=1e-5, rtol=1e-5)


def test_reverse_frames_leaves_padding_in_its_place():
    rows = torch.tensor([[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]).unsqueeze(-1)
    reversed_rows = reverse_frames(rows, torch.tensor([3, 5])).squeeze(-1)
    assert reversed_rows.tolist() == [[3, 2, 1, 0, 0], [5, 4, 3, 2, 1]]
