"""EchoStream: sizes, losses by hand, what no head may see, generation, and each cause of its original's collapse."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForSpeechSeq2Seq

from modeling import EchoStreamConfig, EchoStreamForSpeechToSpeechTranslation, SpeechAdapterConfig
from modeling.ctc import beam_search_ctc, collapse_ctc, ctc_loss_of_fitting, find_misfits
from tests.translation_models import make_translation_batch, make_translation_model, take_row


@pytest.fixture(scope="module")
def model() -> EchoStreamForSpeechToSpeechTranslation:
    return make_translation_model()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return make_translation_batch()


# Sizes


@pytest.mark.parametrize(("size", "total"), [("mini", 4_516_328), ("base", 51_590_120), ("streamspeech", 54_732_776)])
def test_each_size_has_the_parameters_of_the_table_in_the_documentation(size, total):
    with torch.device("meta"):
        model = EchoStreamForSpeechToSpeechTranslation(EchoStreamConfig.from_size(size))
    assert model.count_parameters()["total"] == total == sum(model.count_parts().values())


def test_the_parts_of_streamspeech_have_as_many_parameters_as_the_published_ones():
    with torch.device("meta"):
        model = EchoStreamForSpeechToSpeechTranslation(EchoStreamConfig.from_size("streamspeech"))
    parts = model.count_parts()
    subsampler = sum(value.numel() for value in model.encoder.subsampler.parameters())
    # Width 512 and 2048: attention 4 (512² + 512), from a source of 256 less 2 · 256 · 512; then the network, norms.
    attention, network, norm = 4 * (512**2 + 512), 2 * 512 * 2048 + 2048 + 512, 1024
    decoder_layer = 2 * attention - 2 * 256 * 512 + network + 3 * norm
    assert parts["mt_decoder"] == 6004 * 512 + 4 * decoder_layer + norm
    assert parts["t2u_encoder"] == 2 * (attention + network + 2 * norm) + norm
    assert parts["unit_decoder"] == 2 * (2 * attention + network + 3 * norm) + norm + 1005 * 512
    assert parts["asr_ctc_decoder"] == parts["st_ctc_decoder"] == 256 * 6004 + 6004
    assert subsampler == (80 * 5 + 1) * 1024 + (512 * 5 + 1) * 512 + (256 + 1) * 256
    # Its Conformer has 12 layers of about 2.65 M; with them the whole has the 70.6 M that are published.
    conformer = 12 * (2 * (2 * 256 * 2048 + 2048 + 256) + 5 * 256**2 + 3 * 256**2 + 31 * 256 + 14 * 256)
    assert sum(parts.values()) - parts["encoder"] + subsampler + conformer == pytest.approx(70.6e6, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unit_upsampling": 0}, "`unit_upsampling` must be at least 1, got 0"),
        ({"num_decoder_attention_heads": 7}, "`decoder_hidden_size` must be a multiple of `num_decoder_attention_h"),
        ({"label_smoothing": 1.0}, "`label_smoothing` must be from 0 to below 1, got 1.0"),
        ({"mt_weight": -1.0}, "`mt_weight` must be at least 0, got -1.0"),
        ({"pad_token_id": 9000}, "`pad_token_id` must be a subword below `vocab_size`"),
        ({"blank_token_id": 9000}, "`blank_token_id` must be a subword of both languages, got 9000"),
        ({"blank_token_id": 1}, "`blank_token_id` must be neither `pad_token_id` nor `eos_token_id`, got 1"),
        ({"unit_blank_id": 1005}, "`unit_blank_id` must be a class below `unit_vocab_size`"),
        ({"segment_length": 0}, "`segment_length` must be at least 1, got 0"),
        ({"right_context_length": 5}, "`right_context_length` must be at most `segment_length`"),
    ],
)
def test_a_configuration_of_which_no_model_can_be_built_is_refused(fields, message):
    with pytest.raises(Exception, match=message):
        EchoStreamConfig(**fields)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="`size` must be one of mini, base, streamspeech, got 'huge'"):
        EchoStreamConfig.from_size("huge")


def test_the_encoder_s_fields_are_reachable_in_the_configuration_and_come_back_from_a_file(tmp_path):
    config = EchoStreamConfig(segment_length=8, left_context_length=16)
    config.max_memory_size = 3
    config.save_pretrained(tmp_path)
    loaded = EchoStreamConfig.from_pretrained(tmp_path)
    assert (loaded.segment_length, loaded.left_context_length, loaded.max_memory_size) == (8, 16, 3)
    assert loaded.encoder_config.segment_length == 8
    assert loaded.to_dict() == config.to_dict()


# Losses


@torch.no_grad()
def test_the_losses_are_those_of_torch_a_row_at_a_time(model, batch):
    output = model(**batch)
    sums, counts = dict.fromkeys(("asr", "st", "unit", "mt"), 0.0), dict.fromkeys(("asr", "st", "unit", "mt"), 0)
    for row in range(3):
        alone = take_row(batch, row)
        heads = model(**alone)
        for name, labels, logits, blank in (
            ("asr", "asr_labels", heads.asr_logits, 0),
            ("st", "target_labels", heads.st_logits, 0),
            ("unit", "unit_labels", heads.unit_logits, 24),
        ):
            log_probs, targets = logits.log_softmax(-1).transpose(0, 1), alone[labels]
            lengths = [torch.tensor([log_probs.shape[0]]), torch.tensor([targets.shape[1]])]
            loss = nn.functional.ctc_loss(log_probs, targets, *lengths, blank=blank, reduction="sum")
            sums[name], counts[name] = sums[name] + loss, counts[name] + targets.shape[1]
        targets = torch.cat([alone["target_labels"][0], torch.tensor([2])])  # and the end
        sums["mt"] += nn.functional.cross_entropy(heads.mt_logits[0], targets, reduction="sum")
        counts["mt"] += len(targets)
    for name in sums:
        torch.testing.assert_close(output[f"{name}_loss"], sums[name] / counts[name], rtol=1e-5, atol=1e-5)
    weighted = output.unit_loss + 8 * output.mt_loss + 4 * output.asr_loss + 4 * output.st_loss
    torch.testing.assert_close(output.loss, weighted)


def test_label_smoothing_spreads_a_share_over_all_subwords_in_training_only(batch):
    model = make_translation_model(label_smoothing=0.1, dropout=0.0)
    with torch.no_grad():
        plain = model(**batch)
        model.training = True
        smooth = model(**batch)
    labels = model.make_decoder_labels(batch["target_labels"])[1]
    log_probs = plain.logits.log_softmax(-1)[labels >= 0]
    uniform = -log_probs.mean()
    torch.testing.assert_close(smooth.mt_loss, 0.9 * plain.mt_loss + 0.1 * uniform, rtol=1e-5, atol=1e-5)
    assert abs(uniform - plain.mt_loss) > 0.01  # so that the two differ


def test_a_weight_of_zero_leaves_a_loss_out(batch):
    model = make_translation_model(unit_weight=0.0, mt_weight=0.0, st_weight=0.0, asr_weight=2.0)
    model(**batch).loss.backward()
    assert model.asr_ctc_decoder.weight.grad.abs().sum() > 0
    assert model.st_ctc_decoder.weight.grad is None
    assert all(value.grad is None for value in model.unit_decoder.parameters())


def test_decoder_labels_shift_by_one_and_a_row_without_labels_says_nothing(model):
    labels = torch.tensor([[5, 6, -100], [-100, -100, -100], [7, 8, 9]])
    tokens, next_labels = model.make_decoder_labels(labels)
    assert tokens.tolist() == [[2, 5, 6, 1], [2, 1, 1, 1], [2, 7, 8, 9]]
    assert next_labels.tolist() == [[5, 6, 2, -100], [-100, -100, -100, -100], [7, 8, 9, 2]]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("asr_labels", 0, r"`asr_labels` must not hold the CTC blank, 0, got it in rows \[1\]"),
        ("asr_labels", 32, "`asr_labels` must be classes below 32, got 32"),
        ("target_labels", 40, "`target_labels` must be classes below 40, got 40"),
        ("unit_labels", 24, "`unit_labels` must not hold the CTC blank, 24"),
    ],
)
def test_labels_that_are_no_classes_or_the_blank_are_refused(model, batch, name, value, message):
    labels = batch[name].clone()
    labels[1, 0] = value
    with pytest.raises(ValueError, match=message):
        model(**{**batch, name: labels})


# What the original's collapse came from


@torch.no_grad()
def test_no_head_depends_on_what_a_row_is_batched_with(model, batch):
    together = model(**batch)
    for row in range(3):
        alone = model(**take_row(batch, row))
        for name in ("encoder_out", "asr_logits", "st_logits", "logits", "unit_logits"):
            rows = together[name][row, : alone[name].shape[1]]
            torch.testing.assert_close(rows, alone[name][0], rtol=1e-4, atol=1e-4, msg=name)


@torch.no_grad()
def test_what_stands_in_the_padding_changes_no_loss(model, batch):
    noisy = batch["input_features"].clone()
    noisy[batch["attention_mask"] == 0] = 1e3
    first, second = model(**batch), model(**{**batch, "input_features": noisy})
    torch.testing.assert_close(first.loss, second.loss)


@torch.no_grad()
def test_ctc_is_told_real_lengths_and_not_padded_ones(model, batch):
    output = model(**batch)
    assert output.encoder_lengths.tolist() == [50, 30, 42]
    assert output.unit_lengths.tolist() == [5 * 25, 3 * 25, 2 * 25]
    padded, _ = ctc_loss_of_fitting(output.asr_logits, torch.full((3,), 50), batch["asr_labels"], blank=0)
    assert abs(padded - output.asr_loss) > 0.1


def test_label_zero_counts_and_minus_a_hundred_does_not(model):
    logits = torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(0))
    losses = [model._cross_entropy(logits, torch.tensor([row])) for row in ([0, 5, 2], [5, 2, -100], [0, 5, -100])]
    log_probs = -logits[0].log_softmax(-1)
    torch.testing.assert_close(losses[0], (log_probs[0, 0] + log_probs[1, 5] + log_probs[2, 2]) / 3)
    torch.testing.assert_close(losses[1], (log_probs[0, 5] + log_probs[1, 2]) / 2)
    torch.testing.assert_close(losses[2], (log_probs[0, 0] + log_probs[1, 5]) / 2)


def test_the_blank_has_no_bias_of_its_own(model):
    assert model.asr_ctc_decoder.bias.abs().max() == model.st_ctc_decoder.bias.abs().max() == 0
    assert model.unit_decoder.output_projection.bias is None


@torch.no_grad()
def test_units_that_do_not_fit_are_counted_and_have_no_part_in_the_loss(batch):
    """With 5 frames a subword, 11 units a subword do not fit: the original's loss was zero and said nothing."""
    output = make_translation_model(unit_upsampling=5)(**batch)
    assert output.unit_misfits.tolist() == [True, True, True]
    enough = make_translation_model(unit_upsampling=15)(**batch)
    assert enough.unit_misfits.tolist() == [False, False, True]
    alone = [make_translation_model(unit_upsampling=15)(**take_row(batch, row)).unit_loss for row in (0, 1)]
    torch.testing.assert_close(enough.unit_loss, (30 * alone[0] + 20 * alone[1]) / 50, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_infinite_loss_is_not_hidden():
    logits = torch.zeros(1, 3, 5)
    logits[0, :, 4] = -torch.inf
    loss, misfits = ctc_loss_of_fitting(logits, torch.tensor([3]), torch.tensor([[4]]), blank=0)
    assert not misfits.any()
    assert not torch.isfinite(loss)


def test_every_parameter_has_a_gradient_when_all_heads_have_labels(batch):
    model = make_translation_model()
    model(**batch).loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


# Order in time


@torch.no_grad()
def test_units_of_a_prefix_are_not_changed_by_what_follows(model, batch):
    states, lengths = model.encode(batch["input_features"][:1])[0], torch.tensor([50])
    whole, prefix = (model._decode(torch.tensor([row]), states, lengths)[0] for row in ([2, 5, 6, 7, 8], [2, 5, 6]))
    logits = [model.unit_decoder(model.t2u_encoder(hidden)) for hidden in (whole, prefix)]
    torch.testing.assert_close(logits[0][:, : 3 * 25], logits[1], rtol=1e-4, atol=1e-4)
    other, _ = model._decode(torch.tensor([[2, 9, 6]]), states, lengths)  # and an earlier subword does change them
    assert (model.unit_decoder(model.t2u_encoder(other))[:, 50:] - logits[1][:, 50:]).abs().max() > 1e-3


@torch.no_grad()
def test_a_unit_frame_sees_its_own_subword(model):
    """The mask over states is neither too narrow nor too wide: the last frame of state 1 sees state 1, not state 2."""
    states = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(0))
    changed = states.clone()
    changed[:, 1] += 1.0
    difference = (model.unit_decoder(changed) - model.unit_decoder(states)).abs().amax(-1)[0]
    assert difference[:25].max() < 1e-5 < difference[25:].min()


