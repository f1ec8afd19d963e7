"""An adapter goes on its own base, or on another one openly, and never acts in silence on nothing."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperForConditionalGeneration

from modeling import DeepSpeech2ForCTC, SpeechAdapterConfig, save_adapter
from modeling.adapter_loading import check_effect, load_speech_adapter, make_probe_inputs, read_adapter
from modeling.adapters import ADAPTER_WEIGHTS_NAME, find_active_adapters
from modeling.fingerprint import fingerprint_base

CONFIG_NAME = "adapter_config.json"
FIRST_VERSION = Path(__file__).parent / "fixtures" / "adapters_of_version_1"


@pytest.fixture
def folder(tiny_adapters, tmp_path) -> Path:
    """A copy of alice's adapter, an mlp of 8 hidden units."""
    return Path(shutil.copytree(tiny_adapters["alice"], tmp_path / "alice"))


@pytest.fixture
def lora_folder(tiny_base, tmp_path) -> Path:
    """A LoRA adapter of the tiny recogniser."""
    model = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    model.add_adapter(LoraConfig(target_modules=["classifier.1"], r=2, init_lora_weights=False), "low")
    save_adapter(model, tmp_path / "low")
    return tmp_path / "low"


def test_another_base_is_refused_with_both_sides_shown(folder, tiny_model):
    with torch.no_grad():
        tiny_model.classifier[1].weight[0, 0] += 1
    theirs = json.loads((folder / CONFIG_NAME).read_text())["base_fingerprint"]["weights"]
    ours = fingerprint_base(tiny_model)["weights"]
    with pytest.raises(
        ValueError, match=rf"\(its base / this one\): weights: '{theirs}' / '{ours}'. .*--allow_base_m"
    ):
        tiny_model.load_adapter(str(folder), "alice")
    assert find_active_adapters(tiny_model) == []


@pytest.mark.parametrize("kind", ["folder", "lora_folder"])
def test_a_mismatch_that_is_allowed_is_recorded_and_stays_recorded(kind, request, tiny_model, tmp_path):
    path = request.getfixturevalue(kind)
    with torch.no_grad():
        tiny_model.classifier[1].weight[0, 0] += 1
    assert not read_adapter(path).base_mismatch_allowed
    tiny_model.load_adapter(str(path), "alice", allow_base_mismatch=True)
    assert tiny_model.peft_config["alice"].base_mismatch_allowed
    save_adapter(tiny_model, tmp_path / "again", "alice")
    again = read_adapter(tmp_path / "again")
    assert again.base_mismatch_allowed
    assert again.base_fingerprint == fingerprint_base(tiny_model)

    tiny_model.load_adapter(str(tmp_path / "again"), "bob")
    assert tiny_model.peft_config["bob"].base_mismatch_allowed


def test_an_adapter_on_its_own_base_records_no_mismatch(folder, tiny_model):
    tiny_model.load_adapter(str(folder), "alice", allow_base_mismatch=True)
    assert not tiny_model.peft_config["alice"].base_mismatch_allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_in_another_precision_is_taken_and_another_base_in_it_is_not(folder, tiny_base, dtype):
    model = DeepSpeech2ForCTC.from_pretrained(tiny_base, dtype=dtype)
    model.load_adapter(str(folder), "alice")
    assert find_active_adapters(model) == ["alice"]
    assert not model.peft_config["alice"].base_mismatch_allowed
    other = DeepSpeech2ForCTC.from_pretrained(tiny_base, dtype=dtype)
    with torch.no_grad():
        other.classifier[1].weight[0, 0] += 1
    with pytest.raises(ValueError, match="another .*: weights: '.*'; 1 of 28 tensors differ"):
        other.load_adapter(str(folder), "alice")


@pytest.mark.parametrize("kind", ["speech", "lora"])
def test_an_adapter_saved_before_fingerprints_had_a_version_loads_on_its_base_alone(kind):
    sums = {"speech": 79.16643944382668, "lora": -108.12775132060051}  # of the logits when it was saved
    features = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0))
    model = DeepSpeech2ForCTC.from_pretrained(FIRST_VERSION / "base")
    model.load_adapter(str(FIRST_VERSION / kind), "first")
    with torch.no_grad():
        assert model.eval()(features).logits.double().sum().item() == pytest.approx(sums[kind], abs=1e-3)
    assert not model.peft_config["first"].base_mismatch_allowed

    other = DeepSpeech2ForCTC.from_pretrained(FIRST_VERSION / "base")
    with torch.no_grad():
        other.classifier[1].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"another .*: weights: '\w{32}' / '\w{32}'. Load its own base"):
        other.load_adapter(str(FIRST_VERSION / kind), "first")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_whose_start_changed_the_base_loads_there_and_leaves_another_base_as_it_was(
    init, tiny_base, tiny_model, tmp_path
):
    features = torch.randn(1, 20, 16)
    tiny_model.add_adapter(LoraConfig(target_modules=["classifier.1"], r=2, init_lora_weights=init), "low")
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
        save_adapter(tiny_model, tmp_path / "low")
        fresh = DeepSpeech2ForCTC.from_pretrained(tiny_base)
        fresh.load_adapter(str(tmp_path / "low"), "low")
        torch.testing.assert_close(fresh.eval()(features).logits, tiny_model(features).logits, atol=1e-4, rtol=1e-4)

        other = DeepSpeech2ForCTC.from_pretrained(tiny_base).eval()
        before = other(features).logits
        save_file(
            {
                "base_model.model.classifier.1.lora_A.weight": torch.zeros(2, 32),
                "base_model.model.classifier.1.lora_B.weight": torch.zeros(30, 2),
                "base_model.model.classifier.1.ghost": torch.zeros(1),
            },
            tmp_path / "low" / ADAPTER_WEIGHTS_NAME,
            metadata={"format": "pt"},
        )
        with pytest.raises(ValueError, match="must hold exactly the tensors of its configuration"):
            other.load_adapter(str(tmp_path / "low"), "low")
        assert torch.equal(other(features).logits, before)


