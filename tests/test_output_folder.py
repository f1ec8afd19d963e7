"""An output folder holds one kind of thing, made by one run at a time, whole."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from kills import KILLED

from publishing.report import write_results
from recipes.personalize import main as personalize_main
from recipes.train_ctc import main as train_ctc_main
from training.output_folder import LOCK_NAME, claim_output_dir


def arguments(folder: Path, process_index: int = 0) -> SimpleNamespace:
    return SimpleNamespace(output_dir=str(folder), process_index=process_index)


def die_in_a_write(folder: Path) -> None:
    """Leaves what a run leaves that is killed while it writes."""
    child = os.fork()
    if not child:
        os.rename = lambda *_arguments: os._exit(KILLED)
        with claim_output_dir(arguments(folder)):
            write_results(folder, {})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


def test_a_second_run_in_one_folder_is_refused_and_the_first_goes_on(tmp_path):
    folder = tmp_path / "out"
    with claim_output_dir(arguments(folder)):
        with pytest.raises(ValueError, match="`output_dir` must not be in use by another run, got .*out. Wait for"):
            claim_output_dir(arguments(folder)).__enter__()
        assert (folder / LOCK_NAME).exists()
        with claim_output_dir(arguments(folder, process_index=1)):  # of the same run
            (folder / "file").touch()
    assert os.listdir(folder) == ["file"]
    with claim_output_dir(arguments(folder)):
        pass


def test_a_run_that_fails_before_it_writes_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), claim_output_dir(arguments(tmp_path / "out")):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_killed_run_holds_nothing_and_its_scratch_goes_with_the_next_run(tmp_path):
    folder = tmp_path / "out"
    die_in_a_write(folder)
    assert sorted(name[:9] for name in os.listdir(folder)) == [".lock", ".writing-"]
    with claim_output_dir(arguments(folder)):
        assert os.listdir(folder) == [LOCK_NAME]


def test_recipes_refuse_a_folder_that_another_run_is_at(run_recipe_main, small_base, small_corpus, tmp_path):
    with FileLock(tmp_path / LOCK_NAME):
        for main, flags in (
            (train_ctc_main, ()),
            (personalize_main, ("--model_name_or_path", small_base, "--speaker_id", "ann")),
            (personalize_main, ("--model_name_or_path", small_base, "--speaker_id", "all")),
        ):
            with pytest.raises(ValueError, match="`output_dir` must not be in use by another run"):
                run_recipe_main(main, "--dataset", small_corpus, "--output_dir", tmp_path, *flags)


def test_a_model_is_not_trained_into_a_folder_with_an_adapter(
    run_recipe_main, small_base, small_corpus, tiny_adapters
):
    folder = tiny_adapters["alice"]
    before = sorted(os.listdir(folder))
    for main, flags in (
        (train_ctc_main, ()),
        (personalize_main, ("--model_name_or_path", small_base, "--speaker_id", "ann", "--unfreeze_base")),
    ):
        with pytest.raises(ValueError, match="`output_dir` must not hold an adapter, got .*Choose a folder for"):
            run_recipe_main(main, "--dataset", small_corpus, "--output_dir", folder, *flags)
    assert sorted(os.listdir(folder)) == before
