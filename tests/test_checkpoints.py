"""A run that is killed goes on from its newest whole checkpoint, as if nothing had happened, or says why not."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from kills import kill_at_every_event
from safetensors.torch import load
from test_trainer import NoiseDataset, adapter_tensors, assert_same, load_base, make_trainer, small
from transformers import EarlyStoppingCallback

from publishing.report import write_results
from training.checkpoints import list_checkpoints
from training.trainer import AdapterTrainer

SAVING = {"save_strategy": "steps", "save_total_limit": None}


class Stream(torch.utils.data.IterableDataset):
    """The eight utterances, read in passes; notes what is read."""

    def __init__(self):
        self.pass_number, self.read = 0, []

    def set_epoch(self, epoch: int) -> None:
        self.pass_number = epoch

    def __iter__(self):
        for index in range(8):
            self.read.append((self.pass_number, index))
            yield NoiseDataset()[index]


class EpochNotes(NoiseDataset):
    """Notes the epoch in which each utterance is read."""

    def __init__(self):
        self.epoch, self.read = None, []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        self.read.append(self.epoch)
        return super().__getitem__(index)


@pytest.fixture
def make(tiny_base, tiny_processor, tmp_path):
    """Makes trainers of a fresh adapter, or of the base with `configs=()`, that save into one folder."""

    def run(*configs, folder: str = "run", **settings) -> AdapterTrainer:
        model = load_base(tiny_base, *(configs or [small(dropout=0.3)]))
        return make_trainer(model, tmp_path / folder, tiny_processor, **SAVING | settings)

    return run


@pytest.fixture(scope="module")
def finished(tiny_base, tiny_processor, tmp_path_factory) -> Path:
    """Folder of a run of 6 steps with checkpoints at 2, 4 and 6; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    model = load_base(tiny_base, small(dropout=0.3))
    make_trainer(model, folder, tiny_processor, max_steps=6, save_steps=2, **SAVING).train()
    return folder


@pytest.fixture
def saved(finished, tmp_path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def adapter_tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load((checkpoint / "adapter_model.safetensors").read_bytes())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, remove, empty])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "trainer_state.json", "optimizer.pt", "rng_state.pth"])
def test_a_broken_checkpoint_is_passed_over_for_an_older_whole_one(make, saved, trained_steps, caplog, damage, name):
    straight = adapter_tensors_of(saved / "checkpoint-6")
    damage(saved / "checkpoint-6" / name)
    trained_steps.clear()
    trainer = make(max_steps=6, save_steps=2)
    trainer.train(resume_from_checkpoint=True)

    assert trained_steps == [4, 5]
    assert_same(adapter_tensors_of(saved / "checkpoint-6"), straight)
    assert "checkpoint-6 is passed over (" in caplog.text
    assert "the run goes on from checkpoint-4." in caplog.text


def test_a_run_without_a_whole_checkpoint_starts_anew(make, saved, trained_steps, caplog):
    straight = adapter_tensors_of(saved / "checkpoint-6")
    for checkpoint in list_checkpoints(saved)[1:]:
        shutil.rmtree(checkpoint)
    (saved / "checkpoint-6" / "trainer_state.json").unlink()
    trained_steps.clear()
    make(max_steps=6, save_steps=2).train(resume_from_checkpoint=True)

    assert trained_steps == [0, 1, 2, 3, 4, 5]
    assert_same(adapter_tensors_of(saved / "checkpoint-6"), straight)
    assert "(of checkpoint-6 trainer_state.json is missing or cut off); the run starts anew." in caplog.text


def test_a_run_without_any_checkpoint_starts_anew(make, trained_steps, caplog):
    make(max_steps=2, folder="new").train(resume_from_checkpoint=True)
    assert trained_steps == [0, 1]
    assert "/new; the run starts anew." in caplog.text


def test_a_broken_checkpoint_that_is_named_is_refused(make, saved):
    cut(saved / "checkpoint-6" / "optimizer.pt")
    with pytest.raises(
        ValueError, match="must be a whole checkpoint, got .*checkpoint-6, of which optimizer.pt is cut"
    ):
        make(max_steps=6).train(resume_from_checkpoint=str(saved / "checkpoint-6"))
    with pytest.raises(ValueError, match="must be a whole checkpoint, got .*nowhere, of which trainer_state.json is"):
        make(max_steps=6).train(resume_from_checkpoint=str(saved / "nowhere"))


@pytest.mark.parametrize("wanted", [True, "checkpoint-4"])
def test_weights_without_the_state_of_the_training_are_refused_unless_asked_for(make, tmp_path, trained_steps, wanted):
    make(max_steps=4, save_steps=2, save_only_model=True).train()
    wanted = wanted if wanted is True else str(tmp_path / "run" / wanted)
    message = (
        "must have the state of the training, got .*checkpoint-4 with no scheduler.pt, rng_state.pth, optimizer.pt"
    )
    with pytest.raises(ValueError, match=message):
        make(max_steps=6, save_only_model=True).train(resume_from_checkpoint=wanted)
    trained_steps.clear()
    make(max_steps=6, resume_without_state=True).train(resume_from_checkpoint=wanted)
    assert trained_steps == [4, 5]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_each_part_of_the_state_is_missed(make, saved, name):
    for checkpoint in list_checkpoints(saved):
        (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=f"got .*checkpoint-6 with no {name}: .*Give `--resume_without_state`"):
        make(max_steps=8).train(resume_from_checkpoint=True)