def test_another_vocabulary_and_other_features_are_refused(tiny_model, tiny_processor, tiny_base, tmp_path):
    tiny_model.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[8]), "alice")
    save_adapter(tiny_model, tmp_path / "alice", processor=tiny_processor)
    other = copy.deepcopy(tiny_processor)
    other.tokenizer.add_tokens(["ß"])
    other.feature_extractor.sampling_rate = 8_000

    model = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    with pytest.raises(ValueError, match="features.sampling_rate: 16000 / 8000; vocabulary: "):
        load_speech_adapter(model, str(tmp_path / "alice"), "alice", processor=other)
    load_speech_adapter(model, str(tmp_path / "alice"), "alice", processor=tiny_processor)
    save_adapter(model, tmp_path / "again")
    assert read_adapter(tmp_path / "again").base_fingerprint == read_adapter(tmp_path / "alice").base_fingerprint


def test_an_adapter_that_does_not_name_its_base_loads_with_one_warning(folder, lora_folder, tiny_model, caplog):
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | {"base_fingerprint": None}))
    tensors = load_file(lora_folder / ADAPTER_WEIGHTS_NAME)
    save_file(tensors, lora_folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
    for path in (lora_folder, folder):
        caplog.clear()
        tiny_model.load_adapter(str(path), path.name)
        assert [record.getMessage() for record in caplog.records] == [
            f"{path} does not say which base it was made for; it is loaded unchecked."
        ]


def test_lora_carries_the_fingerprint_without_a_warning_of_peft(lora_folder, tiny_model, recwarn):
    with safe_open(lora_folder / ADAPTER_WEIGHTS_NAME, framework="pt") as file:
        assert json.loads(file.metadata()["base_fingerprint"]) == fingerprint_base(tiny_model)
    tiny_model.load_adapter(str(lora_folder), "low")
    assert not [str(warning.message) for warning in recwarn if "nexpected keyword" in str(warning.message)]


def test_a_name_that_is_taken_and_a_module_that_is_no_model_are_refused(folder, tiny_model):
    tiny_model.load_adapter(str(folder), "alice")
    with pytest.raises(ValueError, match="`adapter_name` must be new, got 'alice'"):
        tiny_model.load_adapter(str(folder), "alice")
    with pytest.raises(ValueError, match="`model` must be a transformers model, got a Linear"):
        load_speech_adapter(torch.nn.Linear(2, 2), str(folder), "alice")


def test_an_adapter_may_be_named_like_a_module_of_the_base(folder, tiny_model):
    tiny_model.load_adapter(str(folder), "0")
    assert find_active_adapters(tiny_model) == ["0"]


@pytest.fixture
def whisper() -> WhisperForConditionalGeneration:
    """Whisper of one layer, random and always the same."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = WhisperConfig(
        vocab_size=60, num_mel_bins=8, max_source_positions=20, encoder_attention_heads=2, decoder_attention_heads=2,
        **sizes, **ids,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def save_whisper_adapter(whisper, folder: Path, target: str, kind: str = "bottleneck") -> None:
    model = copy.deepcopy(whisper)
    model.add_adapter(SpeechAdapterConfig(kind=kind, hidden_sizes=[4], target_modules=target), "room")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "speech_adapter" in name:
                parameter.normal_()
    save_adapter(model, folder)


def test_an_adapter_on_a_module_that_is_never_run_is_refused(whisper, tmp_path):
    whisper.model.unused = torch.nn.Linear(16, 16)
    save_whisper_adapter(whisper, tmp_path, r"model\.unused")
    with pytest.raises(ValueError, match="`adapter` must act on the model, got 'room', with and without which"):
        load_speech_adapter(whisper, str(tmp_path), "room")
    assert type(whisper.model.unused) is torch.nn.Linear
    assert not hasattr(whisper, "peft_config")


@pytest.mark.parametrize("target", [r"model\.encoder\.layers\.0\.fc2", r"model\.decoder\.layers\.0\.fc2"])
def test_an_adapter_that_acts_on_a_stock_model_passes(whisper, tmp_path, target):
    save_whisper_adapter(whisper, tmp_path, target)
    load_speech_adapter(whisper, str(tmp_path), "room")
    assert find_active_adapters(whisper) == ["room"]


def test_adapters_that_are_switched_off_are_noticed(folder, tiny_model):
    tiny_model.load_adapter(str(folder), "alice")
    check_effect(tiny_model, "alice")
    tiny_model.classifier._disable_adapters = True
    with pytest.raises(ValueError, match="`adapter` must act on the model, got 'alice'"):
        check_effect(tiny_model, "alice")


def test_another_active_adapter_does_not_hide_one_without_effect(whisper):
    whisper.model.unused = torch.nn.Linear(16, 16)
    whisper.add_adapter(LoraConfig(target_modules=["encoder.layers.0.fc1"], r=2, init_lora_weights=False), "low")
    whisper.add_adapter(
        SpeechAdapterConfig(kind="replacement", hidden_sizes=[4], target_modules=r"model\.unused"), "dead"
    )
    whisper.set_adapter(["low", "dead"])
    check_effect(whisper.eval(), "low")
    with pytest.raises(ValueError, match="got 'dead', with and without which"):
        check_effect(whisper, "dead")


def test_an_adapter_at_its_start_may_leave_the_base_as_it_is(tiny_model, tiny_base, tmp_path):
    tiny_model.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[8]), "alice")
    save_adapter(tiny_model, tmp_path)
    fresh = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    fresh.load_adapter(str(tmp_path), "alice")
    assert find_active_adapters(fresh) == ["alice"]


def test_an_adapter_too_quiet_to_be_seen_after_rounding_passes_unchanged(tiny_model):
    tiny_model.to(torch.bfloat16)
    tiny_model.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[8]), "alice")
    last = tiny_model.classifier.speech_adapter_blocks["alice"][-1]
    with torch.no_grad():
        last.weight.fill_(1e-12)
    check_effect(tiny_model.eval(), "alice")
    assert (last.weight == 1e-12).all()


def test_the_probe_leaves_modes_and_random_numbers_alone(folder, tiny_base):
    model = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    model.load_adapter(str(folder), "alice", is_trainable=True)
    model.train()
    model.encoder.conv.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    check_effect(model, "alice")
    assert [module.training for module in model.modules()] == modes
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)


def test_probe_inputs_may_be_given(folder, tiny_model):
    tiny_model.load_adapter(str(folder), "alice", probe_inputs={"input_features": torch.ones(1, 20, 16)})
    with pytest.raises(ValueError, match="`input_features` must be"):
        check_effect(tiny_model, "alice", {"input_features": torch.ones(1, 20, 3)})


def test_a_model_of_several_parts_is_not_probed_with_one_of_them(whisper, monkeypatch):
    assert make_probe_inputs(whisper)["input_features"].shape == (1, 8, 40)
    monkeypatch.setattr(whisper.config, "model_type", "two_parts")
    monkeypatch.setattr(type(whisper.config), "sub_configs", {"text_config": object, "audio_config": object})
    assert make_probe_inputs(whisper) is None


@pytest.mark.parametrize("size", [1e-7, 1e-3])
def test_noise_of_the_base_is_no_effect_of_a_dead_adapter(whisper, tmp_path, size):
    whisper.model.unused = torch.nn.Linear(16, 16)
    save_whisper_adapter(whisper, tmp_path, r"model\.unused")
    whisper.proj_out.register_forward_hook(lambda _module, _args, output: output + size * torch.randn_like(output))
    with pytest.raises(ValueError, match="`adapter` must act on the model, got 'room', with and without which"):
        load_speech_adapter(whisper, str(tmp_path), "room")


def test_an_adapter_that_acts_passes_beside_noise_of_the_base(whisper, tmp_path):
    save_whisper_adapter(whisper, tmp_path, r"model\.decoder\.layers\.0\.fc2")
    whisper.proj_out.register_forward_hook(lambda _module, _args, output: output + 1e-6 * torch.randn_like(output))
    load_speech_adapter(whisper, str(tmp_path), "room")
    assert find_active_adapters(whisper) == ["room"]


def test_nan_is_no_effect(whisper, tmp_path):
    save_whisper_adapter(whisper, tmp_path, r"model\.decoder\.layers\.0\.fc2")
    whisper.model.decoder.layers[0].fc2.register_forward_hook(lambda _module, _args, output: output * float("nan"))
    with pytest.raises(ValueError, match="`model` must say numbers, got NaN from the base without 'room'"):
        load_speech_adapter(whisper, str(tmp_path), "room")
    assert not hasattr(whisper, "peft_config")


def test_an_adapter_with_which_the_model_says_nan_is_refused(whisper, tmp_path):
    save_whisper_adapter(whisper, tmp_path, r"model\.decoder\.layers\.0\.fc2")
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS_NAME)
    for tensor in tensors.values():
        tensor.fill_(3e38)  # finite, and no sum of it is
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="`adapter` must let the model say numbers, got NaN with 'room'"):
        load_speech_adapter(whisper, str(tmp_path), "room")
    assert not hasattr(whisper, "peft_config")
