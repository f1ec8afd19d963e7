"""What people's tools do to a model with adapters: delete, save, unload, merge, quantise, export, import twice."""

import importlib
import importlib.util
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from stock_models import KINDS, add_trained, configure, count_hooks, find_layer, logits, make_batch, make_whisper
from transformers import WhisperForConditionalGeneration

import modeling
from modeling import DeepSpeech2ForCTC, SpeechAdapterConfig
from modeling.adapters import find_adapter_code

# peft 0.21 reads a property that transformers 5.23 deprecates.
PEFT_MODEL = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
QUANTIZED = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
CONFIGS = {
    "mlp": {"hidden_sizes": [4]},
    "bottleneck": {"kind": "bottleneck", "hidden_sizes": [4]},
    "replacement": {"kind": "replacement", "hidden_sizes": [4]},
}


def read_names(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_base_that_has_lost_its_last_adapter_is_saved_as_it_was(tiny_model, five_rows, kind, tmp_path):
    before, modules = logits(tiny_model, five_rows), dict(tiny_model.named_modules())
    add_trained(tiny_model, "low", LoraConfig(target_modules=["classifier.1"], r=2))
    for name in ("ann", "ben"):
        add_trained(tiny_model, name, SpeechAdapterConfig(**CONFIGS[kind]))
    tiny_model.delete_adapter(["ann"])
    assert dict(tiny_model.named_modules()).keys() != modules.keys()
    tiny_model.delete_adapter(["ben", "low"])

    assert dict(tiny_model.named_modules()) == modules
    tiny_model.save_pretrained(tmp_path)
    assert torch.equal(logits(DeepSpeech2ForCTC.from_pretrained(tmp_path).eval(), five_rows), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_model_that_has_lost_its_last_adapter_is_saved_as_it_was(kind, tmp_path):
    model = make_whisper()
    batch, names = make_batch(model), [name for name, _ in model.named_modules()]
    before = logits(model, batch)
    for name in ("ann", "ben"):
        add_trained(model, name, configure(kind))
    model.delete_adapter("ann")
    assert find_layer(model).find_block("ben") is not None
    model.delete_adapter("ben")

    assert [name for name, _ in model.named_modules()] == names
    assert count_hooks(model) == 0
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(WhisperForConditionalGeneration.from_pretrained(tmp_path).eval(), batch), before)


def test_a_layer_leaves_from_within_one_of_another_method():
    model = make_whisper()
    batch = make_batch(model)
    target = {"target_modules": ["encoder.layers.0.fc2"]}
    add_trained(model, "ann", configure("bottleneck", **target))
    add_trained(model, "low", LoraConfig(**target, r=2))
    low = logits(model, batch)
    model.delete_adapter("ann")
    model.set_adapter("low")
    assert not any("speech_adapter" in name or "base_layer.base_layer" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model, batch), low)


@PEFT_MODEL
def test_a_base_inside_a_peft_model_is_saved_under_its_own_names(tiny_model, five_rows, tmp_path):
    tiny_model.save_pretrained(tmp_path / "before")
    before = logits(tiny_model, five_rows)
    for config in (SpeechAdapterConfig(), LoraConfig(target_modules=["classifier.1"])):
        peft_model = get_peft_model(DeepSpeech2ForCTC.from_pretrained(tmp_path / "before"), config)
        peft_model.get_base_model().save_pretrained(tmp_path / "after")
        assert read_names(tmp_path / "after") == read_names(tmp_path / "before")
        again = DeepSpeech2ForCTC.from_pretrained(tmp_path / "after").eval()
        assert torch.equal(logits(again, five_rows), before)


@PEFT_MODEL
@pytest.mark.parametrize("kind", CONFIGS)
def test_unload_gives_the_base_back_and_merging_and_weighing_are_refused(tiny_model, five_rows, kind):
    before, names = logits(tiny_model, five_rows), [name for name, _ in tiny_model.named_modules()]
    peft_model = get_peft_model(tiny_model, SpeechAdapterConfig(**CONFIGS[kind]), "ann")
    peft_model.add_adapter("ben", SpeechAdapterConfig(**CONFIGS[kind]))
    with pytest.raises(ValueError, match="cannot be merged into the base. Keep them beside it"):
        peft_model.merge_and_unload()
    with pytest.raises(ValueError, match="have no weighted sum. `python recipes/manage_adapters.py merge`"):
        peft_model.add_weighted_adapter(["ann", "ben"], [0.5, 0.5], "both")
    base = peft_model.unload()
    assert [name for name, _ in base.named_modules()] == names
    assert torch.equal(logits(base, five_rows), before)


@PEFT_MODEL
def test_unload_takes_the_hooks_of_a_transformer_along():
    model = make_whisper()
    peft_model = get_peft_model(model, configure("transformer"))
    assert count_hooks(model) > 0
    assert count_hooks(peft_model.unload()) == 0