def test_a_save_killed_at_any_event_leaves_whole_checkpoints_only(make, saved, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _file: None)  # an event all the same
    trainer = make(max_steps=8, save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    names = sorted(path.name for path in (saved / "checkpoint-8").iterdir())
    newest = []

    def prepare() -> None:
        shutil.rmtree(saved / "checkpoint-8", ignore_errors=True)
        write_results(saved, {})  # any writer cleans

    def check() -> None:
        assert all(sorted(path.name for path in folder.iterdir()) == names for folder in list_checkpoints(saved))
        newest.append(list_checkpoints(saved)[0].name)
        assert newest[-1] in ("checkpoint-6", "checkpoint-8")

    save = partial(trainer._save_checkpoint, trainer.model, None)
    num_kills = kill_at_every_event(save, check, prepare=prepare, stride=4)

    assert newest == sorted(newest)
    assert num_kills > newest.count("checkpoint-6") > 10
    assert [path.name for path in saved.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("configs", [(), None], ids=["adapter", "whole model"])
def test_a_finished_run_trains_no_step_more_when_resumed(tiny_base, tiny_processor, tmp_path, trained_steps, configs):
    runs = []
    for checkpoint in (None, True):  # an epoch has 4 steps
        model = load_base(tiny_base, *([small()] if configs == () else []))
        trainer = make_trainer(model, tmp_path, tiny_processor, max_steps=6, save_steps=3, **SAVING)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append({name: value.detach().clone() for name, value in model.named_parameters()})
    assert trained_steps == [0, 1, 2, 3, 4, 5]
    assert_same(*runs)


def test_patience_is_as_long_after_a_kill_as_without(tiny_base, tiny_processor, tmp_path, trained_steps):
    settings = {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0.3}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"} | SAVING

    def train(folder: str, checkpoint: str | None = None) -> dict:
        model = load_base(tiny_base, small())
        trainer = make_trainer(model, tmp_path / folder, tiny_processor, **settings)
        trainer.add_callback(EarlyStoppingCallback(3))
        trainer.train(resume_from_checkpoint=checkpoint)
        return adapter_tensors(model)

    straight = train("straight")
    last = len(trained_steps)
    assert 3 < last < 40
    for killed_at in (last - 2, last - 1, last):
        folder = shutil.copytree(tmp_path / "straight", tmp_path / f"killed_at_{killed_at}")
        for checkpoint in list_checkpoints(folder):
            if int(checkpoint.name.partition("-")[2]) > killed_at:
                shutil.rmtree(checkpoint)
        trained_steps.clear()
        resumed = train(folder.name, str(folder / f"checkpoint-{killed_at}"))
        assert trained_steps == list(range(killed_at, last))
        assert_same(resumed, straight)


@pytest.mark.usefixtures("saved")
def test_a_resumed_run_may_have_another_patience(make, trained_steps):
    trained_steps.clear()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    trainer = make(max_steps=8, metric_for_best_model="loss", **settings)
    trainer.add_callback(EarlyStoppingCallback(100))
    trainer.train(resume_from_checkpoint=True)
    assert trained_steps == [6, 7]
    callback = trainer.callback_handler.callbacks[-1]
    assert callback.early_stopping_patience == 100


def test_the_time_of_training_counts_what_was_trained_before(make, saved):
    path = saved / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"]["RuntimeCallback"]["attributes"]["seconds_before"] > 0
    state["stateful_callbacks"]["RuntimeCallback"]["attributes"]["seconds_before"] = 1000.0
    path.write_text(json.dumps(state))
    output = make(max_steps=6).train(resume_from_checkpoint=str(saved / "checkpoint-4"))
    assert 1000 < output.metrics["train_runtime"] < 1100


@pytest.mark.parametrize("stopped_at", [3, 4, 5, 6])
def test_a_stream_goes_on_where_it_was(make, tmp_path, stopped_at):
    runs = []
    for checkpoint in (None, str(tmp_path / "run" / f"checkpoint-{stopped_at}")):  # a pass has 4 steps
        stream = Stream()
        trainer = make(max_steps=10, save_steps=1, dataset=stream)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append((adapter_tensors(trainer.model), stream.read))
    assert_same(runs[0][0], runs[1][0])
    assert runs[1][1][-4:] == runs[0][1][-4:]
    assert {number for number, _ in runs[0][1]} == {0, 1, 2}


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
def test_a_resumed_run_reads_the_epochs_that_are_left(make, tmp_path, strategy):
    settings = {"max_steps": 10, "save_steps": 6, "train_sampling_strategy": strategy}  # an epoch has 4 steps
    straight, resumed = EpochNotes(), EpochNotes()
    make(dataset=straight, **settings).train()
    make(dataset=resumed, **settings).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert straight.read == [0] * 8 + [1] * 8 + [2] * 6  # a batch is read ahead
    assert resumed.read == [1] * 4 + [2] * 6


def test_a_best_checkpoint_is_found_after_its_run_was_moved_beside(make, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    trainer = make(max_steps=3, metric_for_best_model="loss", **settings)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert Path(best).parent == tmp_path / "run"
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in list_checkpoints(tmp_path / "run")]
    assert {os.path.dirname(state["best_model_checkpoint"]) for state in states} == {str(tmp_path / "run")}


def test_files_of_a_checkpoint_have_the_permissions_of_any_new_file(saved, tiny_base, tiny_processor, tmp_path):
    make_trainer(load_base(tiny_base), tmp_path / "whole", tiny_processor, max_steps=1).train()
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    for folder in (saved / "checkpoint-6", tmp_path / "whole" / "checkpoint-1"):
        assert {path.name: path.stat().st_mode for path in folder.iterdir()} == dict.fromkeys(os.listdir(folder), mode)
