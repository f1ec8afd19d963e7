"""What one thread asks of a model's adapters leaves the answers of all other threads alone."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from peft import LoraConfig
from serving import logits, logits_loaded, logits_served
from stock_models import add_trained, configure, find_layer, make_batch, make_whisper

from inference.adapter_store import AdapterStore
from modeling import SpeechAdapterConfig, adapter_rows, load_speech_adapter
from modeling.adapters import BASE, adapters_off, find_active_adapters
from publishing.adapter_maps import record_maps
from training.frozen_part import find_frozen_prefix

NUM_THREADS, NUM_CALLS = 4, 12
KINDS = {
    "mlp": SpeechAdapterConfig(hidden_sizes=[8]),
    "bottleneck": SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[8]),
    "lora": LoraConfig(target_modules=["classifier.1"], r=4),
}


def elsewhere(function: Callable, *args) -> object:
    """Returns what `function` gives in another thread, while this one is where it is."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def count_wrong(function: Callable[[int], bool]) -> int:
    """Returns how many calls in threads that run at the same time are wrong; each thread has a number."""

    def call(thread: int) -> int:
        return sum(not function(thread) for _ in range(NUM_CALLS))

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return sum(pool.map(call, range(NUM_THREADS)))


def logits_of_rows(model, names: list[str], batch: dict) -> torch.Tensor:
    with adapter_rows(model, names):
        return logits(model, batch)


@pytest.fixture(params=KINDS)
def served(request, tiny_model, five_rows) -> tuple[object, dict[str, torch.Tensor]]:
    """A model with adapters `ann` and `ben`, the latter active, and what it says with each of them and without."""
    said = {BASE: logits(tiny_model, five_rows)}
    for name in ("ann", "ben"):
        add_trained(tiny_model, name, KINDS[request.param])
        said[name] = logits(tiny_model, five_rows)
    assert not any(torch.allclose(said[a], said[b], atol=0.1) for a, b in (("ann", "ben"), ("ann", BASE)))
    return tiny_model, said


def is_same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left, right, atol=1e-4, rtol=1e-4)


def test_another_thread_keeps_its_adapter_while_one_has_them_off(served, five_rows):
    model, said = served
    with adapters_off(model):
        assert torch.equal(elsewhere(logits, model, five_rows), said["ben"])
        assert torch.equal(logits(model, five_rows), said[BASE])
        assert find_active_adapters(model) == []
        assert elsewhere(find_active_adapters, model) == ["ben"]
    assert torch.equal(logits(model, five_rows), said["ben"])


def test_another_thread_has_other_rows_or_the_active_adapter(served, five_rows):
    model, said = served
    with adapter_rows(model, ["ann"] * 5):
        assert torch.equal(elsewhere(logits, model, five_rows), said["ben"])
        assert is_same(elsewhere(logits_of_rows, model, [BASE] * 5, five_rows), said[BASE])
        assert is_same(logits(model, five_rows), said["ann"])
        with adapters_off(model):
            assert is_same(logits(model, five_rows), said[BASE])
        assert is_same(logits(model, five_rows), said["ann"])


def test_no_answer_is_wrong_in_threads_that_have_rows_of_their_own(served, five_rows):
    model, said = served

    def answer(thread: int) -> bool:
        if thread == 3:
            return torch.equal(logits(model, five_rows), said["ben"])
        names = [["ann", "ben", BASE, "ann", "ben"][(row + thread) % 5] for row in range(5)]
        expected = torch.stack([said[name][row] for row, name in enumerate(names)])
        return is_same(logits_of_rows(model, names, five_rows), expected)

    assert count_wrong(answer) == 0


def test_no_answer_is_wrong_in_threads_that_ask_for_the_base_s_logits_too(served, five_rows):
    model, said = served

    @torch.no_grad()
    def answer(thread: int) -> bool:
        output = model(**five_rows, output_base_logits=thread % 2 == 0)
        is_right = torch.equal(output.logits, said["ben"])
        return is_right and (thread % 2 == 1 or is_same(output.base_logits, said[BASE]))

    assert count_wrong(answer) == 0


def test_no_answer_is_wrong_in_threads_of_one_store(tiny_model, tiny_base, people, five_rows):
    alone = {name: logits_loaded(tiny_base, people, [name] * 5, five_rows) for name in ("ann", "ben", "cho", "dan")}
    alone[BASE] = logits(tiny_model, five_rows)
    # Four threads with two adapters each, none of them checked before; one thread has no rows at all.
    store = AdapterStore(tiny_model, people, capacity=7)
    modules = list(tiny_model.named_modules())

    def answer(thread: int) -> bool:
        if thread == 3:
            return is_same(logits(tiny_model, five_rows), alone[BASE])
        names = [["ann", "ben", "cho", "dan"][(thread + row % 2) % 4] for row in range(5)]
        expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
        return is_same(logits_served(store, names, five_rows), expected)

    assert count_wrong(answer) == 0
    assert list(tiny_model.named_modules()) == modules


