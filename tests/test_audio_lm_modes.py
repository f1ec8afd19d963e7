"""Modes of audio language models: exactly what they say trains, on both sides, in every combination and family."""

import pytest
import torch
from audio_lm_models import ENCODERS, LANGUAGE_MODELS, join, make_clip, make_conversation, make_processor
from peft import LoraConfig
from transformers import AutoModelForCausalLM, WhisperForConditionalGeneration

from modeling.adapters import is_adapter_parameter
from modeling.audio_encoders import run_encoder
from modeling.audio_lm_modes import (
    find_side,
    group_parameters,
    list_trainable,
    set_inference_mode,
    set_modes,
    set_training_mode,
)
from modeling.audio_lm_sides import (
    MODES,
    find_blocks,
    find_lora_targets,
    load_audio_encoder,
    load_language_model,
    make_lora_config,
    set_side_mode,
)
from modeling.fingerprint import fingerprint_base, list_differences

# Linear layers that LoRA goes into, in each of two blocks.
LORA_LAYERS = {
    "whisper": ["fc1", "fc2", "self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj"],
    "wavlm": ["feed_forward.intermediate_dense", "feed_forward.output_dense"],
    "text": [
        "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
        "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
    ],
}  # fmt: skip
LORA_LAYERS["hubert"] = LORA_LAYERS["wav2vec2"] = [
    *(f"attention.{letter}_proj" for letter in ("k", "out", "q", "v")), *LORA_LAYERS["wavlm"]
]  # fmt: skip
# Every mode of a side meets every mode of the other, and every family of that side.
COMBINATIONS = [
    (MODES[row], MODES[column], ENCODERS[(row + column) % 4], LANGUAGE_MODELS[row % 3])
    for row in range(4)
    for column in range(4)
]


def list_expected(model, mode: str, side: str, family: str) -> set[str]:
    """Names of what a side trains in a mode, written down from its parameters and the layers above."""
    names = [name for name, _ in model.named_parameters()]
    prefixes = {"encoder": ("model.audio_tower.",), "text": ("model.language_model.", "lm_head.")}[side]
    names = [name for name in names if name.startswith(prefixes)]
    if mode == "frozen":
        return set()
    if mode == "full":
        is_held = "embed_positions" if family == "whisper" else "nothing"
        return {name for name in names if not is_adapter_parameter(name) and is_held not in name}
    stack = {"whisper": "layers", "text": "layers"}.get(family if side == "encoder" else "text", "encoder.layers")
    adapter = "encoder" if side == "encoder" else "language_model"
    return {
        f"{prefixes[0]}{stack}.{index}.{layer}.lora_{matrix}.{adapter}.weight"
        for index in range(2)
        for layer in LORA_LAYERS[family if side == "encoder" else "text"]
        for matrix in "AB"
    }


def make_batch(model, answers: int = 2) -> dict[str, torch.Tensor]:
    processor = make_processor(model)
    return processor.encode_conversations([make_conversation(make_clip(0.5, seed)) for seed in range(answers)])


