"""Whichever way an adapter is loaded by, it goes on its own base alone."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from stock_models import add_trained, configure, make_whisper
from test_clean_process import BLOCKER
from transformers import AutoModelForSpeechSeq2Seq, WhisperForConditionalGeneration

from modeling import save_adapter
from modeling.adapters import save_adapter_code


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
DOORS = [load_by_model, load_from_pretrained, load_peft_model, load_second_into_peft_model]


@pytest.mark.parametrize("load", DOORS)
def test_every_door_of_a_stock_model_opens_for_its_own_base(saved, load):
    load(saved, "base", "adapter")


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
from transformers import AutoModelForSpeechSeq2Seq, WhisperForConditionalGeneration
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
