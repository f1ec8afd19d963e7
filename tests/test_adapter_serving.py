"""A store serves thousands of adapters from a folder as if each were loaded, and leaves the model as it was."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file
from serving import BIAS, CONFIG_NAME, logits, logits_loaded, logits_served, write_adapter
from stock_models import MAKERS, add_trained, configure, count_hooks, generate, make_batch

from benchmarks.serving import main as run_benchmark
from inference.adapter_store import AdapterStore
from modeling import SpeechAdapterConfig, load_speech_adapter, save_adapter
from modeling.adapters import ADAPTER_WEIGHTS_NAME, BASE, SpeechAdapterLayer, adapter_rows

FRAME_KINDS = ("mlp", "bottleneck", "replacement")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FRAME_KINDS)
def test_a_served_row_says_what_its_loaded_adapter_says(tiny_model, tiny_base, five_rows, kind, dtype, tmp_path):
    for seed, name in enumerate(("ann", "ben", "cho")):
        write_adapter(tiny_base, tmp_path / name, seed, dtype, kind=kind)
    store = AdapterStore(tiny_model, tmp_path, capacity=3)
    alone = {name: logits_loaded(tiny_base, tmp_path, [name] * 5, five_rows) for name in ("ann", "ben", "cho", BASE)}
    # Rows of one adapter apart from each other, one after the other, all, and none.
    for names in (["ann", "ben", "ann", "cho", BASE], ["cho", "cho", "ben", "ben", "ben"], ["ann"] * 5, [BASE] * 5):
        expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
        torch.testing.assert_close(logits_served(store, names, five_rows), expected, rtol=0, atol=1e-5)


def test_a_row_alone_is_bit_equal_to_its_loaded_adapter(tiny_model, tiny_base, people, five_rows):
    store = AdapterStore(tiny_model, people, capacity=1)
    for name in ("ann", "ben", "ann"):  # the second time ann comes by the quick way
        said = logits_served(store, [name] * 5, five_rows)
        assert torch.equal(said, logits_loaded(tiny_base, people, [name] * 5, five_rows))


@pytest.mark.parametrize("family", list(MAKERS))
def test_transformer_adapters_of_stock_models_are_served_and_know_the_padding(family, tmp_path):
    model, loaded = MAKERS[family](), MAKERS[family]()
    for name in ("room", "ldv"):
        trained = MAKERS[family]()
        add_trained(trained, name, configure("transformer"))
        save_adapter(trained, tmp_path / name, name)
        load_speech_adapter(loaded, str(tmp_path / name), name)
    loaded.eval()
    batch, names = make_batch(model), ["ldv", BASE, "room"]
    base, hooks = logits(model, batch), count_hooks(model)

    with AdapterStore(model, tmp_path).rows(names):
        said, text = logits(model, batch), generate(model, batch, num_beams=2)

    with adapter_rows(loaded, names):
        torch.testing.assert_close(said, logits(loaded, batch), rtol=0, atol=1e-5)
        assert text == generate(loaded, batch, num_beams=2)
    assert not torch.equal(said, base)
    assert torch.equal(logits(model, batch), base)
    assert count_hooks(model) == hooks


def test_adapters_of_several_configurations_share_a_batch_and_a_module(tiny_model, tiny_base, five_rows, tmp_path):
    kinds = {"ann": "mlp", "ben": "replacement", "cho": "bottleneck"}
    for seed, (name, kind) in enumerate(kinds.items()):
        write_adapter(tiny_base, tmp_path / name, seed, kind=kind)
    write_adapter(tiny_base, tmp_path / "dan", 3, kind="mlp", hidden_sizes=[6, 4], target_modules=["classifier.1"])
    names = ["cho", "dan", "ann", "ben", BASE]
    expected = logits_loaded(tiny_base, tmp_path, names, five_rows)

    said = logits_served(AdapterStore(tiny_model, tmp_path), names, five_rows)

    torch.testing.assert_close(said, expected, rtol=0, atol=1e-5)
    assert len({tuple(row.flatten()[:40].tolist()) for row in said}) == 5


def test_tensors_in_another_order_and_place_are_served_too(tiny_model, tiny_base, store_folder, five_rows):
    path = store_folder / "ann" / ADAPTER_WEIGHTS_NAME
    tensors = load_file(path)
    header, content = {}, b""
    for name in sorted(tensors, reverse=True):
        bytes_of = tensors[name].numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape)}
        header[name] |= {"data_offsets": [len(content), len(content) + len(bytes_of)]}
        content += bytes_of
    text = json.dumps(header).encode() + b" "
    text += b" " * (1 - len(text) % 2)  # an odd number of bytes, so that no tensor lies where its type should
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)

    store = AdapterStore(tiny_model, store_folder, capacity=1)
    expected = logits_loaded(tiny_base, store_folder, ["ann"] * 5, five_rows)
    for _ in range(2):
        assert torch.equal(logits_served(store, ["ann"] * 5, five_rows), expected)
        store.activate("ben")


def test_a_model_s_own_adapter_serves_rows_beside_those_of_a_store(tiny_model, tiny_base, people, five_rows):
    load_speech_adapter(tiny_model, str(people / "dan"), "own")
    tiny_model.eval()
    store = AdapterStore(tiny_model, people)
    names = ["own", "ann", BASE, "own", "ben"]

    said = logits_served(store, names, five_rows)

    loaded = logits_loaded(tiny_base, people, ["dan" if name == "own" else name for name in names], five_rows)
    torch.testing.assert_close(said, loaded, rtol=0, atol=1e-5)
    with adapter_rows(tiny_model, ["own"] * 5):
        torch.testing.assert_close(logits(tiny_model, five_rows)[0], said[0], rtol=0, atol=1e-5)


def test_the_model_is_as_it_was_outside_rows_and_after_close(tiny_model, people, five_rows, tmp_path):
    before, modules = logits(tiny_model, five_rows), list(tiny_model.named_modules())
    state = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    store = AdapterStore(tiny_model, people)

    assert not torch.equal(logits_served(store, ["ann"] * 5, five_rows), before)
    assert torch.equal(logits(tiny_model, five_rows), before)
    with pytest.raises(ZeroDivisionError), store.rows(["ann", "ben", "ann", "cho", BASE]):
        1 / 0  # noqa: B018

    store.close()
    assert store.loaded == []
    assert torch.equal(logits(tiny_model, five_rows), before)
    assert list(tiny_model.named_modules()) == modules
    assert tiny_model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in tiny_model.state_dict().items())
    tiny_model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == state.keys()
    assert store.activate("ann").keys() == {"classifier"}  # closed, not broken


def test_no_served_weight_is_part_of_the_model_while_it_serves(tiny_model, people):
    numbers = {name.replace(".base_layer", ""): value.numel() for name, value in tiny_model.named_parameters()}
    with AdapterStore(tiny_model, people).rows(["ann", "ben"]):
        inside = {name.replace(".base_layer", ""): value.numel() for name, value in tiny_model.named_parameters()}
    assert inside == numbers


def test_a_base_s_output_that_others_see_is_not_overwritten(tiny_model, people, five_rows):
    store = AdapterStore(tiny_model, people)
    seen = []
    tiny_model.classifier[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        tiny_model(**five_rows)
    with torch.inference_mode(), store.rows(["ann", "ben", "ann", "cho", BASE]):
        tiny_model(**five_rows)
    assert torch.equal(seen[0], seen[-1])


class Same(torch.nn.Module):
    """Returns its input, or its weight, as it is."""

    in_features = out_features = 4

    def __init__(self, weight: torch.Tensor | None):
        super().__init__()
        self.weight = None if weight is None else torch.nn.Parameter(weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.weight is None else self.weight


@pytest.mark.parametrize("weight", [None, torch.ones(2, 3, 4)])
def test_a_base_that_returns_its_input_or_its_weight_keeps_both(weight):
    layer = SpeechAdapterLayer(Same(weight), "ann", SpeechAdapterConfig(kind="mlp", hidden_sizes=[2]))
    layer.speech_adapter_blocks["ann"][-1].bias.data.fill_(1.0)
    states = torch.ones(2, 3, 4)
    with torch.inference_mode():
        adapted = layer(states, adapter_names=["ann", BASE])
        again = layer(states, adapter_names=["ann", BASE])
    assert adapted[:, 0, 0].tolist() == again[:, 0, 0].tolist() == [2.0, 1.0]
    assert torch.equal(states, torch.ones(2, 3, 4))


def test_ten_thousand_adapters_are_served_from_memory_for_sixteen(tiny_model, tiny_base, five_rows, tmp_path):
    kinds = [tmp_path / "originals" / str(seed) for seed in range(8)]
    for seed, folder in enumerate(kinds):
        write_adapter(tiny_base, folder, seed, kind="mlp", hidden_sizes=[2])
    names = [f"user_{number}" for number in range(10_000)]
    for number, name in enumerate(names):
        os.makedirs(tmp_path / "store" / name)
        for file in (CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
            os.link(kinds[number % 8] / file, tmp_path / "store" / name / file)
    said_by_kind = [logits_loaded(tiny_base, tmp_path / "originals", [str(seed)] * 5, five_rows) for seed in range(8)]

    store = AdapterStore(tiny_model, tmp_path / "store", capacity=16)
    assert store.names == sorted(names)
    numbers = random.Random(0).choices(range(10_000), k=200)
    blocks = []
    for number in numbers + numbers[:50]:  # the last ones have been checked, and are in memory no more
        blocks.append(store.activate(f"user_{number}")["classifier"])
        said = store.activate(f"user_{number}")["classifier"][-1].bias
        assert torch.equal(said, load_file(kinds[number % 8] / ADAPTER_WEIGHTS_NAME)[BIAS])
    assert store.loaded == [f"user_{number}" for number in numbers[34:50]]
    assert len({id(block) for block in blocks}) == 16
    row_numbers = [7, 9_999, 1_234, 0, 4_321]
    said = logits_served(store, [f"user_{number}" for number in row_numbers], five_rows)
    expected = torch.stack([said_by_kind[number % 8][row] for row, number in enumerate(row_numbers)])
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-5)


def test_the_adapter_whose_use_is_longest_ago_makes_room(tiny_model, people):
    store = AdapterStore(tiny_model, people, capacity=2)
    for name, loaded in (("ann", ["ann"]), ("ben", ["ann", "ben"]), ("ann", ["ben", "ann"]), ("cho", ["ann", "cho"])):
        store.activate(name)
        assert store.loaded == loaded


def test_adapters_in_use_make_no_room(tiny_model, people, five_rows):
    store = AdapterStore(tiny_model, people, capacity=2)
    store.activate("dan")
    with store.rows(["ann", "ben", BASE, "ben", "ann"]):
        said = logits(tiny_model, five_rows)
        with pytest.raises(
            ValueError, match="`capacity` must be at least the number of adapters in use at once, got 2"
        ):
            store.activate("cho")
        assert torch.equal(logits(tiny_model, five_rows), said)
    store.activate("cho")
    assert store.loaded == ["ben", "cho"]


def test_an_adapter_never_used_is_activated_while_a_batch_is_open(tiny_model, people, five_rows):
    store = AdapterStore(tiny_model, people, capacity=3)
    with store.rows(["ann", "ben", BASE, "ben", "ann"]):
        said = logits(tiny_model, five_rows)
        store._proven.clear()
        store.activate("cho")
        assert torch.equal(logits(tiny_model, five_rows), said)


def test_the_benchmark_measures_rows_and_activation_and_stores_both(tmp_path, capsys):
    run_benchmark(["--quick", "--results_folder", str(tmp_path)])

    *rows, activation, limits = json.loads((tmp_path / "serving.json").read_text())["rows"]
    assert [(row["kind"], row["users"]) for row in rows] == [("mlp", 4), ("replacement", 4)]
    assert all(0 < row["base_s"] and row["max_difference"] < 1e-4 for row in rows)
    # Two hidden layers of 512 and 256 between 32 inputs and 30 outputs, in fp32.
    assert activation["adapter_bytes"] == 4 * (33 * 512 + 513 * 256 + 257 * 30)
    assert min(activation["peer_ms"], activation["ours_ms"], *limits.values()) > 0
    assert (tmp_path / "serving.md").read_text().startswith(capsys.readouterr().out.strip()[:40])
