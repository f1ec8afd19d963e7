"""Adapters saved by the code of fingerprint version 2 load as they did then: same logits, same refusals, every door.

The folders under `fixtures/adapters_of_version_2` were written by `save_adapter`, their logits computed beside it, on
a base that lies there too or under `adapters_of_version_1`.
"""

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, WhisperForConditionalGeneration
from transformers.integrations.peft import PeftAdapterMixin

from modeling import DeepSpeech2ForCTC, load_speech_adapter

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "adapters_of_version_2"
BASES = {"deepspeech2": FIXTURES / "adapters_of_version_1" / "base", "whisper": FOLDER / "whisper"}
SPEECH = [
    "deepspeech2_mlp",
    "deepspeech2_bottleneck",
    "deepspeech2_replacement",
    "whisper_mlp",
    "whisper_bottleneck",
    "whisper_transformer",
    "whisper_transformer_before",
]
LORA = ["deepspeech2_lora", "deepspeech2_pissa", "whisper_lora"]
CLASSES = {"deepspeech2": DeepSpeech2ForCTC, "whisper": WhisperForConditionalGeneration}


@cache
def read_tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "logits.safetensors")


def load_base(name: str, **options) -> PreTrainedModel:
    base = name.partition("_")[0]
    return CLASSES[base].from_pretrained(BASES[base], **options).eval()


@torch.no_grad()
def say(model: torch.nn.Module, name: str) -> torch.Tensor:
    base, tensors = name.partition("_")[0], read_tensors()
    if base == "deepspeech2":
        return model(tensors[base]).logits
    prompt = torch.tensor([[3, 7]] * 2)
    return model(input_features=tensors[base], attention_mask=tensors["whisper_mask"], decoder_input_ids=prompt).logits


def expect(name: str) -> torch.Tensor:
    base, _, adapter = name.partition("_")
    return read_tensors()[f"{base}.{adapter}"]


def load_by_ours(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    load_speech_adapter(model, str(folder), "someone")
    return model


def load_by_transformers(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    PeftAdapterMixin.load_adapter(model, str(folder), "someone")
    return model


def load_by_peft(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(model, str(folder), "someone").eval()


# PEFT 0.21 asks for `is_gradient_checkpointing`, which transformers 5.23 calls deprecated.
BY_PEFT = pytest.param(load_by_peft, marks=pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"))
DOORS = [load_by_ours, load_by_transformers, BY_PEFT]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", SPEECH + LORA)
def test_a_saved_adapter_gives_the_logits_that_it_gave(name, door):
    model = load_base(name)
    torch.testing.assert_close(say(model, name), read_tensors()[f"{name.partition('_')[0]}.base"], atol=1e-4, rtol=0)
    adapted = say(door(model, FOLDER / name), name)
    torch.testing.assert_close(adapted, expect(name), atol=1e-4, rtol=0)
    assert (adapted - read_tensors()[f"{name.partition('_')[0]}.base"]).abs().max() > 0.1


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", SPEECH)
def test_a_saved_adapter_is_refused_by_another_base_through_every_door(name, door):
    model = load_base(name)
    weight = next(value for key, value in model.named_parameters() if key.endswith("weight") and value.dim() == 2)
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"got .*made for another .*: weights: '\w{32}' / '\w{32}'; 1 of \d+ tensors"):
        door(model, FOLDER / name)


@pytest.mark.parametrize("name", ["deepspeech2_lora", "whisper_lora"])
def test_a_saved_lora_is_refused_by_another_base(name):
    model = load_base(name)
    with torch.no_grad():
        next(value for value in model.parameters() if value.dim() == 2)[0, 0] += 1
    with pytest.raises(ValueError, match="1 of .* tensors differ"):
        load_by_ours(model, FOLDER / name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["deepspeech2_bottleneck", "deepspeech2_lora", "whisper_transformer", "whisper_lora"])
def test_a_saved_adapter_is_taken_by_its_base_in_half_precision(name, dtype):
    model = load_by_ours(load_base(name, dtype=dtype), FOLDER / name)
    assert model.active_adapters() == ["someone"]
    parameters = [value for key, value in model.named_parameters() if ".someone." in key]
    assert {value.dtype for value in parameters} == {dtype if name.endswith("lora") else torch.float32}


@pytest.mark.parametrize(("name", "number"), [("deepspeech2_mlp", 1), ("whisper_lora", 1), ("deepspeech2_pissa", 2)])
def test_loading_injects_once_unless_the_start_changes_the_base(name, number, monkeypatch):
    injected, inject = [], BaseTuner.inject_adapter

    def count(tuner: BaseTuner, model: torch.nn.Module, *args, **kwargs) -> None:
        injected.append(model)
        inject(tuner, model, *args, **kwargs)

    monkeypatch.setattr(BaseTuner, "inject_adapter", count)
    load_by_ours(load_base(name), FOLDER / name)
    assert len(injected) == number


def test_a_lora_with_names_that_nobody_knows_is_refused_by_name(tmp_path):
    shutil.copytree(FOLDER / "whisper_lora", tmp_path / "old")
    path = tmp_path / "old" / "adapter_model.safetensors"
    tensors = {name.replace("lora_A.weight", "lora_A.old.weight"): value for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"exactly the tensors of its configuration, got .*old where .*lora_A"):
        load_by_ours(load_base("whisper"), tmp_path / "old")


def test_the_fixture_has_every_kind():
    assert sorted(path.parent.name for path in FOLDER.glob("*/adapter_config.json")) == sorted(SPEECH + LORA)
