"""CTC over packed frames: exact, without the tensor of all classes for all frames of the padded batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from modeling.ctc_labels import check_labels_fit
from training.packed_frames import PackedOrder

# Logits that are computed together: 4 MiB in fp32, which stay in a processor's cache.
CHUNK_LOGITS = 2**20
# Where logits are computed in chunks; elsewhere they are kept, by torch's own operations.
CHUNKED_DEVICES = ("cpu",)
# Log-probability of what no alignment uses; finite, or differences of it would not be numbers.
UNUSED = -1e30


@dataclass(frozen=True)
class _Alignment:
    """
    What CTC needs to know of a batch.

    Args:
        order: Which frame is which.
        columns: Classes that each row's labels use, the blank first, then in any order `(batch, used)`.
        is_used: Which of them are classes `(batch, used)`.
        targets: Labels as places in `columns` `(batch, tokens)`.
        num_targets: Labels of each row.
        row_weights: Weight of each row's loss `(batch,)`.
    """

    order: PackedOrder
    columns: torch.Tensor
    is_used: torch.Tensor
    targets: torch.Tensor
    num_targets: list[int]
    row_weights: torch.Tensor

    def ctc(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns each row's loss `(batch,)` and the forward variables, of `(steps, batch, used)`."""
        lengths = self.order.lengths.tolist()
        return torch.ops.aten._ctc_loss(log_probs, self.targets, lengths, self.num_targets, 0)

    def occupancy(self, log_probs: torch.Tensor, losses: torch.Tensor, forward: torch.Tensor) -> torch.Tensor:
        """
        Returns the gradient on logits less that of their log-sum-exp: minus each row's weight times the chance that
        an alignment is at a class, `(batch, steps, used)`.
        """
        lengths = self.order.lengths.tolist()
        gradient = torch.ops.aten._ctc_loss_backward(
            self.row_weights, log_probs, self.targets, lengths, self.num_targets, losses, forward, 0
        )
        return gradient.sub_(log_probs.exp() * self.row_weights.unsqueeze(-1)).transpose(0, 1)


class _LinearLogits(NamedTuple):
    """Logits that are computed a chunk at a time; see [`packed_linear_ctc`]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    constant_logits: torch.Tensor | None

    def compute(self, chunk: slice, dtype: torch.dtype) -> torch.Tensor:
        """Returns the logits of a chunk of frames `(frames, classes)`."""
        logits = (self.hidden[chunk] @ self.weight.t()).to(dtype)
        if self.bias is not None:
            logits += self.bias
        if self.constant_logits is not None:
            logits += self.constant_logits[chunk]
        return logits


class _LinearCTC(torch.autograd.Function):
    """
    Weighted sum of the rows' CTC losses over logits of a linear map.

    The gradient on logits is w (softmax - occupancy). Its first part follows from a chunk's logits at once; the second
    is zero outside each row's own labels. So logits are computed once and never kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, constant_logits, alignment: _Alignment):
        linear = _LinearLogits(hidden, weight.to(hidden.dtype), bias, constant_logits)
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = [
                torch.zeros_like(value, dtype=alignment.row_weights.dtype) if needed else None
                for value, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
            ]
            log_probs = _scan_chunks(linear, alignment, *gradients)
            losses, forward = alignment.ctc(log_probs)
            if any(ctx.needs_input_grad):
                _add_occupancy(linear, alignment, alignment.occupancy(log_probs, losses, forward), *gradients)
        ctx.dtypes = [getattr(value, "dtype", None) for value in (hidden, weight, bias)]
        ctx.save_for_backward(*gradients)
        return (losses * alignment.row_weights).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        scaled = [
            None if value is None else value.mul(gradient).to(dtype)
            for value, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def packed_linear_ctc(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    lengths: torch.Tensor,
    *,
    blank: int,
    constant_logits: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """
    Returns the CTC loss of `hidden @ weight.T + bias + constant_logits`, as `nn.functional.ctc_loss` of the padded
    log-softmax, with exact gradients.

    Args:
        hidden: Packed frames `(frames, in_features)`; the products are computed in its precision.
        weight: `(classes, in_features)`.
        bias: `(classes,)`, or none.
        labels: Classes `(batch, tokens)`, negative beyond a transcript's end.
        lengths: Frames of each row `(batch,)`, longest first.
        blank: Class of the CTC blank.
        constant_logits: Added to the logits, without a gradient `(frames, classes)`.
        reduction: `"mean"` (a row's loss over its label count, averaged over the rows) or `"sum"`.

    Returns:
        The loss `()`, in fp32, or in float64 for float64.

    Raises:
        ValueError: The lengths are not sorted, a transcript needs more frames than there are, `constant_logits`
            require a gradient, or an unknown reduction.

    Example:

    ```python
    >>> import torch
    >>> from training.packed_ctc import packed_linear_ctc

    >>> hidden, weight = torch.zeros(3, 4), torch.zeros(2, 4)  # two classes, each as likely, in every frame
    >>> loss = packed_linear_ctc(hidden, weight, None, torch.tensor([[1], [1]]), torch.tensor([2, 1]), blank=0)
    >>> round((-2 * loss).exp().item(), 6)  # chances: 3/4 of "11", "1-" or "-1" in two frames, 1/2 of "1" in one
    0.375

    ```
    """
    if constant_logits is not None and constant_logits.requires_grad:
        raise ValueError("`constant_logits` must not require a gradient, got one that does. Detach it.")
    if hidden.device.type not in CHUNKED_DEVICES:
        logits = nn.functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
        logits = logits if constant_logits is None else logits + constant_logits
        return packed_ctc(logits, labels, lengths, blank=blank, reduction=reduction)
    order = PackedOrder(lengths, hidden.device)
    alignment = _align(labels.to(hidden.device), order, blank, reduction, _accumulating_dtype(hidden.dtype))
    if not torch.is_grad_enabled():  # a Function is told what requires a gradient, not whether one is wanted
        hidden, weight, bias = (None if value is None else value.detach() for value in (hidden, weight, bias))
    return _LinearCTC.apply(hidden, weight, bias, constant_logits, alignment)


def packed_ctc(
    logits: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, *, blank: int, reduction: str = "mean"
) -> torch.Tensor:
    """
    Returns the CTC loss of packed `logits` `(frames, classes)`, through torch's own operations.

    The other arguments, the result and the errors are those of [`packed_linear_ctc`].
    """
    label_lengths = check_labels_fit(labels, lengths)
    order = PackedOrder(lengths, logits.device)
    log_probs = order.pad(logits.to(_accumulating_dtype(logits.dtype)).log_softmax(-1))  # (steps, batch, classes)
    with torch.backends.cudnn.flags(enabled=False):
        return nn.functional.ctc_loss(
            log_probs,
            labels.clamp(min=0).to(logits.device),
            order.lengths,
            label_lengths,
            blank=blank,
            reduction=reduction,
        )


def _accumulating_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _align(labels: torch.Tensor, order: PackedOrder, blank: int, reduction: str, dtype: torch.dtype) -> _Alignment:
    if reduction not in ("mean", "sum"):
        raise ValueError(f'`reduction` must be "mean" or "sum", got {reduction!r}.')
    num_targets = check_labels_fit(labels, order.lengths)
    row_weights = torch.ones(len(labels), dtype=dtype)
    if reduction == "mean":
        row_weights /= num_targets.clamp(min=1) * len(labels)
    # Each row's labels in order, padding first; each new one gets the next place, the blank has place 0.
    #     labels  5 3 5 .   ->   ordered  . 3 5 5   ->   places  0 1 2 2   ->   columns  blank 3 5
    ordered, source = nn.functional.pad(labels, (1, 0), value=-1).clamp(min=-1).sort(-1)
    places = nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0)).cumsum(-1)
    num_used = int(places.max()) + 1
    columns = torch.full((len(labels), num_used), blank, device=labels.device)
    columns.scatter_(1, places, ordered.where(ordered >= 0, blank))
    targets = torch.zeros_like(ordered).scatter_(1, source, places)[:, 1:]
    is_used = torch.arange(num_used, device=labels.device) <= places[:, -1:]
    return _Alignment(order, columns, is_used, targets, num_targets.tolist(), row_weights.to(labels.device))


