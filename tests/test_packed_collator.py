"""Rows of cached states become the frames of torch's `PackedSequence`, with what belongs to each row in its order."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from data.collators import pack_states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["one tensor", "padded rows", "own tensors", "transposed", "inference"])
def test_packed_frames_are_in_the_order_of_torch(source, dtype):
    lengths = [2, 5, 1, 5, 4]
    whole = torch.randn(40, 6).to(dtype)
    rows = {
        "one tensor": [whole[8 * row : 8 * row + length] for row, length in enumerate(lengths)],
        "padded rows": [whole.view(5, 8, 6)[row, :length] for row, length in enumerate(lengths)],
        "own tensors": [torch.randn(length, 6).to(dtype) for length in lengths],
        "transposed": [whole.view(6, 40).T[8 * row : 8 * row + length] for row, length in enumerate(lengths)],
    }
    with torch.inference_mode():
        rows["inference"] = list(torch.split(whole[:17].clone(), lengths))
    examples = [{"states": {"h": states}, "labels": [row] * row} for row, states in enumerate(rows[source])]

    batch = pack_states(examples)

    order = [1, 3, 4, 0, 2]
    expected = pack_sequence([rows[source][row] for row in order])
    assert torch.equal(batch["frozen_states"]["h"], expected.data)
    assert batch["frozen_states"]["h"].dtype == dtype
    assert batch["logits_lengths"].tolist() == [5, 5, 4, 2, 1]
    assert [[label for label in row if label != -100] for row in batch["labels"].tolist()] == [
        [row] * row for row in order
    ]
    assert "adapter_names" not in batch


def test_packed_rows_keep_their_adapters():
    examples = [
        {"states": {"h": torch.ones(length, 2)}, "labels": [1], "adapter_name": name}
        for length, name in ((1, "ann"), (3, "ben"), (2, "ann"))
    ]
    assert pack_states(examples)["adapter_names"] == ["ben", "ann", "ann"]
