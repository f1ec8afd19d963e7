"""What stands before the first trainable parameter runs once; the rest, on packed frames, is the same model."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from modeling import DeepSpeech2Config, DeepSpeech2ForCTC, SpeechAdapterConfig
from modeling.adapters import adapters_off, is_adapter_parameter
from training.adapter_dropout import AdapterDropout, seed_dropout
from training.frozen_part import FrozenPrefix, find_frozen_prefix
from training.objectives.recognition import CTCObjective
from training.packed_deepspeech2 import PackedBatch

LENGTHS = [40, 29, 28, 11]
LABELS = torch.tensor([[3, 3, 5, 1], [6, 7, -100, -100], [-100] * 4, [2, 2, 8, -100]])
# At the classifier, between the layers, behind the convolutions alone, and at two places.
PLACES = {
    "mlp": {"kind": "mlp"},
    "replacement": {"kind": "replacement"},
    "bottleneck": {"kind": "bottleneck"},
    "bottleneck_at_layers": {"kind": "bottleneck", "target_modules": r"encoder\.rnn_layers\.[12]"},
    "bottleneck_at_conv": {"kind": "bottleneck", "target_modules": ["encoder.conv"]},
    "bottleneck_at_classifier": {"kind": "bottleneck", "target_modules": ["classifier"]},
    "mlp_at_layer": {"kind": "mlp", "target_modules": ["encoder.rnn_layers.1"]},
    "replacement_at_layer": {"kind": "replacement", "target_modules": ["encoder.rnn_layers.1"]},
    "lora": None,
}
CUTS = {
    "mlp": ("classifier", ("hidden_states", "base_output")),
    "replacement": ("classifier", ("hidden_states",)),
    "bottleneck": ("encoder.conv", ("base_output",)),
    "bottleneck_at_layers": ("encoder.rnn_layers.1", ("base_output",)),
    "bottleneck_at_conv": ("encoder.conv", ("base_output",)),
    "bottleneck_at_classifier": ("classifier", ("base_output",)),
    "mlp_at_layer": ("encoder.rnn_layers.1", ("hidden_states", "base_output")),
    "replacement_at_layer": ("encoder.rnn_layers.1", ("hidden_states",)),
    "lora": ("classifier", ("hidden_states",)),
}


def make_model(**settings) -> DeepSpeech2ForCTC:
    torch.manual_seed(0)
    config = DeepSpeech2Config(
        num_mel_bins=16, conv_channels=4, hidden_size=8, num_hidden_layers=3, vocab_size=12, **settings
    )
    return DeepSpeech2ForCTC(config).eval()


def add_adapter(model: DeepSpeech2ForCTC, place: str, name: str = "alice", dropout: float = 0.0) -> None:
    """Adds an adapter that changes the output, as after some training."""
    config = LoraConfig(target_modules=["classifier.1"], r=4)
    if PLACES[place] is not None:
        config = SpeechAdapterConfig(**PLACES[place], hidden_sizes=[6], dropout=dropout)
    model.add_adapter(config, name)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_adapter_parameter(key) and f".{name}." in key:
                parameter.normal_(0, 0.3, generator=generator)
    model.eval()


def make_batch(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Four rows of noise, longest first, with garbage in the padding."""
    features = torch.randn(4, 40, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.arange(40) < torch.tensor(LENGTHS).unsqueeze(1)
    return {"input_features": features, "attention_mask": mask.long()}


def pack(prefix: FrozenPrefix, batch: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict:
    """What a cache gives: the prefix's states without padding."""
    states, lengths = prefix(batch)
    return {
        "frozen_states": {
            name: pack_padded_sequence(value, lengths, batch_first=True).data.to(dtype or value.dtype)
            for name, value in states.items()
        },
        "logits_lengths": lengths,
    }


def measure(model: DeepSpeech2ForCTC, batch: dict, labels: torch.Tensor = LABELS) -> torch.Tensor:
    return CTCObjective(model)(**batch, labels=labels)["loss"]


def measure_each(model: DeepSpeech2ForCTC, batch: dict, names: list[str]) -> torch.Tensor:
    return CTCObjective(model).measure_adapters({**batch, "labels": LABELS, "adapter_names": names})


def gradients(model: DeepSpeech2ForCTC, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return dict(zip(trainable, torch.autograd.grad(loss, trainable.values()), strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_prefix_ends_where_the_first_trainable_parameter_needs_it(place):
    model = make_model()
    add_adapter(model, place)
    prefix = find_frozen_prefix(model)
    assert (prefix.name, prefix.states) == CUTS[place]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_loss_and_gradients_behind_the_prefix_are_those_of_the_whole_model(place, dtype, tolerance, reduction):
    model = make_model(ctc_loss_reduction=reduction).to(dtype)
    add_adapter(model, place)
    model.to(dtype)
    batch = make_batch(dtype)
    whole = model(**batch, labels=LABELS, output_base_logits=False).loss
    packed = measure(model, pack(find_frozen_prefix(model), batch))

    # The padded loss is computed in fp32, so it is recomputed here from its logits in the model's precision.
    logits = model(**batch, output_base_logits=False).logits
    lengths = [(length + 1) // 2 for length in LENGTHS]
    exact = nn.functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1), LABELS.clamp(min=0), lengths, (4, 2, 0, 3), reduction=reduction
    )
    assert packed.dtype == dtype
    torch.testing.assert_close(packed, exact, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(packed.float(), whole, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(model, packed), gradients(model, exact)
    assert any(value.abs().max() > 1e-3 for value in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=tolerance * (1 + exact.item()), rtol=tolerance)


@pytest.mark.parametrize("place", PLACES)
def test_logits_behind_the_prefix_are_those_of_the_whole_model(place):
    model = make_model()
    add_adapter(model, place)
    batch = make_batch()
    prefix = find_frozen_prefix(model)
    packed = pack(prefix, batch)
    with torch.no_grad():
        whole = model(**batch)
        ours = PackedBatch(prefix, packed["frozen_states"], packed["logits_lengths"]).compute_logits()

    assert packed["logits_lengths"].tolist() == whole.logits_lengths.tolist() == [20, 15, 14, 6]
    expected = pack_padded_sequence(whole.logits, whole.logits_lengths, batch_first=True).data
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["mlp", "replacement", "bottleneck"])
def test_states_say_what_the_base_says_with_the_adapter_off(place):
    model = make_model()
    base = model(**make_batch(), labels=LABELS).loss
    add_adapter(model, place)
    packed = pack(find_frozen_prefix(model), make_batch())
    with adapters_off(model):
        torch.testing.assert_close(measure(model, packed), base, atol=1e-5, rtol=1e-5)


def test_an_mlp_needs_no_more_than_its_input():
    model = make_model()
    add_adapter(model, "mlp")
    packed = pack(find_frozen_prefix(model), make_batch())
    both = measure(model, packed)
    del packed["frozen_states"]["base_output"]
    assert measure(model, packed).item() == pytest.approx(both.item(), rel=1e-6)


def test_adapters_at_two_stages_train_together():
    model = make_model().double()
    add_adapter(model, "mlp", "alice")
    add_adapter(model, "bottleneck_at_layers", "room")
    model.set_adapter(["alice", "room"])
    model.double()
    batch = make_batch(torch.float64)
    prefix = find_frozen_prefix(model)
    packed = measure(model, pack(prefix, batch))
    whole = model(**batch, labels=LABELS, output_base_logits=False).loss

    assert prefix.name == "encoder.rnn_layers.1"
    torch.testing.assert_close(packed.float(), whole, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(model, packed), gradients(model, whole)
    assert {name.split(".speech_adapter_blocks.")[1].split(".")[0] for name in ours} == {"alice", "room"}
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)


def test_states_in_half_precision_are_computed_with_in_the_model_s():
    model = make_model()
    add_adapter(model, "mlp")
    prefix = find_frozen_prefix(model)
    exact = measure(model, pack(prefix, make_batch()))
    half = measure(model, pack(prefix, make_batch(), torch.bfloat16))

    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=0.01)


@pytest.mark.parametrize("place", ["mlp", "replacement", "bottleneck"])
def test_stacked_adapters_get_the_losses_and_gradients_that_they_get_alone(place):
    names = ["alice", "bob", "alice", "carol"]
    model = make_model().double()
    for name in dict.fromkeys(names):
        add_adapter(model, place, name, dropout=0.4)
    model.double()
    model.set_adapter(["alice", "bob", "carol"])
    packed = pack(find_frozen_prefix(model), make_batch(torch.float64))
    seed_dropout(model, 7)
    for module in model.modules():
        module.training = isinstance(module, AdapterDropout)
    together = measure_each(model, packed, names)
    stacked = gradients(model, together.sum())

    for index, (name, rows) in enumerate({"alice": [0, 2], "bob": [1], "carol": [3]}.items()):
        alone = make_model().double()
        add_adapter(alone, place, name, dropout=0.4)
        alone.double()
        prefix = find_frozen_prefix(alone)
        own = {key: value[rows] for key, value in make_batch(torch.float64).items()}
        inputs = pack(prefix, own)
        seed_dropout(alone, 7)
        for module in alone.modules():
            module.training = isinstance(module, AdapterDropout)
        loss = measure(alone, inputs, LABELS[rows])
        assert together[index].item() == pytest.approx(loss.item(), abs=1e-10)
        for key, gradient in gradients(alone, loss).items():
            torch.testing.assert_close(stacked[key], gradient, atol=1e-10, rtol=1e-10)


def test_losses_of_a_stack_are_each_adapter_s_own():
    names = ["alice", "bob", "alice", "bob"]
    model = make_model().double()
    for name in ("alice", "bob"):
        add_adapter(model, "replacement", name)
    model.set_adapter(["alice", "bob"])
    model.double()
    packed = pack(find_frozen_prefix(model), make_batch(torch.float64))
    losses, reversed_losses = measure_each(model, packed, names), measure_each(model, packed, names[::-1])

    assert losses.shape == (2,)
    blocks = model.classifier.speech_adapter_blocks
    logits = {name: blocks[name](packed["frozen_states"]["hidden_states"]) for name in blocks}
    rows = torch.cat([torch.arange(sum(length > step for length in [20, 15, 14, 6])) for step in range(20)])
    for values, order in ((losses, names), (reversed_losses, names[::-1])):
        expected: dict[str, list[torch.Tensor]] = {name: [] for name in dict.fromkeys(order)}
        for row, name in enumerate(order):
            target = LABELS[row][LABELS[row] >= 0]
            log_probs = logits[name][rows == row].log_softmax(-1)
            loss = nn.functional.ctc_loss(log_probs, target, [len(log_probs)], [len(target)], reduction="sum")
            expected[name].append(loss / max(1, len(target)))
        torch.testing.assert_close(
            values, torch.stack([torch.stack(own).mean() for own in expected.values()]), atol=1e-10, rtol=0
        )


def test_logits_of_a_stack_are_each_adapter_s_own():
    names = ["alice", "bob", "alice", "bob"]
    model = make_model()
    for name in ("alice", "bob"):
        add_adapter(model, "bottleneck", name)
    model.set_adapter(["alice", "bob"])
    prefix = find_frozen_prefix(model)
    packed = pack(prefix, make_batch())
    with torch.no_grad():
        ours = PackedBatch(prefix, packed["frozen_states"], packed["logits_lengths"], names).compute_logits()
        with model.adapter_rows(names):
            theirs = model(**make_batch()).logits
    theirs = pack_padded_sequence(theirs, packed["logits_lengths"], batch_first=True).data
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_prefix_runs_in_evaluation_and_inference_mode_and_gives_the_modes_back():
    model = make_model(hidden_dropout=0.9)
    add_adapter(model, "mlp")
    prefix = find_frozen_prefix(model)
    expected, lengths = prefix(make_batch())
    model.train()
    model.encoder.conv.eval()
    before = {name: module.training for name, module in model.named_modules()}
    buffers = copy.deepcopy(dict(model.named_buffers()))
    states, _ = prefix(make_batch())

    assert lengths.tolist() == [20, 15, 14, 6]
    assert {name: torch.equal(value, expected[name]) for name, value in states.items()} == {
        "hidden_states": True,
        "base_output": True,
    }
    assert all(value.is_inference() for value in states.values())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_prefix_stops_at_the_cut():
    model = make_model()
    add_adapter(model, "replacement")
    prefix = find_frozen_prefix(model)
    model.classifier.base_layer.register_forward_hook(lambda *_: pytest.fail("the base's classifier ran"))
    prefix(make_batch())


def test_states_made_in_inference_mode_can_be_trained_on():
    model = make_model()
    add_adapter(model, "replacement")
    states, lengths = find_frozen_prefix(model)({"input_features": make_batch()["input_features"][:1]})
    frames = {name: value[0] for name, value in states.items()}
    assert frames["hidden_states"].is_inference()
    measure(model, {"frozen_states": frames, "logits_lengths": lengths}, LABELS[:1]).backward()
    assert model.classifier.speech_adapter_blocks["alice"][0].weight.grad.abs().max() > 0


def test_only_real_frames_are_computed():
    model = make_model()
    add_adapter(model, "bottleneck")
    packed = pack(find_frozen_prefix(model), make_batch())
    num_frames: list[int] = []
    for module in model.encoder.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.Linear)):
            module.register_forward_hook(lambda _module, args, _output: num_frames.append(len(args[0])))
    measure(model, packed).backward()

    # Norms of three layers; two maps of the adapters behind the convolutions and behind each layer.
    assert num_frames == [20 + 15 + 14 + 6] * (3 + 2 * 4)


def test_nothing_stands_before_a_base_that_trains():
    model = make_model()
    assert find_frozen_prefix(model) is None
    add_adapter(model, "mlp")
    model.unfreeze_base_model()
    assert find_frozen_prefix(model) is None
    with pytest.raises(ValueError, match="The model must have a trainable parameter, got none"):
        find_frozen_prefix(make_model().requires_grad_(False))


def test_a_base_that_trains_from_a_layer_on_is_cut_before_that_layer():
    model = make_model().double().requires_grad_(False)
    model.encoder.rnn_layers[2].requires_grad_(True)
    model.classifier.requires_grad_(True)
    prefix = find_frozen_prefix(model)
    packed = measure(model, pack(prefix, make_batch(torch.float64)))
    whole = model(**make_batch(torch.float64), labels=LABELS).loss

    assert (prefix.name, prefix.states) == ("encoder.rnn_layers.2", ("hidden_states",))
    ours, theirs = gradients(model, packed), gradients(model, whole)
    assert len(ours) == 2 + 8 + 3
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_prefix_of_a_peft_model_is_that_of_the_model_inside():
    model = get_peft_model(make_model(), LoraConfig(target_modules=["classifier.1"], r=4))
    prefix = find_frozen_prefix(model)
    assert (prefix.name, prefix.states) == CUTS["lora"]
    assert prefix(make_batch())[0]["hidden_states"].shape == (4, 20, 16)


def test_digest_depends_on_what_stands_before_the_cut_and_on_nothing_behind():
    def digest(change: str | None = None, name: str = "alice", place: str = "mlp", extra: str | None = None) -> str:
        model = make_model()
        if extra:
            add_adapter(model, "bottleneck_at_conv", extra)
        add_adapter(model, place, name)
        if change:
            model.get_parameter(change).data[0] += 1
        return find_frozen_prefix(model).digest

    same = digest()
    assert len(same) == 32
    assert digest(name="bob") == digest(extra="conv") == same
    assert digest("classifier.speech_adapter_blocks.alice.0.weight") == same
    assert digest("classifier.base_layer.1.weight") != same
    assert digest("encoder.rnn_layers.2.rnn.weight_hh_l0") != same

    hidden = digest(place="replacement")
    assert digest("classifier.base_layer.1.weight", place="replacement") == hidden != same
    assert digest("encoder.rnn_layers.1.batch_norm.bias", place="replacement") != hidden

    layer = digest(place="bottleneck_at_layers")
    assert digest("encoder.rnn_layers.2.base_layer.rnn.bias_ih_l0", place="bottleneck_at_layers") == layer
    assert digest("encoder.rnn_layers.1.base_layer.rnn.bias_ih_l0", place="bottleneck_at_layers") != layer


def test_digest_includes_buffers_and_frozen_adapters_that_act():
    model = make_model()
    add_adapter(model, "bottleneck_at_conv", "room")
    add_adapter(model, "mlp")
    idle = find_frozen_prefix(model).digest
    model.encoder.rnn_layers[0].batch_norm.running_mean += 1
    moved = find_frozen_prefix(model).digest
    model.set_adapter(["room", "alice"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".alice." in name)
    acting = find_frozen_prefix(model)
    before, digest = acting(make_batch())[0]["hidden_states"], acting.digest
    model.encoder.conv.speech_adapter_blocks["room"][1].weight.data[0] += 1

    assert acting.name == "classifier"
    assert len({idle, moved, digest, find_frozen_prefix(model).digest}) == 4
    assert not torch.allclose(acting(make_batch())[0]["hidden_states"], before)


def test_states_that_do_not_fit_are_refused():
    model, layered = make_model(), make_model()
    add_adapter(model, "replacement")
    add_adapter(layered, "bottleneck")
    packed = pack(find_frozen_prefix(model), make_batch())
    frames = packed["frozen_states"]["hidden_states"]

    with pytest.raises(ValueError, match=r"`frozen_states` must be what .* at classifier, .* got \['base_output'\]"):
        measure(model, {**packed, "frozen_states": {"base_output": frames}})
    with pytest.raises(ValueError, match=r"must be what .* at encoder.conv, .*, got \['hidden_states'\]"):
        measure(layered, packed)
    with pytest.raises(ValueError, match=r"`logits_lengths` must add up to .*, got 54 and \[55\]"):
        measure(model, {**packed, "logits_lengths": torch.tensor([20, 15, 14, 5])})
    with pytest.raises(ValueError, match="`logits_lengths` must be at least 1 and the longest first"):
        measure(model, {**packed, "logits_lengths": torch.tensor([15, 20, 14, 6])})


def test_adapter_names_that_do_not_fit_are_refused():
    model = make_model()
    add_adapter(model, "replacement")
    packed = pack(find_frozen_prefix(model), make_batch())

    message = "`adapter_names` must be one speech adapter of this model a row, got .* for 4 rows"
    for names in (["alice"] * 3, ["alice", "alice", "alice", "zoe"], ["alice", "alice", "alice", "__base__"]):
        with pytest.raises(ValueError, match=message):
            measure_each(model, packed, names)
    whole = CTCObjective(make_model())
    for inputs in ({**make_batch(), "adapter_names": ["alice"] * 4}, packed):
        with pytest.raises(ValueError, match="`frozen_states` and `adapter_names` must go with a recogniser whose"):
            whole(**inputs, labels=LABELS)


@pytest.mark.parametrize("place", ["mlp", "bottleneck"])
def test_features_go_through_the_frozen_part_first_and_the_rest_on_real_frames(place):
    model = make_model()
    add_adapter(model, place)
    objective, batch, shuffled = CTCObjective(model), make_batch(), [2, 0, 3, 1]
    expected = measure(model, pack(find_frozen_prefix(model), batch))
    rows = {name: value[shuffled] for name, value in batch.items()}
    packed = objective.run_frozen({**rows, "labels": LABELS[shuffled], "adapter_names": ["a", "b", "c", "d"]})
    assert packed["logits_lengths"].tolist() == [20, 15, 14, 6]
    assert packed["adapter_names"] == ["b", "d", "a", "c"]
    assert torch.equal(packed["labels"], LABELS)
    torch.testing.assert_close(objective(**rows, labels=LABELS[shuffled])["loss"], expected, atol=1e-6, rtol=1e-6)


def test_an_adapter_that_looks_at_whole_rows_trains_on_whole_batches():
    model = make_model()
    model.add_adapter(SpeechAdapterConfig(kind="transformer", target_modules=["encoder.rnn_layers.1"]), "alice")
    objective = CTCObjective(model)
    assert objective.prefix is None
    batch = {**make_batch(), "labels": LABELS}
    torch.testing.assert_close(objective(**batch)["loss"], model(**batch).loss, atol=1e-6, rtol=1e-6)


def test_a_recogniser_of_transformers_trains_by_its_own_loss():
    model = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8, 8],
            conv_stride=[5, 4], conv_kernel=[10, 8], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            vocab_size=12, ctc_loss_reduction="mean",
        )
    ).eval()  # fmt: skip
    objective = CTCObjective(model)
    batch = {"input_values": torch.randn(4, 900), "labels": LABELS}
    loss = objective(**batch)["loss"]
    assert objective.prefix is None
    assert loss == model(**batch).loss
    assert objective(**batch, shares={"utterances": torch.tensor(0.5)})["loss"] == loss / 2
