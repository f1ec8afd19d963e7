"""What is saved says what it is without being loaded, and damage is named."""

import itertools
import json
import os
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from modeling import DeepSpeech2ForCTC, SpeechAdapterConfig, save_adapter
from modeling.adapter_files import describe_adapter
from modeling.adapter_loading import read_adapter
from modeling.adapters import ADAPTER_WEIGHTS_NAME, name_on_disk


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A saved bottleneck of 4 hidden units behind both blocks of the tiny recogniser."""
    tiny_model.name_or_path = "me/base"
    tiny_model.add_adapter(SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[4]), "alice")
    save_adapter(tiny_model, tmp_path)
    return tmp_path


def test_description_is_the_adapter_s_own(folder):
    # Widths 16 (convolutions) and 32 (layer): norm 2 w, down 4 w + 4, up 4 w + w.
    parameters = sum(2 * width + 4 * width + 4 + 4 * width + width for width in (16, 32))
    assert describe_adapter(folder) == {
        "kind": "bottleneck",
        "hidden_sizes": [4],
        "target_modules": r"encoder\.(conv|rnn_layers\.\d+)",
        "base": "me/base",
        "parameters": parameters,
        "bytes": (folder / ADAPTER_WEIGHTS_NAME).stat().st_size,
        "dtype": "F32",
    }


def test_description_of_lora_names_the_method(tiny_model, tmp_path):
    tiny_model.add_adapter(LoraConfig(target_modules=["classifier.1"], r=2), "low")
    tiny_model.classifier[1].lora_A["low"].to(torch.bfloat16)
    save_adapter(tiny_model, tmp_path)
    description = describe_adapter(tmp_path)

    assert (description["kind"], description["hidden_sizes"]) == ("lora", None)
    assert (description["parameters"], description["dtype"]) == (2 * 32 + 2 * 30, "BF16,F32")
    assert description["target_modules"] == ["classifier.1"]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"`adapter` must be a folder with {name}, got "):
        describe_adapter(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null and void"])
def test_a_configuration_that_is_no_json_is_named(folder, content):
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(ValueError, match="must have a JSON file as configuration, got .*adapter_config.json"):
        describe_adapter(folder)


@pytest.mark.parametrize("content", [[], {}, {"peft_type": 3}])
def test_a_configuration_of_something_else_is_named(folder, content):
    (folder / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="must have `peft_type` in its configuration, got none in .*adapter_config.json"
    ):
        describe_adapter(folder)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_truncated_weights_are_named(folder, num_bytes):
    path = folder / ADAPTER_WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match="must have whole weights, got a damaged .*adapter_model.safetensors"):
        describe_adapter(folder)


def test_a_header_that_promises_more_than_the_file_holds_is_named(folder):
    header = json.dumps({"huge": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / ADAPTER_WEIGHTS_NAME).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="must have whole weights"):
        describe_adapter(folder)


def test_save_adapter_needs_one_adapter_to_save(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"`adapter_name` must be one of the model's adapters \(\), got \[\]"):
        save_adapter(tiny_model, tmp_path)
    for name, kind in (("alice", "mlp"), ("room", "bottleneck")):
        tiny_model.add_adapter(SpeechAdapterConfig(kind=kind, hidden_sizes=[4]), name)
    with pytest.raises(ValueError, match=r"\(alice, room\), got \['bob'\]"):
        save_adapter(tiny_model, tmp_path, "bob")
    tiny_model.set_adapter(["alice", "room"])
    with pytest.raises(ValueError, match=r"got \['room', 'alice'\]"):
        save_adapter(tiny_model, tmp_path)
    save_adapter(tiny_model, tmp_path, "alice")
    assert describe_adapter(tmp_path)["kind"] == "mlp"


@pytest.mark.parametrize(
    "key", ["classifier.1.lora_A.weight", "base_model.model.classifier.base_layer.1.lora_A.weight"]
)
def test_a_tensor_has_one_name_on_disk_however_it_is_wrapped(key):
    assert name_on_disk(key) == "base_model.model.classifier.1.lora_A.weight"


def test_lora_under_a_speech_adapter_is_saved_as_if_it_were_alone(tiny_model, tiny_base, tmp_path):
    features = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(0))
    tiny_model.add_adapter(LoraConfig(target_modules=["classifier.1"], r=2, init_lora_weights=False), "low")
    with_lora = tiny_model.eval()(features).logits
    tiny_model.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[4]), "alice")
    save_adapter(tiny_model, tmp_path, "low")

    assert set(load_file(tmp_path / ADAPTER_WEIGHTS_NAME)) == {
        "base_model.model.classifier.1.lora_A.weight",
        "base_model.model.classifier.1.lora_B.weight",
    }
    fresh = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    fresh.load_adapter(str(tmp_path), adapter_name="low")
    assert torch.equal(fresh(features).logits, with_lora)


def save_forever(model, folder: Path, ready: int) -> None:
    """Saves adapters `small` and `large` in turn; says once that the first is there."""
    for step, name in enumerate(itertools.cycle(("small", "large"))):
        save_adapter(model, folder, name)
        if not step:
            os.write(ready, b".")


def test_a_save_that_is_killed_leaves_the_old_or_the_new_adapter(tiny_base, tmp_path):
    base = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    values = {"small": (4, 1.0), "large": (64, 2.0)}
    for name, (size, value) in values.items():
        base.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[size]), name)
        for parameter in base.classifier.speech_adapter_blocks[name].parameters():
            torch.nn.init.constant_(parameter, value)
    fresh, generator, seen = DeepSpeech2ForCTC.from_pretrained(tiny_base), torch.Generator().manual_seed(0), set()
    start = time.perf_counter()
    save_adapter(base, tmp_path, "small")
    two_saves = 2 * (time.perf_counter() - start)
    for share in torch.rand(20, generator=generator).tolist():
        _kill_after(share * two_saves, base, tmp_path)
        saved = read_adapter(tmp_path)
        value = saved.tensors["base_model.model.classifier.speech_adapter_blocks.0.bias"][0].item()
        name = "small" if value == 1.0 else "large"
        assert saved.config.hidden_sizes == [values[name][0]]
        assert all((tensor == values[name][1]).all() for tensor in saved.tensors.values())
        fresh.load_adapter(str(tmp_path), "alice")
        fresh.delete_adapter("alice")
        seen.add(name)
    assert seen == {"small", "large"}


def _kill_after(seconds: float, model, folder: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            save_forever(model, folder, writer)
        finally:
            os._exit(1)
    os.read(reader, 1)
    time.sleep(seconds)
    os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
