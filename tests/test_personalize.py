"""The recipe that adapts a recogniser to a speaker, run as its users do, on a few clips of synthetic speech."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCTC, AutoProcessor, pipeline

from modeling import DeepSpeech2Config, DeepSpeech2ForCTC, SpeechAdapterConfig
from recipes.personalize import main
from training.personal import HIDDEN_SIZES


@pytest.fixture
def personalize(run_recipe_main, small_base, small_corpus):
    """Adapts the small base to ann in three quick steps; returns the output folder."""

    def run(output_dir: Path, *flags: object, speaker_id: str = "ann") -> Path:
        run_recipe_main(
            main, "--model_name_or_path", small_base, "--dataset", small_corpus, "--speaker_id", speaker_id,
            "--adapter_hidden_sizes", 4, "--max_steps", 3, "--learning_rate", "1e-2", "--save_strategy", "no",
            "--output_dir", output_dir, *flags,
        )  # fmt: skip
        return output_dir

    return run


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", HIDDEN_SIZES)
def test_personalize_writes_the_adapter_alone_and_leaves_the_base_as_it_was(personalize, small_base, tmp_path, kind):
    base_before = read_folder(small_base)
    output_dir = personalize(tmp_path / "ann", "--adapter_kind", kind)
    assert read_folder(small_base) == base_before
    AutoProcessor.from_pretrained(small_base).save_pretrained(tmp_path / "processor")
    processor_files = {path.name for path in (tmp_path / "processor").iterdir()}
    assert {path.name for path in output_dir.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "eval_results.json",
        "results.png",
        *processor_files,
    }
    assert {"processor_config.json", "vocab.json"} <= processor_files
    tensors = load_file(output_dir / "adapter_model.safetensors")
    assert tensors
    assert all("speech_adapter_blocks" in name for name in tensors)
    results = json.loads((output_dir / "eval_results.json").read_text())
    assert results["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    base = AutoModelForCTC.from_pretrained(small_base)
    assert results["total_parameters"] == base.count_parameters()["total"] + results["trainable_parameters"]
    assert {"base_wer", "eval_wer", "base_cer", "eval_cer", "train_runtime"} <= results.keys()


def test_personalize_trains_on_no_more_speech_than_allowed(personalize, tmp_path):
    results = json.loads((personalize(tmp_path / "out", "--max_train_seconds", 1.5) / "eval_results.json").read_text())
    assert 0 < results["train_seconds"] <= 1.5


def test_personalize_saves_an_adapter_that_changes_the_base_and_can_be_turned_off(personalize, small_base, tmp_path):
    output_dir = personalize(tmp_path / "ann")
    model = AutoModelForCTC.from_pretrained(small_base).eval()
    features = torch.randn(2, 40, 16)
    with torch.no_grad():
        base_logits = model(features).logits
        model.load_adapter(str(output_dir))
        output = model(features, output_base_logits=True)
        assert not torch.equal(output.logits, base_logits)
        assert torch.equal(output.base_logits, base_logits)
        model.disable_adapters()
        assert torch.equal(model(features).logits, base_logits)


def test_personalize_starts_from_another_users_adapter(personalize, tmp_path):
    first = personalize(tmp_path / "ann", "--adapter_kind", "mlp")
    second = personalize(tmp_path / "ben", "--init_adapter", first, "--learning_rate", "1e-9", speaker_id="ben")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)


def test_personalize_resumes_to_the_same_adapter_as_the_uninterrupted_run(personalize, trained_steps, tmp_path):
    flags = ("--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 5)
    flags += ("--max_speed", 1.1, "--num_time_masks", 1, "--per_device_train_batch_size", 2)
    whole = personalize(tmp_path / "whole", *flags)
    checkpoint = whole / "checkpoint-2"
    assert not any(path.name == "model.safetensors" for path in whole.rglob("*"))
    resumed = personalize(tmp_path / "resumed", *flags, "--resume_from_checkpoint", checkpoint)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert trained_steps == [0, 1, 2, 3, 2, 3]


def test_personalize_fine_tunes_the_whole_model_on_request(personalize, small_base, tmp_path):
    output_dir = personalize(tmp_path / "full", "--unfreeze_base")
    results = json.loads((output_dir / "eval_results.json").read_text())
    assert results["trainable_parameters"] == results["total_parameters"]
    before, after = (AutoModelForCTC.from_pretrained(folder) for folder in (small_base, output_dir))
    assert not torch.equal(before.classifier[1].weight, after.classifier[1].weight)
    assert not (output_dir / "adapter_config.json").exists()


def test_personalize_refuses_a_folder_that_holds_another_adapter(personalize, tmp_path):
    output_dir = personalize(tmp_path / "ann")
    before = read_folder(output_dir)
    with pytest.raises(ValueError, match="`output_dir` must not hold another adapter, got .*Choose another folder"):
        personalize(output_dir, speaker_id="ben")
    assert read_folder(output_dir) == before


def test_personalize_refuses_the_folder_of_a_model(personalize, small_base):
    with pytest.raises(ValueError, match="`output_dir` must not hold a model, got"):
        personalize(small_base)


def test_personalize_refuses_an_unknown_speaker_and_writes_nothing(personalize, tmp_path):
    with pytest.raises(ValueError, match=r"`speaker_id` must be one of .*\(ann, ben\), got 'zoe'"):
        personalize(tmp_path / "zoe", speaker_id="zoe")
    assert not (tmp_path / "zoe").exists()


def test_personalize_never_turns_a_speakers_name_into_a_path(run_recipe_main, small_base, small_corpus, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = list(csv.reader((small_corpus / "metadata.csv").open()))
    manifest = [rows[0]] + [[str(small_corpus / name), "../ann", *rest] for name, _, *rest in rows[1:]]
    with (corpus / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(manifest)
    run_recipe_main(
        main, "--model_name_or_path", small_base, "--dataset", corpus / "metadata.csv", "--speaker_id", "../ann",
        "--adapter_hidden_sizes", 4, "--max_steps", 1, "--save_strategy", "no", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "out"}
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["speaker_id"] == "../ann"


def test_personalize_names_characters_that_the_base_cannot_write(run_recipe_main, small_base, korean_corpus, tmp_path):
    with pytest.raises(ValueError, match="`text` .*불"):
        run_recipe_main(
            main, "--model_name_or_path", small_base, "--dataset", korean_corpus, "--speaker_id", "minjun",
            "--adapter_hidden_sizes", 4, "--output_dir", tmp_path / "out",
        )  # fmt: skip


def test_personalize_refuses_an_adapter_that_is_a_large_share_of_the_model(personalize, tmp_path):
    with pytest.raises(ValueError, match=r"At most 20.0% of the parameters may train here, got"):
        personalize(tmp_path / "out", "--adapter_kind", "bottleneck", "--adapter_hidden_sizes", 512)


@pytest.mark.parametrize("kind", HIDDEN_SIZES)
def test_personalize_keeps_an_adapter_of_default_size_below_four_percent_of_the_shipped_recogniser(kind):
    config = DeepSpeech2Config(num_mel_bins=40, hidden_size=192, num_hidden_layers=2, vocab_size=20)
    model = DeepSpeech2ForCTC(config)
    model.add_adapter(SpeechAdapterConfig(kind=kind, hidden_sizes=HIDDEN_SIZES[kind]), "ann")
    counts = model.count_parameters()
    assert 0 < counts["adapter"] <= 0.04 * counts["total"]


def test_the_pipeline_of_the_library_takes_the_adapter_for_a_model(personalize, small_base, tmp_path):
    output_dir = personalize(tmp_path / "ann", "--learning_rate", "0.1")
    speech = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype("float32")
    recognise = pipeline("automatic-speech-recognition", model=str(output_dir), device="cpu")

    processor = AutoProcessor.from_pretrained(small_base)
    model = AutoModelForCTC.from_pretrained(small_base).eval()
    inputs = processor(speech, sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        base = model(**inputs).logits
        model.load_adapter(str(output_dir), "ann")
        expected = model(**inputs).logits
        piped = recognise.model(**inputs).logits
    assert torch.equal(piped, expected)
    assert not torch.equal(piped, base)
    assert recognise(speech)["text"] == processor.batch_decode(expected.argmax(-1))[0]
