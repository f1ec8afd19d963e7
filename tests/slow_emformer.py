"""Emformer's equations for one utterance, segment by segment and without any mask: slow, and independent of ours."""

import torch
from torch.nn import functional as F


def norm(weights, name, frames):
    return F.layer_norm(frames, frames.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def linear(weights, name, frames):
    return F.linear(frames, weights[f"{name}.weight"], weights[f"{name}.bias"])


def attend(weights, name, queries, keys, num_heads):
    """Equations 5 to 7 of arXiv 2010.10759, head by head."""
    query = linear(weights, f"{name}.emb_to_query", queries).chunk(num_heads, -1)
    key, value = linear(weights, f"{name}.emb_to_key_value", keys).chunk(2, -1)
    heads = []
    for q, k, v in zip(query, key.chunk(num_heads, -1), value.chunk(num_heads, -1), strict=True):
        heads.append(torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v)
    return linear(weights, f"{name}.out_proj", torch.cat(heads, -1))


def feed_forward(weights, name, frames):
    inner = F.relu(linear(weights, f"{name}.pos_ff.1", norm(weights, f"{name}.pos_ff.0", frames)))
    return norm(weights, f"{name}.layer_norm_output", linear(weights, f"{name}.pos_ff.4", inner) + frames)


def encode(model, frames):
    """Encodes the frames `(frames, hidden)` of one utterance with the weights of `model`: `(frames, hidden)`."""
    weights, config = dict(model.named_parameters()), model.config
    length, left, right = config.segment_length, config.left_context_length, config.right_context_length
    starts = range(0, len(frames), length)
    lookahead = [frames[start + length : start + length + right] for start in starts]
    memory = [frames[start : start + length].mean(0) for start in starts]
    for index in range(config.num_hidden_layers):
        name = f"layers.{index}"
        normed = norm(weights, f"{name}.layer_norm_input", frames)
        above, above_lookahead, above_memory = [], [], []
        for number, start in enumerate(starts):
            own = normed[start : start + length]
            ahead = norm(weights, f"{name}.layer_norm_input", lookahead[number])
            past = normed[max(0, start - left) : start]
            oldest = max(0, number - config.max_memory_size)
            if config.memory_type == "mean":
                bank = [normed[begin : begin + length].mean(0) for begin in starts[oldest:number]]
            else:
                bank = memory[oldest:number]
            bank = torch.stack(bank) if bank else frames[:0]
            attended = attend(
                weights,
                f"{name}.attention",
                torch.cat([ahead, own]),
                torch.cat([bank, ahead, past, own]),
                config.num_attention_heads,
            )
            summary = attend(
                weights,
                f"{name}.attention",
                own.mean(0, keepdim=True),
                torch.cat([ahead, past, own]),
                config.num_attention_heads,
            )[0]
            above_memory.append(summary.tanh() if config.memory_activation == "tanh" else summary.clamp(-10, 10))
            rows = feed_forward(
                weights, name, attended + torch.cat([lookahead[number], frames[start : start + length]])
            )
            above_lookahead.append(rows[: len(ahead)])
            above.append(rows[len(ahead) :])
        frames, lookahead, memory = torch.cat(above), above_lookahead, above_memory
    return frames