@torch.no_grad()
def test_eager_attention_says_what_sdpa_says(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    eager = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, attn_implementation="eager").eval()
    first, second = model(**batch), eager(**batch)
    assert eager.unit_decoder.layer_config._attn_implementation == "eager"
    for name in ("loss", "asr_logits", "logits"):
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_segment_of_zero_is_the_whole_utterance(model, batch):
    features = batch["input_features"][:1]
    whole, one, short = (model.encode(features, segment_length=length)[0] for length in (0, 50, 4))
    torch.testing.assert_close(whole, one)
    assert (whole - short).abs().max() > 1e-3


@torch.no_grad()
def test_a_stream_in_the_model_equals_the_whole_and_begins_anew_when_reset(batch):
    model, features = make_translation_model(), batch["input_features"]
    whole = model.encode(features)[0]
    for _ in range(2):
        parts = [
            model.encode_segment(features[:, start : start + 30], is_last=start >= 180)
            for start in range(0, features.shape[1], 30)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
        model.reset_cache()


# Files and generation


@torch.no_grad()
def test_a_saved_model_gives_the_same_logits(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).eval()
    first, second = model(**batch), loaded(**batch)
    for name in ("asr_logits", "st_logits", "logits", "unit_logits"):
        assert torch.equal(first[name], second[name]), name


@torch.no_grad()
def test_greedy_generation_takes_the_best_subword_of_each_step(model, batch):
    inputs = {name: batch[name] for name in ("input_features", "attention_mask")}
    sequences = model.generate(**inputs, max_new_tokens=6)
    for row in range(3):
        alone = take_row(batch, row)
        tokens = [2]
        while len(tokens) < 7 and (len(tokens) == 1 or tokens[-1] != 2):
            logits = model(alone["input_features"], decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
            logits[[0, 1, 3]] = -torch.inf
            tokens.append(int(logits.argmax()))
        assert sequences[row, : len(tokens)].tolist() == tokens


@torch.no_grad()
def test_beam_search_finds_no_less_probable_translation_than_greedy(batch):
    model = make_translation_model()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for layer in model.mt_decoder.layers:  # so that a subword does not only say itself again
            layer.fc2.weight.data.normal_(std=1.0)
    inputs = {name: batch[name] for name in ("input_features", "attention_mask")}

    def score(num_beams: int) -> torch.Tensor:
        options = {"min_new_tokens": 5, "max_new_tokens": 5}
        sequences = model.generate(**inputs, num_beams=num_beams, **options)
        logits = model(**inputs, decoder_input_ids=sequences[:, :-1]).logits
        logits[..., [0, 1, 3]] = -torch.inf
        logits[:, :5, 2] = -torch.inf
        return logits.log_softmax(-1).gather(-1, sequences[:, 1:].unsqueeze(-1)).sum((1, 2))

    greedy, beam = score(1), score(4)
    assert (beam >= greedy - 1e-4).all()
    assert (beam > greedy + 1e-3).any()


@torch.no_grad()
def test_generation_with_units_gives_numbers_of_units_and_the_same_alone(model, batch):
    inputs = {name: batch[name] for name in ("input_features", "attention_mask")}
    together = model.generate(**inputs, return_units=True, min_new_tokens=3, max_new_tokens=4)
    assert all(0 <= unit < model.config.num_units for row in together.units for unit in row)
    assert any(together.units)
    for row in range(3):
        alone = model.generate(take_row(batch, row)["input_features"], return_units=True, min_new_tokens=3,
                               max_new_tokens=4)  # fmt: skip
        assert alone.units == [together.units[row]]


@torch.no_grad()
def test_units_of_several_beams_are_those_of_each_translation(model, batch):
    inputs = {name: batch[name] for name in ("input_features", "attention_mask")}
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    output = model.generate(**inputs, return_units=True, **options)
    assert output.sequences.shape[0] == len(output.units) == 6
    states = model.encode(**inputs)[0]
    units = model.generate_units(output.sequences[3:4], states[1:2], torch.tensor([30]))
    assert units == [output.units[3]]


def test_generation_writes_neither_blank_nor_padding_nor_unknown():
    model = make_translation_model()
    for index in (0, 1, 3):
        model.mt_decoder.embed_tokens.weight.data[index] = 0
    model.mt_decoder.layer_norm.weight.data.zero_()
    model.mt_decoder.layer_norm.bias.data.copy_(-model.mt_decoder.embed_tokens.weight.data.sum(0))
    sequences = model.generate(torch.randn(1, 100, 80), max_new_tokens=5)
    assert not set(sequences[0, 1:].tolist()) & {0, 1, 3}


def test_generation_from_states_asks_for_their_mask(model, batch):
    states = model.encode(batch["input_features"], batch["attention_mask"])
    with pytest.raises(ValueError, match="`attention_mask` must be given with `encoder_outputs`, got none"):
        model.generate(encoder_outputs=states)
    inputs = {name: batch[name] for name in ("input_features", "attention_mask")}
    expected = model.generate(**inputs, max_new_tokens=4)
    again = model.generate(encoder_outputs=states, attention_mask=batch["attention_mask"], max_new_tokens=4)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("is_adapted", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(batch, is_adapted):
    gradients = []
    for is_checkpointed in (False, True):
        model = make_translation_model(encoder_fields={"dropout": 0.0}, dropout=0.0).train()
        if is_adapted:
            torch.manual_seed(0)
            model.add_adapter(SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[2]), "ann")
            model.freeze_base_model()
        if is_checkpointed:
            model.activation_checkpointing_enable()
        model(**batch).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0].values())