@PEFT_MODEL
def test_lora_on_our_model_is_merged_and_weighed_as_its_arithmetic_says(tiny_model, five_rows):
    peft_model = get_peft_model(tiny_model, LoraConfig(target_modules=["classifier.1"], r=2), "ann").eval()
    peft_model.add_adapter("ben", LoraConfig(target_modules=["classifier.1"], r=2))
    said = {}
    with peft_model.disable_adapter():
        said["base"] = logits(peft_model, five_rows)
    for name in ("ann", "ben"):
        for key, parameter in peft_model.named_parameters():
            if f".{name}." in key:
                torch.nn.init.normal_(parameter)
        peft_model.set_adapter(name)
        said[name] = logits(peft_model, five_rows)
    peft_model.add_weighted_adapter(["ann", "ben"], [0.25, 0.5], "both", combination_type="cat")
    peft_model.set_adapter("both")
    expected = 0.25 * said["ann"] + 0.5 * said["ben"] + 0.25 * said["base"]
    torch.testing.assert_close(logits(peft_model, five_rows), expected, atol=1e-4, rtol=1e-4)
    peft_model.set_adapter("ann")
    merged = peft_model.merge_and_unload(adapter_names=["ann"])
    torch.testing.assert_close(logits(merged, five_rows), said["ann"], atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_modules())


@QUANTIZED
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_quantised_copy_says_about_what_the_model_with_its_adapter_says(tiny_model, five_rows, kind):
    base = logits(tiny_model, five_rows)
    add_trained(tiny_model, "ann", SpeechAdapterConfig(**CONFIGS[kind]))
    said = logits(tiny_model, five_rows)
    parts = {torch.nn.Linear, torch.nn.GRU}
    quantized = torch.ao.quantization.quantize_dynamic(tiny_model, parts)
    heard = quantized(**five_rows).logits  # with a gradient, as without
    assert torch.equal(heard, logits(quantized, five_rows))
    assert (heard - said).norm() < 0.25 * (base - said).norm()
    assert (heard - said).norm() > 0


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "replacement"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_encoder_with_an_adapter_is_exported_for_rows_with_padding_and_without(kind, has_grad, strict):
    model = make_whisper()
    config = configure(kind) if kind in KINDS else SpeechAdapterConfig(**CONFIGS[kind], target_modules=[ENCODER_NORM])
    add_trained(model, "ldv", config)
    batch, encoder = make_batch(model), model.model.encoder
    full = torch.ones_like(batch["attention_mask"])
    with torch.set_grad_enabled(has_grad):
        example = {"attention_mask": full}
        exported = torch.export.export(encoder, (batch["input_features"],), kwargs=example, strict=strict).module()
        for mask in (full, batch["attention_mask"]):
            expected = encoder(batch["input_features"], attention_mask=mask)[0]
            said = exported(batch["input_features"], attention_mask=mask)[0]
            torch.testing.assert_close(said, expected, atol=1e-4, rtol=1e-4)


ENCODER_NORM = "encoder.layer_norm"


def import_code(folder: Path, name: str, monkeypatch) -> object:
    package = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, None, is_package=True))
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, name, package)
    try:
        return importlib.import_module(f"{name}.adapters")
    finally:
        for module in [module for module in sys.modules if module.startswith(f"{name}.")]:
            del sys.modules[module]


def test_code_of_another_version_is_refused_and_other_comments_are_not(tmp_path, monkeypatch):
    for path in find_adapter_code():
        shutil.copy(path, tmp_path)
    blocks = tmp_path / "adapter_blocks.py"
    text = blocks.read_text(encoding="utf-8")
    blocks.write_text("# A remark.\n" + text.replace('"""Returns the last axis', '"""Gives the last axis'), "utf-8")
    assert import_code(tmp_path, "reworded", monkeypatch).SpeechAdapterConfig is SpeechAdapterConfig
    blocks.write_text(text.replace("10_000", "10_001"), encoding="utf-8")
    with pytest.raises(ImportError, match=r"must be of one version in a process, got \w{16} in .* after \w{16} in"):
        import_code(tmp_path, "changed", monkeypatch)
    assert modeling.SpeechAdapterConfig is SpeechAdapterConfig


def test_a_transformer_without_a_mask_says_once_that_it_hears_padding(caplog):
    model = make_whisper()
    add_trained(model, "ldv", configure())
    batch = make_batch(model)
    with caplog.at_level(logging.WARNING):
        logits(model, batch)
        assert "takes padding for speech" not in caplog.text
        del batch["attention_mask"]
        for _ in range(2):
            logits(model, batch)
    assert caplog.text.count("takes padding for speech. Use the processor that was saved with it") == 1