def wake_lora(model) -> None:
    """Gives every second matrix values, so that the first one has a gradient."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("encoder_mode", "llm_mode", "encoder", "llm"), COMBINATIONS)
def test_exactly_what_the_modes_say_trains(audio_lm_bases, encoder_mode, llm_mode, encoder, llm):
    model = join(audio_lm_bases, encoder, llm, encoder_mode=encoder_mode, llm_mode=llm_mode)
    wake_lora(model)
    sides = list_expected(model, encoder_mode, "encoder", encoder) | list_expected(model, llm_mode, "text", llm)
    projector = {name for name, _ in model.named_parameters() if ".multi_modal_projector." in name}
    batch = make_batch(model)
    for projector_mode, expected in (("trainable", sides | projector), ("frozen", sides)):
        set_modes(model, encoder_mode=encoder_mode, llm_mode=llm_mode, projector_mode=projector_mode)
        parameters = dict(model.named_parameters())
        assert {name for name, value in parameters.items() if value.requires_grad} == expected
        counted = sum(parameters[name].numel() for name in expected)
        assert sum(list_trainable(model).values()) == counted
        if not expected:
            continue
        before = {name: value.detach().clone() for name, value in parameters.items()}
        rates = dict.fromkeys(("projector", "encoder", "language_model"), 1e-2)
        optimizer = torch.optim.AdamW(group_parameters(model, rates))
        set_training_mode(model)
        model(**batch).loss.backward()
        # Nothing is masked in a clip so short, and the scores of all keys may move together.
        silent = {name for name in expected if "masked_spec_embed" in name or "k_proj.bias" in name}
        moved = {name for name, value in parameters.items() if value.grad is not None and value.grad.abs().sum() > 0}
        assert expected - silent <= moved <= expected
        optimizer.step()
        changed = {name for name, value in parameters.items() if not torch.equal(value, before[name])}
        assert expected - silent <= changed <= expected
        model.zero_grad()


def test_lora_of_the_language_model_leaves_the_encoder_alone(audio_lm_bases):
    """Suffixes such as q_proj name layers of both sides; a pattern is looked for in its own side only."""
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    model = join(audio_lm_bases, "whisper", "llama")
    names = [name for name, _ in model.model.audio_tower.named_modules() if name.endswith(("q_proj", "v_proj"))]
    assert len(names) == 4  # the suffixes do match there
    set_modes(model, llm_mode="lora", llm_lora=lora)
    assert not any(is_adapter_parameter(name) for name, _ in model.model.audio_tower.named_parameters())
    assert sum(is_adapter_parameter(name) for name, _ in model.model.language_model.named_parameters()) == 8


def test_patterns_of_an_encoder_miss_a_decoder_beside_it(audio_lm_bases):
    whole = WhisperForConditionalGeneration.from_pretrained(audio_lm_bases["whisper"])
    pattern = find_lora_targets(load_audio_encoder(audio_lm_bases["whisper"]))
    config = LoraConfig(target_modules=pattern.replace("(?:.*\\.)?", r"model\.encoder\.", 1))
    whole.add_adapter(config)
    names = [name for name, _ in whole.named_parameters() if is_adapter_parameter(name)]
    assert len(names) == 24
    assert all(name.startswith("model.encoder.") for name in names)


def test_lora_in_wavlms_attention_would_do_nothing(audio_lm_bases):
    """Why the pattern of WavLM has no attention: its class takes the weights past the layers."""
    encoder = load_audio_encoder(audio_lm_bases["wavlm"])
    set_side_mode(
        encoder, "lora", "encoder", lora=make_lora_config(encoder, "encoder", targets=["q_proj", "out_proj"])
    )
    wave = torch.from_numpy(make_clip(0.3)).unsqueeze(0)
    with torch.no_grad():
        before = run_encoder(encoder, wave)[0].last_hidden_state
        wake_lora(encoder)
        assert torch.equal(run_encoder(encoder, wave)[0].last_hidden_state, before)


def test_unknown_families_get_lora_in_all_linear_layers_of_their_blocks(audio_lm_bases):
    model = AutoModelForCausalLM.from_pretrained(audio_lm_bases["llama"])
    known = find_lora_targets(model)
    model.config.model_type = "unheard"
    found = find_lora_targets(model)
    assert found != known
    matched = []
    for pattern in (known, found):
        config = LoraConfig(target_modules=pattern, r=1)
        fresh = AutoModelForCausalLM.from_pretrained(audio_lm_bases["llama"])
        fresh.add_adapter(config)
        matched.append({name for name, _ in fresh.named_parameters() if is_adapter_parameter(name)})
    assert matched[0] == matched[1]
    with pytest.raises(ValueError, match="`model` must have a stack of blocks, got a Linear with none"):
        find_blocks(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("encoder", "llm"), list(zip(ENCODERS, (*LANGUAGE_MODELS, "llama"), strict=True)))
def test_4_bit_sides_have_gradients_after_an_evaluation(audio_lm_bases, encoder, llm):
    model = join(audio_lm_bases, encoder, llm, encoder_mode="qlora", llm_mode="qlora")
    wake_lora(model)
    batch = make_batch(model)
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) > 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    set_inference_mode(model)
    with torch.no_grad():
        model(**batch)
    set_training_mode(model)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if is_adapter_parameter(name):
            assert parameter.dtype == torch.float32
            assert parameter.grad.abs().sum() > 0, name


def test_4_bits_are_the_same_base_by_its_fingerprint(audio_lm_bases):
    whole = join(audio_lm_bases, "whisper", "llama")
    small = join(audio_lm_bases, "whisper", "llama", encoder_mode="qlora", llm_mode="qlora")
    other = join(audio_lm_bases, "hubert", "qwen2")
    for name in ("encoder", "language_model"):
        ours, theirs = (fingerprint_base(find_side(model, name)) for model in (whole, small))
        assert ours["tensors"] != theirs["tensors"]
        assert list_differences(ours, theirs) == []
        assert list_differences(ours, fingerprint_base(find_side(other, name)))


def test_checkpoints_give_the_gradients_of_a_plain_run_on_both_sides(audio_lm_bases):
    model = join(audio_lm_bases, "whisper", "llama", encoder_mode="lora", llm_mode="lora")
    wake_lora(model)
    batch, gradients, calls = make_batch(model), [], []
    for is_checkpointing in (False, True):
        set_training_mode(model, gradient_checkpointing=is_checkpointing)
        hooks = [
            block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
            for block in find_blocks(model.model.language_model)
        ]
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad})
        for hook in hooks:
            hook.remove()
    assert len(calls) == 2 + 4  # two blocks, that run twice with checkpoints
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_projector_learns_through_a_frozen_language_model_with_checkpoints(audio_lm_bases):
    model = join(audio_lm_bases, "whisper", "llama")
    batch = make_batch(model)
    set_training_mode(model, gradient_checkpointing=True)
    blocks = find_blocks(model.model.language_model)
    assert all(block.training and not block.mlp.training for block in blocks)
    model(**batch).loss.backward()
    assert all(value.grad.abs().sum() > 0 for value in model.model.multi_modal_projector.parameters())


def test_a_frozen_encoder_stays_still_while_the_rest_trains(audio_lm_bases):
    model = join(audio_lm_bases, "hubert", "llama", llm_mode="full")
    wave = torch.from_numpy(make_clip(0.8)).unsqueeze(0)
    tower = model.model.audio_tower
    with torch.no_grad():
        still = run_encoder(tower.eval(), wave)[0].last_hidden_state
        set_training_mode(model)
        assert torch.equal(run_encoder(tower, wave)[0].last_hidden_state, still)
        assert model.model.language_model.training
        tower.train()  # dropout and masks, if they were let
        assert not torch.equal(run_encoder(tower, wave)[0].last_hidden_state, still)
    set_modes(model, encoder_mode="lora")
    set_training_mode(model)
    assert tower.training
    assert not model.model.language_model.training


def test_stages_follow_each_other_in_one_model(audio_lm_bases):
    model = join(audio_lm_bases, "whisper", "llama")
    sizes = [list_trainable(model)]
    set_modes(model, encoder_mode="lora", llm_mode="lora")
    sizes.append(list_trainable(model))
    set_modes(model, llm_mode="lora", llm_last_layers=1, projector_mode="frozen")
    sizes.append(list_trainable(model))
    body = model.model.language_model
    layer = sum(value.numel() for name, value in body.layers[1].named_parameters() if not is_adapter_parameter(name))
    last = layer + body.norm.weight.numel() + model.lm_head.weight.numel()
    lora = sum(value.numel() for name, value in body.named_parameters() if is_adapter_parameter(name))
    assert [size["encoder"] > 0 for size in sizes] == [False, True, False]
    assert [size["projector"] > 0 for size in sizes] == [True, True, False]
    assert [size["language_model"] for size in sizes] == [0, lora, lora + last]
    assert any(is_adapter_parameter(name) for name, _ in model.model.audio_tower.named_parameters())  # it still acts


def test_each_part_has_its_own_learning_rate(audio_lm_bases):
    model = join(audio_lm_bases, "whisper", "llama", encoder_mode="full", llm_mode="lora")
    rates = {"projector": 1e-3, "encoder": 1e-5, "language_model": 1e-4}
    groups = group_parameters(model, rates, weight_decay=0.1)
    assert {(group["name"], group["lr"]) for group in groups} == set(rates.items())
    grouped = [id(value) for group in groups for value in group["params"]]
    assert sorted(grouped) == sorted(id(value) for value in model.parameters() if value.requires_grad)
    for group in groups:
        assert {value.dim() > 1 for value in group["params"]} == {group["weight_decay"] == 0.1}
    with pytest.raises(ValueError, match="`learning_rates` must have one for each part .* got none for .'encoder'"):
        group_parameters(model, {"projector": 1.0, "language_model": 1.0})
    set_modes(model, projector_mode="frozen")
    with pytest.raises(ValueError, match="The modes must let something train, got none"):
        group_parameters(model, rates)


def test_modes_that_do_not_exist_or_fit_are_refused(audio_lm_bases):
    model = join(audio_lm_bases, "whisper", "llama")
    for flag in ("encoder_mode", "llm_mode"):
        with pytest.raises(ValueError, match=f"`{flag}` must be one of frozen, full, lora, qlora, got 'half'"):
            set_modes(model, **{flag: "half"})
        with pytest.raises(ValueError, match=f"`{flag}` must fit the weights, got 'qlora' and weights not in 4 bits"):
            set_modes(model, **{flag: "qlora"})
    with pytest.raises(ValueError, match="`projector_mode` must be one of trainable, frozen, got 'lora'"):
        set_modes(model, projector_mode="lora")
    for number in (-1, 3):
        with pytest.raises(ValueError, match=f"`llm_last_layers` must be 1 to 2, got {number}"):
            set_modes(model, llm_last_layers=number)
    with pytest.raises(ValueError, match="`encoder_lora_targets` must match layers of the encoder"):
        set_modes(model, encoder_mode="lora", encoder_lora=LoraConfig(target_modules=["gate_proj"]))
    small = join(audio_lm_bases, "whisper", "llama", llm_mode="qlora")
    with pytest.raises(ValueError, match="`llm_mode` must fit the weights, got 'full' and weights in 4 bits"):
        set_modes(small, llm_mode="full")
    with pytest.raises(ValueError, match="`llm_last_layers` must be 0 with weights in 4 bits"):
        set_modes(small, llm_mode="qlora", llm_last_layers=1)


def test_each_side_stands_alone(audio_lm_bases):
    encoder = load_audio_encoder(audio_lm_bases["hubert"], "lora")
    output, frames = run_encoder(encoder, torch.from_numpy(make_clip(0.5))[None], output_hidden_states=True)
    assert (encoder.config.hidden_size, len(output.hidden_states), frames.tolist()) == (32, 3, [24])
    assert {name for name, value in encoder.named_parameters() if value.requires_grad} == {
        name for name, _ in encoder.named_parameters() if ".lora_" in name
    }
    language_model = load_language_model(audio_lm_bases["mistral"], "qlora")
    tokens = torch.tensor([[1, 2, 3]])
    output = language_model(tokens, labels=tokens)
    output.loss.backward()
    assert language_model.get_input_embeddings()(tokens).shape == (1, 3, 32)
    assert language_model.generate(tokens, max_new_tokens=2, do_sample=False).shape[0] == 1
    assert all((value.grad is not None) == (".lora_" in name) for name, value in language_model.named_parameters())


def test_a_side_is_the_same_model_as_in_the_whole(audio_lm_bases):
    model = join(audio_lm_bases, "whisper", "mistral", llm_mode="lora")
    wake_lora(model)
    view = find_side(model, "language_model")
    tokens = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(view(tokens).logits, model(tokens).logits)
    assert type(view).__name__ == "MistralForCausalLM"
    assert list(view.peft_config) == ["language_model"]
