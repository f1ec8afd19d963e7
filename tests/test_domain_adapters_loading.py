"""Domain adapters of stock models come back: from folders, over 4-bit bases, and where this project is no package."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import (
    KINDS,
    MAKERS,
    TOLERANCES,
    add_trained,
    configure,
    count_hooks,
    find_layer,
    logits,
    make_batch,
    train,
)
from test_clean_process import BLOCKER
from transformers import BitsAndBytesConfig, PreTrainedModel

from modeling import load_speech_adapter, save_adapter
from modeling.adapter_files import save_adapter_code
from modeling.adapter_loading import check_effect, make_probe_inputs
from modeling.adapters import ADAPTER_WEIGHTS_NAME, adapters_off, find_adapter_layers, is_adapter_parameter


@pytest.fixture(params=list(MAKERS))
def model(request) -> PreTrainedModel:
    """A tiny Whisper or Qwen2-Audio, random and always the same."""
    return MAKERS[request.param]()


@pytest.fixture
def batch(model) -> dict[str, torch.Tensor]:
    return make_batch(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_gives_equal_logits_on_a_fresh_stock_model(model, kind, dtype, tmp_path):
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base", dtype=dtype)
    batch = make_batch(model)
    before = logits(model, batch)
    add_trained(model, "ldv", configure(kind))
    save_adapter(model, tmp_path / "ldv")
    names = load_file(tmp_path / "ldv" / ADAPTER_WEIGHTS_NAME)
    assert {name.replace("base_model.model.", "").replace("_blocks.", "_blocks.ldv.") for name in names} == {
        name for name, _ in model.named_parameters() if is_adapter_parameter(name)
    }

    fresh = type(model).from_pretrained(tmp_path / "base", dtype=dtype)
    fresh.load_adapter(str(tmp_path / "ldv"), "vibrometer")
    both = type(model).from_pretrained(tmp_path / "ldv", dtype=dtype)
    tensors = {name: value for name, value in model.named_parameters() if is_adapter_parameter(name)}
    for other, other_name in ((fresh, "vibrometer"), (both, "default")):
        for name, value in tensors.items():
            loaded = other.get_parameter(name.replace(".ldv.", f".{other_name}."))
            assert loaded.dtype == torch.float32
            assert torch.equal(loaded, value)
        # Kernels round differently at other addresses in memory, so not bit for bit.
        torch.testing.assert_close(logits(other, batch), logits(model, batch), **TOLERANCES[dtype])
    with adapters_off(fresh):
        assert torch.equal(logits(fresh, batch), before)


def test_an_adapter_of_another_base_or_width_is_refused(model, tmp_path):
    other = MAKERS[model.config.model_type](width=24)
    add_trained(other, "ldv", configure())
    save_adapter(other, tmp_path, "ldv")
    hooks = count_hooks(model)
    with pytest.raises(ValueError, match="num_parameters: .* weights: .*allow_base_mismatch"):
        load_speech_adapter(model, str(tmp_path), "ldv")
    with pytest.raises(ValueError, match=r"is torch.float32 \(24,\) and should be \(16,\)"):
        load_speech_adapter(model, str(tmp_path), "ldv", allow_base_mismatch=True)
    assert count_hooks(model) == hooks
    assert find_adapter_layers(model) == []


def test_the_probe_hears_the_adapter_and_misses_one_that_is_off(model):
    inputs = make_probe_inputs(model)
    assert torch.isfinite(logits(model, inputs)).all()
    model.add_adapter(configure(), "ldv")
    check_effect(model, "ldv")  # zero at the start, which is no fault
    torch.nn.init.constant_(find_layer(model).find_block("ldv").last_layer.weight, 1e-12)
    check_effect(model, "ldv")
    model.disable_adapters()
    with pytest.raises(ValueError, match="`adapter` must act on the model, got 'ldv'"):
        check_effect(model, "ldv")


# bitsandbytes' own kernels repack the weights in the first evaluation where the processor has AVX512-BF16, and every
# gradient that passes a repacked layer is zero from then on, in silence.
def keep_gradients(model: PreTrainedModel) -> None:
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False


def test_an_adapter_over_a_4_bit_base_starts_as_nothing_trains_alone_and_loads(model, batch, tmp_path):
    model.save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    load = partial(type(model).from_pretrained, tmp_path / "base", quantization_config=quantization, device_map="cpu")
    quantized = load()
    assert any(type(part).__name__ == "Linear4bit" for part in quantized.modules())
    keep_gradients(quantized)
    before = logits(quantized, batch)
    quantized.add_adapter(configure(), "ldv")
    assert torch.equal(logits(quantized.eval(), batch), before)

    with_gradient = train(quantized, batch, steps=2)
    assert with_gradient == {name for name, _ in quantized.named_parameters() if is_adapter_parameter(name)}
    adapted = logits(quantized, batch)
    assert not torch.equal(adapted, before)
    save_adapter(quantized, tmp_path / "ldv", "ldv")
    fresh = load()
    keep_gradients(fresh)
    fresh.load_adapter(str(tmp_path / "ldv"), "ldv")
    torch.testing.assert_close(logits(fresh, batch), adapted, **TOLERANCES[torch.float32])


LOADING = """
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2AudioForConditionalGeneration, WhisperForConditionalGeneration
from transformers.dynamic_module_utils import get_class_from_dynamic_module

report = {"too early": attempt(lambda: WhisperForConditionalGeneration.from_pretrained("whisper/ldv"))}
for name, kind in (("whisper", WhisperForConditionalGeneration), ("qwen2_audio", Qwen2AudioForConditionalGeneration)):
    batch = load_file(f"{name}/batch.safetensors")
    get_class_from_dynamic_module("adapters.SpeechAdapterConfig", f"{name}/ldv")
    model = kind.from_pretrained(f"{name}/ldv").eval()
    other = kind.from_pretrained(f"{name}/base").eval()
    other.load_adapter(f"{name}/ldv")
    with torch.no_grad():
        found = {"repository": model(**batch).logits, "load_adapter": other(**batch).logits}
    save_file({key: value.contiguous() for key, value in found.items()}, f"{name}/logits.safetensors")
finish(report)
"""


def test_adapters_come_back_in_two_lines_in_a_process_without_this_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the adapters name their bases as they were loaded: by relative paths
    expected = {}
    for name, make in MAKERS.items():
        make().save_pretrained(f"{name}/base")
        model = type(make()).from_pretrained(f"{name}/base").eval()
        batch = make_batch(model)
        add_trained(model, "ldv", configure())
        save_adapter(model, f"{name}/ldv", "ldv")
        save_adapter_code(f"{name}/ldv")
        save_file(batch, f"{name}/batch.safetensors")
        expected[name] = logits(model, batch)

    command = [sys.executable, "-I", "-c", BLOCKER + LOADING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["too early"][0] == "KeyError"
    assert (report["import"], report["ours"]) == ("ImportError", [])
    for name, value in expected.items():
        for found in load_file(f"{name}/logits.safetensors").values():
            torch.testing.assert_close(found, value, atol=1e-6, rtol=0)
