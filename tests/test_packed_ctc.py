"""CTC over packed frames is torch's CTC over the padded log-softmax: same loss, same gradients, same refusals."""

import pytest
import torch
from torch import nn

from modeling.ctc_labels import check_labels_fit, count_repeats
from training import packed_ctc as packed_ctc_module
from training.packed_ctc import packed_ctc, packed_linear_ctc

LENGTHS = torch.tensor([9, 7, 7, 3, 1])
# Repeats, an empty transcript, a row of one frame, and a row that needs every frame that it has.
LABELS = torch.tensor([[1, 1, 2, -100], [3, 4, 3, 3], [-100] * 4, [2, 2, -100, -100], [5, -100, -100, -100]])


def make_linear(num_classes: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Frames, weight, bias and constant logits."""
    generator = torch.Generator().manual_seed(num_classes)
    num_frames = int(LENGTHS.sum())
    tensors = [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in [(num_frames, 8), (num_classes, 8), (num_classes,), (num_frames, num_classes)]
    ]
    return [value.requires_grad_(index < 3) for index, value in enumerate(tensors)]


def run_torch(logits: torch.Tensor, *, blank: int, reduction: str) -> torch.Tensor:
    """The loss by torch alone, row by row."""
    losses, rows = [], torch.cat([torch.arange(int((LENGTHS > step).sum())) for step in range(9)])
    for row, labels in enumerate(LABELS):
        target = labels[labels >= 0]
        log_probs = logits[rows == row].log_softmax(-1)
        loss = nn.functional.ctc_loss(log_probs, target, [len(log_probs)], [len(target)], blank=blank, reduction="sum")
        losses.append(loss / {"mean": max(1, len(target)) * len(LABELS), "sum": 1}[reduction])
    return torch.stack(losses).sum()


@pytest.mark.parametrize("chunk_logits", [packed_ctc_module.CHUNK_LOGITS, 1, 40])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("num_classes", "blank"), [(6, 0), (7, 6), (300, 0)])
def test_loss_and_gradients_equal_plain_autograd_in_float64(num_classes, blank, reduction, chunk_logits, monkeypatch):
    monkeypatch.setattr(packed_ctc_module, "CHUNK_LOGITS", chunk_logits)
    hidden, weight, bias, constant = make_linear(num_classes)
    loss = packed_linear_ctc(
        hidden, weight, bias, LABELS, LENGTHS, blank=blank, constant_logits=constant, reduction=reduction
    )
    expected = run_torch(hidden @ weight.T + bias + constant, blank=blank, reduction=reduction)

    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, [hidden, weight, bias]),
        torch.autograd.grad(3 * expected, [hidden, weight, bias]),
        strict=True,
    ):
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-12)


def test_loss_has_the_gradient_of_its_own_values():
    hidden, weight, bias, constant = make_linear(6)
    assert torch.autograd.gradcheck(
        lambda *tensors: packed_linear_ctc(*tensors, LABELS, LENGTHS, blank=0, constant_logits=constant),
        (hidden, weight, bias),
    )


def test_only_what_trains_gets_a_gradient():
    hidden, weight, _, _ = make_linear(6)
    weight.requires_grad_(False)
    loss = packed_linear_ctc(hidden, weight, None, LABELS, LENGTHS, blank=0)
    (gradient,) = torch.autograd.grad(loss, [hidden], retain_graph=True)
    expected = run_torch(hidden @ weight.T, blank=0, reduction="mean")

    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0], atol=1e-10, rtol=0)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(loss, [weight])


def test_loss_is_the_same_without_gradients():
    hidden, weight, bias, _ = make_linear(6)
    loss = packed_linear_ctc(hidden, weight, bias, LABELS, LENGTHS, blank=0)
    with torch.no_grad():
        without = packed_linear_ctc(hidden, weight, bias, LABELS, LENGTHS, blank=0)
    assert loss.requires_grad
    assert not without.requires_grad
    assert loss.item() == without.item()


def test_fp32_stays_close_to_float64_with_logits_far_from_zero():
    exact, rounded = make_linear(300), make_linear(300, torch.float32)
    losses = [
        packed_linear_ctc(hidden, 10 * weight, bias, LABELS, LENGTHS, blank=0, constant_logits=constant + 1e3)
        for hidden, weight, bias, constant in (exact, rounded)
    ]
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    gradients = [
        torch.autograd.grad(loss, tensors[:3]) for loss, tensors in zip(losses, (exact, rounded), strict=True)
    ]
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-3)


def test_half_precision_multiplies_in_half_and_sums_in_fp32():
    hidden, weight, bias, _ = make_linear(6, torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    loss = packed_linear_ctc(half, weight, bias, LABELS, LENGTHS, blank=0)
    gradients = torch.autograd.grad(loss, [half, weight])
    expected = packed_linear_ctc(hidden, weight, bias, LABELS, LENGTHS, blank=0)
    theirs = torch.autograd.grad(expected, [hidden, weight])

    assert [value.dtype for value in (loss, *gradients)] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(loss, expected, atol=0, rtol=0.02)
    for ours, exact in zip(gradients, theirs, strict=True):
        assert (ours - exact).norm() < 0.03 * exact.norm()


def test_autocast_does_not_change_the_precision():
    hidden, weight, bias, _ = make_linear(6, torch.float32)
    loss = packed_linear_ctc(hidden, weight, bias, LABELS, LENGTHS, blank=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed_linear_ctc(hidden, weight, bias, LABELS, LENGTHS, blank=0).item() == loss.item()


def test_loss_elsewhere_than_on_a_cpu_is_the_same(monkeypatch):
    tensors = make_linear(6)
    chunked = packed_linear_ctc(*tensors[:3], LABELS, LENGTHS, blank=0, constant_logits=tensors[3])
    monkeypatch.setattr(packed_ctc_module, "CHUNKED_DEVICES", ())
    monkeypatch.setattr(packed_ctc_module, "_scan_chunks", None)
    whole = packed_linear_ctc(*tensors[:3], LABELS, LENGTHS, blank=0, constant_logits=tensors[3])

    torch.testing.assert_close(whole, chunked, atol=1e-10, rtol=0)
    for ours, theirs in zip(*(torch.autograd.grad(loss, tensors[:3]) for loss in (chunked, whole)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_batches_without_any_label_have_a_loss():
    hidden, weight, bias, _ = make_linear(6)
    loss = packed_linear_ctc(hidden, weight, bias, LABELS[:, :0], LENGTHS, blank=0, reduction="sum")
    log_probs = (hidden @ weight.T + bias).log_softmax(-1)
    torch.testing.assert_close(loss, -log_probs[:, 0].sum(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_plain_loss_over_packed_logits_equals_torch_s_row_by_row(reduction):
    logits = make_linear(6)[3].requires_grad_()
    loss = packed_ctc(logits, LABELS, LENGTHS, blank=0, reduction=reduction)
    expected = run_torch(logits, blank=0, reduction=reduction)

    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


def test_transcripts_longer_than_their_frames_are_refused_by_row():
    message = r"`labels` must fit the audio, got rows \[3\] with \[4\] frames .* and \[3\] there"
    labels = LABELS.clone()
    labels[3, 2] = 4
    hidden, weight, bias, constant = make_linear(6)
    with pytest.raises(ValueError, match=message):
        packed_linear_ctc(hidden, weight, bias, labels, LENGTHS, blank=0)
    with pytest.raises(ValueError, match=message):
        packed_ctc(constant, labels, LENGTHS, blank=0)
    assert check_labels_fit(LABELS, LENGTHS).tolist() == [3, 4, 0, 2, 1]


def test_count_repeats_ignores_padding():
    assert count_repeats(torch.tensor([[4, 4, 4, 5], [4, -100, -100, -100], [4, 5, 4, 4]])).tolist() == [2, 0, 1]


def test_unknown_reductions_and_constants_that_train_are_refused():
    hidden, weight, bias, constant = make_linear(6)
    with pytest.raises(ValueError, match='`reduction` must be "mean" or "sum", got \'none\''):
        packed_linear_ctc(hidden, weight, bias, LABELS, LENGTHS, blank=0, reduction="none")
    with pytest.raises(ValueError, match="`constant_logits` must not require a gradient"):
        packed_linear_ctc(hidden, weight, bias, LABELS, LENGTHS, blank=0, constant_logits=constant.requires_grad_())
