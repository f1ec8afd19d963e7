"""Many speakers in one run: every adapter is the one that its speaker would get alone."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from ast import literal_eval
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from kills import kill_at_every_event
from safetensors.torch import load_file
from transformers import AutoModelForCTC

from modeling import SpeechAdapterConfig
from modeling.files import list_whole
from publishing.card import CardSubject
from recipes import train_ctc
from recipes.personalize import main
from training.personal import PersonalArguments, save_personal_outcome
from training.stacks import StackMember, list_unfinished, read_finished, train_stack

ROOT = Path(__file__).parents[1]
WEIGHTS = "adapter_model.safetensors"
NO_ROOMS = ("--pause_share", 0, "--room_share", 0, "--device_share", 0)
ROOMS = ("--pause_share", 1, "--room_share", 0.5, "--device_share", 0.5)


@pytest.fixture
def personalize(run_recipe_main, small_base, small_corpus, tmp_path):
    """Adapts the small base to speakers for three epochs, as recorded by default; returns the output folder."""

    def run(output: str, *speakers: str, flags: tuple = ()) -> Path:
        run_recipe_main(
            main, "--model_name_or_path", small_base, "--dataset", small_corpus, "--speaker_id", *speakers,
            "--adapter_hidden_sizes", 4, "--num_train_epochs", 3, "--per_device_train_batch_size", 4,
            "--learning_rate", "1e-2", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / output,
            *NO_ROOMS, *flags,
        )  # fmt: skip
        return tmp_path / output

    return run


def assert_close(first: Path, second: Path, *, atol: float) -> None:
    before, after = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=atol, rtol=0)


def is_close(first: Path, second: Path, *, atol: float) -> bool:
    before, after = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    return all(torch.allclose(after[name], value, atol=atol, rtol=0) for name, value in before.items())


@pytest.mark.parametrize(
    "flags",
    [
        ("--adapter_kind", "mlp"),
        ("--adapter_kind", "replacement", "--max_grad_norm", 0.1),
        ("--adapter_kind", "bottleneck", "--weight_decay", 0.1),
        ("--adapter_kind", "bottleneck", "--max_speed", 1.1, "--num_time_masks", 1, *ROOMS),
        ("--adapter_kind", "mlp", *ROOMS, "--cache_variants", 2),
    ],
    ids=["mlp", "replacement", "bottleneck", "augmented", "variants"],
)
def test_personalize_all_gives_each_speaker_the_adapter_that_a_run_alone_gives(personalize, flags):
    together = personalize("all", "all", flags=flags)
    for speaker in ("ann", "ben"):
        # Adam makes a step of the rounding where a gradient is near zero; other speech changes more than 1e-3.
        assert_close(personalize(speaker, speaker, flags=flags), together / speaker, atol=5e-4)


@pytest.mark.parametrize(
    "flags",
    [("--max_speed", 1.2), ("--num_time_masks", 2), ROOMS, (*ROOMS, "--cache_variants", 2)],
    ids=["speed", "masks", "rooms", "variants"],
)
def test_augmented_speech_teaches_a_stack_another_adapter_than_plain_speech(personalize, flags):
    plain, augmented = personalize("plain", "ann", "ben"), personalize("augmented", "ann", "ben", flags=flags)
    for speaker in ("ann", "ben"):
        assert not is_close(plain / speaker, augmented / speaker, atol=1e-3)


def test_dropout_teaches_a_stack_another_adapter(personalize):
    flags = ("--adapter_kind", "mlp", "--adapter_dropout")
    without, dropped = (personalize(f"p{share}", "ann", "ben", flags=(*flags, share)) for share in (0.0, 0.4))
    for speaker in ("ann", "ben"):
        assert not is_close(without / speaker, dropped / speaker, atol=1e-3)


def test_personalize_all_gives_the_same_adapters_in_stacks_of_one(personalize, monkeypatch):
    sizes = []

    def count(model, members, *args, **kwargs):
        sizes.append(len(members))
        return train_stack(model, members, *args, **kwargs)

    monkeypatch.setattr("training.stacks.train_stack", count)
    together = personalize("two", "ann", "ben")
    apart = personalize("one", "ann", "ben", flags=("--speakers_per_stack", 1))
    assert sizes == [2, 1, 1]
    for speaker in ("ann", "ben"):
        assert_close(apart / speaker, together / speaker, atol=1e-4)


def test_personalize_all_differs_between_speakers_and_from_the_start(personalize):
    together = personalize("all", "all", flags=("--adapter_kind", "mlp"))
    ann, ben = (load_file(together / speaker / WEIGHTS) for speaker in ("ann", "ben"))
    last = max(name for name in ann if name.endswith("weight"))
    assert not torch.equal(ann[last], torch.zeros_like(ann[last]))
    assert not torch.allclose(ann[last], ben[last], atol=1e-3)


def test_personalize_all_stops_each_speaker_early_as_a_run_alone_does(personalize, trained_steps, monkeypatch):
    stopped = []

    def finish(member):
        last = {name: value.clone() for name, value in member.blocks.state_dict().items()}
        finish_member(member)
        state = member.blocks.state_dict()
        stopped.append((member.step, member.num_steps))
        assert any(not torch.equal(last[name], best) for name, best in member.best_state.items())
        assert all(torch.equal(state[name], best) for name, best in member.best_state.items())

    finish_member = StackMember.finish
    monkeypatch.setattr(StackMember, "finish", finish)
    flags = ("--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end", "true",
             "--early_stopping_patience", 1, "--num_train_epochs", 6, "--learning_rate", "0.1")  # fmt: skip
    together = personalize("all", "all", flags=flags)
    for speaker, (num_steps, num_planned) in zip(("ann", "ben"), stopped, strict=True):
        trained_steps.clear()
        assert_close(personalize(speaker, speaker, flags=flags), together / speaker, atol=1e-4)
        assert len(trained_steps) == num_steps < num_planned


BEST = ("--load_best_model_at_end", "true", "--early_stopping_patience", 1, "--learning_rate", "0.1")
BEST_OF_EPOCHS = ("--eval_strategy", "epoch", "--save_strategy", "epoch", *BEST, "--num_train_epochs", 6)
BEST_OF_SHARES = ("--eval_strategy", "steps", "--eval_steps", "0.3", "--save_strategy", "steps", "--save_steps", "0.3",
                  *BEST, "--max_steps", 10)  # fmt: skip
PLATEAU = ("--eval_strategy", "epoch", "--lr_scheduler_type", "reduce_lr_on_plateau", "--learning_rate", "0.1",
           "--lr_scheduler_kwargs", '{"factor": 0.5, "patience": 0}', "--num_train_epochs", 6)  # fmt: skip


def read_logs(capsys) -> list[dict]:
    """What was logged of trainings and evaluations, without their speeds."""
    lines = re.findall(r"^\{'.*\}$", capsys.readouterr().out, re.MULTILINE)
    logs = [{key: value for key, value in literal_eval(line).items() if "_per_" not in key} for line in lines]
    return [row | {"eval_runtime": None} for row in logs if "train_runtime" not in row]


@pytest.mark.parametrize(
    ("flags", "num_evaluations"),
    [
        (BEST_OF_SHARES, range(2, 5)),
        ((*BEST_OF_EPOCHS, "--metric_for_best_model", "wer"), range(2, 7)),
        ((*BEST_OF_EPOCHS, "--greater_is_better", "true", "--eval_delay", 2), range(2, 6)),
        (PLATEAU, [6]),
    ],
    ids=["shares", "wer", "greatest", "plateau"],
)
def test_personalize_all_evaluates_stops_and_logs_as_a_run_alone_does(personalize, capsys, flags, num_evaluations):
    flags = (*flags, "--logging_steps", "0.2", "--logging_first_step", "--disable_tqdm", "true")
    together = personalize("all", "all", flags=flags)
    logs = read_logs(capsys)
    for speaker in ("ann", "ben"):
        assert_close(personalize(speaker, speaker, flags=flags), together / speaker, atol=1e-3)
        alone = read_logs(capsys)
        own = [{key: row[key] for key in row if key != "speaker"} for row in logs if row["speaker"] == speaker]
        assert len([row for row in own if "eval_loss" in row]) in num_evaluations
        assert [row.keys() for row in own] == [row.keys() for row in alone]
        for row, other in zip(own, alone, strict=True):
            assert {key: float(row[key]) for key in row if row[key]} == pytest.approx(
                {key: float(other[key]) for key in other if other[key]}, rel=2e-3
            )


def test_personalize_all_lowers_the_learning_rate_where_the_loss_stays(personalize, capsys):
    personalize("all", "all", flags=(*PLATEAU, "--logging_strategy", "epoch", "--disable_tqdm", "true"))
    rates = {float(row["learning_rate"]) for row in read_logs(capsys) if "learning_rate" in row}
    assert len(rates) > 1
    assert rates <= {0.1 * 0.5**step for step in range(6)}


def test_personalize_all_writes_adapters_that_load_and_a_summary(personalize, small_base):
    together = personalize("all", "all")
    summary = json.loads((together / "eval_results.json").read_text())
    assert [row["speaker_id"] for row in summary["speakers"]] == ["ann", "ben"]
    assert summary["num_speakers"] == 2
    for speaker in ("ann", "ben"):
        own = json.loads((together / speaker / "eval_results.json").read_text())
        model = AutoModelForCTC.from_pretrained(small_base)
        base = model.count_parameters()["total"]
        model.load_adapter(str(together / speaker), speaker)
        assert own["trainable_parameters"] == model.count_parameters()["adapter"] > 0
        assert own["total_parameters"] == base + own["trainable_parameters"]


def test_personalize_all_leaves_finished_speakers_as_they_are_when_resumed(personalize):
    together = personalize("all", "ann")
    first = personalize("both", "ann", "ben")
    before = (first / "ann" / WEIGHTS).stat().st_mtime_ns
    (first / "ben" / WEIGHTS).unlink()
    again = personalize("both", "ann", "ben", flags=("--resume_from_checkpoint", "true"))
    assert (again / "ann" / WEIGHTS).stat().st_mtime_ns == before
    assert (again / "ben" / WEIGHTS).is_file()
    assert_close(together, again / "ann", atol=1e-4)


@pytest.mark.parametrize("lost", ["eval_results.json", "README.md", "results.png", "adapter_config.json", WEIGHTS])
def test_personalize_all_completes_a_speaker_that_lacks_a_part_and_reports_all(personalize, lost):
    folder = personalize("both", "all")
    before = json.loads((folder / "eval_results.json").read_text())
    copied = Path(shutil.copytree(folder / "ben", folder.parent / "ben_before"))
    (folder / "ben" / lost).unlink()
    for name in ("eval_results.json", "results.png"):
        (folder / name).unlink()
    ann = (folder / "ann" / WEIGHTS).stat().st_mtime_ns

    personalize("both", "all", flags=("--resume_from_checkpoint", "true"))

    assert (folder / "ben" / lost).is_file()
    assert (folder / "ann" / WEIGHTS).stat().st_mtime_ns == ann
    assert_close(folder / "ben", copied, atol=1e-4)
    after = json.loads((folder / "eval_results.json").read_text())
    for row in before["speakers"] + after["speakers"]:
        row.pop("train_runtime")
        row.pop("adapter_bytes")
    assert after == before
    assert (folder / "results.png").is_file()


def test_personalize_all_reports_everybody_when_nobody_is_left_to_train(personalize):
    folder = personalize("both", "all")
    before = (folder / "eval_results.json").read_bytes()
    (folder / "eval_results.json").unlink()
    personalize("both", "all", flags=("--resume_from_checkpoint", "true"))
    assert (folder / "eval_results.json").read_bytes() == before


def test_a_late_process_trains_its_share_though_others_have_finished_theirs(personalize, monkeypatch):
    folder = personalize("both", "all")  # what the others have finished by now
    names = {"ann": "ann", "ben": "ben"}
    assert list_unfinished(names, str(folder), is_resumed=True) == []

    def receive(values: list) -> None:
        values[0] = ["ann", "ben"]  # what the first process had found

    monkeypatch.setattr("training.stacks.broadcast_object_list", receive)
    monkeypatch.setattr("accelerate.PartialState.is_main_process", False)
    assert list_unfinished(names, str(folder), is_resumed=True) == ["ann", "ben"]


def test_a_speaker_killed_at_any_event_of_a_save_is_unfinished_or_whole(
    tiny_model, tiny_processor, tmp_path, monkeypatch
):
    monkeypatch.setattr("os.fsync", lambda _file: None)  # an event all the same
    tiny_model.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[8]), "speaker")
    rates = {f"{state}_{rate}": 0.5 for state in ("base", "eval") for rate in ("wer", "cer")}
    sizes = {"trainable_parameters": 1, "total_parameters": 2, "train_seconds": 1.0, "train_runtime": 1.0}
    subject = CardSubject("me/corpus", "test", "Speech adapter.", base="me/base", picture="results.png")
    personal_args = PersonalArguments("me/base", ["ann"])
    unfinished = []

    def save() -> None:
        results = {**rates, **sizes, "speaker_id": "ann"}
        save_personal_outcome(tiny_model, tiny_processor, personal_args, subject, tmp_path / "ann", results)

    def check() -> None:
        unfinished.append(list_unfinished({"ann": "ann"}, str(tmp_path), is_resumed=True))
        if unfinished[-1]:
            assert not [path for path in (tmp_path / "ann").glob("[!.]*")]
        else:
            assert len(list_whole(tmp_path / "ann")) > 5
            assert read_finished({"ann": "ann"}, str(tmp_path))[0]["eval_wer"] == 0.5

    clean = partial(shutil.rmtree, tmp_path / "ann", ignore_errors=True)
    num_kills = kill_at_every_event(save, check, prepare=clean, stride=40)
    assert unfinished == sorted(unfinished, reverse=True)
    assert num_kills > unfinished.count(["ann"]) > 5
    assert unfinished.count([]) > 5


def test_personalize_all_refuses_to_overwrite_a_speaker(personalize):
    personalize("both", "ann", "ben")
    with pytest.raises(ValueError, match="`output_dir` must not hold another adapter, got .*ann"):
        personalize("both", "ann", "ben")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--unfreeze_base",), "`unfreeze_base` makes one model"),
        (("--speakers_per_stack", 0), "`speakers_per_stack` must be at least 1, got 0"),
        (("--gradient_accumulation_steps", 2), "`gradient_accumulation_steps` must be left .* training of several"),
        (("--train_sampling_strategy", "group_by_length"), "`train_sampling_strategy` must be left at the default"),
        (
            ("--dataloader_num_workers", 1, "--dataloader_drop_last"),
            "`dataloader_drop_last`, `dataloader_num_workers`",
        ),
        (("--metric_for_best_model", "bleu"), "`metric_for_best_model` must be loss or wer or cer, got 'bleu'"),
        (("--bf16", "--use_cpu"), "`bf16` must be left at the default: the training of several speakers"),
        (("--save_strategy", "epoch"), "`save_strategy` must be no for several speakers, got epoch"),
        (("--push_to_hub",), "`push_to_hub` takes one speaker, got several"),
    ],
)
def test_personalize_all_refuses_what_makes_sense_for_one_speaker_only(personalize, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        personalize("out", "ann", "ben", flags=flags)
    assert not (tmp_path / "out").exists()


def rename_speakers(corpus: Path, folder: Path, names: dict[str, str], *, keep=bool) -> Path:
    """Copies a corpus under other names of its speakers, with the rows that `keep` wants."""
    shutil.copytree(corpus, folder)
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = [row | {"speaker_id": names[row["speaker_id"]]} for row in csv.DictReader(file) if keep(row)]
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_personalize_all_trains_any_id_into_a_folder_of_its_own(personalize, small_corpus, tmp_path, capsys):
    names = {"ann": "../x", "ben": "\u0928\u0940\u0924\u093e"}
    corpus = rename_speakers(small_corpus, tmp_path / "renamed", names)
    together = personalize("all", "all", flags=("--dataset", corpus))
    rows = json.loads((together / "eval_results.json").read_text())["speakers"]
    assert {row["speaker_id"] for row in rows} == set(names.values())
    assert {path.name for path in together.iterdir() if path.is_dir()} == {row["folder"] for row in rows}
    for row in rows:
        assert (
            json.loads((together / row["folder"] / "eval_results.json").read_text())["speaker_id"] == row["speaker_id"]
        )
        assert (together / row["folder"] / WEIGHTS).is_file()
    assert not (tmp_path / "x").exists()
    table = capsys.readouterr().out
    assert [row["folder"] for row in rows if row["folder"] not in table] == []


def test_personalize_all_names_the_speakers_that_it_leaves_out(personalize, small_corpus, tmp_path, caplog):
    names = {"ann": "ann", "ben": "ben"}
    corpus = rename_speakers(
        small_corpus, tmp_path / "part", names, keep=lambda row: (row["speaker_id"], row["split"]) != ("ben", "test")
    )
    together = personalize("all", "all", flags=("--dataset", corpus))
    assert "1 of 2 speakers are left out: nothing to evaluate on for ben." in caplog.text
    assert [path.name for path in together.iterdir() if path.is_dir()] == ["ann"]


def test_personalize_all_refuses_a_corpus_whose_splits_share_no_speaker(personalize, small_corpus, tmp_path):
    corpus = rename_speakers(
        small_corpus, tmp_path / "apart", {"ann": "ann", "ben": "ben"},
        keep=lambda row: (row["speaker_id"] == "ann") == (row["split"] == "train"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="got none of 2: nothing to evaluate on for ann; nothing to train on for ben"):
        personalize("all", "all", flags=("--dataset", corpus))
    assert not (tmp_path / "all").exists()


def test_personalize_all_leaves_out_a_speaker_whose_recordings_cannot_be_used(
    personalize, small_corpus, tmp_path, caplog
):
    corpus = rename_speakers(small_corpus, tmp_path / "silent", {"ann": "ann", "ben": "ben"})
    for path in corpus.glob("ben_*.wav"):
        soundfile.write(path, np.zeros(16_000), 16_000)
    together = personalize("all", "all", flags=("--dataset", corpus))
    assert "Speaker 'ben' is left out: 6 of 6 recordings cannot be used" in caplog.text
    assert [path.name for path in together.iterdir() if path.is_dir()] == ["ann"]
    for path in corpus.glob("ann_*.wav"):
        soundfile.write(path, np.zeros(16_000), 16_000)
    with pytest.raises(ValueError, match="`speaker_id` all must find a speaker whose data can be used, got none"):
        personalize("none", "all", flags=("--dataset", corpus))


def test_personalize_refuses_an_unknown_speaker_among_several_before_it_trains(personalize, tmp_path):
    with pytest.raises(ValueError, match=r"`speaker_id` must be one of the 2 speakers .*, got '\.\./ann'"):
        personalize("out", "ann", "../ann")
    assert not (tmp_path / "out").exists()


def test_personalize_all_refuses_the_mixed_precision_of_a_launcher(personalize, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="Mixed precision .* must be off for several speakers, got bf16"):
        personalize("out", "ann", "ben")
    assert not (tmp_path / "out").exists()


def test_personalize_refuses_patience_without_the_best_model(personalize):
    with pytest.raises(ValueError, match="`early_stopping_patience` needs `load_best_model_at_end`"):
        personalize("out", "ann", flags=("--early_stopping_patience", 2))


def test_personalize_all_gives_the_same_adapters_on_two_processes(personalize, small_base, small_corpus, tmp_path):
    together = personalize("all", "all")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/multi_cpu.yaml",
        "recipes/personalize.py",
        "--model_name_or_path", small_base, "--dataset", small_corpus, "--speaker_id", "all",
        "--adapter_hidden_sizes", "4", "--num_train_epochs", "3", "--per_device_train_batch_size", "4",
        "--learning_rate", "1e-2", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "two", *NO_ROOMS,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(map(str, command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Runs as 2 processes on cpu" in run.stderr
    assert sorted(re.findall(r"^1 adapters in \d+ s: (\w+)$", run.stdout, re.MULTILINE)) == ["ann", "ben"]
    summary = json.loads((tmp_path / "two" / "eval_results.json").read_text())
    assert [row["speaker_id"] for row in summary["speakers"]] == ["ann", "ben"]
    for speaker in ("ann", "ben"):
        assert_close(tmp_path / "two" / speaker, together / speaker, atol=1e-4)


def empty_test_transcripts(small_corpus, folder: Path, speakers: tuple[str, ...]) -> Path:
    corpus = Path(shutil.copytree(small_corpus, folder))
    rows = list(csv.DictReader((corpus / "metadata.csv").open()))
    for row in rows:
        if row["split"] == "test" and row["speaker_id"] in speakers:
            row["text"] = "..."
    with (corpus / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return corpus


def test_personalize_finds_a_speaker_with_nothing_to_score_before_training(
    personalize, small_corpus, tmp_path, trained_steps, caplog
):
    corpus = empty_test_transcripts(small_corpus, tmp_path / "empty", ("ben",))
    message = "`text` must have a word in some reference, got 3 without"
    with pytest.raises(ValueError, match=message):
        personalize("ben", "ben", flags=("--dataset", corpus))
    assert trained_steps == []
    together = personalize("all", "all", flags=("--dataset", corpus, "--speakers_per_stack", 1))
    assert [path.name for path in together.iterdir() if path.is_dir()] == ["ann"]
    assert message in caplog.text


def test_train_ctc_finds_that_there_is_nothing_to_score_before_training(
    run_recipe_main, small_corpus, tmp_path, trained_steps
):
    corpus = empty_test_transcripts(small_corpus, tmp_path / "empty", ("ann", "ben"))
    with pytest.raises(ValueError, match="`text` must have a word in some reference, got 6 without"):
        run_recipe_main(train_ctc.main, "--dataset", corpus, "--max_steps", 1, "--output_dir", tmp_path / "out")
    assert trained_steps == []