def test_unit_beams_find_what_no_single_best_path_says():
    log_probs = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    assert collapse_ctc(log_probs.argmax(-1).unsqueeze(0), torch.tensor([2]), blank=0) == [[]]
    assert beam_search_ctc(log_probs, blank=0, num_beams=2) == [1]


def test_a_beam_search_agrees_with_the_sum_over_all_alignments():
    generator = torch.Generator().manual_seed(3)
    log_probs = (2 * torch.randn(5, 3, generator=generator)).log_softmax(-1)
    totals: dict[tuple[int, ...], float] = {}
    for path in torch.cartesian_prod(*[torch.arange(3)] * 5):
        labels = tuple(collapse_ctc(path.unsqueeze(0), torch.tensor([5]), blank=0)[0])
        totals[labels] = totals.get(labels, 0.0) + log_probs.gather(1, path.unsqueeze(1)).sum().exp().item()
    assert beam_search_ctc(log_probs, blank=0, num_beams=200) == list(max(totals, key=totals.get))
    assert sum(totals.values()) == pytest.approx(1.0)


def test_beams_must_be_at_least_one():
    with pytest.raises(ValueError, match="`num_beams` must be at least 1, got 0"):
        beam_search_ctc(torch.zeros(2, 3), blank=0, num_beams=0)


def test_misfits_are_counted_with_repeats():
    labels = torch.tensor([[5, 5, -100], [5, 6, 7], [5, 6, -100]])
    assert find_misfits(labels, torch.tensor([2, 3, 2])).tolist() == [True, False, False]
