"""What trains behind the frozen part gets the same from a cache and without one."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from data.augmentation import Augmentation
from data.collators import CTCCollator
from data.corpora import load_corpus
from data.utterances import UtteranceDataset, decode_clips
from modeling import SpeechAdapterConfig
from training.frozen_part import CacheArguments, FrozenPrefix, cache_frozen_part
from training.objectives.recognition import CTCObjective


@pytest.fixture
def utterances(small_corpus, tiny_processor):
    """Makes the training utterances of the small corpus; `speed` is the fastest."""

    def make(speed: float = 1.0) -> UtteranceDataset:
        corpus = load_corpus(str(small_corpus), split="train", required_columns=("audio", "text"))
        clips = decode_clips(corpus, tiny_processor, samples_per_logit=320, max_speed=speed)
        return UtteranceDataset(clips, tiny_processor, augmentation=Augmentation(max_speed=speed))

    return make


@pytest.fixture
def adapted(tiny_model):
    """Puts an adapter on the tiny recogniser and returns what trains it."""

    def make(kind: str = "bottleneck") -> CTCObjective:
        tiny_model.add_adapter(SpeechAdapterConfig(kind=kind, hidden_sizes=[4], dropout=0.0), "ann")
        return CTCObjective(tiny_model)

    return make


@pytest.fixture
def cache(tiny_processor, tmp_path):
    """Caches the frozen part of an objective for utterances."""

    def run(objective: CTCObjective, dataset: UtteranceDataset, **settings) -> Dataset:
        arguments = CacheArguments(cache_dir=str(tmp_path), **settings)
        return cache_frozen_part(dataset, objective.prefix, tiny_processor, arguments, batch_size=4)

    return run


def loss_and_gradients(module, batch: dict) -> list[torch.Tensor]:
    module.zero_grad()
    loss = module(**batch)["loss"]
    loss.backward()
    return [loss.detach(), *(value.grad.clone() for value in module.parameters() if value.requires_grad)]


@pytest.mark.parametrize("kind", ["mlp", "replacement", "bottleneck"])
def test_cached_and_uncached_rows_and_whole_forwards_give_one_gradient(
    adapted, cache, utterances, tiny_model, tiny_processor, kind
):
    objective, dataset, collate = adapted(kind), utterances(), CTCCollator(tiny_processor)
    cached = cache(objective, dataset)
    rows = [0, 3, 5]
    packed, padded = collate([cached[row] for row in rows]), collate([dataset[row] for row in rows])
    assert "input_features" in padded
    assert "frozen_states" in packed
    # As a process that loads data makes it, without the model.
    (loaded,) = DataLoader(Subset(cached, rows), batch_size=3, num_workers=1, collate_fn=collate)
    torch.testing.assert_close(loaded["frozen_states"], packed["frozen_states"], rtol=0, atol=0)
    from_cache, fresh = loss_and_gradients(objective, packed), loss_and_gradients(objective, padded)
    whole = loss_and_gradients(tiny_model, padded)
    for first, second, third in zip(from_cache, fresh, whole, strict=True):
        assert (first - second).norm() <= 1e-3 * second.norm()
        assert (first - third).norm() <= 1e-3 * third.norm()


def test_no_network_runs_while_a_batch_is_collated(adapted, cache, utterances, tiny_model, tiny_processor):
    objective, dataset, collate = adapted(), utterances(), CTCCollator(tiny_processor)
    cached, runs = cache(objective, dataset), []
    for module in tiny_model.modules():
        module.register_forward_hook(lambda *_: runs.append(None))
    batches = [collate([part[0], part[1]]) for part in (dataset, cached)]
    assert not runs
    for batch in batches:
        objective(**batch)
        assert runs
        runs.clear()


def test_a_second_run_reads_the_cache_of_the_first(adapted, cache, utterances, monkeypatch, tmp_path):
    objective, run, calls = adapted(), FrozenPrefix.__call__, []

    def count(self, batch):
        calls.append(batch)
        return run(self, batch)

    monkeypatch.setattr(FrozenPrefix, "__call__", count)
    cache(objective, utterances())
    assert len(calls) == 3  # twelve utterances, four at a time
    (path,) = tmp_path.rglob("*.safetensors")
    before = path.stat().st_mtime_ns
    cache(objective, utterances())
    assert len(calls) == 3
    assert [path] == list(tmp_path.rglob("*.safetensors"))
    assert path.stat().st_mtime_ns == before


def test_augmented_speech_is_not_cached_and_that_is_said_unless_variants_are_asked_for(
    adapted, cache, utterances, tmp_path, caplog
):
    objective, dataset = adapted(), utterances(1.1)
    with caplog.at_level(logging.WARNING):
        assert cache(objective, dataset) is dataset
    assert "The frozen part is not cached: utterances are augmented" in caplog.text
    assert not list(tmp_path.rglob("*.safetensors"))


def test_augmented_speech_is_cached_in_as_many_variants_as_asked_for(adapted, cache, utterances, tmp_path):
    cached = cache(adapted(), utterances(1.1), cache_variants=2)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    drawn = []
    for epoch in range(3):
        cached.set_epoch(epoch)
        drawn.append(cached[0]["states"]["base_output"].clone())
    assert torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape != drawn[1].shape or not torch.equal(drawn[0], drawn[1])


def test_a_bf16_cache_is_half_as_large_and_gives_nearly_the_same_loss(
    adapted, cache, utterances, tiny_processor, tmp_path
):
    objective, dataset, collate = adapted(), utterances(), CTCCollator(tiny_processor)
    exact = cache(objective, dataset)
    (path,) = tmp_path.rglob("*.safetensors")
    size = path.stat().st_size
    rounded = cache(objective, dataset, cache_dtype="bfloat16")
    (smaller,) = set(tmp_path.rglob("*.safetensors")) - {path}
    assert smaller.stat().st_size < 0.6 * size
    losses = [loss_and_gradients(objective, collate([part[0], part[1]]))[0] for part in (exact, rounded)]
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0)


def test_a_whole_model_that_trains_is_not_cached_and_that_is_said(
    tiny_model, tiny_processor, cache, utterances, caplog
):
    objective, dataset = CTCObjective(tiny_model), utterances()
    with caplog.at_level(logging.WARNING):
        assert cache(objective, dataset) is dataset
    assert "The frozen part is not cached: the first layer is trainable" in caplog.text
    assert "input_features" in CTCCollator(tiny_processor)([dataset[0]])


def test_cache_variants_must_not_be_negative():
    with pytest.raises(ValueError, match="`cache_variants` must be at least 0, got -1"):
        CacheArguments(cache_variants=-1)
