"""Whichever way an adapter is loaded by, it goes on its own base alone."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from stock_models import add_trained, configure, make_whisper
from test_clean_process import BLOCKER
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperForConditionalGeneration

from inference.decoding import load_recognizer, recognize_batch
from modeling import DeepSpeech2ForCTC, SpeechAdapterConfig, save_adapter
from modeling.adapter_files import save_adapter_code


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a stock Whisper, of another one, and of an adapter of the first with its code."""
    folder = tmp_path_factory.mktemp("saved")
    model = make_whisper()
    model.save_pretrained(folder / "base")
    other = make_whisper()
    with torch.no_grad():
        other.model.decoder.layers[0].fc1.weight[0, 0] += 1
    other.save_pretrained(folder / "other")
    model = WhisperForConditionalGeneration.from_pretrained(folder / "base")
    add_trained(model, "room", configure("bottleneck"))
    save_adapter(model, folder / "adapter")
    save_adapter_code(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    (folder / "elsewhere").mkdir()
    for name in ("adapter_model.safetensors", *(file.name for file in path.parent.glob("*.py"))):
        (folder / "elsewhere" / name).write_bytes((path.parent / name).read_bytes())
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(folder / "other")}
    (folder / "elsewhere" / "adapter_config.json").write_text(json.dumps(config))
    return folder


def load_by_model(folder, base, adapter):
    model = WhisperForConditionalGeneration.from_pretrained(folder / base)
    model.load_adapter(str(folder / adapter))
    return model


def load_from_pretrained(folder, _base, adapter):
    return AutoModelForSpeechSeq2Seq.from_pretrained(folder / adapter)


def load_peft_model(folder, base, adapter):
    model = WhisperForConditionalGeneration.from_pretrained(folder / base)
    return PeftModel.from_pretrained(model, str(folder / adapter))


def load_second_into_peft_model(folder, base, adapter):
    model = WhisperForConditionalGeneration.from_pretrained(folder / base)
    add_trained(model, "first", configure("mlp"))
    config = model.peft_config["first"]
    model.delete_adapter("first")
    model = PeftModel(model, config, "first")
    model.load_adapter(str(folder / adapter), "room")
    return model


# PEFT asks transformers for a name that it gives up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def load_auto_peft_model(folder, _base, adapter):
    return AutoPeftModel.from_pretrained(str(folder / adapter))


DOORS = [load_by_model, load_from_pretrained, load_peft_model, load_second_into_peft_model, load_auto_peft_model]


@pytest.mark.parametrize("load", DOORS)
def test_every_door_of_a_stock_model_opens_for_its_own_base(saved, load):
    parameters = list(load(saved, "base", "adapter").parameters())
    weights = load_file(saved / "adapter" / "adapter_model.safetensors")
    assert weights
    assert [name for name, weight in weights.items() if not any(map(weight.equal, parameters))] == []


@pytest.mark.parametrize("load", DOORS)
def test_every_door_of_a_stock_model_is_closed_to_another_base(saved, load):
    with pytest.raises(ValueError, match=r"must be used with the base that it was made for.*; 1 of 50 tensors differ"):
        load(saved, "other", "elsewhere")


def test_a_refused_second_adapter_leaves_no_trace_in_a_stock_model(saved):
    model = WhisperForConditionalGeneration.from_pretrained(saved / "other")
    add_trained(model, "own", configure("mlp"))
    with pytest.raises(ValueError, match="must be used with the base that it was made for"):
        model.load_adapter(str(saved / "adapter"), "room")
    assert list(model.peft_config) == ["own"]
    assert not any(".room." in name for name, _ in model.named_parameters())


CLEAN = """
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperForConditionalGeneration
from transformers.dynamic_module_utils import get_class_from_dynamic_module

get_class_from_dynamic_module("adapters.SpeechAdapterConfig", "adapter")
report = {}
def load(base, adapter):
    model = WhisperForConditionalGeneration.from_pretrained(base)
    model.load_adapter(adapter)
for base in ("base", "other"):
    report[base] = attempt(lambda: load(base, "adapter"))[:2]
report["from_pretrained"] = attempt(lambda: AutoModelForSpeechSeq2Seq.from_pretrained("elsewhere"))[:2]
finish(report)
"""


def test_a_process_without_this_project_refuses_another_base_too(saved, tmp_path):
    command = [sys.executable, "-I", "-c", BLOCKER + CLEAN]
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, cwd=saved, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["base"] == ["nothing", ""]
    for door in ("other", "from_pretrained"):
        assert report[door][0] == "ValueError"
        assert "must be used with the base that it was made for" in report[door][1]
    assert report["ours"] == []


def test_auto_peft_model_finds_a_base_that_is_not_of_transformers(tiny_base, tmp_path):
    model = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    model.add_adapter(LoraConfig(target_modules=["classifier.1"], r=2, init_lora_weights=False), "low")
    features = torch.randn(1, 20, 16)
    expected = model.eval()(features).logits
    save_adapter(model, tmp_path)
    loaded = AutoPeftModel.from_pretrained(str(tmp_path))
    assert torch.equal(loaded.eval()(features).logits, expected)


def test_a_local_base_is_kept_as_an_absolute_path_that_is_no_name_on_the_hub(tiny_base, tmp_path, monkeypatch):
    (tmp_path / "outputs").mkdir()
    shutil.copytree(tiny_base, tmp_path / "outputs" / "base")
    monkeypatch.chdir(tmp_path)
    for config in (SpeechAdapterConfig(kind="mlp"), LoraConfig(target_modules=["classifier.1"])):
        model = DeepSpeech2ForCTC.from_pretrained("outputs/base")
        model.add_adapter(config, "ann")
        save_adapter(model, tmp_path / "adapter")
        name = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert name == str(tmp_path / "outputs" / "base")
        with pytest.raises(HFValidationError):
            validate_repo_id(name)
        model = get_peft_model(DeepSpeech2ForCTC.from_pretrained("outputs/base"), SpeechAdapterConfig(kind="mlp"))
    model.save_pretrained(tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "outputs" / "base")


@torch.no_grad()
def test_a_checkpoint_saved_in_half_precision_hears_with_adapters_of_the_whole_one(tiny_base, tiny_adapters, tmp_path):
    features = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    whole = DeepSpeech2ForCTC.from_pretrained(tiny_base).eval()
    whole.load_adapter(tiny_adapters["bob"], "bob")
    for dtype in (torch.bfloat16, torch.float16):
        DeepSpeech2ForCTC.from_pretrained(tiny_base, dtype=dtype).save_pretrained(tmp_path)
        AutoProcessor.from_pretrained(tiny_base).save_pretrained(tmp_path)
        model, _ = load_recognizer(str(tmp_path), {"bob": tiny_adapters["bob"]})
        assert model.classifier[1].weight.dtype == dtype
        batch = {"input_features": features, "attention_mask": torch.ones(2, 30, dtype=torch.long)}
        for row, expected in zip(
            recognize_batch(model, batch, as_log_probs=True), whole(features).logits, strict=True
        ):
            difference = torch.from_numpy(row) - expected.log_softmax(-1)
            assert difference.abs().mean() < 0.02 * expected.log_softmax(-1).abs().mean()
