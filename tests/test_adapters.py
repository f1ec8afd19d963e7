"""The contract of every adapter: it alone trains, starts as nothing, travels alone, and leaves no trace when off."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import safe_open

import modeling.adapters
from modeling import DeepSpeech2ForCTC, SpeechAdapterConfig, adapter_rows, save_adapter
from modeling.adapter_config import KINDS
from modeling.adapters import (
    ADAPTER_WEIGHTS_NAME,
    BASE,
    SPEECH_ADAPTER,
    adapters_off,
    check_adapter_name,
    find_active_adapters,
    is_adapter_parameter,
)

RESIDUAL = [kind for kind in KINDS if kind != "replacement"]
SMALL: dict[str, dict] = {kind: {"hidden_sizes": [8]} for kind in KINDS}
# Has no default place in this project's own models.
SMALL["transformer"] = {"num_layers": 1, "num_heads": 2, "ffn_size": 8, "target_modules": r"encoder\.rnn_layers\.0"}
# In the classifier, under the place of the mlp and the replacement.
LORA = {"target_modules": ["classifier.1"], "r": 4, "init_lora_weights": False}


# peft 0.21 reads a property that transformers 5.23 deprecates.
PEFT_MODEL = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows of noise of 16 bins; the second and third are padded."""
    features = torch.randn(3, 30, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(30) < torch.tensor([[30], [17], [24]])
    return {"input_features": features, "attention_mask": mask.long()}


def add_adapter(model, name: str, config: object) -> None:
    """Adds an adapter that changes the output, as after a training; each call draws other weights."""
    model.add_adapter(config, name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_adapter_parameter(key) and f".{name}." in key:
                parameter.normal_(generator=torch.Generator().manual_seed(len(key) + sum(map(ord, name))))
    model.eval()


def small(kind: str, **settings) -> SpeechAdapterConfig:
    return SpeechAdapterConfig(kind=kind, **SMALL[kind] | settings)


@torch.no_grad()
def logits(model, batch: dict) -> torch.Tensor:
    return model(**batch).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_gets_a_gradient_if_and_only_if_it_is_the_adapter_s(tiny_model, batch, kind):
    add_adapter(tiny_model, "alice", small(kind))
    tiny_model.train()
    tiny_model(**batch, labels=torch.tensor([[3, 4]] * 3)).loss.backward()

    with_gradient = {name for name, value in tiny_model.named_parameters() if value.grad is not None}
    of_adapter = {name for name, _ in tiny_model.named_parameters() if ".speech_adapter_blocks.alice." in name}
    assert with_gradient == of_adapter != set()
    assert all(tiny_model.get_parameter(name).grad.abs().max() > 0 for name in of_adapter)


@pytest.mark.parametrize("kind", RESIDUAL)
def test_a_residual_adapter_is_nothing_at_the_start(tiny_model, batch, kind):
    before = logits(tiny_model, batch)
    tiny_model.add_adapter(small(kind), "alice")
    assert torch.equal(logits(tiny_model.eval(), batch), before)


@pytest.mark.parametrize("kind", RESIDUAL)
def test_a_residual_adapter_learns_from_its_first_step_on(tiny_model, batch, kind):
    tiny_model.add_adapter(small(kind, dropout=0.0), "alice")
    optimizer = torch.optim.SGD((value for value in tiny_model.parameters() if value.requires_grad), lr=1e-4)
    losses = []
    for _ in range(3):
        loss = tiny_model(**batch, labels=torch.tensor([[3, 4]] * 3)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_a_replacement_says_what_its_block_says(tiny_model, batch):
    add_adapter(tiny_model, "alice", small("replacement"))
    hidden_states = tiny_model(**batch, output_hidden_states=True).hidden_states[-1]
    block = tiny_model.classifier.speech_adapter_blocks["alice"]

    torch.testing.assert_close(tiny_model(**batch).logits[0], block(hidden_states)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_s_tensors_are_on_disk(tiny_model, kind, tmp_path):
    add_adapter(tiny_model, "alice", small(kind))
    save_adapter(tiny_model, tmp_path, "alice")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", ADAPTER_WEIGHTS_NAME]
    with safe_open(tmp_path / ADAPTER_WEIGHTS_NAME, framework="pt") as file:
        names = {name.replace("base_model.model.", "").replace("_blocks.", "_blocks.alice.") for name in file.keys()}
    assert names == {name for name, _ in tiny_model.named_parameters() if is_adapter_parameter(name)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_gives_equal_logits_on_a_fresh_base(tiny_model, tiny_base, batch, kind, dtype, tmp_path):
    tiny_model.to(dtype)
    batch["input_features"] = batch["input_features"].to(dtype)
    add_adapter(tiny_model, "alice", small(kind))
    save_adapter(tiny_model, tmp_path)

    fresh = DeepSpeech2ForCTC.from_pretrained(tiny_base, dtype=dtype)
    fresh.load_adapter(str(tmp_path), adapter_name="someone")

    assert fresh.active_adapters() == ["someone"]
    assert {value.dtype for name, value in fresh.named_parameters() if is_adapter_parameter(name)} == {torch.float32}
    assert torch.equal(logits(fresh, batch), logits(tiny_model, batch))
    assert not any(value.requires_grad for value in fresh.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_folder_loads_as_base_and_adapter(tiny_base, batch, kind, tmp_path):
    model = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    add_adapter(model, "alice", small(kind))
    save_adapter(model, tmp_path)

    assert torch.equal(logits(DeepSpeech2ForCTC.from_pretrained(tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_off_leaves_the_base_as_it_was(tiny_model, batch, kind):
    before = logits(tiny_model, batch)
    add_adapter(tiny_model, "alice", small(kind))
    adapted = logits(tiny_model, batch)
    assert not torch.allclose(adapted, before, atol=0.1)

    tiny_model.disable_adapters()
    assert torch.equal(logits(tiny_model, batch), before)
    assert find_active_adapters(tiny_model) == []
    assert find_active_adapters(tiny_model, even_if_off=True) == ["alice"]
    tiny_model.enable_adapters()
    assert torch.equal(logits(tiny_model, batch), adapted)


def test_adapters_off_restores_what_was_on_even_after_an_error(tiny_model):
    add_adapter(tiny_model, "alice", small("mlp"))
    add_adapter(tiny_model, "bob", small("bottleneck"))
    trainable = [name for name, value in tiny_model.named_parameters() if value.requires_grad]

    def fail_with_adapters_off() -> None:
        with adapters_off(tiny_model):
            assert find_active_adapters(tiny_model) == []
            raise KeyError

    with pytest.raises(KeyError):
        fail_with_adapters_off()
    assert find_active_adapters(tiny_model) == ["bob"]
    assert [name for name, value in tiny_model.named_parameters() if value.requires_grad] == trainable


@pytest.mark.parametrize("kind", KINDS)
def test_named_adapters_switch_and_go_away(tiny_model, batch, kind):
    before = logits(tiny_model, batch)
    outputs = {}
    for name in ("alice", "bob"):
        add_adapter(tiny_model, name, small(kind))
        outputs[name] = logits(tiny_model, batch)
    assert not torch.equal(outputs["alice"], outputs["bob"])

    tiny_model.set_adapter("alice")
    assert torch.equal(logits(tiny_model, batch), outputs["alice"])
    tiny_model.delete_adapter("alice")
    assert list(tiny_model.peft_config) == ["bob"]
    assert not any(".alice." in name for name, _ in tiny_model.named_parameters())
    tiny_model.set_adapter("bob")
    assert torch.equal(logits(tiny_model, batch), outputs["bob"])
    tiny_model.delete_adapter("bob")
    assert torch.equal(logits(tiny_model, batch), before)
    assert tiny_model.count_parameters()["adapter"] == 0


def test_adapters_at_different_places_act_together(tiny_model, batch):
    add_adapter(tiny_model, "room", small("bottleneck"))
    room = logits(tiny_model, batch)
    add_adapter(tiny_model, "alice", small("mlp"))
    tiny_model.set_adapter(["room", "alice"])

    assert find_active_adapters(tiny_model) == ["room", "alice"]
    both = logits(tiny_model, batch)
    with torch.no_grad():
        hidden_states = tiny_model(**batch, output_hidden_states=True).hidden_states[-1]
        expected = room + tiny_model.classifier.speech_adapter_blocks["alice"](hidden_states)
    torch.testing.assert_close(both[0], expected[0])


def test_two_active_adapters_on_one_module_are_refused(tiny_model, batch):
    for name in ("alice", "bob"):
        add_adapter(tiny_model, name, small("mlp"))
    tiny_model.set_adapter(["alice", "bob"])
    with pytest.raises(ValueError, match=r"one active speech adapter, got \['alice', 'bob'\]. Activate one"):
        tiny_model(**batch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_matches_nothing_is_refused(tiny_model, kind):
    with pytest.raises(ValueError, match="nowhere"):
        tiny_model.add_adapter(small(kind, target_modules=["nowhere"]), "alice")


def test_a_target_without_a_width_is_refused_by_its_type(tiny_model):
    with pytest.raises(ValueError, match="`in_features` and `out_features`, got a BatchNorm1d"):
        tiny_model.add_adapter(small("mlp", target_modules=["batch_norm"]), "alice")


def test_targets_can_be_named_and_excluded(tiny_model):
    config = small("bottleneck", target_modules=r"encoder\.(conv|rnn_layers\.\d+)", exclude_modules=r"encoder\.conv")
    tiny_model.add_adapter(config, "alice")
    places = {
        name.split(".speech_adapter_blocks")[0] for name, _ in tiny_model.named_parameters() if "_blocks" in name
    }
    assert places == {"encoder.rnn_layers.0"}


@pytest.mark.parametrize("kinds", [("mlp", "mlp"), ("bottleneck", "bottleneck"), ("replacement", "bottleneck")])
def test_every_row_has_its_own_adapter(tiny_model, batch, kinds):
    alone = {BASE: logits(tiny_model, batch)}
    for name, kind in zip(("alice", "bob"), kinds, strict=True):
        add_adapter(tiny_model, name, small(kind))
        alone[name] = logits(tiny_model, batch)

    for names in (["alice", BASE, "bob"], ["bob", "bob", "bob"], ["bob", "alice", "bob"], [BASE] * 3):
        with torch.no_grad(), tiny_model.adapter_rows(names):
            together = tiny_model(**batch).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(together[row], alone[name][row], atol=1e-4, rtol=1e-5)
    assert torch.equal(logits(tiny_model, batch), alone["bob"])


def test_rows_take_lora_and_speech_adapters_in_one_batch(tiny_model, batch):
    alone = {BASE: logits(tiny_model, batch)}
    add_adapter(tiny_model, "low", LoraConfig(**LORA))
    alone["low"] = logits(tiny_model, batch)
    add_adapter(tiny_model, "alice", small("bottleneck"))
    alone["alice"] = logits(tiny_model, batch)

    with torch.no_grad(), adapter_rows(tiny_model, ["alice", "low", BASE]):
        together = tiny_model(**batch).logits

    for row, name in enumerate(["alice", "low", BASE]):
        torch.testing.assert_close(together[row], alone[name][row], atol=1e-4, rtol=1e-5)


def test_rows_are_refused_when_they_cannot_be_right(tiny_model, batch):
    add_adapter(tiny_model, "alice", small("mlp"))
    with adapter_rows(tiny_model, ["alice", BASE]), pytest.raises(ValueError, match="got 2 names for 3 rows"):
        tiny_model(**batch)
    with pytest.raises(ValueError, match=r"loaded adapters \(__base__, alice\), got \['bob'\]"):
        with adapter_rows(tiny_model, ["alice", "bob", BASE]):
            pass
    tiny_model.train()
    with pytest.raises(ValueError, match=r"inference only. Call `model.eval\(\)`"):
        with adapter_rows(tiny_model, ["alice"]):
            pass
    with adapter_rows(tiny_model, None):
        assert tiny_model(**batch).logits.requires_grad


@pytest.mark.parametrize("name", ["a.b", "a/b", "..", "a\\b", "a b", "a" * 65, "keys", "forward", "__base__"])
def test_names_that_are_paths_or_reserved_are_refused(tiny_model, name):
    with pytest.raises(ValueError, match="`adapter_name` must"):
        tiny_model.add_adapter(small("mlp"), name)


@pytest.mark.parametrize("name", ["", 7, None])
def test_names_that_are_no_names_are_refused(name):
    with pytest.raises(ValueError, match="`adapter_name` must be 1 to 64 letters"):
        check_adapter_name(name)


def test_a_model_refuses_a_name_and_then_takes_another(tiny_model, tiny_adapters, batch):
    before = logits(tiny_model, batch)
    with pytest.raises(ValueError, match="`adapter_name` must"):
        tiny_model.add_adapter(small("mlp"), "")
    with pytest.raises(ValueError, match="`adapter_name` must"):
        tiny_model.load_adapter(tiny_adapters["bob"], "../bob")
    assert torch.equal(logits(tiny_model, batch), before)
    add_adapter(tiny_model, "alice", small("mlp"))
    assert find_active_adapters(tiny_model) == ["alice"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "prefix"}, "`kind` must be one of mlp, bottleneck, replacement, transformer, got 'prefix'"),
        (
            {"kind": "replacement", "hidden_sizes": []},
            r"`hidden_sizes` must be a list of positive integers, got \[\]",
        ),
        ({"hidden_sizes": [8, 0]}, r"positive integers, got \[8, 0\]"),
        ({"hidden_sizes": [8.0]}, r"positive integers, got \[8.0\]"),
        ({"hidden_sizes": [True]}, r"positive integers, got \[True\]"),
        ({"hidden_sizes": 8}, "positive integers, got 8"),
        ({"kind": "bottleneck", "hidden_sizes": [8, 4]}, r"bottleneck must be one width, got \[8, 4\]"),
        ({"dropout": 1.0}, "`dropout` must be from 0 to below 1, got 1.0"),
        ({"dropout": -0.1}, "`dropout` must be from 0 to below 1, got -0.1"),
        ({"dropout": "0.1"}, "`dropout` must be from 0 to below 1, got '0.1'"),
    ],
)
def test_a_configuration_of_no_adapter_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SpeechAdapterConfig(**settings)


@PEFT_MODEL
def test_merging_is_refused(tiny_model):
    peft_model = get_peft_model(tiny_model, small("mlp"))
    with pytest.raises(ValueError, match="cannot be merged into the base"):
        peft_model.merge_adapter()


@PEFT_MODEL
@pytest.mark.parametrize("kind", KINDS)
def test_peft_model_trains_saves_loads_and_mixes_rows(tiny_model, tiny_base, batch, kind, tmp_path):
    base = logits(tiny_model, batch)
    peft_model = get_peft_model(tiny_model, small(kind), adapter_name="alice").eval()
    trainable = [name for name, value in peft_model.named_parameters() if value.requires_grad]
    assert trainable == [name for name, _ in peft_model.named_parameters() if is_adapter_parameter(name)]
    with torch.no_grad():
        for name in trainable:
            peft_model.get_parameter(name).normal_()
    adapted = logits(peft_model, batch)
    peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    save_adapter(peft_model, tmp_path / "ours")
    assert (tmp_path / "ours" / ADAPTER_WEIGHTS_NAME).read_bytes() == (
        tmp_path / "alice" / ADAPTER_WEIGHTS_NAME
    ).read_bytes()

    fresh = PeftModel.from_pretrained(DeepSpeech2ForCTC.from_pretrained(tiny_base), tmp_path / "alice").eval()
    assert torch.equal(logits(fresh, batch), adapted)
    with torch.no_grad():
        rows = fresh(**batch, adapter_names=["default", BASE, "default"]).logits
    for row, expected in enumerate([adapted, base, adapted]):
        torch.testing.assert_close(rows[row], expected[row], atol=1e-4, rtol=1e-5)
    with fresh.disable_adapter():
        assert torch.equal(logits(fresh, batch), base)


def test_importing_the_file_again_under_another_name_is_harmless(tiny_model, batch, monkeypatch):
    folder = Path(modeling.adapters.__file__).parent
    package = importlib.util.module_from_spec(importlib.util.spec_from_loader("again", None, is_package=True))
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, "again", package)
    again = importlib.import_module("again.adapters")
    monkeypatch.setitem(sys.modules, "again.adapters", again)

    assert again is not modeling.adapters
    assert again.SPEECH_ADAPTER is SPEECH_ADAPTER
    assert again.SpeechAdapterConfig is SpeechAdapterConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[SPEECH_ADAPTER] is modeling.adapters.SpeechAdapterModel
    add_adapter(tiny_model, "alice", again.SpeechAdapterConfig(kind="mlp"))
    with again.adapters_off(tiny_model):
        off = logits(tiny_model, batch)
    tiny_model.disable_adapters()
    assert torch.equal(logits(tiny_model, batch), off)


def test_lora_is_added_switched_and_saved_through_the_same_verbs(tiny_model, tiny_base, batch, tmp_path):
    add_adapter(tiny_model, "low", LoraConfig(**LORA))
    with_lora = logits(tiny_model, batch)
    assert {name for name, value in tiny_model.named_parameters() if value.requires_grad} == {
        "classifier.1.lora_A.low.weight",
        "classifier.1.lora_B.low.weight",
    }
    save_adapter(tiny_model, tmp_path)

    fresh = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    fresh.load_adapter(str(tmp_path), adapter_name="low")
    assert torch.equal(logits(fresh, batch), with_lora)
    add_adapter(fresh, "alice", small("bottleneck"))
    fresh.set_adapter("low")
    assert torch.equal(logits(fresh, batch), with_lora)
