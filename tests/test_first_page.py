"""README's first page: whoever follows its five steps from top to bottom ends with an adapter of their voice."""

import importlib
import os
import re
from pathlib import Path

import pytest
import soundfile
import torch
from readme import FIRST_PAGE, find_commands, find_example

from data import record
from data.corpora import load_corpus
from data.synthesis import Voice, synthesize
from inference.recognizers import open_recognizer
from modeling.adapters import adapters_off
from tests.speech_models import save_base

ROOT = Path(__file__).parents[1]
STEPS = FIRST_PAGE[FIRST_PAGE.index("## Your own voice") : FIRST_PAGE.index("### What to expect")]
HUB_NAME = "openai/whisper-tiny.en"
VOICE = Voice("me", "en-us+f3", rate_wpm=220)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder to work in, with a tiny Whisper in the place of the Hub's and a few short sentences to read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    save_base("whisper", tmp_path / "whisper")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "prompts.txt").write_text("\n".join(["good morning", "open it", "one", "two", "stop"]))
    return tmp_path


class Reader:
    """Reads what the recorder shows: each question is followed by the take of its sentence."""

    def __init__(self, prompts: list[str]):
        self.takes = [(synthesize(prompt, VOICE), 16_000) for prompt in prompts]

    def capture(self):
        return self.takes.pop(0)


def put_tiny(token: str) -> str:
    """Returns a token of a command with this machine's Whisper and files in the place of the page's."""
    token = token.replace(HUB_NAME, "whisper")
    return str(ROOT / token) if token.startswith("recipes/") else token


def test_the_five_steps_end_with_an_adapter_of_ones_own_voice(desk, run_recipe_main, capsys):
    install, recording, listening, personalizing, transcribing = (
        find_commands(part, text=STEPS)
        for part in ("make ", "data.record", "evaluate_asr", "personalize.py", "transcribe")
    )
    assert install == [["make", ".venv/installed"]]  # that it exists is tested with the other targets
    assert [tokens[:3] for tokens in recording] == [["python", "-m", "data.record"]]

    reader = Reader((desk / "docs" / "prompts.txt").read_text().splitlines())
    record.main(recording[0][3:], capture=reader.capture, ask=lambda _question: "")
    assert capsys.readouterr().out.splitlines()[-1].endswith("4 to train, 1 to test.")

    said = []
    for (tokens,) in (listening, personalizing, transcribing):
        assert tokens[0] == "python"
        script = importlib.import_module(tokens[1].removesuffix(".py").replace("/", "."))
        run_recipe_main(script.main, *map(put_tiny, tokens[2:]))
        said.append(capsys.readouterr().out)
    assert re.search(r"^me +1 +2 ", said[0], re.MULTILINE)  # the table: one utterance of two words
    assert re.search(r"^base_wer +\d", said[1], re.MULTILINE)
    assert said[2].count("\n") == 1

    example = find_example("load_adapter", text=STEPS).replace(HUB_NAME, "whisper")
    scope: dict = {}
    exec(example, scope)
    features = torch.randn(1, 16, 200, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": features, "decoder_input_ids": torch.tensor([[3, 7, 9]])}
    recognizer = open_recognizer("whisper", {"me": "outputs/me"})
    with torch.no_grad():
        logits = scope["model"].eval()(**inputs).logits
        assert torch.equal(logits, recognizer.model(**inputs).logits)
        with adapters_off(recognizer.model):
            assert not torch.equal(logits, recognizer.model(**inputs).logits)


def test_a_folder_of_wavs_and_three_lines_is_a_corpus(tmp_path):
    (table,) = re.findall(r"```csv\n(.*?)```", STEPS, flags=re.DOTALL)
    assert len(table.splitlines()) == 3
    (tmp_path / "metadata.csv").write_text(table)
    for name, text in re.findall(r"^(\S+\.wav),([^,]+),", table, flags=re.MULTILINE):
        soundfile.write(tmp_path / name, synthesize(text, VOICE), 16_000)
    for split in ("train", "test"):
        corpus = load_corpus(str(tmp_path), split=split, required_columns=("audio", "text", "speaker_id"))
        assert corpus["speaker_id"] == ["me"]


def test_the_sentences_to_read_are_as_many_as_the_page_says():
    prompts = record.read_prompts(ROOT / "docs" / "prompts.txt")
    assert f"**2. Record** {len(prompts)} sentences" in STEPS
    assert f"1 of {len(prompts)}: {prompts[0]}\n" in STEPS
    assert len({*prompts}) == len(prompts)


def test_a_person_reads_the_first_page_in_ten_minutes():
    words = re.sub(r"```.*?```", "", FIRST_PAGE, flags=re.DOTALL).split()
    assert len(words) < 2000  # at 200 words a minute


def test_pictures_and_pages_that_the_first_page_names_exist():
    targets = re.findall(r"\]\(((?!http)[^)#]+)", FIRST_PAGE)
    assert len(targets) > 8
    assert [target for target in targets if not os.path.exists(ROOT / target)] == []
