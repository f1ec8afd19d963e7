"""DeepSpeech2 is the paper's graph: sizes by hand, lengths by brute force, rows independent of their neighbours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCTC

from modeling import DeepSpeech2Config, DeepSpeech2ForCTC, SpeechAdapterConfig
from modeling.adapters import adapters_off
from modeling.modeling_deepspeech2 import PADDED_LOGIT, DeepSpeech2Convolutions, get_output_lengths, mask_frames

ROOT = Path(__file__).parents[1]
KINDS = ("mlp", "bottleneck", "replacement")
SMALL = {"num_mel_bins": 16, "conv_channels": 4, "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 12}


@pytest.fixture
def model() -> DeepSpeech2ForCTC:
    torch.manual_seed(0)
    return DeepSpeech2ForCTC(DeepSpeech2Config(**SMALL)).eval()


def make_batch(*num_frames: int) -> dict[str, torch.Tensor]:
    """Noise of 16 bins, garbage in the padding, and the mask that says where it is."""
    generator = torch.Generator().manual_seed(sum(num_frames))
    features = torch.randn(len(num_frames), max(num_frames), 16, generator=generator)
    mask = torch.arange(max(num_frames)) < torch.tensor(num_frames).unsqueeze(1)
    return {"input_features": features, "attention_mask": mask.long()}


def add_loud_adapter(model: DeepSpeech2ForCTC, kind: str, name: str = "alice") -> None:
    """Adds an adapter that changes the output, as after a training."""
    model.add_adapter(SpeechAdapterConfig(kind=kind, hidden_sizes=[8]), name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.eval()


@pytest.mark.parametrize(
    ("sizes", "total"),
    [
        ({"num_mel_bins": 256, "hidden_size": 512, "num_hidden_layers": 5, "vocab_size": 2000}, 29_082_848),
        ({"num_mel_bins": 80, "hidden_size": 1024, "num_hidden_layers": 3, "vocab_size": 2001}, 52_371_936),
    ],
)
def test_parameter_counts_are_the_originals(sizes, total):
    with torch.device("meta"):
        model = DeepSpeech2ForCTC(DeepSpeech2Config(**sizes))

    assert model.count_parameters() == {"total": total, "base": total, "adapter": 0}


def test_parameter_counts_split_into_base_and_adapter():
    model = DeepSpeech2ForCTC(
        DeepSpeech2Config(num_mel_bins=16, hidden_size=512, num_hidden_layers=1, vocab_size=2000)
    )
    base = model.count_parameters()["total"]
    model.add_adapter(SpeechAdapterConfig(kind="mlp"), "alice")

    assert model.count_parameters() == {"total": base + 1_170_128, "base": base, "adapter": 1_170_128}
    assert model.count_parameters(trainable_only=True) == {"total": 1_170_128, "base": 0, "adapter": 1_170_128}


def test_freezing_and_unfreezing_the_base_decides_what_trains(model):
    add_loud_adapter(model, "mlp")
    model.unfreeze_base_model()
    assert model.count_parameters(trainable_only=True) == model.count_parameters()

    model.freeze_base_model()
    assert model.count_parameters(trainable_only=True)["base"] == 0
    assert model.count_parameters(trainable_only=True)["adapter"] == model.count_parameters()["adapter"] > 0


def test_output_lengths_equal_a_convolution_s_own_for_every_length(model):
    first, second = model.encoder.conv.layers[0], model.encoder.conv.layers[3]
    for frames in range(1, 41):
        brute_force = second(first(torch.zeros(1, 1, 16, frames))).shape[-1]
        assert (
            get_output_lengths(torch.tensor(frames))
            == brute_force
            == model(torch.zeros(1, frames, 16)).logits.shape[1]
        )


def test_one_frame_is_the_shortest_input(model):
    assert model(**make_batch(1)).logits_lengths.tolist() == [1]
    batch = make_batch(4, 4)
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match=r"`attention_mask` must leave every row at least one frame, got \[4, 0\]"):
        model(**batch)
    with pytest.raises(ValueError, match=r"`attention_mask` must leave every row at least one frame, got \[0\]"):
        model(torch.zeros(1, 0, 16))


@pytest.mark.parametrize("shape", [(1, 9, 15), (9, 16), (1, 1, 9, 16)])
def test_features_of_another_shape_are_refused_with_the_right_one(model, shape):
    with pytest.raises(
        ValueError, match=r"`input_features` must be \(batch, frames, 16\), got .* own feature extractor"
    ):
        model(torch.zeros(shape))


def test_a_missing_attention_mask_means_that_every_frame_counts(model):
    batch = make_batch(30, 30)
    assert torch.equal(model(batch["input_features"]).logits, model(**batch).logits)


@pytest.mark.parametrize("num_mel_bins", [4, 5, 6, 7, 80, 161, 256])
def test_width_after_the_convolutions_is_a_convolution_s_own(num_mel_bins):
    with torch.device("meta"):
        encoder = DeepSpeech2ForCTC(DeepSpeech2Config(**{**SMALL, "num_mel_bins": num_mel_bins})).encoder
        brute_force = encoder.conv.layers[3](encoder.conv.layers[0](torch.zeros(1, 1, num_mel_bins, 9))).flatten(1, 2)
    assert encoder.conv.out_features == brute_force.shape[1] == encoder.rnn_layers[0].in_features


def test_mask_frames_zeroes_only_what_lies_beyond_each_row():
    masked = mask_frames(torch.ones(2, 3, 4), torch.tensor([4, 1]))
    assert masked.tolist() == [[[1.0] * 4] * 3, [[1.0, 0.0, 0.0, 0.0]] * 3]


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_logits_do_not_depend_on_batch_mates_or_padding(model, kind, with_gradient):
    if kind:
        add_loud_adapter(model, kind)
    batch = make_batch(40, 13, 27)

    with torch.set_grad_enabled(with_gradient):
        together = model(**batch)
        for row, frames in enumerate([40, 13, 27]):
            alone = model(batch["input_features"][row : row + 1, :frames])
            logits = together.logits[row, : alone.logits.shape[1]]
            assert together.logits_lengths[row] == alone.logits.shape[1] == (frames + 1) // 2
            torch.testing.assert_close(logits, alone.logits[0], atol=2e-5, rtol=1e-5)


def test_training_on_the_same_real_frames_gives_the_same_loss_whatever_the_padding(model):
    model.train()
    model.encoder.dropout.p = 0.0
    batch = make_batch(40, 13)
    longer = {
        "input_features": nn.functional.pad(batch["input_features"], (0, 0, 0, 11), value=7.0),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 11)),
    }
    labels = torch.tensor([[3, 4, 5], [6, 7, -100]])

    # The convolutions' BatchNorm2d sees the padding, as in the original, so its statistics are held here.
    model.encoder.conv.eval()

    torch.testing.assert_close(model(**batch, labels=labels).loss, model(**longer, labels=labels).loss)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_padding_is_certain_of_the_blank(model, kind):
    if kind:
        add_loud_adapter(model, kind)
    output = model(**make_batch(40, 13))

    padding = output.logits[1, 7:]
    assert padding.argmax(-1).unique().tolist() == [0]
    assert padding[:, 0].unique().tolist() == [0.0]
    assert padding[:, 1:].unique().tolist() == [PADDED_LOGIT]
    assert padding.softmax(-1)[:, 0].unique().tolist() == [1.0]


def test_the_blank_of_padding_is_the_configured_one():
    model = DeepSpeech2ForCTC(DeepSpeech2Config(**SMALL, pad_token_id=11)).eval()
    assert model(**make_batch(40, 13)).logits[1, 7:].argmax(-1).unique().tolist() == [11]


def test_hidden_states_are_the_convolutions_and_each_layer(model):
    hidden_states = model(**make_batch(21), output_hidden_states=True).hidden_states

    assert [tuple(states.shape) for states in hidden_states] == [(1, 11, 4 * 4), (1, 11, 32), (1, 11, 32)]
    torch.testing.assert_close(model.classifier(hidden_states[-1]), model(**make_batch(21)).logits)
    assert model(**make_batch(21)).hidden_states is None


def test_outputs_come_as_a_tuple_when_asked(model):
    logits, lengths = model(**make_batch(21), return_dict=False)
    assert torch.equal(logits, model(**make_batch(21)).logits)
    assert lengths.tolist() == [11]


@pytest.mark.parametrize("kind", KINDS)
def test_base_logits_equal_the_logits_with_the_adapter_off(model, kind):
    before = model(**make_batch(40, 13)).logits
    add_loud_adapter(model, kind)
    output = model(**make_batch(40, 13), output_base_logits=True)
    with adapters_off(model):
        off = model(**make_batch(40, 13))

    assert torch.equal(output.base_logits, before)
    assert torch.equal(off.logits, before)
    assert not torch.allclose(output.logits, before, atol=1e-2)


def test_base_logits_are_there_on_request_only(model):
    batch, passes = make_batch(21), []
    assert torch.equal(model(**batch, output_base_logits=True).base_logits, model(**batch).logits)

    add_loud_adapter(model, "bottleneck")
    model.encoder.register_forward_pre_hook(lambda *_: passes.append(0))
    assert model(**batch).base_logits is None
    assert len(passes) == 1  # and the base costs nothing
    model.train()
    assert not model(**batch, output_base_logits=True).base_logits.requires_grad
    assert len(passes) == 3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_equals_ctc_computed_row_by_row(reduction):
    torch.manual_seed(1)
    model = DeepSpeech2ForCTC(DeepSpeech2Config(**SMALL, ctc_loss_reduction=reduction)).eval()
    batch = make_batch(40, 13)
    loss = model(**batch, labels=torch.tensor([[3, 3, 5, 1], [6, 7, -100, -100]])).loss

    rows = []
    for row, (frames, labels) in enumerate([(40, [3, 3, 5, 1]), (13, [6, 7])]):
        log_probs = model(batch["input_features"][row : row + 1, :frames]).logits[0].log_softmax(-1)
        target = torch.tensor(labels)
        # Without a batch dimension, and the sum over the labels: no reduction of ours is shared.
        rows.append(nn.functional.ctc_loss(log_probs, target, [len(log_probs)], [len(target)], reduction="sum"))
    expected = torch.stack(rows).sum() if reduction == "sum" else (rows[0] / 4 + rows[1] / 2) / 2
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)


def test_loss_is_computed_in_fp32_over_a_base_in_half_precision(model):
    model.bfloat16()
    batch = make_batch(40, 13)
    batch["input_features"] = batch["input_features"].bfloat16()
    assert model(**batch, labels=torch.tensor([[3], [4]])).loss.dtype == torch.float32


def test_transcripts_longer_than_the_audio_are_refused_by_row(model):
    # 13 frames give 7 of logits; four labels with a repeat each need 4 + 3, five of them 5 + 4.
    assert model(**make_batch(40, 13), labels=torch.tensor([[1, 2, 3, 4], [5, 5, 5, 5]])).loss.isfinite()
    with pytest.raises(
        ValueError, match=r"`labels` must fit the audio, got rows \[1\] with \[9\] frames .* and \[7\] there"
    ):
        model(**make_batch(40, 13), labels=torch.tensor([[1, 2, 3, 4, 5], [5, 5, 5, 5, 5]]))


@pytest.mark.parametrize("load", [DeepSpeech2ForCTC.from_pretrained, AutoModelForCTC.from_pretrained])
def test_every_weight_and_buffer_survives_save_and_load(model, load, tmp_path):
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.full_like(buffer, 3 + len(name)))
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path)

    assert type(reloaded) is DeepSpeech2ForCTC
    assert not reloaded.training
    assert {name: value.tolist() for name, value in reloaded.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    assert torch.equal(reloaded(**make_batch(30)).logits, model(**make_batch(30)).logits)


def test_fresh_weights_do_not_depend_on_the_way_they_are_made(model, tmp_path):
    model.save_pretrained(tmp_path, state_dict={"encoder.conv.layers.0.weight": model.encoder.conv.layers[0].weight})
    reloaded = DeepSpeech2ForCTC.from_pretrained(tmp_path)

    assert torch.equal(reloaded.encoder.conv.layers[0].weight, model.encoder.conv.layers[0].weight)
    rnn = reloaded.encoder.rnn_layers[1].rnn
    assert rnn.bias_hh_l0.abs().max() == 0
    gram = rnn.weight_hh_l0.T @ rnn.weight_hh_l0
    torch.testing.assert_close(gram, torch.eye(16), atol=1e-5, rtol=0)
    assert reloaded.encoder.rnn_layers[0].batch_norm.running_var.tolist() == [1.0] * 16


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"num_mel_bins": 3}, "`num_mel_bins` must be at least 4, got 3"),
        ({"conv_channels": 0}, "`conv_channels` must be at least 1, got 0"),
        ({"vocab_size": -1}, "`vocab_size` must be at least 1, got -1"),
        ({"pad_token_id": 32}, r"`pad_token_id` must be a class below `vocab_size` \(32\), got 32"),
        ({"ctc_loss_reduction": "none"}, '`ctc_loss_reduction` must be "mean" or "sum", got \'none\''),
        ({"hidden_size": 2.5}, "hidden_size"),
    ],
)
def test_configuration_refuses_what_cannot_be_built(field, message):
    with pytest.raises(StrictDataclassError, match=message):
        DeepSpeech2Config(**field)


# Trains a step for each number of mel bins; the library ends the process where it has spoiled its memory.
TRAIN_STEPS = """
import torch
from modeling import DeepSpeech2Config, DeepSpeech2ForCTC
for num_bins in (16, 18, 19, 20, 21, 22, 23, 25, 40, 80):
    sizes = {"conv_channels": 4, "hidden_size": 4, "num_hidden_layers": 1, "vocab_size": 5}
    model = DeepSpeech2ForCTC(DeepSpeech2Config(num_mel_bins=num_bins, **sizes)).train()
    features, mask = torch.randn(3, 61, num_bins), torch.ones(3, 61).long()
    for _ in range(2):
        model(input_features=features, attention_mask=mask, labels=torch.ones(3, 4).long()).loss.backward()
