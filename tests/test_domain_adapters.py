"""The contract of every adapter, kept in stock Whisper (after the encoder) and Qwen2-Audio (before the projector)."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stock_models import (
    AUDIO_TOKEN,
    FRAMES,
    KINDS,
    MAKERS,
    TOWER_LENGTHS,
    add_trained,
    configure,
    count_hooks,
    find_layer,
    generate,
    logits,
    make_batch,
    make_qwen2_audio,
    make_whisper,
    train,
)
from transformers import (
    PreTrainedModel,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from modeling import SpeechAdapterConfig, adapter_rows
from modeling.adapter_loading import make_probe_inputs
from modeling.adapters import BASE, SpeechAdapterLayer, adapters_off, is_adapter_parameter
from publishing.adapter_maps import record_maps
from training.packed_deepspeech2 import adapt_frames


@pytest.fixture(params=list(MAKERS))
def model(request) -> PreTrainedModel:
    """A tiny Whisper or Qwen2-Audio, random and always the same."""
    return MAKERS[request.param]()


@pytest.fixture
def batch(model) -> dict[str, torch.Tensor]:
    return make_batch(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_starts_as_nothing_bit_for_bit(name, kind, attention, dtype):
    model = MAKERS[name](attention).to(dtype)
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    assert {config._attn_implementation for config in configs} == {attention}
    batch = make_batch(model)
    before = logits(model, batch)
    texts = [generate(model, batch, num_beams=beams) for beams in (1, 2)]
    model.add_adapter(configure(kind), "ldv")
    model.eval()
    assert torch.equal(logits(model, batch), before)
    assert [generate(model, batch, num_beams=beams) for beams in (1, 2)] == texts


@pytest.mark.parametrize("preset", ["lightweight", "standard", "heavy"])
def test_presets_start_as_nothing_too(model, batch, preset):
    before = logits(model, batch)
    model.add_adapter(SpeechAdapterConfig(kind="transformer", preset=preset, num_heads=2, ffn_size=8), "ldv")
    assert torch.equal(logits(model.eval(), batch), before)


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_train_every_part_of_the_adapter_and_nothing_else(model, batch, kind):
    base = {name: value.clone() for name, value in model.named_parameters()}
    before = logits(model, batch)
    model.add_adapter(configure(kind), "ldv")
    with_gradient = train(model, batch, steps=2)

    of_adapter = {name for name, _ in model.named_parameters() if is_adapter_parameter(name)}
    assert with_gradient == of_adapter != set()
    after = {name.replace(".base_layer.", "."): value for name, value in model.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert not torch.equal(logits(model, batch), before)
    with adapters_off(model):
        assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_trains_as_training_without_it(model, batch, use_reentrant):
    model.add_adapter(configure(), "ldv")
    other = copy.deepcopy(model)
    other.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls = []
    for twin in (other, model):
        ffn = find_layer(twin).find_block("ldv").layers[0].ffn
        ffn.register_forward_pre_hook(lambda module, _args: calls.append(module))
    assert train(other, batch, steps=2) == train(model, batch, steps=2)
    assert len(calls) == 4 + 2  # once more in each backward pass
    torch.testing.assert_close(logits(other, batch), logits(model, batch))


def test_the_adapter_gets_the_lengths_of_the_tower_s_frames(model, batch):
    add_trained(model, "ldv", configure())
    layer, expected = find_layer(model), TOWER_LENGTHS[model.config.model_type]
    with record_maps(layer.find_block("ldv")) as maps:
        logits(model, batch)
        generate(model, batch)
        with adapter_rows(model, ["ldv", BASE, "ldv"]):
            logits(model, batch)
    assert [part.frame_lengths.tolist() for part in maps] == [expected, expected, [expected[0], expected[2]]]
    assert all(not part.attentions[0][1, :, :, expected[1] :].any() for part in maps[:2])
    assert layer.frame_lengths.lengths is None


def test_the_adapter_changes_what_its_formula_says_and_where(model, batch):
    add_trained(model, "ldv", configure())
    layer, seen = find_layer(model), {}
    layer.base_layer.register_forward_hook(lambda _module, args, output: seen.update(source=args[0], target=output))
    layer.register_forward_hook(lambda _module, args, output: seen.update(input=args[0], output=output))
    logits(model, batch)

    lengths = torch.tensor(TOWER_LENGTHS[model.config.model_type])
    block = layer.find_block("ldv")
    changed, unchanged = {"before": ("source", "input"), "after": ("output", "target")}[block.position]
    with torch.no_grad():
        expected = seen[unchanged] + block(seen[unchanged], lengths)
    torch.testing.assert_close(seen[changed], expected)
    assert {"whisper": "after", "qwen2_audio": "before"}[model.config.model_type] == block.position


def test_without_a_mask_all_of_whisper_s_frames_count():
    model = make_whisper()
    add_trained(model, "ldv", configure())
    inputs = make_batch(model)
    mask = inputs.pop("attention_mask")
    with record_maps(find_layer(model).find_block("ldv"), with_attention=False) as maps:
        unmasked = logits(model, inputs)
        full = logits(model, inputs | {"attention_mask": torch.ones_like(mask)})
        generate(model, inputs)
    assert torch.equal(unmasked, full)
    assert maps[0].frame_lengths is maps[2].frame_lengths is None
    assert not torch.equal(logits(model, inputs | {"attention_mask": mask}), unmasked)


def test_lengths_do_not_outlive_a_call_that_fails(model, batch):
    add_trained(model, "ldv", configure())
    with pytest.raises(ValueError, match="mel input features to be of length 40"):
        model(**batch | {"input_features": batch["input_features"][:, :, :-1]})
    assert find_layer(model).frame_lengths.lengths is None


@pytest.mark.parametrize("num_beams", [1, 3])
def test_every_row_has_its_own_domain_and_the_base_runs_once(model, batch, num_beams):
    texts = {BASE: generate(model, batch, num_beams=num_beams)}
    alone = {BASE: logits(model, batch)}
    for name in ("ldv", "phone"):
        add_trained(model, name, configure())
        alone[name], texts[name] = logits(model, batch), generate(model, batch, num_beams=num_beams)
    rows_of_base = []
    find_layer(model).base_layer.register_forward_hook(
        lambda _module, args, _output: rows_of_base.append(len(args[0]))
    )

    names = ["ldv", BASE, "phone"]
    with adapter_rows(model, names):
        together = logits(model, batch)
        assert rows_of_base == [3]
        text = generate(model, batch, num_beams=num_beams)
    for row, name in enumerate(names):
        torch.testing.assert_close(together[row], alone[name][row], atol=1e-4, rtol=1e-4)
    assert text == [texts[name][row] for row, name in enumerate(names)]
    assert not torch.allclose(alone["ldv"], alone[BASE], atol=1e-2)


def test_kinds_and_positions_mix_in_one_batch(model, batch):
    alone = {}
    for name, kind, settings in (
        ("ldv", "transformer", {}),
        ("mlp", "mlp", {}),
        ("before", "bottleneck", {"position": "before"}),
    ):
        add_trained(model, name, configure(kind, **settings))
        alone[name] = logits(model, batch)
    with adapter_rows(model, ["before", "ldv", "mlp"]):
        together = logits(model, batch)
    for row, name in enumerate(["before", "ldv", "mlp"]):
        torch.testing.assert_close(together[row], alone[name][row], atol=1e-4, rtol=1e-4)


def test_domains_switch_go_away_and_leave_nothing(model, batch):
    before, hooks = logits(model, batch), count_hooks(model)
    outputs, counts = {}, []
    for name in ("ldv", "phone"):
        add_trained(model, name, configure())
        outputs[name] = logits(model, batch)
        counts.append(count_hooks(model))
    assert counts[0] == counts[1] > hooks  # the second finds them there

    model.set_adapter("ldv")
    assert torch.equal(logits(model, batch), outputs["ldv"])
    model.disable_adapters()
    assert torch.equal(logits(model, batch), before)
    model.enable_adapters()
    model.delete_adapter("ldv")
    assert count_hooks(model) == counts[0]
    model.set_adapter("phone")
    assert torch.equal(logits(model, batch), outputs["phone"])
    model.delete_adapter("phone")
    assert count_hooks(model) == hooks
    assert torch.equal(logits(model, batch), before)
    assert not any(is_adapter_parameter(name) for name, _ in model.named_parameters())


def test_an_adapter_stacks_with_lora_on_the_language_model(model, batch):
    add_trained(model, "ldv", configure())
    ldv = logits(model, batch)
    lora = LoraConfig(target_modules=r".*(language_model|decoder)\.layers.*v_proj", r=2, init_lora_weights=False)
    model.add_adapter(lora, "words")
    model.set_adapter(["ldv", "words"])
    model.eval()
    both = logits(model, batch)
    assert not torch.allclose(both, ldv, atol=1e-4)
    model.set_adapter("words")
    assert not torch.allclose(logits(model, batch), both, atol=1e-4)
    model.set_adapter("ldv")
    assert torch.equal(logits(model, batch), ldv)


def test_copies_and_pickles_work_alone(model, batch):
    add_trained(model, "ldv", configure())
    expected, hooks = logits(model, batch), count_hooks(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, batch), expected)
        with record_maps(find_layer(other).find_block("ldv"), with_attention=False) as maps:
            logits(other, batch)
        assert maps[0].frame_lengths.tolist() == TOWER_LENGTHS[model.config.model_type]
        other.delete_adapter("ldv")
        assert count_hooks(other) == 0
    assert count_hooks(model) == hooks
    assert torch.equal(logits(model, batch), expected)


def test_a_probe_of_qwen2_audio_has_a_placeholder_for_each_frame():
    inputs = make_probe_inputs(make_qwen2_audio())
    assert inputs["feature_attention_mask"].sum() == FRAMES
    assert (inputs["input_ids"] == AUDIO_TOKEN).sum() == 10
    assert inputs["input_ids"][0, -1] != AUDIO_TOKEN


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make_whisper, "model.encoder.layer_norm"),
        (lambda: make_whisper().model, "encoder.layer_norm"),
        (make_qwen2_audio, "model.multi_modal_projector"),
        (lambda: make_qwen2_audio().model, "multi_modal_projector"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_default_targets_are_one_module_with_a_head_and_without(make, name, kind):
    model = make()
    model.add_adapter(configure(kind), "ldv")
    assert [name for name, part in model.named_modules() if isinstance(part, SpeechAdapterLayer)] == [name]


def test_an_mlp_of_the_papers_size_has_its_parameters_before_the_projector():
    config = make_qwen2_audio().config
    config.audio_config.d_model, config.text_config.hidden_size = 1280, 4096
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 2
    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration(config)
    model.add_adapter(SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[256]), "ldv")
    count = sum(value.numel() for name, value in model.named_parameters() if is_adapter_parameter(name))
    assert count == 2 * 1280 + (1280 + 1) * 256 + (256 + 1) * 1280 == 659_456


# peft 0.21 reads a property that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_model_knows_the_lengths_too(model, batch):
    peft_model = get_peft_model(model, configure()).eval()
    layer = find_layer(model)
    with record_maps(layer.find_block("default"), with_attention=False) as maps:
        logits(peft_model, batch)
    assert maps[0].frame_lengths.tolist() == TOWER_LENGTHS[model.config.model_type]


def test_frames_without_rows_are_refused():
    model = make_whisper()
    model.add_adapter(configure(), "ldv")
    model.add_adapter(configure("bottleneck", position="before"), "room")
    layer, frames = find_layer(model), torch.zeros(5, 16)
    for name, kind in (("ldv", "transformer"), ("room", "bottleneck")):
        with pytest.raises(ValueError, match=f"`frozen_states` must go with adapters .* got '{name}', a {kind}"):
            adapt_frames(layer, frames, frames, {name: torch.arange(5)})


def test_a_model_that_cannot_tell_frames_from_padding_is_refused():
    sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(num_attention_heads=1, num_key_value_heads=1, **sizes))
    with pytest.raises(
        ValueError, match="inside an audio model for a transformer, got .*down_proj of a Qwen2ForCausal"
    ):
        model.add_adapter(configure(target_modules=["down_proj"]), "ldv")


def test_lengths_are_repeated_with_their_rows():
    model = make_whisper()
    add_trained(model, "ldv", configure())
    inputs = make_batch(model)
    del inputs["decoder_input_ids"]
    with record_maps(find_layer(model).find_block("ldv"), with_attention=False) as maps:
        model.generate(**inputs, max_new_tokens=2, num_beams=2, num_return_sequences=2)
    assert maps[0].frame_lengths.tolist() == [20, 20, 11, 11, 15, 15]
    with pytest.raises(ValueError, match="a row for each row of features, got 3 for 2 rows"):
        model.model.encoder(inputs["input_features"][:2], attention_mask=inputs["attention_mask"])


def test_a_transformer_in_a_decoder_is_refused_and_one_in_a_checkpointed_layer_says_so():
    model, batch = make_whisper(), make_batch(make_whisper())
    with pytest.raises(ValueError, match="inside an audio model for a transformer, got model.decoder.layer_norm of a"):
        model.add_adapter(configure(target_modules=["decoder.layer_norm"]), "ldv")
    inside = make_whisper()
    add_trained(inside, "ldv", configure(target_modules=["encoder.layers.0.final_layer_norm"]))
    inside.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    loss = inside.train()(**batch, labels=torch.tensor([[9, 11]] * 3)).loss
    with pytest.raises(
        ValueError, match="`gradient_checkpointing` must be off for a transformer adapter inside a layer"
    ):
        loss.backward()
