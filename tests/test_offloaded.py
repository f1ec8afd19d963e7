"""Adapters load, act and save where accelerate keeps a part of the base, or all of it, outside of the model."""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from safetensors.torch import load_file
from stock_models import add_trained, configure, logits, make_batch, make_whisper
from transformers import AutoModelForSpeechSeq2Seq, WhisperForConditionalGeneration

from modeling import load_speech_adapter, save_adapter
from modeling.adapter_loading import read_adapter
from modeling.adapters import ADAPTER_WEIGHTS_NAME
from modeling.fingerprint import list_differences

DISK = {"model.encoder": "cpu", "model.decoder": "disk", "proj_out": "disk"}
LORA = LoraConfig(target_modules=r".*decoder.*(q_proj|v_proj)", r=2, init_lora_weights=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_whisper().save_pretrained(folder)
    return folder


def load_on_disk(folder, device_map=DISK):
    return WhisperForConditionalGeneration.from_pretrained(
        folder, device_map=device_map, offload_folder=folder / "offload"
    ).eval()


def load_beside(folder):
    return cpu_offload(WhisperForConditionalGeneration.from_pretrained(folder).eval())


OFFLOADS = [load_on_disk, lambda folder: load_on_disk(folder, {"": "disk"}), load_beside]


@pytest.fixture(scope="module", params=["decoder", "encoder", "lora"])
def adapter(request, base, tmp_path_factory):
    """Folder of an adapter of the base in memory, and what it says there."""
    configs = {
        "decoder": configure("bottleneck", target_modules=r"model\.decoder\.layers\.0\.fc2"),
        "encoder": configure("transformer"),
        "lora": LORA,
    }
    model = WhisperForConditionalGeneration.from_pretrained(base).eval()
    batch = make_batch(model)
    before = logits(model, batch)
    add_trained(model, "room", configs[request.param])
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder)
    assert not torch.allclose(logits(model, batch), before, atol=1e-2)
    return folder, batch, logits(model, batch)


@pytest.mark.parametrize("load", OFFLOADS)
def test_an_adapter_loads_beside_offloaded_weights_and_saves_there(base, adapter, load, tmp_path):
    folder, batch, expected = adapter
    model = load(base)
    assert model.model.decoder.layers[0].fc1.weight.is_meta
    load_speech_adapter(model, str(folder), "room")
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    save_adapter(model, tmp_path)
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS_NAME).items():
        assert torch.equal(load_file(tmp_path / ADAPTER_WEIGHTS_NAME)[name], tensor)
    theirs, ours = (read_adapter(path).base_fingerprint for path in (folder, tmp_path))
    assert theirs["weights"] == ours["weights"] is not None
    assert list_differences(theirs, ours) == []


@pytest.mark.parametrize("load", OFFLOADS)
def test_another_base_is_refused_although_it_is_offloaded(base, adapter, load, tmp_path):
    folder, _, _ = adapter
    other = WhisperForConditionalGeneration.from_pretrained(base)
    with torch.no_grad():
        other.model.decoder.layers[0].fc1.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another .*1 of 50 tensors differ"):
        load_speech_adapter(load(tmp_path / "other"), str(folder), "room")


def test_an_adapter_that_is_offloaded_itself_is_saved(base, adapter, tmp_path):
    folder, batch, expected = adapter
    model = WhisperForConditionalGeneration.from_pretrained(base).eval()
    load_speech_adapter(model, str(folder), "room")
    model = cpu_offload(model)
    assert all(value.is_meta for name, value in model.named_parameters() if ".room." in name)
    save_adapter(model, tmp_path)
    assert read_adapter(tmp_path).base_fingerprint == read_adapter(folder).base_fingerprint
    fresh = WhisperForConditionalGeneration.from_pretrained(base).eval()
    load_speech_adapter(fresh, str(tmp_path), "room")
    assert torch.equal(logits(fresh, batch), expected)


def test_from_pretrained_of_an_adapter_takes_its_base_from_everywhere(base, adapter, tmp_path, monkeypatch):
    _, batch, expected = adapter
    monkeypatch.chdir(base.parent)
    model = WhisperForConditionalGeneration.from_pretrained(base.name).eval()  # a path that is relative
    folder = adapter[0]
    load_speech_adapter(model, str(folder), "room")
    save_adapter(model, tmp_path)
    monkeypatch.chdir(tmp_path)
    again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, batch), expected, atol=1e-5, rtol=1e-5)
