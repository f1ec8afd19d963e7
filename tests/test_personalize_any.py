"""Any recogniser learns a speaker through the recipe: adapters train, save, load, switch, and leave the base alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from inference.decoding import extract_inputs
from inference.recognizers import open_recognizer
from modeling.adapters import adapters_off
from recipes.personalize import main
from recipes.train_ctc import main as train_ctc_main
from tests.ctc_models import MAKERS, save_ctc_base
from tests.speech_models import save_base
from training.personal import PersonalArguments, make_personal_config

FAMILIES = [*sorted(MAKERS), "whisper"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two speakers with three clips to train on and one to evaluate on."""
    folder, generator = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    rows = ["file_name,text,speaker_id,split"]
    for speaker in ("ann", "ben"):
        for number, text in enumerate(("zero one", "one", "two", "one zero")):
            name = f"{speaker}_{number}.wav"
            soundfile.write(folder / name, generator.normal(0, 0.1, 16_000 + 800 * number), 16_000)
            rows.append(f"{name},{text},{speaker},{'test' if number == 3 else 'train'}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    return str(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_ctc_base(family, folder / family) for family in MAKERS} | {
        "whisper": str(save_base("whisper", folder / "whisper"))
    }


@pytest.fixture
def personalize(run_recipe_main, bases, corpus, tmp_path):
    """Adapts a base of a family in a few quick steps; returns the output folder."""

    def run(family: str, *flags: object, speaker_id: str = "ann", steps: int = 4) -> str:
        run_recipe_main(
            main, "--model_name_or_path", bases[family], "--dataset", corpus, "--speaker_id", speaker_id,
            "--adapter_hidden_sizes", 2, "--lora_rank", 1,
            "--max_steps", steps, "--learning_rate", "1e-2", "--language", "en", "--output_dir", tmp_path / "out",
            "--pause_share", 0, "--room_share", 0, "--device_share", 0, "--cache_dir", tmp_path / "cache", *flags,
        )  # fmt: skip
        return str(tmp_path / "out")

    return run


def compute(recognizer, clip):
    """Scores of a clip: logits of a CTC model, or of a Whisper's first tokens."""
    samples = soundfile.read(clip, dtype="float32")[0]
    if hasattr(recognizer, "prompt"):
        inputs = recognizer.prompt.extract([samples]) | {"decoder_input_ids": torch.tensor([[3, 7, 9]])}
    else:
        inputs = extract_inputs(recognizer.processor, [samples])
        inputs = {name: inputs[name] for name in (recognizer.model.main_input_name, "attention_mask")}
    with torch.no_grad():
        return recognizer.model(**inputs).logits


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_trains_loads_switches_and_leaves_the_base_alone(family, kind, personalize, bases, corpus):
    folder = personalize(family, "--adapter_kind", kind)
    results = json.loads(Path(folder, "eval_results.json").read_text())
    assert 0 < results["trainable_parameters"] < 0.2 * results["total_parameters"]
    assert results["train_seconds"] == pytest.approx(3.15)

    clip = f"{corpus}/ann_3.wav"
    base = compute(open_recognizer(bases[family], language=["en"]), clip)
    recognizer = open_recognizer(bases[family], {"ann": folder}, language=["en"])
    assert not torch.equal(compute(recognizer, clip), base)
    with adapters_off(recognizer.model):
        assert torch.equal(compute(recognizer, clip), base)


