"""Training of speech translation by its recipe: five ways to start, adapters, and what is left in the folder."""

import json
import sys
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from modeling import EchoStreamForSpeechToSpeechTranslation, EchoStreamProcessor
from modeling.adapters import adapters_off, is_adapter_parameter
from recipes.train_s2st import main, plan_model
from tests.translation_models import TINY_FIELDS, make_translation_batch, write_translation_corpus
from training.start import StartArguments
from training.translation import (
    ADAPTER_NAME,
    TranslationArguments,
    add_translation_adapter,
    check_adapter_start,
    make_adapter_config,
)

LORA = TranslationArguments(adapter_kind="lora")
TINY = ("--model_fields", *TINY_FIELDS, "--vocab_size", 60, "--per_device_train_batch_size", 5, "--seed", 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Manifest of a few Spanish sentences with English text and units."""
    return write_translation_corpus(tmp_path_factory.mktemp("translations") / "es")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """Folder of four steps from scratch, with checkpoints of the second and of the fourth."""
    folder = tmp_path_factory.mktemp("s2st")
    _run(corpus, folder, *TINY, "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2,
         "--save_total_limit", 5, "--segment_lengths", 4, 8, 0, "--num_time_masks", 1,
         "--language", "es", "en")  # fmt: skip
    return folder


def _run(corpus, folder, *flags) -> None:
    tokens = ["recipe.py", "--dataset", corpus, "--output_dir", folder, "--disable_tqdm", "true", *flags]
    with patch.object(sys, "argv", list(map(str, tokens))):
        main()


def read(folder, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_scratch_leaves_a_model_that_loads_with_its_figures(trained):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(trained)
    processor = AutoProcessor.from_pretrained(trained)
    assert type(model) is EchoStreamForSpeechToSpeechTranslation
    assert type(processor) is EchoStreamProcessor
    assert model.config.num_units == 12
    assert (len(processor.tokenizer), len(processor.target_tokenizer)) == (
        model.config.source_vocab_size, model.config.vocab_size,
    )  # fmt: skip
    ids = processor(target_text=["press two"]).target_labels
    assert processor.batch_decode(ids) == ["press two"]
    results = read(trained, "eval_results.json")
    assert {"eval_wer", "eval_mt_bleu", "eval_unit_error_rate", "eval_encoder_cosine"} <= results.keys()
    assert results["num_train_clips"] == 10
    assert results["total_parameters"] == model.count_parameters()["total"]
    assert "AutoModelForSpeechSeq2Seq" in (trained / "README.md").read_text()
    assert read(trained, "start_report.json")["start"] == "scratch"


def test_the_features_are_normalised_by_the_corpus(trained):
    extractor = AutoProcessor.from_pretrained(trained).feature_extractor
    assert len(extractor.mean) == len(extractor.std) == 80
    assert min(extractor.std) > 0.1


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(trained, corpus, trained_steps, tmp_path):
    flags = ("--max_steps", 4, "--segment_lengths", 4, 8, 0, "--num_time_masks", 1, "--save_strategy", "no")
    _run(corpus, tmp_path, *TINY, *flags, "--start", "resume", "--checkpoint", trained / "checkpoint-2",
         "--language", "es", "en")  # fmt: skip
    assert trained_steps == [2, 3]
    first, second = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    before = load_file(trained / "checkpoint-2" / "model.safetensors")
    assert any(not torch.equal(first[name], before[name]) for name in first)


def test_a_run_that_has_collapsed_ends_after_as_many_alarms_as_asked_for(corpus, trained_steps, tmp_path):
    """A blank that is certain from the start, in evaluations after each step."""
    flags = ("--max_steps", 6, "--eval_strategy", "steps", "--eval_steps", 1, "--learning_rate", "1e-9")
    with patch("training.health.MAX_BLANK_SHARE", -1.0):
        _run(corpus, tmp_path, *TINY, *flags, "--stop_on_collapse", "--collapse_patience", 2)
    assert trained_steps == [0, 1]


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_a_plan_has_the_parameters_of_the_run(trained, kind):
    start = StartArguments(start="transfer", checkpoint=str(trained))
    arguments = (start, TranslationArguments(adapter_kind=kind, adapter_size=2))
    model = AutoModelForSpeechSeq2Seq.from_pretrained(trained)
    if kind == "lora":
        add_translation_adapter(model, arguments[1], str(trained))
    with torch.device("meta"):
        planned = plan_model(arguments)
    assert planned.count_parameters() == model.count_parameters()
    assert planned.count_parameters(trainable_only=True) == model.count_parameters(trainable_only=True)


def test_a_plan_of_a_new_model_has_vocabularies_of_the_size_asked_for():
    with torch.device("meta"):
        planned = plan_model((StartArguments(vocab_size=70, num_units=20), TranslationArguments()))
    assert (planned.config.source_vocab_size, planned.config.vocab_size, planned.config.num_units) == (70, 70, 20)


def test_nothing_to_resume_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="`output_dir` must hold a checkpoint for `--start resume`, got .* without"):
        _run(corpus, tmp_path, *TINY, "--start", "resume")


def test_partial_takes_the_decoders_and_an_encoder_of_another_size(trained, corpus, tmp_path):
    fields = ("hidden_size=16", "num_hidden_layers=2", "intermediate_size=16", "encoder.subsampling_channels=16")
    _run(corpus, tmp_path, "--start", "partial", "--checkpoint", trained, "--model_fields", *fields, "--max_steps", 1,
         "--encoder_lr", "1e-3", "--decoder_lr", "1e-12")  # fmt: skip
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    decoders = [name for name in before if not name.startswith("encoder.")]
    for name in decoders:
        torch.testing.assert_close(after[name], before[name], atol=1e-8, rtol=1e-6, msg=name)
    report = read(tmp_path, "start_report.json")
    assert sorted(report["loaded"]) == sorted(decoders)
    assert set(report["fresh"]) == {name for name in after if name.startswith("encoder.")}
    assert any(name.startswith("encoder.layers.1.") for name in after)


def test_a_transfer_trains_the_encoder_first(trained, corpus, tmp_path):
    flags = ("--start", "transfer", "--checkpoint", trained, "--max_steps", 2, "--save_strategy", "steps",
             "--save_steps", 1, "--save_total_limit", 5, "--encoder_steps", 1, "--warmup_steps", 0)  # fmt: skip
    _run(corpus, tmp_path, *flags)
    before = load_file(trained / "model.safetensors")
    first, second = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
    changed = {name for name in before if not torch.equal(before[name], first[name])}
    assert changed
    assert all(name.startswith("encoder.") for name in changed)
    later = {name for name in before if not torch.equal(first[name], second[name])}
    assert "st_ctc_decoder.weight" in later
    assert read(tmp_path, "start_report.json")["fresh"] == []


def test_a_transfer_that_was_stopped_while_the_encoder_trained_alone_goes_on_so(trained, corpus, tmp_path):
    flags = ("--max_steps", 3, "--encoder_steps", 2, "--save_strategy", "steps", "--save_steps", 1,
             "--save_total_limit", 5, "--warmup_steps", 0)  # fmt: skip
    _run(corpus, tmp_path / "whole", "--start", "transfer", "--checkpoint", trained, *flags)
    stopped = tmp_path / "whole" / "checkpoint-1"
    _run(corpus, tmp_path / "resumed", "--start", "resume", "--checkpoint", stopped, *flags)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    middle = load_file(tmp_path / "resumed" / "checkpoint-2" / "model.safetensors")
    before = load_file(trained / "model.safetensors")
    assert torch.equal(middle["st_ctc_decoder.weight"], before["st_ctc_decoder.weight"])
    assert not torch.equal(first["st_ctc_decoder.weight"], before["st_ctc_decoder.weight"])


def test_evaluate_measures_and_leaves_no_step(trained, corpus, trained_steps, tmp_path):
    _run(corpus, tmp_path, "--start", "evaluate", "--checkpoint", trained)
    assert trained_steps == []
    measured, results = read(trained, "eval_results.json"), read(tmp_path, "eval_results.json")
    for name in ("eval_loss", "eval_wer", "eval_encoder_cosine"):
        assert results[name] == pytest.approx(measured[name], rel=1e-4)
    assert results["num_train_clips"] == 0


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_an_adapter_trains_on_a_frozen_model_and_is_saved_alone(trained, corpus, tmp_path, kind):
    _run(corpus, tmp_path, "--start", "transfer", "--checkpoint", trained, "--adapter_kind", kind, "--adapter_size", 2,
         "--max_steps", 2, "--learning_rate", "1e-2", "--warmup_steps", 0)  # fmt: skip
    assert not (tmp_path / "model.safetensors").exists()
    assert (
        sum(value.numel() for value in load_file(tmp_path / "adapter_model.safetensors").values())
        == (read(tmp_path, "eval_results.json")["trainable_parameters"])
    )
    base = AutoModelForSpeechSeq2Seq.from_pretrained(trained).eval()
    adapted = AutoModelForSpeechSeq2Seq.from_pretrained(trained).eval()
    adapted.load_adapter(str(tmp_path), ADAPTER_NAME)
    features = make_translation_batch()["input_features"]
    tokens = torch.tensor([[2, 5, 6]]).expand(3, -1)
    with torch.no_grad():
        first, second = (one(features, decoder_input_ids=tokens).logits for one in (base, adapted))
        assert (first - second).abs().max() > 1e-5
        with adapters_off(adapted):
            assert torch.equal(adapted(features, decoder_input_ids=tokens).logits, first)


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_a_gradient_is_there_if_and_only_if_the_parameter_is_an_adapter_s(trained, kind):
    model = EchoStreamForSpeechToSpeechTranslation.from_pretrained(trained).train()
    add_translation_adapter(model, TranslationArguments(adapter_kind=kind, adapter_size=2), str(trained))
    for name, parameter in model.named_parameters():
        if is_adapter_parameter(name):
            torch.nn.init.normal_(parameter)
    batch = make_translation_batch()
    labels = {name: batch[name].clamp(max=11) for name in ("asr_labels", "target_labels", "unit_labels")}
    model(batch["input_features"], **labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_adapter_parameter(name), name
    adapted = {name.split(".speech_adapter")[0].split(".lora_")[0] for name, value in model.named_parameters()
               if value.grad is not None and value.grad.any()}  # fmt: skip
    assert {name.partition(".")[0] for name in adapted} == {"encoder", "mt_decoder", "unit_decoder"}


def test_an_adapter_says_nothing_at_the_start(trained):
    model = EchoStreamForSpeechToSpeechTranslation.from_pretrained(trained).eval()
    features = make_translation_batch()["input_features"]
    with torch.no_grad():
        before = model(features).asr_logits
        add_translation_adapter(model, TranslationArguments(adapter_kind="bottleneck"), str(trained))
        assert torch.equal(model(features).asr_logits, before)


@pytest.mark.parametrize(
    ("start", "checkpoint", "message"),
    [
        ("scratch", None, r"`adapter_kind` lora needs `--start transfer` \(or resume\), got scratch"),
        ("partial", "x", r"`adapter_kind` lora needs `--start transfer` \(or resume\), got partial"),
        ("resume", None, "`checkpoint` must name the adapter's base with `--adapter_kind`, got none"),
    ],
)
def test_an_adapter_without_a_whole_model_is_refused(start, checkpoint, message):
    with pytest.raises(ValueError, match=message):
        check_adapter_start(
            StartArguments(start=start, checkpoint=checkpoint), TranslationArguments(adapter_kind="lora")
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_steps": -1}, "`encoder_steps` must be at least 0, got -1"),
        ({"encoder_lr": 0.0}, "`encoder_lr` must be above 0, got 0.0"),
        ({"decoder_lr": -1.0}, "`decoder_lr` must be above 0, got -1.0"),
    ],
)
def test_rates_and_steps_that_are_none_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TranslationArguments(**fields)


def test_the_configuration_of_an_adapter_follows_from_its_kind():
    lora = make_adapter_config(TranslationArguments(adapter_kind="lora", adapter_size=4))
    assert (lora.r, lora.lora_alpha) == (4, 8)
    assert make_adapter_config(TranslationArguments(adapter_kind="bottleneck", adapter_size=4)).hidden_sizes == [4]


def test_a_corpus_without_units_leaves_their_loss_out(corpus, tmp_path, caplog):
    rows = [line.split("\t") for line in corpus.read_text().splitlines()]
    place = rows[0].index("tgt_audio")
    table = "\n".join("\t".join(cells[:place] + cells[place + 1 :]) for cells in rows) + "\n"
    manifest = corpus.with_name("without.tsv")
    manifest.write_text(table)
    _run(manifest, tmp_path, *TINY, "--max_steps", 1)
    assert "The corpus has no column `units`: the units' loss is left out" in caplog.text
    results = read(tmp_path, "eval_results.json")
    assert "eval_unit_loss" not in results
    parts = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).count_parts()
    idle = parts["t2u_encoder"] + parts["unit_decoder"]
    assert results["trainable_parameters"] == results["total_parameters"] - idle


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tgt_text", "...", "column `target_text` has no word"),
        ("tgt_audio", " ".join(["7", "8"] * 90), "unit_labels: 180 frames needed"),
        ("src_text", "marque uno dos tres " * 40, "asr_labels: .* frames needed"),
    ],
)
def test_rows_that_cannot_be_learned_are_named(corpus, tmp_path, column, value, message):
    rows = [line.split("\t") for line in corpus.read_text().splitlines()]
    place = rows[0].index(column)
    for cells in rows[1:3]:
        cells[place] = value
    manifest = corpus.with_name(f"broken_{column}.tsv")
    manifest.write_text("\n".join("\t".join(cells) for cells in rows) + "\n")
    with pytest.raises(ValueError, match=message):
        _run(manifest, tmp_path, *TINY, "--max_steps", 1)
    assert not (tmp_path / "model.safetensors").exists()


def test_units_outside_the_model_s_are_named(trained, corpus, tmp_path):
    manifest = corpus.with_name("other_units.tsv")
    manifest.write_text(corpus.read_text().replace("\t0 3 6 9", "\t0 3 6 99"))
    with pytest.raises(ValueError, match="unit 99 is none of the model's 12"):
        _run(manifest, tmp_path, "--start", "transfer", "--checkpoint", trained, "--max_steps", 1)
