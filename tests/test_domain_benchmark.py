"""The benchmark of domain adapters: its base hears whole digits, its runs are the recipe's, its tables add up."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import WhisperProcessor

from benchmarks.domain_adapters import TABLES, list_runs, summarize
from benchmarks.domain_base import (
    AUGMENTATION,
    CHUNK_SECONDS,
    GuidedWhisper,
    WhisperUtterances,
    collate,
    make_model,
    make_processor,
    measure_wer,
    read_corpus,
    split_recordings,
    synthesize_phrases,
)
from data.audio import SAMPLING_RATE
from data.corpora import load_corpus
from data.prepare_fsdd import DIGITS
from recipes.adapt_domain import ARGUMENTS
from training.arguments import parse_arguments


@pytest.fixture(scope="module")
def processor() -> WhisperProcessor:
    return make_processor()


@pytest.fixture
def recordings(small_corpus):
    """Six recordings of two synthetic speakers who say three digits."""
    return load_corpus(str(small_corpus), split="train")


def test_every_digit_is_one_token(processor):
    tokens = processor.tokenizer(f" {' '.join(DIGITS)}", add_special_tokens=False).input_ids
    assert len(tokens) == 10
    assert len(set(tokens)) == 10
    assert processor.tokenizer.decode(tokens) == f" {' '.join(DIGITS)}"


def test_processor_and_model_come_back_from_disk(processor, tmp_path):
    torch.manual_seed(0)
    model = make_model(processor).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = WhisperProcessor.from_pretrained(tmp_path)
    features = torch.randn(1, 80, CHUNK_SECONDS * 100, generator=torch.Generator().manual_seed(0))

    assert loaded.tokenizer(" two nine").input_ids == processor.tokenizer(" two nine").input_ids
    assert loaded.feature_extractor.n_samples == CHUNK_SECONDS * SAMPLING_RATE
    expected = model.generate(features, max_new_tokens=4)
    assert type(model).from_pretrained(tmp_path).eval().generate(features, max_new_tokens=4).tolist() == (
        expected.tolist()
    )


def test_held_out_recordings_are_the_first_four_of_every_speaker_and_digit():
    columns = {"speaker_id": ["ann", "ben"] * 6, "text": ["one", "two"] * 6, "number": list(range(12))}
    kept, held_out = split_recordings(Dataset.from_dict(columns))
    assert held_out["number"][:] == list(range(8))
    assert kept["number"][:] == list(range(8, 12))


def test_phrases_are_short_varied_and_always_the_same():
    phrases, again = synthesize_phrases(seed=0, num_phrases=2), synthesize_phrases(seed=0, num_phrases=2)
    assert {word for text in phrases["text"] for word in text.split()} <= set(DIGITS)
    assert {len(text.split()) for text in phrases["text"]} == {1, 2, 3}
    assert phrases["samples"] == again["samples"]
    assert max(phrases["num_samples"]) <= CHUNK_SECONDS * SAMPLING_RATE


def test_utterances_leave_out_the_clips_that_do_not_fit(processor, recordings):
    clips = read_corpus(recordings.select([0, 0, 0]))
    samples = np.ones(CHUNK_SECONDS * SAMPLING_RATE // 2, np.float32)
    clips = clips.map(lambda _: {"samples": samples, "num_samples": len(samples)})
    utterances = WhisperUtterances(clips, processor, concatenate=(3, 3))
    words = processor.tokenizer.decode(utterances[0]["labels"], skip_special_tokens=True).split()
    assert words == clips["text"][:2]


def test_augmented_utterances_are_the_same_in_the_same_epoch_alone(processor, recordings):
    first, second = (
        WhisperUtterances(read_corpus(recordings), processor, augmentation=AUGMENTATION) for _ in range(2)
    )
    assert torch.equal(first[1]["input_features"], second[1]["input_features"])
    second.set_epoch(1)
    assert not torch.equal(first[1]["input_features"], second[1]["input_features"])


def test_guided_loss_is_the_decoders_and_ctc_of_the_words(processor, recordings):
    torch.manual_seed(0)
    utterances = WhisperUtterances(read_corpus(recordings), processor, concatenate=(1, 2))
    blank = processor.tokenizer.eos_token_id
    guided = GuidedWhisper(make_model(processor), blank=blank).eval()
    batch = collate([utterances[index] for index in range(2)])
    losses = []
    for features, labels in zip(batch["input_features"], batch["labels"], strict=True):
        words = labels[(labels >= 0) & (labels < blank)]
        states = guided.whisper.model.encoder(features.unsqueeze(0)).last_hidden_state[0]
        log_probs = guided.head(states).log_softmax(-1)
        losses.append(torch.nn.functional.ctc_loss(log_probs, words, [len(log_probs)], [len(words)], blank=blank))

    expected = guided.whisper(**batch).loss + torch.stack(losses).mean()
    assert guided(**batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_wer_counts_what_the_base_says(processor, recordings):
    torch.manual_seed(0)
    utterances = WhisperUtterances(read_corpus(recordings), processor)
    model = make_model(processor)
    model.generation_config.max_length = 2  # room for the start alone: every word is missing
    assert measure_wer(model, utterances, batch_size=4) == 1.0


@pytest.mark.parametrize("table", TABLES)
def test_every_run_is_one_that_the_recipe_takes(table, tmp_path):
    runs = list_runs(table)
    shared = ["--model_name_or_path", "base", "--dataset", "fsdd", "--output_dir", str(tmp_path)]
    shared += ["--config", "recipes/configs/adapt_domain_fsdd.yaml"]
    for flags in runs.values():
        tokens = [str(token) for flag, value in flags.items() for token in (f"--{flag}", value)]
        parsed = {}
        for arguments in parse_arguments(*ARGUMENTS, argv=[*shared, *tokens]):
            parsed |= vars(arguments)
        assert {name: parsed[name] for name in flags} == flags
    assert len({str(flags) for flags in runs.values()}) == len(runs)


def test_table_shows_what_was_measured_and_nothing_else():
    rates = {"ldv_wer_before": 0.5, "microphone_wer_before": 0.05}
    after = {"ldv_wer_after": 0.2, "gap_closed": 2 / 3, "microphone_wer_off": 0.05, "microphone_wer_on": 0.07}
    rows = [{"row": "none", **rates}, {"row": "bottleneck, task", "trainable_parameters": 1234, **rates, **after}]
    table = summarize("methods", rows).splitlines()

    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == ["none", "", "50.0%", "", "", "5.0%", "", ""]
    assert [cell.strip() for cell in table[3].split("|")[1:-1]] == [
        "bottleneck, task", "1,234", "50.0%", "20.0%", "66.7%", "5.0%", "5.0%", "7.0%",
    ]  # fmt: skip
