"""The recipe that scores translation models, run as its users do, on a model that train_s2st.py made."""

import json

import pytest
import torch
from translation_models import SENTENCES, TINY_FIELDS, write_translation_corpus

from data.translation_metrics import score_bleu
from inference.translation_scoring import load_translator
from modeling import SpeechAdapterConfig
from modeling.adapter_files import save_adapter
from recipes.evaluate_s2st import main
from recipes.train_s2st import main as train_s2st


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> str:
    return str(write_translation_corpus(tmp_path_factory.mktemp("translation") / "corpus"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, manifest, run_recipe_main) -> str:
    """A tiny model after two steps."""
    folder = tmp_path_factory.mktemp("s2st")
    run_recipe_main(
        train_s2st, "--dataset", manifest, "--vocab_size", 60, "--max_steps", 2, "--model_fields", *TINY_FIELDS,
        "--output_dir", folder,
    )  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, model_folder) -> str:
    """An adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("adapter")
    model, processor = load_translator(model_folder)
    config = SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[4], target_modules=r"encoder\.layers\.\d+")
    model.add_adapter(config, "adapter")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * ("adapter" in name))
    save_adapter(model, folder, "adapter", processor=processor)
    return str(folder)


def evaluate(tmp_path, *tokens: str) -> dict:
    output = tmp_path / "scores.json"
    main([*tokens, "--output_file", str(output)])
    return json.loads(output.read_text(encoding="utf-8"))


def test_the_table_has_scores_and_health_of_every_head(model_folder, manifest, tmp_path, capsys):
    content = evaluate(tmp_path, "--model_name_or_path", model_folder, "--dataset", manifest)
    printed = capsys.readouterr().out
    figures = content["figures"]["model"]
    assert set(figures) == {
        "wer", "cer", "st_bleu", "st_chrf", "mt_bleu", "mt_chrf", "unit_error_rate", "encoder_cosine",
        "feature_cosine", "asr_blank_share", "st_blank_share", "unit_blank_share", "asr_infeasible_share",
        "st_infeasible_share", "unit_infeasible_share",
    }  # fmt: skip
    assert f"| wer                   | {100 * figures['wer']:.2f} %" in printed
    assert f"| mt bleu               | {figures['mt_bleu']:.2f} " in printed


def test_the_file_says_what_was_said_of_every_clip_and_how_it_was_scored(model_folder, manifest, tmp_path):
    content = evaluate(tmp_path, "--model_name_or_path", model_folder, "--dataset", manifest)
    rows = content["utterances"]
    assert {row["text"]: row["target_text"] for row in rows} == SENTENCES
    scores = score_bleu([row["model"]["st_text"] for row in rows], list(SENTENCES.values()))
    assert content["figures"]["model"]["st_bleu"] == pytest.approx(scores["bleu"])
    assert content["bleu_signature"] == scores["bleu_signature"]
    assert content["arguments"]["dataset"] == manifest


def test_alarms_are_printed_with_their_cause(model_folder, manifest, tmp_path, caplog):
    model, processor = load_translator(model_folder)
    model.st_ctc_decoder.bias.data[model.config.blank_token_id] += 50
    model.save_pretrained(tmp_path / "ill")
    processor.save_pretrained(tmp_path / "ill")
    content = evaluate(tmp_path, "--model_name_or_path", str(tmp_path / "ill"), "--dataset", manifest)
    assert content["figures"]["model"]["st_blank_share"] == 1
    (alarm,) = [alarm for alarm in content["alarms"]["model"] if "translation's CTC says the blank" in alarm]
    assert alarm in caplog.text


def test_an_adapter_is_scored_beside_the_model_as_it_is(model_folder, adapter_folder, manifest, tmp_path, capsys):
    base = ("--model_name_or_path", model_folder, "--dataset", manifest)
    alone = evaluate(tmp_path, *base)
    both = evaluate(tmp_path, *base, "--adapter", adapter_folder)
    assert list(both["figures"]) == ["unadapted", "adapted"]
    assert both["figures"]["unadapted"] == pytest.approx(alone["figures"]["model"])
    assert both["figures"]["adapted"]["encoder_cosine"] != pytest.approx(alone["figures"]["model"]["encoder_cosine"])
    assert "unadapted" in capsys.readouterr().out


def test_the_split_that_recipes_train_on_is_warned_of(model_folder, manifest, caplog):
    main(["--model_name_or_path", model_folder, "--dataset", manifest, "--split", "train"])
    assert "`split` is 'train', which recipes train on" in caplog.text


def test_a_recogniser_is_refused(tiny_base, manifest):
    with pytest.raises(ValueError, match="`model_name_or_path` must be an EchoStream with its processor, got"):
        main(["--model_name_or_path", tiny_base, "--dataset", manifest])
