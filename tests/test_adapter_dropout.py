"""Dropout of adapters: masks of single bytes that are fair, exactly scaled, and the same alone as among others."""

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from modeling import SpeechAdapterConfig
from modeling.adapters import SpeechAdapterLayer
from training.adapter_dropout import AdapterDropout, seed_dropout


@pytest.fixture(autouse=True)
def fixed_randomness() -> Iterator[None]:
    """The global generator in a known state, and as it was afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def make_dropouts(*names: str) -> nn.ModuleDict:
    """A module in which two layers hold an adapter of each name, of two dropouts."""
    blocks = nn.ModuleDict({name: nn.Sequential(AdapterDropout(0.5), AdapterDropout(0.5)) for name in names})
    return nn.ModuleDict({layer: nn.ModuleDict({"speech_adapter_blocks": copy.deepcopy(blocks)}) for layer in "ab"})


def draw_masks(model: nn.Module, name: str | None = None) -> list[list[float]]:
    dropouts = [
        module
        for path, module in model.named_modules()
        if isinstance(module, AdapterDropout) and (name is None or f".{name}." in path)
    ]
    return [dropout(torch.ones(40)).tolist() for dropout in dropouts]


@pytest.mark.parametrize(("p", "kept"), [(0.1, 230), (0.5, 128), (0.999, 1)])
def test_dropout_keeps_the_rounded_share_and_scales_by_its_inverse(p, kept):
    dropped = AdapterDropout(p)(torch.ones(1000, 1001))
    share = (dropped != 0).double().mean().item()

    assert sorted(dropped.unique().tolist()) == [0.0, pytest.approx(256 / kept, rel=1e-6)]
    assert share == pytest.approx(kept / 256, abs=4 * (kept / 256 * (1 - kept / 256) / 1e6) ** 0.5)


def test_every_byte_of_a_random_word_is_fair():
    shares = (AdapterDropout(0.5)(torch.ones(100_000, 8)) != 0).double().mean(0)
    torch.testing.assert_close(shares, torch.full((8,), 0.5, dtype=torch.float64), atol=0.01, rtol=0)


@pytest.mark.parametrize("shape", [(0, 3), (1,), (7,), (3, 5, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_takes_any_shape_and_precision(shape, dtype):
    states = torch.full(shape, 3.0, dtype=dtype)
    dropped = AdapterDropout(0.5)(states)
    assert (dropped.shape, dropped.dtype) == (states.shape, dtype)
    assert set(dropped.unique().tolist()) <= {0.0, 6.0}


def test_gradient_goes_through_what_is_kept():
    states = torch.randn(50, dtype=torch.float64, requires_grad=True)
    dropout = AdapterDropout(0.25)
    dropped = dropout(states)
    (gradient,) = torch.autograd.grad(dropped.sum(), states)

    assert set(gradient.unique().tolist()) == {0.0, 256 / 192}
    torch.testing.assert_close(dropped, states * gradient)


def test_dropout_is_nothing_in_evaluation_and_at_zero():
    states = torch.randn(20)
    assert AdapterDropout(0.9).eval()(states) is states
    assert AdapterDropout(0.0)(states) is states


def test_unseeded_masks_come_from_the_global_generator():
    dropout = AdapterDropout(0.5)
    first, second = (dropout(torch.ones(64)) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(dropout(torch.ones(64)), first)
    assert not torch.equal(first, second)


def test_seeded_masks_repeat_and_leave_the_global_generator_alone():
    model = make_dropouts("alice")
    before = torch.get_rng_state()
    seed_dropout(model, 3)
    first, second = draw_masks(model), draw_masks(model)
    seed_dropout(model, 3)
    again = draw_masks(model)
    seed_dropout(model, 4)
    other = draw_masks(model)

    assert again == first
    assert len({str(mask) for mask in first + second + other}) == 12
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_of_an_adapter_do_not_depend_on_its_name_or_its_company():
    alone, stacked = make_dropouts("alice"), make_dropouts("zoe", "bob", "alice")
    for model in (alone, stacked):
        seed_dropout(model, 3)
    expected = draw_masks(alone)

    assert all(draw_masks(stacked, name) == expected for name in ("alice", "bob", "zoe"))


def test_masks_of_an_adapter_s_blocks_alone_are_those_in_the_model():
    model = make_dropouts("zoe", "alice")
    seed_dropout(model, 3)
    expected = draw_masks(model, "alice")
    blocks = nn.ModuleList(model[layer]["speech_adapter_blocks"]["alice"] for layer in "ab")
    seed_dropout(blocks, 3)
    assert draw_masks(blocks) == expected


def test_seeded_dropout_can_be_copied_and_pickled():
    model = make_dropouts("alice")
    seed_dropout(model, 3)
    draw_masks(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = draw_masks(model)
    assert [draw_masks(other) for other in copies] == [expected, expected]


@pytest.mark.parametrize(("kind", "hidden_sizes"), [("mlp", [4, 4]), ("replacement", [4, 4]), ("bottleneck", [4])])
def test_adapters_drop_by_bytes_once_they_are_seeded(tiny_model, kind, hidden_sizes):
    tiny_model.add_adapter(SpeechAdapterConfig(kind=kind, hidden_sizes=hidden_sizes, dropout=0.3), "alice")
    seed_dropout(tiny_model, 0)
    dropouts = [module for module in tiny_model.modules() if isinstance(module, nn.Dropout) and module.p == 0.3]
    assert [type(dropout) for dropout in dropouts] == [AdapterDropout] * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "bottleneck"])
def test_checkpointing_gives_the_gradients_of_the_masks_that_were_drawn(kind, use_reentrant):
    base = nn.Linear(6, 6)
    layer = SpeechAdapterLayer(base, "alice", SpeechAdapterConfig(kind=kind, hidden_sizes=[8], dropout=0.5))
    for parameter in layer.speech_adapter_blocks.parameters():
        nn.init.normal_(parameter)
    batches = [torch.randn(3, 6, requires_grad=True) for _ in range(3)]

    def find_gradients(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        seed_dropout(layer, 3)
        layer.zero_grad()
        first = run(batches[0]).square().sum()
        (run(batches[1]).square().sum() + run(batches[2]).sum()).backward()  # not in the order of the calls
        first.backward()
        return [parameter.grad for parameter in layer.speech_adapter_blocks.parameters()]

    expected = find_gradients(layer)
    found = find_gradients(partial(checkpoint, layer, use_reentrant=use_reentrant))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    seed_dropout(layer, 3)
    assert not torch.equal(layer(batches[0]), layer(batches[0]))  # masks of two calls differ


def test_calls_that_checkpointing_cannot_tell_apart_are_refused():
    dropout, states = AdapterDropout(0.5), torch.randn(6, requires_grad=True)
    seed_dropout(dropout, 3)
    losses = [checkpoint(dropout, states, use_reentrant=False).square().sum() for _ in range(2)]
    with pytest.raises(ValueError, match="must run a call again whose input no other call had, got 2 calls"):
        sum(losses).backward()
