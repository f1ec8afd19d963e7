"""Each illness of a translation model is brought about by its real cause, and the alarm names it."""

import logging

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from data.parallel_synthesis import TARGET_VOICE
from data.synthesis import synthesize
from modeling import EchoStreamConfig, EchoStreamFeatureExtractor, EchoStreamForSpeechToSpeechTranslation
from training.health import (
    HealthArguments,
    HealthCallback,
    HealthMeter,
    find_alarms,
    format_health,
    mean_pairwise_cosine,
    pick_figures,
    pool_frames,
)

TEXTS = ("turn left at the bank", "press one", "it is now half past two", "two coffees please", "seven")
HEALTHY = {"encoder_cosine": 0.4, "asr_blank_share": 0.8, "asr_infeasible_share": 0.0}
COLLAPSED = {"encoder_cosine": 0.9999}


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [synthesize(text, TARGET_VOICE) for text in TEXTS]


@pytest.fixture(scope="module")
def extractor(clips) -> EchoStreamFeatureExtractor:
    extractor = EchoStreamFeatureExtractor()
    extractor.set_statistics(*extractor.measure(clips))
    return extractor


def make_model(**fields) -> EchoStreamForSpeechToSpeechTranslation:
    encoder = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "subsampling_channels": 32}
    sizes = {"decoder_hidden_size": 24, "decoder_intermediate_size": 32, "num_mt_layers": 1}
    vocabularies = {"source_vocab_size": 32, "vocab_size": 40, "unit_vocab_size": 25}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = EchoStreamConfig.from_size("mini", encoder=encoder, **{**sizes, **vocabularies, **fields})
        return EchoStreamForSpeechToSpeechTranslation(config).eval()


def make_batch(clips, extractor) -> dict[str, torch.Tensor]:
    """Five utterances with five subwords a side and sixty units, as one subword has ten to twelve."""
    generator = torch.Generator().manual_seed(0)
    classes = {"asr_labels": (32, 5), "target_labels": (40, 5), "unit_labels": (24, 60)}
    labels = {
        name: torch.randint(4, largest, (len(clips), number), generator=generator)
        for name, (largest, number) in classes.items()
    }
    return {**extractor(clips, sampling_rate=16_000, return_tensors="pt"), **labels}


def measure(model, batch) -> dict[str, float]:
    meter = HealthMeter()
    meter.update(model, model(**batch), batch)
    return meter.compute()


