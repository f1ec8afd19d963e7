"""No recipe runs a stranger's code, and none stops to ask whether it may."""

import json
import re
from pathlib import Path

import pytest
from tree import list_code

from inference.decoding import load_recognizer
from recipes.adapt_domain import main as adapt_domain_main
from recipes.personalize import main as personalize_main
from recipes.train_ctc import main as train_ctc_main

CALL = re.compile(r"Auto\w+\.from_pretrained\([^)]*\)")


@pytest.fixture
def strange_base(tmp_path, monkeypatch) -> Path:
    """A folder whose configuration names code of its own, which leaves a file when it runs."""
    folder = tmp_path / "strange"
    folder.mkdir()
    auto_map = {
        "AutoConfig": "strange.Config",
        "AutoModelForCTC": "strange.Model",
        "AutoProcessor": "strange.Processor",
    }
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"model_type": "strange", "auto_map": auto_map}))
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    def ask(question: str) -> str:
        raise AssertionError(f"somebody was asked: {question}")

    monkeypatch.setattr("builtins.input", ask)
    return folder


def test_a_base_with_code_of_its_own_is_refused_without_a_question(
    run_recipe_main, small_corpus, strange_base, tmp_path
):
    flags = ("--model_name_or_path", strange_base, "--dataset", small_corpus, "--output_dir", tmp_path / "out")
    acts = (
        lambda: run_recipe_main(train_ctc_main, *flags),
        lambda: run_recipe_main(personalize_main, *flags, "--speaker_id", "ann"),
        lambda: run_recipe_main(personalize_main, *flags, "--speaker_id", "all"),
        lambda: run_recipe_main(adapt_domain_main, *flags, "--objective", "task", "--simulate_domain", "ldv"),
        lambda: load_recognizer(str(strange_base)),
    )
    for act in acts:
        with pytest.raises(ValueError, match="custom code which must be executed"):
            act()
    assert not (tmp_path / "ran").exists()


def test_every_automatic_class_is_told_not_to_run_code():
    calls = [
        call
        for path in list_code()
        for call in CALL.findall(path.read_text(encoding="utf-8"))
        if "{" not in call and '"' not in call  # an example of a card
    ]
    assert len(calls) > 10
    # Those with `**` pass on what their caller says.
    assert [call for call in calls if "trust_remote_code=False" not in call and "**" not in call] == []
