"""Every YAML file of a run that ships is run, on a few clips and with tiny models; a new one needs a run here."""

import json
from pathlib import Path

import pytest

from recipes import adapt_domain, personalize, train_audio_lm, train_ctc, train_s2st
from tests.speech_models import save_base
from tests.translation_models import TINY_FIELDS, write_translation_corpus

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
TINY_RECOGNIZER = ("--hidden_size", 8, "--num_hidden_layers", 1, "--max_steps", 1)
TINY_ADAPTER = ("--num_heads", 2, "--ffn_size", 16, "--max_steps", 1, "--max_new_tokens", 2)
TINY_TRANSLATOR = ("--model_fields", *TINY_FIELDS, "--vocab_size", 60, "--eval_split", "test", "--max_steps", 1)
# The recipe of each file, the base of its run, and what makes the run small.
RUNS = {
    "train_ctc_fsdd": (train_ctc, None, TINY_RECOGNIZER),
    "train_ctc_emformer": (train_ctc, None, TINY_RECOGNIZER),
    "train_ctc_synthetic": (train_ctc, None, TINY_RECOGNIZER),
    "personalize_fsdd": (personalize, "small", ("--speaker_id", "ann", "--max_steps", 1)),
    "personalize_synthetic": (personalize, "small", ("--speaker_id", "ann", "ben", "--max_steps", 1)),
    "personalize_whisper": (personalize, "whisper", ("--speaker_id", "ann", "--max_steps", 1, "--language", "en")),
    "adapt_domain_fsdd": (adapt_domain, "whisper", TINY_ADAPTER),
    "adapt_domain_qwen2_audio": (adapt_domain, "qwen2_audio", (*TINY_ADAPTER, "--simulate_domain", "ldv")),
    "train_s2st_synthetic": (train_s2st, None, TINY_TRANSLATOR),
    "train_audio_lm_barista": (train_audio_lm, "audio_lm", ("--max_steps", 1, "--max_answer_tokens", 40)),
    "train_audio_lm_fsdd": (train_audio_lm, "audio_lm", ("--max_steps", 1)),
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_ships_runs(
    run_recipe_main, small_corpus, small_base, audio_lm_bases, few_words, tmp_path, config
):
    recipe, base, flags = RUNS[config.stem]
    if base == "audio_lm":
        sides = ("--encoder", audio_lm_bases["whisper"], "--language_model", audio_lm_bases["llama"])
        words = ("--dataset", few_words, "--transcripts", few_words / "words.jsonl")
        flags = (*flags, *sides, *words, "--cache_dir", tmp_path / "cache")
    elif base:
        folder = small_base if base == "small" else save_base(base, tmp_path / "base")
        flags = (*flags, "--model_name_or_path", folder, "--cache_dir", tmp_path / "cache")
    is_translated = recipe is train_s2st
    corpus = write_translation_corpus(tmp_path / "corpus") if is_translated else small_corpus
    run_recipe_main(recipe.main, "--config", config, "--dataset", corpus, "--output_dir", tmp_path / "out", *flags)
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert any(name.endswith(("wer", "cosine_after", "exact_match")) for name in results)
