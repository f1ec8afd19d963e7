"""A base that lacks tensors, or has some that are no numbers, is refused by every recipe that loads it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCTC

from modeling.whole_models import load_whole
from recipes.personalize import main as personalize_main
from recipes.transcribe import main as transcribe_main


def change_base(base: str, folder: Path, change) -> str:
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def drop_classifier(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["classifier.1.weight"]


def break_classifier(tensors: dict[str, torch.Tensor]) -> None:
    tensors["classifier.1.weight"][0, 0] = float("nan")


def break_many(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.fill_(float("inf"))


MISSING = r"must have all weights of its model, got .*base without classifier.1.weight. Fetch"
BROKEN = r"must have finite weights, got NaN or infinity in classifier.1.weight of .*base. Take"


@pytest.mark.parametrize(("change", "message"), [(drop_classifier, MISSING), (break_classifier, BROKEN)])
def test_recipes_refuse_a_base_that_is_not_whole(run_recipe_main, small_base, small_corpus, tmp_path, change, message):
    base, sound = change_base(small_base, tmp_path / "base", change), next(Path(small_corpus).glob("*.wav"))
    with pytest.raises(ValueError, match=message):
        run_recipe_main(transcribe_main, "--model_name_or_path", base, sound)
    adapt = ["--model_name_or_path", base, "--dataset", small_corpus, "--output_dir", tmp_path / "out"]
    for speaker in ("ann", "all"):
        with pytest.raises(ValueError, match=message):
            run_recipe_main(personalize_main, *adapt, "--speaker_id", speaker, "--max_steps", 1)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.safetensors"))


def test_the_first_of_many_broken_tensors_are_named(tiny_base, tmp_path):
    base = change_base(tiny_base, tmp_path / "base", break_many)
    with pytest.raises(ValueError, match=r"infinity in [\w.]+, [\w.]+, [\w.]+ and \d+ more of"):
        load_whole(AutoModelForCTC, base)
    assert load_whole(AutoModelForCTC, tiny_base).classifier[1].weight.isfinite().all()
