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


def stream(model, features, cuts, **caches):
    """Encodes `features` `(batch, frames, mel)` cut at `cuts`; returns what each call gave, and the last output."""
    parts, start = [], 0
    for end in [*cuts, features.shape[1]]:
        is_last = end == features.shape[1]
        output = model(features[:, start:end], use_cache=True, is_last=is_last, **caches)
        caches = {"past_key_values": output.past_key_values, "padding_cache": output.padding_cache}
        parts.append(output.last_hidden_state)
        start = end
    return parts, output


@pytest.mark.parametrize("memory_type", ["attention", "mean"])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_a_stream_gives_what_the_whole_utterance_gives(context, memory_type):
    model = make_model(context, memory_type=memory_type)
    for num_frames in (4, 50, 143):
        features = torch.randn(1, num_frames, 8)
        parts, _ = stream(model, features, sorted({1, 2, 9, 17, 40, 41} & set(range(num_frames))))
        with torch.no_grad():
            whole = model(features).last_hidden_state
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
