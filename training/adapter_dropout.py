"""Dropout of adapters in training: masks of single bytes that each step draws from its seed alone."""

import hashlib
from collections import deque

import torch
from torch import nn

from modeling.adapter_blocks import NAMED_BLOCKS

# Chances are counted in so many parts: one random byte decides about one value.
CHANCES = 256
# Calls between two seeds that gradient checkpointing can run again.
MAX_REPEATABLE = 1024
CALL_STRIDE = 0x9E3779B97F4A7C15  # odd and far from small numbers, so that no two calls of a training share a seed


class AdapterDropout(nn.Dropout):
    """
    Dropout whose masks cost a byte of randomness a value on a CPU, and that [`seed_dropout`] makes repeatable.

    There, the chance to keep a value is rounded to 256ths, at least one; what is kept is scaled by its exact inverse.
    Unseeded, the masks come from torch's global generator. Seeded, a mask depends on the seed, the number of calls
    since then and the number of values; a call that gradient checkpointing runs again has the mask that it had.
    """

    seed: int | None = None
    num_calls = 0  # since the seed was given

    def reseed(self, seed: int) -> None:
        """Lets the masks to come depend on `seed` and the number of values alone."""
        self.seed, self.num_calls = seed, 0
        self.repeatable: deque[tuple[int, torch.Tensor]] = deque(
            maxlen=MAX_REPEATABLE
        )  # calls and sums of their input

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return hidden_states
        device = hidden_states.device
        generator = None if self.seed is None else self._make_generator(hidden_states.detach())
        if device.type == "cpu":
            return self._drop_by_bytes(hidden_states, generator)
        if generator is None:
            return nn.functional.dropout(hidden_states, self.p)
        is_kept = torch.rand(hidden_states.shape, device=device, generator=generator) >= self.p
        return hidden_states * is_kept / (1 - self.p)

    def _make_generator(self, hidden_states: torch.Tensor) -> torch.Generator:
        if torch._C._current_graph_task_id() != -1:  # within a backward pass
            call = self._find_call(hidden_states.sum())
        else:
            call = self.num_calls
            self.num_calls += 1
            if _may_be_repeated():
                self.repeatable.append((call, hidden_states.sum()))
        seed = (self.seed + call * CALL_STRIDE) % 2**63
        return torch.Generator(hidden_states.device).manual_seed(seed)

    def _find_call(self, total: torch.Tensor) -> int:
        calls = [call for call, other in self.repeatable if torch.equal(other, total)]
        if len(calls) == 1 or (calls and not total):
            return calls[0]
        raise ValueError(
            f"`gradient_checkpointing` must run a call again whose input no other call had, got {len(calls)} calls of "
            "an adapter's dropout with that input. Turn checkpointing off, or give each call its own."
        )

    def _drop_by_bytes(self, hidden_states: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        kept = max(1, round(CHANCES * (1 - self.p)))
        words = torch.empty(-(-hidden_states.numel() // 8), dtype=torch.int64)
        chances = words.random_(-(2**63), None, generator=generator).view(torch.uint8)
        is_kept = chances[: hidden_states.numel()].view(hidden_states.shape) < kept
        # Values times mask times scale in one pass, with a gradient of its own.
        return torch.ops.aten.native_dropout_backward(hidden_states, is_kept, CHANCES / kept)


def _may_be_repeated() -> bool:
    """Whether this call may be within gradient checkpointing, which asks for tensors its own way or for none."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def seed_dropout(model: nn.Module, seed: int) -> None:
    """
    Reseeds the dropouts of the adapters in `model`, each of an adapter's differently, and lets them draw bytes.

    A transformer's stay as they are: torch draws their masks within its attention too.

    A dropout's seed depends on how many of the same adapter stand before it and not on the adapter's name: an adapter
    draws the same masks alone and among others.

    Args:
        model: A model with adapters, or one adapter's blocks.
        seed: Of all of them.
    """
    for block in model.modules():
        for part in block if isinstance(block, nn.Sequential) and hasattr(block, "last_layer") else ():
            if type(part) is nn.Dropout:
                part.__class__ = AdapterDropout  # it has no other state
    num_before: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdapterDropout):
            _, _, below = name.rpartition(f"{NAMED_BLOCKS}.")
            adapter = below.split(".")[0] if f"{NAMED_BLOCKS}." in name else ""
            position = num_before[adapter] = num_before.get(adapter, -1) + 1
            digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
            module.reseed(int.from_bytes(digest, "big") >> 1)