def train(model, batch, parameters, *, lr: float, num_steps: int) -> None:
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(num_steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def evaluate(callback: HealthCallback, figures: dict[str, float], step: int = 10) -> TrainerControl:
    control = TrainerControl()
    metrics = {f"eval_{name}": value for name, value in figures.items()} | {"eval_loss": 1.0}
    callback.on_evaluate(TrainingArguments("unused"), TrainerState(global_step=step), control, metrics=metrics)
    return control


def test_a_healthy_model_raises_no_alarm(clips, extractor):
    figures = measure(make_model(), make_batch(clips, extractor))
    assert len(figures) == 8
    assert find_alarms(figures) == []


def test_features_without_statistics_of_the_corpus_are_named_as_the_cause(clips):
    figures = measure(make_model(), make_batch(clips, EchoStreamFeatureExtractor()))
    (alarm,) = find_alarms(figures)
    assert "The encoder says nearly the same of all utterances" in alarm
    assert "the feature extractor has no `mean` and `std` of the corpus" in alarm


def test_an_encoder_that_too_high_a_learning_rate_has_broken_is_named(clips, extractor):
    model, batch = make_model(), make_batch(clips, extractor)
    train(model, batch, model.parameters(), lr=0.5, num_steps=20)
    figures = measure(model, batch)
    assert figures["encoder_cosine"] > 0.99 > 0.5 > abs(figures["feature_cosine"])
    assert "likely its learning rate is too high or its warm-up too short" in find_alarms(figures)[0]


def test_a_ctc_that_says_the_blank_alone_is_named(clips, extractor):
    model = make_model()
    model.asr_ctc_decoder.bias.data[0] += 20  # a bias toward the blank, as in the original
    (alarm,) = find_alarms(measure(model, make_batch(clips, extractor)))
    assert "The transcript's CTC says the blank in 100.0% of its frames" in alarm
    assert "its loss counts too little beside the others" in alarm


def test_units_that_do_not_fit_the_upsampling_are_counted_and_named(clips, extractor):
    batch = make_batch(clips, extractor)
    figures = measure(make_model(unit_upsampling=5), batch)
    assert figures["unit_infeasible_share"] == 1.0
    (alarm,) = find_alarms(figures)
    assert "The units' CTC cannot align 100.0% of the utterances" in alarm
    assert "`unit_upsampling` is below the units a subword" in alarm
    assert measure(make_model(unit_upsampling=25), batch)["unit_infeasible_share"] == 0.0


def test_blanks_that_follow_from_another_illness_say_so():
    blank = {"asr_blank_share": 1.0}
    assert "It follows from the encoder" in find_alarms({**blank, "encoder_cosine": 0.999})[1]
    assert (
        "It follows from the utterances that it cannot align" in find_alarms({**blank, "asr_infeasible_share": 0.2})[1]
    )


def test_transcripts_longer_than_their_audio_are_counted_by_rows(clips, extractor):
    batch = make_batch(clips, extractor)
    batch["asr_labels"] = torch.full((5, 200), -100)
    batch["asr_labels"][:, :3] = torch.tensor([4, 5, 6])
    batch["asr_labels"][1] = torch.arange(200) % 28 + 4
    figures = measure(make_model(), batch)
    assert figures["asr_infeasible_share"] == pytest.approx(0.2)
    assert "Likely texts do not belong to their audio" in find_alarms(figures)[0]


def test_figures_do_not_depend_on_batches_and_padding(clips, extractor):
    model, whole = make_model(), make_batch(clips, extractor)
    model.asr_ctc_decoder.bias.data[0] += 20  # every frame is a blank, those of padding too
    meter = HealthMeter()
    for row in range(len(clips)):
        num_frames = int(whole["attention_mask"][row].sum())
        alone = {name: rows[row : row + 1] for name, rows in whole.items()}
        for name in ("input_features", "attention_mask"):
            alone[name] = alone[name][:, :num_frames]
        meter.update(model, model(**alone), alone)
    figures = meter.compute()
    assert figures["asr_blank_share"] == 1
    assert figures == pytest.approx(measure(model, whole), abs=1e-5)


def test_mean_pairwise_cosine_is_that_of_all_pairs():
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    pairs = [
        float(torch.cosine_similarity(vectors[left], vectors[right], dim=0))
        for left in range(7)
        for right in range(7)
        if left != right
    ]
    assert mean_pairwise_cosine(vectors) == pytest.approx(np.mean(pairs))


def test_pool_frames_leaves_padding_and_empty_rows_out():
    frames = torch.tensor([[[1.0], [3.0], [99.0]], [[5.0], [99.0], [99.0]], [[9.0], [9.0], [9.0]]])
    assert pool_frames(frames, torch.tensor([2, 1, 0])).tolist() == [[2.0], [5.0]]


def test_numbers_that_are_none_raise_the_alarm():
    assert len(find_alarms({"encoder_cosine": float("nan"), "asr_blank_share": 0.5})) == 1


def test_only_the_health_figures_are_picked_from_metrics():
    metrics = {"eval_loss": 2.0, "eval_encoder_cosine": 0.5, "eval_asr_blank_share": 0.25, "epoch": 1.0}
    figures = pick_figures(metrics)
    assert figures == {"encoder_cosine": 0.5, "asr_blank_share": 0.25}
    assert format_health(figures) == "encoder cosine 0.500, asr blank share 25.0%"


def test_every_evaluation_prints_its_figures_and_warns_of_alarms(capsys, caplog):
    callback = HealthCallback()
    with caplog.at_level(logging.WARNING):
        control = evaluate(callback, COLLAPSED, step=40)
    assert capsys.readouterr().out == "health at step 40: encoder cosine 1.000\n"
    assert "mean cosine 0.9999, alarm above 0.95" in caplog.text
    assert not control.should_training_stop


def test_stop_on_collapse_stops_after_alarms_in_a_row_alone():
    callback = HealthCallback(stop_on_collapse=True, patience=2)
    stops = [
        evaluate(callback, figures).should_training_stop for figures in (COLLAPSED, HEALTHY, COLLAPSED, COLLAPSED)
    ]
    assert stops == [False, False, False, True]
    assert callback.has_stopped


def test_a_metric_without_health_figures_prints_nothing(capsys):
    evaluate(HealthCallback(stop_on_collapse=True, patience=1), {})
    assert capsys.readouterr().out == ""


def test_patience_below_one_is_refused():
    with pytest.raises(ValueError, match="`collapse_patience` must be at least 1, got 0"):
        HealthArguments(collapse_patience=0)
