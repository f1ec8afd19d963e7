"""The file of a cache holds what was written, and a single changed bit of it shows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.cache_file import CacheWriter, find_cache_damage


def write_file(path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Three utterances of 5, 3 and 2 frames with two states, in two batches."""
    with CacheWriter(path, num_utterances=3, dtype=dtype, key="k") as writer:
        for rows, lengths in (([1, 0], [5, 3]), ([2], [2])):
            ramp = torch.arange(5.0).view(1, 5, 1) + 10 * torch.tensor(rows).view(-1, 1, 1)
            states = {"h": ramp.expand(-1, -1, 2), "b": -ramp}
            writer.write(rows, states, torch.tensor(lengths))
        writer.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_are_in_the_order_of_writing_with_a_table_of_where_they_are(tmp_path, dtype):
    write_file(tmp_path / "file", dtype)
    tensors = load_file(tmp_path / "file")
    assert tensors["lengths"].tolist() == [3, 5, 2]
    assert tensors["starts"].tolist() == [5, 0, 8]
    assert tensors["b"].flatten().tolist() == [-10, -11, -12, -13, -14, 0, -1, -2, -20, -21]
    assert torch.equal(tensors["h"], -tensors["b"].expand(-1, 2))
    assert tensors["h"].dtype == tensors["b"].dtype == dtype


def test_a_whole_file_has_no_damage_and_fits_its_key_and_precision_alone(tmp_path):
    write_file(tmp_path / "file")
    assert find_cache_damage(tmp_path / "file", "k", torch.float32) is None
    assert find_cache_damage(tmp_path / "file", "l", torch.float32) == "it was made for another key"
    assert find_cache_damage(tmp_path / "file", "k", torch.bfloat16) == "the checksum of 'h' is another"
    assert find_cache_damage(tmp_path / "absent", "k", torch.float32).startswith("it cannot be read")


def test_every_changed_bit_and_every_missing_byte_is_found(tmp_path):
    path = tmp_path / "file"
    write_file(path)
    content = path.read_bytes()
    unnoticed = []
    for position in range(len(content)):
        for damaged in (
            content[:position],
            *(
                content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
                for bit in range(8)
            ),
        ):
            path.write_bytes(damaged)
            unnoticed += [position] * (find_cache_damage(path, "k", torch.float32) is None)
    assert not unnoticed


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"h": torch.ones(2, 2, 4)}, r"must return states \(batch, frames, width\).*got .*\(2, 2, 4\).* and \[3, 1\]"),
        ({"h": torch.ones(1, 3, 4)}, r"must return states \(batch, frames, width\).*\(1, 3, 4\)"),
        ({"starts": torch.ones(2, 3, 4)}, "must return states that are not named lengths or starts, got .'starts'"),
        ({}, r"must return states that are not named lengths or starts, got \[\]"),
    ],
)
def test_states_that_do_not_fit_their_lengths_are_refused(tmp_path, states, message):
    with (
        CacheWriter(tmp_path / "file", num_utterances=2, dtype=torch.float32, key="") as writer,
        pytest.raises(ValueError, match=message),
    ):
        writer.write([0, 1], states, torch.tensor([3, 1]))


def test_states_of_another_width_than_before_are_refused(tmp_path):
    with CacheWriter(tmp_path / "file", num_utterances=2, dtype=torch.float32, key="") as writer:
        writer.write([0], {"h": torch.ones(1, 3, 4)}, torch.tensor([3]))
        with pytest.raises(ValueError, match=r"of the widths \{'h': 4\}.*got .*\(1, 3, 5\)"):
            writer.write([1], {"h": torch.ones(1, 3, 5)}, torch.tensor([3]))
