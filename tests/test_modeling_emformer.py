"""Emformer gives what its equations say, whole, in batches and in streams."""

import itertools

import pytest
import torch
from slow_emformer import encode

from modeling import EmformerConfig, EmformerModel

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
# Segment, left context, right context, memories.
CONTEXTS = [
    (segment, left, right, memory)
    for segment, left, right, memory in itertools.product((1, 3, 4), (0, 5, 30), (0, 1, 3), (0, 1, 3))
    if right <= segment
]


def make_model(context=(4, 5, 2, 3), **settings):
    torch.manual_seed(0)
    segment, left, right, memory = context
    config = EmformerConfig(
        segment_length=segment,
        left_context_length=left,
        right_context_length=right,
        max_memory_size=memory,
        **{**SIZES, "num_mel_bins": 8, "subsampling_channels": 12, **settings},
    )
    return EmformerModel(config).eval()


@pytest.mark.parametrize("memory_type", ["attention", "mean"])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_forward_gives_what_the_equations_of_the_paper_give(context, memory_type):
    model = make_model(context, memory_type=memory_type).double()
    for num_frames in (1, 4, 10, 97):  # 97 frames of the shortest contexts are several blocks
        frames = torch.randn(num_frames, 16, dtype=torch.double)
        with torch.no_grad():
            output = model(inputs_embeds=frames[None]).last_hidden_state[0]
            torch.testing.assert_close(output, encode(model, frames), rtol=0, atol=1e-12)