def _list_chunks(num_frames: int, num_classes: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // num_classes)
    for start in range(0, num_frames, size):
        yield slice(start, min(start + size, num_frames))


def _scan_chunks(
    linear: _LinearLogits,
    alignment: _Alignment,
    by_hidden: torch.Tensor | None,
    by_weight: torch.Tensor | None,
    by_bias: torch.Tensor | None,
) -> torch.Tensor:
    """
    Returns the log-probabilities of each row's own classes `(steps, batch, used)` and writes the part of the gradients
    on hidden, weight and bias that comes of the log-sum-exp.
    """
    hidden, weight = linear.hidden, linear.weight
    rows, dtype = alignment.order.rows, alignment.row_weights.dtype
    used = hidden.new_empty(len(hidden), alignment.columns.shape[1], dtype=dtype)
    for chunk in _list_chunks(len(hidden), len(weight)):
        logits = linear.compute(chunk, dtype)
        torch.gather(logits, 1, alignment.columns[rows[chunk]], out=used[chunk])
        peak = logits.amax(1, keepdim=True)
        chances = logits.sub_(peak).exp_()  # of each class, times the frame's total
        total = chances.sum(1, keepdim=True)
        used[chunk] -= peak + total.log()
        scale = alignment.row_weights[rows[chunk]].unsqueeze(1) / total
        if by_bias is not None:
            by_bias += scale.squeeze(1) @ chances
        chances = chances.to(hidden.dtype)
        if by_hidden is not None:
            torch.mul(chances @ weight, scale, out=by_hidden[chunk])
        if by_weight is not None:
            by_weight += chances.t() @ (hidden[chunk] * scale).to(hidden.dtype)
    used.masked_fill_(~alignment.is_used[rows], UNUSED)
    return alignment.order.pad(used, UNUSED)


def _add_occupancy(
    linear: _LinearLogits,
    alignment: _Alignment,
    occupancy: torch.Tensor,
    by_hidden: torch.Tensor | None,
    by_weight: torch.Tensor | None,
    by_bias: torch.Tensor | None,
) -> None:
    """Adds the part of the gradients that comes of each row's own classes, given as `(batch, steps, used)`."""
    columns, order = alignment.columns, alignment.order
    if by_hidden is not None:
        rows_weights = linear.weight.index_select(0, columns.flatten()).unflatten(0, columns.shape)
        change = torch.bmm(occupancy, rows_weights.to(occupancy.dtype)).flatten(0, 1)  # (batch * steps, in_features)
        by_hidden += change.index_select(0, order.rows * occupancy.shape[1] + order.steps)
    if by_weight is not None:
        padded = order.pad(linear.hidden.to(occupancy.dtype)).transpose(0, 1)
        by_weight.index_add_(0, columns.flatten(), torch.bmm(occupancy.transpose(1, 2), padded).flatten(0, 1))
    if by_bias is not None:
        by_bias.index_add_(0, columns.flatten(), occupancy.sum(1).flatten())
