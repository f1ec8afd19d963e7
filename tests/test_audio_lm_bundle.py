"""Bundles of audio language models: only what was trained, on the bases that it was trained on, and whole copies."""

import json
import shutil

import pytest
import torch
from audio_lm_models import (
    join,
    make_clip,
    make_conversation,
    make_encoder_base,
    make_language_model,
    make_processor,
    make_tokenizer,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor, pipeline

from modeling import AudioLMForConditionalGeneration, load_speech_adapter, save_adapter
from modeling.adapters import adapters_off, is_adapter_parameter
from modeling.audio_encoders import load_encoder, run_encoder
from modeling.audio_lm_modes import find_side, list_trainable, set_modes
from modeling.audio_lm_sides import load_audio_encoder, load_language_model, set_side_mode

BUNDLE_FILES = {"audio_lm.json", "config.json", "generation_config.json", "model.safetensors"}
BIAS = "model.multi_modal_projector.linear_1.bias"


def train_a_step(model) -> dict[str, torch.Tensor]:
    """Moves whatever trains, LoRA's second matrices away from zero, and returns the batch."""
    processor = make_processor(model)
    batch = processor.encode_conversations([make_conversation(make_clip(0.5))])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.eval()
    return batch


def say(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture(scope="module")
def bundle(audio_lm_bases, tmp_path_factory):
    """A bundle with LoRA on both sides, its model and a batch."""
    model = join(audio_lm_bases, "wav2vec2", "mistral", encoder_mode="lora", llm_mode="lora")
    batch = train_a_step(model)
    folder = tmp_path_factory.mktemp("bundle")
    model.save_pretrained(folder)
    make_processor(model).save_pretrained(folder)
    return folder, model, batch


@pytest.mark.parametrize(
    ("encoder", "llm", "modes", "adapters"),
    [
        ("whisper", "qwen2", {}, set()),
        ("hubert", "llama", {"llm_mode": "lora"}, {"language_model"}),
        ("whisper", "mistral", {"encoder_mode": "qlora", "llm_mode": "qlora"}, {"encoder", "language_model"}),
        ("wavlm", "llama", {"encoder_mode": "full"}, set()),
        ("hubert", "qwen2", {"encoder_mode": "lora", "llm_mode": "full"}, {"encoder"}),
    ],
)
def test_a_bundle_comes_back_with_what_was_trained_alone(audio_lm_bases, tmp_path, encoder, llm, modes, adapters):
    model = join(audio_lm_bases, encoder, llm, **modes)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    batch = train_a_step(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {f"{name}_adapter" for name in adapters}
    files = {path.name for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".py"}
    assert files == BUNDLE_FILES
    expected = {name for name in trained if not is_adapter_parameter(name)}
    written = {name.replace(".base_layer.", ".") for name in expected}
    assert load_file(tmp_path / "model.safetensors").keys() == written
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, AudioLMForConditionalGeneration)
    assert torch.equal(say(loaded, batch), say(model, batch))
    assert not any(value.requires_grad for value in loaded.parameters())
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    set_modes(loaded, **modes)
    assert {name for name, value in loaded.named_parameters() if value.requires_grad} == trained


def test_training_goes_on_from_a_bundle_as_if_it_had_not_stopped(bundle, tmp_path):
    folder, model, batch = bundle
    results = []
    for one in (model, AutoModelForMultimodalLM.from_pretrained(folder)):
        set_modes(one, encoder_mode="lora", llm_mode="lora")
        optimizer = torch.optim.SGD([value for value in one.parameters() if value.requires_grad], lr=0.1)
        copied = {name: value.detach().clone() for name, value in one.state_dict().items()}
        one(**batch).loss.backward()
        optimizer.step()
        results.append(say(one.eval(), batch))
        one.save_pretrained(tmp_path / str(len(results)))
        one.zero_grad()
        one.load_state_dict(copied)
    assert torch.equal(*results)
    assert not torch.equal(results[0], say(model, batch))
    pair = [AutoModelForMultimodalLM.from_pretrained(tmp_path / number) for number in ("1", "2")]
    assert torch.equal(say(pair[0], batch), results[0])
    assert torch.equal(say(pair[1], batch), results[0])


def test_what_a_stage_before_trained_stays_in_the_bundle(audio_lm_bases, tmp_path):
    model = join(audio_lm_bases, "whisper", "llama")
    set_modes(model, llm_mode="lora", llm_last_layers=1)
    train_a_step(model)
    set_modes(model, encoder_mode="lora", projector_mode="frozen")
    batch = train_a_step(model)
    model.save_pretrained(tmp_path / "two")
    names = load_file(tmp_path / "two/model.safetensors").keys()
    assert {name.split(".")[1] if name.startswith("model.") else name for name in names} == {
        "multi_modal_projector", "language_model", "lm_head.weight"
    }  # fmt: skip
    assert not any(".layers.0." in name for name in names)
    assert torch.equal(say(AutoModelForMultimodalLM.from_pretrained(tmp_path / "two"), batch), say(model, batch))


@pytest.mark.parametrize(("mode", "tolerance"), [("lora", 2e-4), ("qlora", None)])
def test_a_whole_copy_needs_no_bases(audio_lm_bases, tmp_path, mode, tolerance):
    model = join(audio_lm_bases, "whisper", "qwen2", encoder_mode=mode, llm_mode=mode)
    batch = train_a_step(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, save_full=True)
    assert not (tmp_path / "audio_lm.json").exists()
    assert not list(tmp_path.glob("*_adapter"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    whole = AutoModelForMultimodalLM.from_pretrained(tmp_path).eval()
    assert not any(is_adapter_parameter(name) for name, _ in whole.named_parameters())
    assert whole.lm_head.weight is whole.get_input_embeddings().weight  # tied, as in its base
    difference = (say(whole, batch) - say(model, batch).float()).abs().max()
    with adapters_off(model):
        without = (say(whole, batch) - say(model, batch).float()).abs().max()
    assert difference < without / 4
    if tolerance:
        assert difference < tolerance
    whole.save_pretrained(tmp_path / "again")
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(say(again, batch), say(whole, batch))


def test_text_alone_in_a_loaded_bundle_is_the_base_bit_for_bit(bundle, audio_lm_bases):
    folder, _, _ = bundle
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(audio_lm_bases["mistral"]).eval()
    tokens = torch.tensor([[5, 9, 14, 3]])
    with torch.no_grad():
        assert not torch.equal(model(tokens).logits, base(tokens).logits)
        with adapters_off(model):
            assert torch.equal(model(tokens).logits, base(tokens).logits)


def test_a_bundle_answers_in_the_pipeline_by_its_name(bundle):
    folder, model, _ = bundle
    pipe = pipeline("any-to-any", model=str(folder))
    messages = make_conversation(make_clip(0.5), answer=None)
    options = {"max_new_tokens": 4, "return_full_text": False, "generate_kwargs": {"do_sample": False}}
    answer = pipe(text=messages, **options)[0]["generated_text"]
    processor = AutoProcessor.from_pretrained(folder)
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert answer == processor.decode(tokens, skip_special_tokens=True)


def test_the_lora_of_each_side_loads_into_that_side_alone(bundle, audio_lm_bases):
    folder, model, _ = bundle
    encoder = load_encoder(audio_lm_bases["wav2vec2"])
    wave = torch.from_numpy(make_clip(0.5))[None]
    with torch.no_grad():
        bare = run_encoder(encoder, wave)[0].last_hidden_state
        load_speech_adapter(encoder, str(folder / "encoder_adapter"), "mine")
        heard = run_encoder(encoder, wave)[0].last_hidden_state
        assert torch.equal(heard, run_encoder(model.model.audio_tower, wave)[0].last_hidden_state)
        assert not torch.equal(heard, bare)
    language_model = AutoModelForCausalLM.from_pretrained(audio_lm_bases["mistral"]).eval()
    language_model.load_adapter(str(folder / "language_model_adapter"))  # transformers' own door
    tokens = torch.tensor([[5, 9, 14, 3]])
    with torch.no_grad():
        assert torch.equal(language_model(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_side_alone_is_saved_loaded_and_trained_on(audio_lm_bases, tmp_path, mode):
    tokens = torch.tensor([[5, 9, 14, 3]])
    for name, load, kind in (
        ("encoder", load_audio_encoder, "wavlm"),
        ("language_model", load_language_model, "llama"),
    ):
        side = load(audio_lm_bases[kind], mode)
        run = (lambda model: model(tokens).logits) if name == "language_model" else _hear
        with torch.no_grad():
            for index, parameter in enumerate(value for value in side.parameters() if value.requires_grad):
                parameter += 0.01 * (index % 3 + 1)
        folder = tmp_path / name
        if mode == "full":
            side.save_pretrained(folder)
            loaded = load(str(folder), mode)
        else:
            save_adapter(side, folder, name)
            assert len(list(folder.iterdir())) == 2
            loaded = load(audio_lm_bases[kind])
            load_speech_adapter(loaded, str(folder), name)
        with torch.no_grad():
            assert torch.equal(run(loaded.eval()), run(side.eval()))
        set_side_mode(loaded, mode, name)
        names = [{key for key, value in model.named_parameters() if value.requires_grad} for model in (side, loaded)]
        assert names[0] == names[1]
        assert names[0]


def _hear(encoder) -> torch.Tensor:
    return run_encoder(encoder, torch.from_numpy(make_clip(0.5))[None])[0].last_hidden_state


@pytest.fixture
def copied(bundle, tmp_path):
    """A copy of the bundle, to be spoiled."""
    return shutil.copytree(bundle[0], tmp_path / "copy")


def test_a_bundle_on_another_base_is_refused(audio_lm_bases, tmp_path):
    torch.manual_seed(7)
    make_encoder_base("hubert").save_pretrained(tmp_path / "hubert")
    make_language_model("llama").save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    plain, adapted = (join(audio_lm_bases, "hubert", "llama", llm_mode=mode) for mode in ("frozen", "lora"))
    train_a_step(adapted)
    plain.save_pretrained(tmp_path / "plain")
    adapted.save_pretrained(tmp_path / "adapted")
    load = AutoModelForMultimodalLM.from_pretrained
    for name, place in (("encoder", "hubert"), ("language_model", "llama")):
        with pytest.raises(
            ValueError, match=f"`{name}` must be the base that the bundle was trained on, got .*{place}"
        ):
            load(tmp_path / "plain", **{name: str(tmp_path / place)})
    with pytest.raises(ValueError, match="`adapter` must be used with the base that it was made for"):
        load(tmp_path / "adapted", language_model=str(tmp_path / "llama"))
    insisted = load(tmp_path / "adapted", language_model=str(tmp_path / "llama"), allow_base_mismatch=True)
    assert insisted.base_sides["language_model"].name_or_path == str(tmp_path / "llama")


def test_a_base_that_has_moved_is_asked_for_and_named(copied, audio_lm_bases, tmp_path):
    manifest = json.loads((copied / "audio_lm.json").read_text())
    manifest["bases"]["encoder"]["name_or_path"] = str(tmp_path / "gone")
    (copied / "audio_lm.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="`encoder` must be where the bundle says, got '.*gone'"):
        AutoModelForMultimodalLM.from_pretrained(copied)
    model = AutoModelForMultimodalLM.from_pretrained(copied, encoder=audio_lm_bases["wav2vec2"])
    assert list_trainable(model) == dict.fromkeys(("projector", "encoder", "language_model"), 0)


def test_bundles_of_two_saves_are_refused(copied):
    path = copied / "language_model_adapter/adapter_model.safetensors"
    with open(path, "rb") as file:
        content = bytearray(file.read())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="`bundle` must be of one save, got .* whose language_model_adapter is"):
        AutoModelForMultimodalLM.from_pretrained(copied)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda state: state.pop("model.multi_modal_projector.linear_1.bias"),
            "linear_1.bias' is missing or too much",
        ),
        (lambda state: state.update(extra=torch.zeros(1)), "'extra' is missing or too much"),
        (
            lambda state: state["model.multi_modal_projector.linear_1.bias"].fill_(torch.nan),
            "finite weights of the righ",
        ),
        (
            lambda state: state.update({BIAS: torch.zeros(3)}),
            rf"finite weights of the right shapes, got '{BIAS}' \(3,\)",
        ),
    ],
)
def test_damaged_weights_are_refused(copied, spoil, message):
    state = load_file(copied / "model.safetensors")
    spoil(state)
    save_file(state, copied / "model.safetensors")
    with pytest.raises(ValueError, match=f"`bundle` must hold .*{message}"):
        AutoModelForMultimodalLM.from_pretrained(copied)


@pytest.mark.parametrize("content", ["{", '{"version": 9}', '{"version": 1, "bases": {}}'])
def test_damaged_manifests_are_refused(copied, content):
    (copied / "audio_lm.json").write_text(content)
    with pytest.raises(ValueError, match="`bundle` must have a whole audio_lm.json of version 1"):
        AutoModelForMultimodalLM.from_pretrained(copied)


def test_a_bundle_without_weights_is_refused(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="`bundle` must have model.safetensors, got none in"):
        AutoModelForMultimodalLM.from_pretrained(copied)


def test_a_push_past_the_recipes_is_refused(bundle, tmp_path):
    with pytest.raises(ValueError, match="`push_to_hub` must be left out, got True"):
        bundle[1].save_pretrained(tmp_path, push_to_hub=True)


def test_the_configuration_says_nothing_of_how_sides_are_quantised(audio_lm_bases, tmp_path):
    model = join(audio_lm_bases, "whisper", "llama", llm_mode="qlora")
    model.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path).text_config.model_type == "llama"
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path, load_in_4bit=False)
    assert find_side(loaded, "language_model").model.layers[0].mlp.up_proj.weight.dtype == torch.float32
