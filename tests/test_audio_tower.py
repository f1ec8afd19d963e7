"""The audio tower run alone, skipped and loaded alone gives what it gives inside the whole model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from data.prompts import make_prompt
from inference.audio_models import find_family, find_tower, load_model
from modeling import SpeechAdapterConfig
from modeling.adapter_files import save_adapter
from modeling.adapters import is_adapter_parameter, load_speech_adapter
from modeling.fingerprint import count_unknown, fingerprint_base, list_differences
from tests.speech_models import save_base
from training.audio_tower import add_adapter, apply_block, find_tower_block, load_tower_alone, run_tower, tower_skipped
from training.checkpoint_digest import note_checkpoint

FAMILIES = ("whisper", "qwen2_audio")
TRANSFORMER = {"kind": "transformer", "num_layers": 1, "num_heads": 2, "ffn_size": 8, "dropout": 0.0}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models."""
    return {family: save_base(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def make_batch(folder: Path, *num_samples: int) -> dict[str, torch.Tensor]:
    """Features, mask, prompt and labels of noise."""
    prompt = make_prompt(AutoProcessor.from_pretrained(folder))
    clips = [np.random.default_rng(count).normal(0, 0.1, count).astype(np.float32) for count in num_samples]
    prompts = [prompt.ask(None, [prompt.count_frames(len(clip))]) for clip in clips]
    return prompt.extract(clips) | prompt.pad_training(prompts, [prompt.answer("one")] * len(clips))


def configs(model) -> dict[str, object]:
    """An adapter of every method."""
    family = find_family(model.config)
    return {
        "transformer": SpeechAdapterConfig(**TRANSFORMER),
        "bottleneck": SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[4], dropout=0.0),
        "projector": SpeechAdapterConfig(kind="mlp", hidden_sizes=[], target_modules=family.projector),
        "lora_projector": LoraConfig(target_modules=family.projector, r=2),
        "lora_llm": LoraConfig(target_modules=family.text_attention, r=2),
    }


def randomize(model) -> None:
    """Gives adapters weights that are not those of the start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name):
                parameter.normal_(std=0.2, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_alone_gives_what_it_gives_inside_the_model(bases, family):
    model, batch = load_model(str(bases[family])).eval(), make_batch(bases[family], 16_000, 9_000)
    heard = []
    hook = find_tower(model).register_forward_hook(lambda _module, _args, output: heard.append(output[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    assert torch.equal(run_tower(model, batch), heard[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["transformer", "bottleneck", "projector", "lora_projector", "lora_llm"])
def test_skipping_the_tower_changes_neither_loss_nor_gradients(bases, family, method):
    model, batch = load_model(str(bases[family])).eval(), make_batch(bases[family], 16_000, 9_000)
    add_adapter(model, configs(model)[method], "domain")
    randomize(model)
    losses, gradients = [], []
    states = run_tower(model, batch)
    for features in (None, states):
        model.zero_grad()
        with tower_skipped(model) if features is not None else torch.enable_grad():
            loss = model(**(batch if features is None else batch | {"input_features": features})).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == {name for name, _ in model.named_parameters() if is_adapter_parameter(name)}
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=0)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert torch.equal(run_tower(model, batch), states)


def test_whisper_s_tower_may_be_cut_to_the_frames_of_qwen2_audio_s_speech(bases):
    model, batch = load_model(str(bases["qwen2_audio"])).eval(), make_batch(bases["qwen2_audio"], 16_000, 9_000)
    states = run_tower(model, batch)
    with torch.no_grad(), tower_skipped(model):
        whole, cut = (model(**batch | {"input_features": part}).loss for part in (states, states[:, :25]))
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_loaded_alone_has_its_weights_and_nothing_else(bases, family):
    whole, alone = load_model(str(bases[family])), load_tower_alone(str(bases[family]))
    expected = find_tower(whole).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in find_tower(alone).state_dict().items())
    in_memory = {name for name, value in alone.named_parameters() if not value.is_meta}
    assert in_memory == {
        f"{find_family(alone.config).tower}.{name}" for name in dict(find_tower(alone).named_parameters())
    }
    assert not any(parameter.requires_grad for parameter in alone.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [TRANSFORMER, {"kind": "bottleneck", "hidden_sizes": [4]}])
def test_an_adapter_made_on_the_tower_alone_acts_on_the_whole_model(bases, tmp_path, family, config):
    alone, batch = load_tower_alone(str(bases[family])), make_batch(bases[family], 16_000, 9_000)
    note_checkpoint(alone)
    add_adapter(alone, SpeechAdapterConfig(**config), "domain")
    randomize(alone)
    save_adapter(alone, tmp_path / "adapter", "domain")
    whole = load_model(str(bases[family])).eval()
    load_speech_adapter(whole, str(tmp_path / "adapter"), "domain")
    states, lengths = run_tower(alone, batch), torch.tensor([50, 29]) // (1 + (family == "qwen2_audio"))
    expected = apply_block(find_tower_block(alone, "domain").eval(), states, lengths)
    heard = []
    module = whole.get_submodule(
        {"whisper": "model.encoder", "qwen2_audio": "model.multi_modal_projector.base_layer"}[family]
    )
    module.register_forward_hook(
        lambda _module, args, output: heard.append({"whisper": output, "qwen2_audio": args}[family][0])
    )
    with torch.no_grad():
        whole(**batch)
    torch.testing.assert_close(heard[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_loaded_alone_has_the_fingerprint_of_the_whole_checkpoint(bases, tmp_path, family):
    expected = fingerprint_base(load_model(str(bases[family])))
    alone = load_tower_alone(str(bases[family]))
    assert fingerprint_base(alone)["weights"] is None
    note_checkpoint(alone)
    assert fingerprint_base(alone) == expected
    sharded = tmp_path / "sharded"
    load_model(str(bases[family])).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    alone = load_tower_alone(str(sharded))
    note_checkpoint(alone)
    assert fingerprint_base(alone) == expected


def test_an_adapter_of_a_tower_is_refused_by_another_language_model(bases, tmp_path):
    alone = load_tower_alone(str(bases["qwen2_audio"]))
    note_checkpoint(alone)
    add_adapter(alone, SpeechAdapterConfig(**TRANSFORMER), "domain")
    save_adapter(alone, tmp_path / "adapter", "domain")
    other = load_model(str(bases["qwen2_audio"]))
    other.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="must be used with the base that it was made for"):
        load_speech_adapter(other, str(tmp_path / "adapter"), "domain")


def test_a_checkpoint_that_cannot_be_read_leaves_the_weights_unsaid(bases, tmp_path, caplog):
    alone = load_tower_alone(str(bases["whisper"]))
    alone.name_or_path = str(tmp_path)
    note_checkpoint(alone)
    assert fingerprint_base(alone)["weights"] is None
    assert "The adapter will not say which weights it was made for" in caplog.text


def test_a_tower_in_another_precision_than_the_files_is_of_the_same_base(bases):
    alone = load_tower_alone(str(bases["whisper"]), dtype="bfloat16")
    note_checkpoint(alone)
    fingerprint = fingerprint_base(alone)
    assert fingerprint["dtype"] == "bfloat16"
    assert list_differences(fingerprint_base(load_model(str(bases["whisper"]))), fingerprint) == []
    assert count_unknown(fingerprint, fingerprint)[0] == 0


def test_a_tower_without_all_of_its_weights_is_refused(tmp_path):
    save_base("whisper", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.encoder.conv1.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold a whole audio tower, got .*without \['conv1.weight'\]"):
        load_tower_alone(str(tmp_path))


@pytest.mark.parametrize("load", [load_model, load_tower_alone])
def test_a_model_of_another_family_is_refused(tiny_base, load):
    with pytest.raises(ValueError, match="must be a Whisper or a Qwen2-Audio, got a model of type 'deepspeech2'"):
        load(tiny_base)


def test_an_adapter_elsewhere_is_not_found_on_the_tower_s_output(bases):
    model = load_model(str(bases["whisper"]))
    add_adapter(model, configs(model)["lora_llm"], "domain")
    with pytest.raises(ValueError, match="must have one adapter 'domain' on its tower's output, got 0"):
        find_tower_block(model, "domain")


MEMORY_PROGRAM = """
import json, sys
import torch
import modeling
from training.audio_tower import load_tower_alone
from modeling.fingerprint import fingerprint_base
from training.checkpoint_digest import note_checkpoint

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

torch.nn.Linear(64, 64)(torch.zeros(1, 64))
before = peak()
model = load_tower_alone(sys.argv[1])
loaded = peak()
note_checkpoint(model)
digested = peak() - before
print(json.dumps({"loaded": loaded - before, "digested": digested, "digest": fingerprint_base(model)["weights"]}))
"""


def test_the_language_model_never_comes_into_memory(tmp_path):
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    audio = {"model_type": "qwen2_audio_encoder", "d_model": 256, "encoder_layers": 4, "encoder_attention_heads": 2}
    audio |= {"encoder_ffn_dim": 1024, "num_mel_bins": 16, "max_source_positions": 100}
    text = {"model_type": "qwen2", "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "intermediate_size": 2560, "vocab_size": 8000}
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=5)
    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(1e-3 * (number + 1))
    model.save_pretrained(tmp_path)
    tower_bytes = 4 * sum(parameter.numel() for parameter in find_tower(model).parameters())
    rest_bytes = 4 * sum(parameter.numel() for parameter in model.parameters()) - tower_bytes
    assert rest_bytes > 12 * tower_bytes
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    growth = json.loads(run.stdout.splitlines()[-1])
    assert growth["digest"] == fingerprint_base(model)["weights"]
    # The tower, its file's pages and what the library needs to read it; the rest alone would be far more.
    assert growth["loaded"] < 3 * tower_bytes + 40_000_000 < rest_bytes / 2
    assert growth["digested"] < 3 * tower_bytes + 60_000_000 < rest_bytes / 2
