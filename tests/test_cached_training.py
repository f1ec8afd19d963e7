"""What trains behind the frozen part gets the same from a cache and without one."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from data.augmentation import Augmentation
from data.corpora import load_corpus
from data.utterances import UtteranceDataset, decode_clips
from modeling import SpeechAdapterConfig
from training.frozen_part import CacheArguments, FrozenPart
from training.frozen_prefix import FrozenPrefix


@pytest.fixture
def utterances(small_corpus, tiny_processor):
    """Makes the training utterances of the small corpus; `speed` is the fastest."""

    def make(speed: float = 1.0) -> UtteranceDataset:
        corpus = load_corpus(str(small_corpus), split="train", required_columns=("audio", "text"))
        clips = decode_clips(corpus, tiny_processor, samples_per_logit=320, max_speed=speed)
        return UtteranceDataset(clips, tiny_processor, augmentation=Augmentation(max_speed=speed))

    return make


@pytest.fixture
def make_frozen(tiny_model, tiny_processor, tmp_path):
    """Puts an adapter on the tiny recogniser and returns its frozen part."""

    def make(kind: str = "bottleneck", **settings) -> FrozenPart:
        tiny_model.add_adapter(SpeechAdapterConfig(kind=kind, hidden_sizes=[4], dropout=0.0), "ann")
        arguments = CacheArguments(cache_dir=str(tmp_path), **settings)
        return FrozenPart(tiny_model, tiny_processor, arguments, batch_size=4)

    return make


def loss_and_gradients(model, batch: dict) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(value.grad.clone() for value in model.parameters() if value.requires_grad)]


@pytest.mark.parametrize("kind", ["mlp", "replacement", "bottleneck"])
def test_cached_and_uncached_rows_and_whole_forwards_give_one_gradient(make_frozen, utterances, tiny_model, kind):
    frozen, dataset = make_frozen(kind), utterances()
    cached = frozen.prepare(dataset)
    rows = [0, 3, 5]
    batches = [
        frozen.collate([cached[row] for row in rows]),
        frozen.collate([dataset[row] for row in rows]),
        frozen.collator(num_workers=1)([dataset[row] for row in rows]),
    ]
    assert "input_features" in batches[2]
    assert "frozen_states" in batches[1]
    # As a process that loads data makes it.
    (loaded,) = DataLoader(
        Subset(cached, rows), batch_size=3, num_workers=1, collate_fn=frozen.collator(num_workers=1)
    )
    torch.testing.assert_close(loaded["frozen_states"], batches[0]["frozen_states"], rtol=0, atol=0)
    from_cache, fresh, whole = (loss_and_gradients(tiny_model, batch) for batch in batches)
    for first, second, third in zip(from_cache, fresh, whole, strict=True):
        assert (first - second).norm() <= 1e-3 * second.norm()
        assert (first - third).norm() <= 1e-3 * third.norm()


def test_a_second_run_reads_the_cache_of_the_first(make_frozen, utterances, monkeypatch, tmp_path):
    frozen, run, calls = make_frozen(), FrozenPrefix.__call__, []

    def count(self, batch):
        calls.append(batch)
        return run(self, batch)

    monkeypatch.setattr(FrozenPrefix, "__call__", count)
    frozen.prepare(utterances())
    assert len(calls) == 3  # twelve utterances, four at a time
    (path,) = tmp_path.rglob("*.safetensors")
    before = path.stat().st_mtime_ns
    frozen.prepare(utterances())
    assert len(calls) == 3
    assert [path] == list(tmp_path.rglob("*.safetensors"))
    assert path.stat().st_mtime_ns == before


def test_augmented_speech_is_not_cached_and_that_is_said_unless_variants_are_asked_for(
    make_frozen, utterances, tmp_path, caplog
):
    frozen, dataset = make_frozen(), utterances(1.1)
    with caplog.at_level(logging.WARNING):
        assert frozen.prepare(dataset) is dataset
    assert "The frozen part is not cached: utterances are augmented" in caplog.text
    assert not list(tmp_path.rglob("*.safetensors"))


def test_augmented_speech_is_cached_in_as_many_variants_as_asked_for(make_frozen, utterances, tmp_path):
    frozen, dataset = make_frozen(cache_variants=2), utterances(1.1)
    cached = frozen.prepare(dataset)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    drawn = []
    for epoch in range(3):
        cached.set_epoch(epoch)
        drawn.append(cached[0]["states"]["base_output"].clone())
    assert torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape != drawn[1].shape or not torch.equal(drawn[0], drawn[1])


def test_a_bf16_cache_is_half_as_large_and_gives_nearly_the_same_loss(make_frozen, utterances, tiny_model, tmp_path):
    frozen, dataset = make_frozen(), utterances()
    exact = frozen.prepare(dataset)
    (path,) = tmp_path.rglob("*.safetensors")
    size = path.stat().st_size
    frozen.arguments.cache_dtype = "bfloat16"
    rounded = frozen.prepare(dataset)
    (smaller,) = set(tmp_path.rglob("*.safetensors")) - {path}
    assert smaller.stat().st_size < 0.6 * size
    losses = [loss_and_gradients(tiny_model, frozen.collate([part[0], part[1]]))[0] for part in (exact, rounded)]
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0)


def test_a_whole_model_that_trains_is_not_cached_and_that_is_said(tiny_model, tiny_processor, utterances, caplog):
    frozen, dataset = FrozenPart(tiny_model, tiny_processor, CacheArguments(), batch_size=4), utterances()
    with caplog.at_level(logging.WARNING):
        assert frozen.prepare(dataset) is dataset
    assert "The frozen part is not cached: the first layer is trainable" in caplog.text
    assert "input_features" in frozen.collator()([dataset[0]])


def test_cache_variants_must_not_be_negative():
    with pytest.raises(ValueError, match="`cache_variants` must be at least 0, got -1"):
        CacheArguments(cache_variants=-1)
