"""The recipe that trains a recogniser, run as its users do, on a few clips of synthetic speech."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import AutoModelForCTC, AutoProcessor, Wav2Vec2CTCTokenizer

from modeling import DeepSpeech2ForCTC, JamoCTCTokenizer
from recipes.personalize import main as personalize_main
from recipes.train_ctc import main
from training.trainer import AdapterTrainer


def test_train_ctc_writes_a_model_that_the_auto_classes_load(small_base):
    model = AutoModelForCTC.from_pretrained(small_base)
    processor = AutoProcessor.from_pretrained(small_base)
    assert type(model) is DeepSpeech2ForCTC
    assert type(processor.tokenizer) is Wav2Vec2CTCTokenizer
    assert model.config.vocab_size == len(processor.tokenizer)
    assert processor.decode(processor(text="two one").labels, group_tokens=False) == "two one"


def test_train_ctc_reports_error_rates_and_leaves_the_excluded_speaker_out(small_base, small_corpus):
    results = json.loads((small_base / "eval_results.json").read_text())
    assert results["eval_wer"] > 0
    assert results["total_parameters"] == AutoModelForCTC.from_pretrained(small_base).count_parameters()["total"]
    rows = (small_corpus / "metadata.csv").read_text().splitlines()
    assert results["num_train_clips"] == sum(",ann," in row and ",train" in row for row in rows) > 0


def test_train_ctc_goes_on_from_a_checkpoint(run_recipe_main, small_base, small_corpus, tmp_path):
    run_recipe_main(
        main, "--model_name_or_path", small_base, "--dataset", small_corpus, "--output_dir", tmp_path / "out",
        "--max_steps", 1, "--learning_rate", "1e-9", "--initial_lr", "1e-9", "--final_lr", "1e-9",
    )  # fmt: skip
    before, after = (AutoModelForCTC.from_pretrained(folder) for folder in (small_base, tmp_path / "out"))
    torch.testing.assert_close(before.classifier[1].weight, after.classifier[1].weight, atol=1e-6, rtol=0)


def test_train_ctc_resumes_to_the_same_model_as_the_uninterrupted_run(
    run_recipe_main, small_corpus, trained_steps, tmp_path
):
    flags = ("--dataset", small_corpus, "--num_mel_bins", 16, "--hidden_size", 8, "--num_hidden_layers", 1,
             "--max_steps", 4, "--per_device_train_batch_size", 4, "--save_strategy", "steps", "--save_steps", 2,
             "--save_total_limit", 5, "--max_speed", 1.1)  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_recipe_main(main, *flags, "--output_dir", whole)
    run_recipe_main(main, *flags, "--output_dir", resumed, "--resume_from_checkpoint", whole / "checkpoint-2")
    assert trained_steps == [0, 1, 2, 3, 2, 3]
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_train_ctc_writes_korean_in_jamo(run_recipe_main, korean_corpus, tmp_path):
    run_recipe_main(
        main, "--dataset", korean_corpus, "--text_unit", "jamo", "--num_mel_bins", 16, "--hidden_size", 8,
        "--num_hidden_layers", 1, "--max_steps", 1, "--save_strategy", "no", "--output_dir", tmp_path,
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor.tokenizer) is JamoCTCTokenizer
    assert processor.decode(processor(text="불 켜 줘").labels, group_tokens=False) == "불 켜 줘"
    assert not any("가" <= token <= "힣" for token in processor.tokenizer.get_vocab())


def test_train_ctc_refuses_an_excluded_speaker_that_is_unknown(run_recipe_main, small_corpus, tmp_path):
    with pytest.raises(ValueError, match=r"`speaker_id` must be one of .*\(ann, ben\), got 'zoe'"):
        run_recipe_main(main, "--dataset", small_corpus, "--exclude_speakers", "zoe", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_train_ctc_streams_a_corpus(run_recipe_main, small_corpus, monkeypatch, tmp_path):
    trained, train = [], AdapterTrainer.train

    def note(self, *args, **kwargs):
        trained.append(self.train_dataset)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "train", note)
    run_recipe_main(
        main, "--dataset", small_corpus, "--streaming", "--exclude_speakers", "ben", "--num_mel_bins", 16,
        "--hidden_size", 8, "--num_hidden_layers", 1, "--max_steps", 2, "--per_device_train_batch_size", 2,
        "--save_strategy", "no", "--output_dir", tmp_path,
    )  # fmt: skip
    assert AutoModelForCTC.from_pretrained(tmp_path).config.num_mel_bins == 16
    assert [isinstance(dataset, IterableDataset) for dataset in trained] == [True]


def test_train_ctc_refuses_to_join_the_clips_of_a_stream(run_recipe_main, small_corpus, tmp_path):
    flags = ("--dataset", small_corpus, "--streaming", "--concatenate_max", 2, "--output_dir", tmp_path)
    with pytest.raises(ValueError, match="`concatenate_max` must be 1 with `streaming`, got 2"):
        run_recipe_main(main, *flags)


def test_train_ctc_normalises_by_the_language_and_saves_it_for_those_who_go_on(
    run_recipe_main, small_corpus, tmp_path, caplog, capsys
):
    corpus = shutil.copytree(small_corpus, tmp_path / "corpus")
    table = (corpus / "metadata.csv").read_text()
    (corpus / "metadata.csv").write_text(table.replace(",one,", ",[nefes] ISI,").replace(",two,", ",İki ...,"))
    flags = ("--dataset", corpus, "--transcript_style", "brackets", "--max_steps", 1, "--save_strategy", "no")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    run_recipe_main(
        main, *flags, "--language", "tr", "--num_mel_bins", 16, "--hidden_size", 8,
        "--num_hidden_layers", 1, "--output_dir", base,
    )  # fmt: skip
    tokenizer = AutoProcessor.from_pretrained(base).tokenizer
    assert set(tokenizer.get_vocab()) == {"<pad>", "<unk>", "|", *"ısıikithree"}
    assert "'[nefes] ISI' -> 'ISI'" in capsys.readouterr().err

    run_recipe_main(personalize_main, *flags, "--model_name_or_path", base, "--speaker_id", "ann",
                    "--adapter_hidden_sizes", 2, "--output_dir", adapter)  # fmt: skip
    assert (adapter / "eval_results.json").is_file()
    assert "outside the vocabulary" not in caplog.text  # as "isi" or "i\u0307ki" would be
    with pytest.raises(ValueError, match="`language` must be tr, by which .* got en"):
        run_recipe_main(personalize_main, *flags, "--model_name_or_path", base, "--speaker_id", "ann",
                        "--language", "en", "--output_dir", tmp_path / "other")  # fmt: skip
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "`max_steps` must be at least 1 with `streaming`, got -1"),
        (("--max_steps", 2, "--num_train_epochs", 3), "`num_train_epochs` must be left out with `streaming`, got 3"),
        (("--max_steps", 2, "--train_sampling_strategy", "sequential"), "`train_sampling_strategy` must be left out"),
    ],
)
def test_train_ctc_refuses_passes_and_orders_of_a_stream(run_recipe_main, small_corpus, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run_recipe_main(main, "--dataset", small_corpus, "--streaming", "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