def test_a_store_learns_a_configuration_while_another_thread_is_served(tiny_model, tiny_base, people, five_rows):
    store = AdapterStore(tiny_model, people)
    expected = logits_loaded(tiny_base, people, ["ann"] * 5, five_rows)
    with store.rows(["ann"] * 5):
        other = AdapterStore(tiny_model, people)
        elsewhere(other.activate, "ben")  # injects, probes, and takes away again
        assert torch.equal(logits(tiny_model, five_rows), expected)
        assert is_same(elsewhere(logits_served, store, ["cho"] * 5, five_rows),
                       logits_loaded(tiny_base, people, ["cho"] * 5, five_rows))  # fmt: skip
        assert torch.equal(logits(tiny_model, five_rows), expected)


def test_a_store_serves_rows_of_the_model_s_own_adapter_in_threads(tiny_model, tiny_base, people, five_rows):
    load_speech_adapter(tiny_model, str(people / "dan"), "own")
    tiny_model.eval()
    own, store = logits(tiny_model, five_rows), AdapterStore(tiny_model, people)
    with store.rows(["ann"] * 5):
        assert torch.equal(elsewhere(logits, tiny_model, five_rows), own)
        assert is_same(logits(tiny_model, five_rows), logits_loaded(tiny_base, people, ["ann"] * 5, five_rows))


def test_each_thread_has_the_padding_and_the_maps_of_its_own_call():
    model, counts = make_whisper(), [8, 12, 16, 20]
    add_trained(model, "ldv", configure())
    batch, block = make_batch(model), find_layer(model).find_block("ldv")

    def answer(thread: int) -> bool:
        mask = (torch.arange(40) < 2 * counts[thread]).long().expand(3, -1)
        with record_maps(block, with_attention=False) as maps:
            logits(model, batch | {"attention_mask": mask})
        return [part.frame_lengths.tolist() for part in maps] == [[counts[thread]] * 3]

    assert count_wrong(answer) == 0


def test_another_thread_runs_the_whole_model_while_one_computes_the_frozen_part(tiny_model, five_rows):
    add_trained(tiny_model, "ann", KINDS["mlp"])
    whole, prefix = logits(tiny_model, five_rows), find_frozen_prefix(tiny_model)
    seen = []

    def run_meanwhile(*_) -> None:
        handle.remove()
        seen.append(elsewhere(logits, tiny_model, five_rows))

    handle = tiny_model.encoder.conv.register_forward_pre_hook(run_meanwhile)
    states, _ = prefix(five_rows)
    assert torch.equal(seen[0], whole)
    assert set(states) == {"hidden_states", "base_output"}


def test_tasks_of_one_thread_keep_their_own_rows(tiny_model, five_rows):
    said = {}
    for name in ("ann", "ben"):
        add_trained(tiny_model, name, KINDS["mlp"])
        said[name] = logits(tiny_model, five_rows)

    async def answer(name: str) -> bool:
        with adapter_rows(tiny_model, [name] * 5):
            await asyncio.sleep(0)  # the other task's turn
            return is_same(await asyncio.to_thread(logits, tiny_model, five_rows), said[name])

    async def answer_both() -> list[bool]:
        return await asyncio.gather(answer("ann"), answer("ben"))

    assert asyncio.run(answer_both()) == [True, True]


def test_a_thread_started_inside_takes_the_rows_along_by_its_context(tiny_model, five_rows):
    add_trained(tiny_model, "ann", KINDS["mlp"])
    base = logits_of_rows(tiny_model, [BASE] * 5, five_rows)
    with adapter_rows(tiny_model, [BASE] * 5):
        run = partial(contextvars.copy_context().run, logits, tiny_model, five_rows)
        assert torch.equal(elsewhere(run), base)


def test_rows_that_others_may_have_changed_meanwhile_are_refused(tiny_model, five_rows):
    for name in ("ann", "ben"):
        add_trained(tiny_model, name, KINDS["mlp"])

    def answer(name: str):
        with adapter_rows(tiny_model, [name] * 5):
            yield
            yield logits(tiny_model, five_rows)

    first, second = answer("ann"), answer("ben")
    next(first), next(second), next(first)
    with pytest.raises(RuntimeError, match="must be left in the context in which they were entered.*Do not `yield`"):
        next(first)
