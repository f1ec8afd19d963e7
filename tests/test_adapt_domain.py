"""The recipe that adapts a model to another domain, run as its users do, on tiny models and a few synthetic clips."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data.ldv import LDVChannel
from inference.answering import answer, load_chat
from inference.audio_models import find_family, load_model
from modeling.adapters import adapters_off
from publishing.hub import HubTarget, collect_files
from recipes.adapt_domain import ARGUMENTS, main
from tests.speech_models import save_base
from training.arguments import parse_arguments
from training.audio_tower import load_tower_alone
from training.domain_methods import METHODS, DomainArguments

ROOT = Path(__file__).parents[1]
FAMILIES = ("whisper", "qwen2_audio")
TRAINED = [method for method in METHODS if method != "none"]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("adapt_domain_*.yaml"))
RATES = {
    "microphone_wer_before", "microphone_wer_off", "microphone_wer_on",
    "ldv_wer_before", "ldv_wer_off", "ldv_wer_after",
}  # fmt: skip


@pytest.fixture(scope="session")
def domain_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny Whisper and a tiny Qwen2-Audio."""
    return {family: save_base(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture
def run_main(run_recipe_main, domain_bases, tmp_path):
    """Adapts a tiny base in three quick steps; returns the output folder."""

    def run(dataset: Path, *flags: object, family: str = "whisper", output_dir: Path | None = None) -> Path:
        output_dir = output_dir or tmp_path / "out"
        run_recipe_main(
            main, "--model_name_or_path", domain_bases[family], "--dataset", dataset, "--preset", "lightweight",
            "--ffn_size", 16, "--num_heads", 2, "--lora_rank", 2, "--bottleneck_size", 4, "--max_steps", 3,
            "--learning_rate", "1e-2", "--max_new_tokens", 4, "--cache_dir", tmp_path / "cache", "--logging_steps", 3,
            "--output_dir", output_dir, *flags,
        )  # fmt: skip
        return output_dir

    return run


@pytest.fixture
def adapt_domain(run_main, small_corpus):
    """As `run_main`, to a simulated vibrometer."""

    def run(*flags: object, **options: object) -> Path:
        return run_main(small_corpus, "--simulate_domain", "ldv", *flags, **options)

    return run


@pytest.fixture
def recorded_corpus(small_corpus, tmp_path):
    """Writes a corpus with the small one's recordings in two domains, which a function may change row by row."""

    def write(change=lambda row: row) -> Path:
        folder = tmp_path / "recorded"
        folder.mkdir()
        rows = []
        for row in csv.DictReader((small_corpus / "metadata.csv").open()):
            row["file_name"] = str(small_corpus / row["file_name"])
            rows += [{**row, "domain": domain, "pair_id": row["file_name"]} for domain in ("microphone", "ldv")]
        rows = [changed for row in rows if (changed := change(row))]
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return folder / "metadata.csv"  # a manifest may name recordings elsewhere, a folder may not

    return write


def spy(monkeypatch, load, look) -> list:
    """What `look` sees in each model that the recipe loads with a function, right after it."""
    seen = []

    def load_and_look(*args, **kwargs):
        model = load(*args, **kwargs)
        seen.append(look(model))
        return model

    monkeypatch.setattr(f"training.domain_methods.{load.__name__}", load_and_look)
    return seen


def split_parameters(model) -> tuple[set[str], set[str]]:
    """Names of the parameters without memory, and of those outside the audio tower."""
    tower = find_family(model.config).tower
    names = {name: value.is_meta for name, value in model.named_parameters()}
    return {name for name in names if names[name]}, {name for name in names if not name.startswith(f"{tower}.")}


def read_results(folder: Path) -> dict:
    return json.loads((folder / "eval_results.json").read_text())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_writes_its_adapter_alone_and_leaves_the_base_as_it_was(adapt_domain, domain_bases, method):
    before = {path.name: path.read_bytes() for path in domain_bases["whisper"].iterdir()}
    output_dir = adapt_domain("--method", method)
    assert {path.name: path.read_bytes() for path in domain_bases["whisper"].iterdir()} == before
    AutoProcessor.from_pretrained(domain_bases["whisper"]).save_pretrained(output_dir.parent / "processor")
    processor_files = names(output_dir.parent / "processor")
    assert {name for name in names(output_dir) if "." in name and not name.endswith(".png")} == processor_files | {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "processor_config.json",
        "domain_report.json",
        "eval_results.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    results = read_results(output_dir)
    tensors = load_file(output_dir / "adapter_model.safetensors")
    assert results["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert results.keys() >= RATES
    assert (results["method"], results["objective"]) == (method, "task")
    assert results["microphone_wer_off"] == results["microphone_wer_before"]
    assert results["ldv_wer_off"] == results["ldv_wer_before"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_acts_and_is_nothing_when_off(adapt_domain, domain_bases, small_corpus, family):
    output_dir = adapt_domain("--objective", "both", "--scale_lr", "0.5", "--learning_rate", "0.3", family=family)
    base, prompt = load_chat(str(domain_bases[family]))
    model, _ = load_chat(str(domain_bases[family]), str(output_dir))
    samples, _ = soundfile.read(next(small_corpus.glob("*.wav")), dtype="float32")
    chats = [(None, [samples])]
    inputs = prompt.extract([samples]) | prompt.pad_asking([prompt.ask(None, [prompt.count_frames(len(samples))])])
    with torch.inference_mode():
        expected = base(**inputs).logits
        assert not torch.equal(model(**inputs).logits, expected)
        with adapters_off(model):
            assert torch.equal(model(**inputs).logits, expected)
            assert answer(model, prompt, chats, max_new_tokens=8) == answer(base, prompt, chats, max_new_tokens=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_needs_the_tower_alone_and_makes_features_more_alike(adapt_domain, monkeypatch, family):
    flags = ("--objective", "distill", "--tower_only", "--max_steps", 24, "--report_clips", 2, "--use_gate", "true")
    flags += ("--logging_steps", 12)
    loaded = spy(monkeypatch, load_tower_alone, split_parameters)
    output_dir = adapt_domain(*flags, family=family)
    ((on_meta, outside),) = loaded
    assert on_meta == outside != set()
    results = read_results(output_dir)
    assert results["ldv_feature_cosine_after"] > results["ldv_feature_cosine_before"]
    assert results["ldv_feature_l2_after"] < results["ldv_feature_l2_before"]
    assert not any("wer" in name for name in results)
    assert {"report_maps_0.png", "report_maps_1.png", "report_gates.png", "report_scale.png"} <= names(output_dir)
    fingerprint = json.loads((output_dir / "adapter_config.json").read_text())["base_fingerprint"]
    assert len(fingerprint["weights"]) == 32
    assert fingerprint["num_parameters"] == results["total_parameters"] - results["trainable_parameters"]


def test_a_distilled_adapter_is_measured_on_the_whole_model(adapt_domain):
    results = read_results(adapt_domain("--objective", "distill", "--method", "bottleneck", "--num_channels", 2))
    assert results.keys() >= RATES | {"ldv_feature_cosine_after"}
    assert results["microphone_wer_off"] == results["microphone_wer_before"]


def test_a_resumed_adaptation_equals_the_uninterrupted_one(adapt_domain, trained_steps, tmp_path):
    flags = ("--objective", "both", "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2)
    flags += ("--save_total_limit", 5, "--per_device_train_batch_size", 2)
    whole = adapt_domain(*flags, output_dir=tmp_path / "whole")
    resume = ("--resume_from_checkpoint", whole / "checkpoint-2")
    resumed = adapt_domain(*flags, *resume, output_dir=tmp_path / "resumed")
    assert trained_steps == [0, 1, 2, 3, 2, 3]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_caching_changes_nothing_but_the_time(adapt_domain, monkeypatch, tmp_path):
    flags = ("--objective", "both", "--adapter_dropout", 0.0)
    calls, forward = [], WhisperEncoder.forward

    def count(self, *args, **kwargs):
        calls[-1] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WhisperEncoder, "forward", count)
    folders = []
    for run, cached in (("fresh", "false"), ("cached", "true"), ("again", "true")):
        calls.append(0)
        folders.append(adapt_domain(*flags, "--cache_features", cached, output_dir=tmp_path / run))
        assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == (cached == "true")
    assert calls[0] > calls[1] > calls[2]
    fresh, cached, again = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert [name for name in cached if not torch.equal(cached[name], again[name])] == []
    for name, tensor in cached.items():
        torch.testing.assert_close(fresh[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("method", ["lora_llm", "domain_adapter"])
def test_adapters_learn_in_full_precision_over_a_base_in_four_bits(adapt_domain, monkeypatch, method):
    layers = spy(monkeypatch, load_model, lambda model: type(model.model.language_model.layers[0].mlp.up_proj))
    output_dir = adapt_domain("--method", method, "--load_in_4bit", "true", family="qwen2_audio")
    assert [layer.__name__ for layer in layers] == ["Linear4bit"]
    tensors = load_file(output_dir / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    last = [tensor for name, tensor in tensors.items() if "lora_B" in name or "output_norm" in name]
    assert all(tensor.any() for tensor in last)


def test_the_method_none_measures_the_base(adapt_domain):
    output_dir = adapt_domain("--method", "none")
    assert names(output_dir) == {"eval_results.json"}
    assert {"method", "microphone_wer_before", "ldv_wer_before"} <= read_results(output_dir).keys()


def test_the_folder_is_ready_for_the_hub_with_the_code_of_its_kind(adapt_domain):
    output_dir = adapt_domain("--objective", "distill", "--tower_only")
    files = collect_files(output_dir, HubTarget("me/ldv", base_model_id="me/base", base_revision="abc"))
    card = files["README.md"].decode()
    assert 'get_class_from_dynamic_module("adapters.SpeechAdapterConfig", "me/ldv")' in card
    assert 'WhisperForConditionalGeneration.from_pretrained("me/ldv")' in card
    assert "(report_gradients.png)" in card
    assert {"adapters.py", "adapter_blocks.py", "domain_report.json", "report_gradients.png"} <= files.keys()
    assert str(output_dir.parent) not in card


def test_recordings_of_two_domains_are_trained_on_as_pairs(run_main, recorded_corpus):
    results = read_results(run_main(recorded_corpus(), "--objective", "distill", "--tower_only"))
    assert results["ldv_feature_cosine_before"] == pytest.approx(1.0, abs=1e-6)  # the same recordings


def test_a_missing_partner_is_named(run_main, recorded_corpus):
    def drop(row: dict) -> dict | None:
        return None if row["domain"] == "ldv" and "ann_two_0" in row["file_name"] else row

    with pytest.raises(
        ValueError, match="Every clip must have a partner in the other domain, got none for .*ann_two_0"
    ):
        run_main(recorded_corpus(drop), "--objective", "distill")


def test_pairs_are_not_needed_for_a_task(run_main, recorded_corpus):
    def keep_some(row: dict) -> dict | None:
        return None if row["domain"] == "microphone" and row["speaker_id"] == "ann" else row

    assert read_results(run_main(recorded_corpus(keep_some))).keys() >= RATES


def test_a_domain_without_data_is_refused(run_main, recorded_corpus):
    with pytest.raises(ValueError, match=r"`target_domain` must be one of .*\(ldv, microphone\), got 'throat'"):
        run_main(recorded_corpus(), "--target_domain", "throat")


def test_an_adapter_of_another_width_is_refused(adapt_domain, domain_bases):
    output_dir = adapt_domain("--objective", "distill", "--tower_only")
    config = json.loads((output_dir / "adapter_config.json").read_text())
    (output_dir / "adapter_config.json").write_text(json.dumps(config | {"ffn_size": 24}))
    with pytest.raises(ValueError, match="`adapter` must be an adapter of this base, got .* should be"):
        load_chat(str(domain_bases["whisper"]), str(output_dir))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--objective", "distill", "--tower_only"), "8 of 12 clips are longer than 2 s and are split"),
        ((), "8 split clips are left out of training: a transcript cannot be split"),
    ],
)
def test_long_clips_are_split_with_a_message(run_main, recorded_corpus, tmp_path, caplog, flags, message):
    def lengthen(row: dict) -> dict:
        samples, rate = soundfile.read(row["file_name"])
        path = tmp_path / f"long_{Path(row['file_name']).name}"
        soundfile.write(path, np.tile(samples, 1 if "three" in path.name else 8), rate)
        return {**row, "file_name": str(path)}

    run_main(recorded_corpus(lengthen), "--max_steps", 1, *flags)
    assert message in caplog.text


def test_a_folder_with_another_adapter_is_refused(adapt_domain):
    adapt_domain("--objective", "distill", "--tower_only")
    with pytest.raises(ValueError, match="`output_dir` must not hold another adapter"):
        adapt_domain("--objective", "distill", "--tower_only")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"objective": "distill", "method": "projector"},
            "`objective` distill trains what changes the tower's output",
        ),
        (
            {"objective": "both", "method": "lora_llm"},
            "domain_adapter and bottleneck, got lora_llm. Use `--objective task`",
        ),
        ({"tower_only": True}, "`tower_only` needs `--objective distill`, got task"),
        ({"target_domain": "microphone"}, "`target_domain` must not be the source domain, got 'microphone'"),
        ({"num_channels": 0}, "`num_channels` must be at least 1, and 1 for recordings, got 0"),
        ({"num_channels": 2}, "`num_channels` must be at least 1, and 1 for recordings, got 2"),
        (
            {"num_channels": 2, "simulate_domain": "ldv", "cache_features": False},
            "`num_channels` above 1 needs `--cache_features true`, got 2",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DomainArguments(model_name_or_path="base", **settings)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_parses(path, tmp_path):
    tokens = ["--config", str(path), "--dataset", "fsdd", "--output_dir", str(tmp_path)]
    base = ["--model_name_or_path", "base"] if "fsdd" in path.stem else []
    domain_args, _, channel, _, training_args = parse_arguments(*ARGUMENTS, argv=[*tokens, *base])
    assert domain_args.objective in ("task", "distill")
    assert channel == LDVChannel()
    assert 1e-5 < training_args.learning_rate <= training_args.scale_lr


def test_there_is_a_configuration_for_each_family():
    assert [path.stem for path in CONFIGS] == ["adapt_domain_fsdd", "adapt_domain_qwen2_audio"]