print("sound")
"""


def test_training_is_sound_for_the_numbers_of_mel_bins_in_use_and_around_the_unsafe_ones():
    environment = {**os.environ, "LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}  # where there is one
    command = [sys.executable, "-c", TRAIN_STEPS]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert (run.returncode, run.stdout) == (0, "sound\n"), run.stderr[-500:]


@pytest.mark.parametrize("num_bins", [19, 20, 22])
def test_padded_bins_change_neither_the_convolutions_nor_their_gradient(num_bins):
    config = DeepSpeech2Config(num_mel_bins=num_bins, conv_channels=3, vocab_size=5)
    convolutions = DeepSpeech2Convolutions(config).eval()
    features, lengths = (
        torch.randn(2, 31, num_bins, generator=torch.Generator().manual_seed(0)),
        torch.tensor([31, 31]),
    )
    with torch.backends.mkldnn.flags(enabled=False):
        plain = features.transpose(1, 2).unsqueeze(1)
        for layer in convolutions.layers:
            plain = layer(plain)
        (plain**2).sum().backward()
        expected = convolutions.layers[0].weight.grad.clone()
        convolutions.zero_grad()
    hidden_states = convolutions(features, lengths)
    (hidden_states**2).sum().backward()
    torch.testing.assert_close(hidden_states, plain.flatten(1, 2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(convolutions.layers[0].weight.grad, expected, rtol=1e-4, atol=1e-4)