@pytest.mark.parametrize(("family", "kind"), [("hubert", "mlp"), ("whisper", "mlp"), ("whisper", "transformer")])
def test_other_kinds_have_a_place_in_models_of_transformers(family, kind, personalize):
    assert Path(personalize(family, "--adapter_kind", kind), "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("family", ["wavlm", "whisper"])
def test_loss_on_the_training_speech_falls(family, personalize, tmp_path):
    personalize(
        family, "--adapter_kind", "lora", "--learning_rate", "3e-2", "--logging_steps", 1, "--report_to", "none",
        "--adapter_dropout", 0, "--save_strategy", "steps", "--save_steps", 12, steps=12,
    )  # fmt: skip
    state = json.loads((tmp_path / "out" / "checkpoint-12" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


def test_speakers_of_a_model_that_cannot_stack_train_one_after_the_other(personalize, bases, corpus, caplog):
    folder = Path(personalize("hubert", speaker_id="all"))
    assert "The speakers train one after the other" in caplog.text
    summary = json.loads((folder / "eval_results.json").read_text())
    assert [row["speaker_id"] for row in summary["speakers"]] == ["ann", "ben"]
    adapters = {name: str(folder / name) for name in ("ann", "ben")}
    recognizer = open_recognizer(bases["hubert"], adapters)
    clips = [f"{corpus}/ann_3.wav"] * 2
    said = recognizer.transcribe(clips, adapter_names=["ann", "ben"], batch_size=2)
    alone = [open_recognizer(bases["hubert"], {"x": folder}).transcribe(clips[:1]) for folder in adapters.values()]
    assert [one.text for one in said] == [next(iter(other)).text for other in alone]


def test_whispers_encoder_runs_once_where_nothing_inside_it_trains(personalize, tmp_path, caplog):
    personalize("whisper", "--adapter_kind", "lora")
    (cache,) = (tmp_path / "cache").glob("*/states.safetensors")
    written = cache.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "out")
    personalize("whisper", "--adapter_kind", "bottleneck")
    assert cache.stat().st_mtime_ns == written  # another adapter of the same base reads the same states
    assert "The encoder is not cached" not in caplog.text


def test_default_sizes_are_a_small_part_of_a_whisper():
    config = WhisperConfig(d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
                           decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536)  # fmt: skip
    for kind in ("bottleneck", "mlp", "lora"):
        with torch.device("meta"):
            model = WhisperForConditionalGeneration(config)
        total = model.num_parameters()
        arguments = PersonalArguments("base", ["ann"], adapter_kind=kind)
        model.add_adapter(make_personal_config(arguments, "whisper"), "ann")
        assert 0 < model.num_parameters(only_trainable=True) <= 0.02 * total


def test_english_only_whisper_refuses_a_language_that_it_has_no_token_of(bases, corpus, run_recipe_main, tmp_path):
    with pytest.raises(ValueError, match="`language` must be one of the model's, got 'ko'"):
        run_recipe_main(
            main, "--model_name_or_path", bases["whisper"], "--dataset", corpus, "--speaker_id", "ann",
            "--language", "ko", "--output_dir", tmp_path / "out",
        )  # fmt: skip


@pytest.mark.parametrize("family", ["hubert", "parakeet"])
def test_a_ctc_model_of_transformers_is_fine_tuned_whole(family, bases, corpus, run_recipe_main, tmp_path):
    run_recipe_main(
        train_ctc_main, "--model_name_or_path", bases[family], "--dataset", corpus, "--language", "en",
        "--max_steps", 2, "--learning_rate", "1e-2", "--output_dir", tmp_path / "tuned",
    )  # fmt: skip
    results = json.loads((tmp_path / "tuned" / "eval_results.json").read_text())
    clip = f"{corpus}/ann_3.wav"
    tuned = open_recognizer(str(tmp_path / "tuned"))
    assert not torch.equal(compute(tuned, clip), compute(open_recognizer(bases[family]), clip))
    assert results["total_parameters"] == tuned.model.num_parameters()


def test_fine_tuning_a_whisper_with_ctc_is_refused(bases, corpus, run_recipe_main, tmp_path):
    with pytest.raises(ValueError, match="must be a CTC model, got a Whisper in .* with `recipes/personalize.py`"):
        run_recipe_main(
            train_ctc_main, "--model_name_or_path", bases["whisper"], "--dataset", corpus, "--output_dir",
            tmp_path / "tuned",
        )  # fmt: skip
