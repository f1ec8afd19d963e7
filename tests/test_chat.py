"""Asking about recordings on the command line: which value is the question, long files, adapters, several clips."""

import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data.domain_clips import find_cuts
from inference.answering import answer, load_chat
from inference.audio_models import load_model
from modeling import SpeechAdapterConfig
from modeling.adapter_files import save_adapter
from modeling.adapters import is_adapter_parameter
from recipes.chat import flag_question, main
from tests.speech_models import save_base
from training.audio_tower import add_adapter

FAMILIES = ("whisper", "qwen2_audio")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models."""
    return {family: save_base(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Recordings of noise of 1, 1.5 and 5 seconds; the tiny models hear 2 at once."""
    folder, paths = tmp_path_factory.mktemp("recordings"), []
    for number, seconds in enumerate((1.0, 1.5, 5.0)):
        samples = np.random.default_rng(number).normal(0, 0.1, round(16_000 * seconds))
        paths.append(str(folder / f"noise{number}.wav"))
        soundfile.write(paths[-1], samples, 16_000)
    return paths


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of loud adapters."""
    folders = {}
    for family, base in bases.items():
        model = load_model(str(base))
        add_adapter(model, SpeechAdapterConfig(kind="transformer", num_layers=1, num_heads=2, ffn_size=8), "loud")
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for name, parameter in model.named_parameters():
                if is_adapter_parameter(name):
                    parameter.normal_()
        folders[family] = str(tmp_path_factory.mktemp("adapter"))
        save_adapter(model, folders[family], "loud")
    return folders


@pytest.fixture
def chat(bases, capsys):
    """Runs the recipe; returns what it prints."""

    def run(family: str, *tokens: str) -> str:
        capsys.readouterr()
        main(["--model_name_or_path", str(bases[family]), "--max_new_tokens", "6", *tokens])
        return capsys.readouterr().out

    return run


def clips(*num_samples: int) -> list[np.ndarray]:
    return [np.random.default_rng(count).normal(0, 0.1, count).astype(np.float32) for count in num_samples]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--audio", "a.wav", "Who?"], ["--audio", "a.wav", "--question", "Who?"]),
        (["Who?", "--audio", "a.wav", "b.FLAC"], ["--audio", "a.wav", "b.FLAC", "--question", "Who?"]),
        (["--audio=a.wav", "Who?"], ["--audio=a.wav", "--question", "Who?"]),
        (["--audio", "a.wav", "--adapter", "x", "Who?"], ["--audio", "a.wav", "--adapter", "x", "--question", "Who?"]),
        (["--audio", "a.wav", "--question", "Who?"], ["--audio", "a.wav", "--question", "Who?"]),
        (["--audio", "a.wav", "--load_in_4bit", "true"], ["--audio", "a.wav", "--load_in_4bit", "true"]),
    ],
)
def test_the_question_is_the_value_that_is_neither_a_recording_nor_a_flag_s(tokens, expected):
    assert flag_question(tokens) == expected


def test_a_recording_of_any_name_is_no_question_if_it_is_there(tmp_path):
    path = tmp_path / "recording"
    path.touch()
    assert flag_question(["--audio", str(path)]) == ["--audio", str(path)]


def test_a_question_without_quotation_marks_is_refused():
    with pytest.raises(ValueError, match=r"`question` must be one value, got \['Who', 'speaks\?'\]. Put it in"):
        flag_question(["--audio", "a.wav", "Who", "speaks?"])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_does_not_depend_on_the_others_of_its_batch(bases, family):
    model, prompt = load_chat(str(bases[family]))
    words = {"whisper": [None] * 3, "qwen2_audio": ["a", "a longer question", None]}[family]
    chats = [(question, [clip]) for question, clip in zip(words, clips(9_000, 30_000, 16_000), strict=True)]
    together = answer(model, prompt, chats, max_new_tokens=6)
    assert together == [answer(model, prompt, [chat], max_new_tokens=6)[0] for chat in chats]
    assert len(set(together)) > 1


def test_a_chat_hears_all_of_its_clips(bases):
    model, prompt = load_chat(str(bases["qwen2_audio"]))
    first, second, third = clips(9_000, 30_000, 16_000)
    answers = answer(model, prompt, [("a", [first, second]), ("a", [first, third])], max_new_tokens=6)
    assert answers[0] != answers[1]
    alone = [answer(model, prompt, [("a", heard)], max_new_tokens=6)[0] for heard in ([first, second], [first, third])]
    assert answers == alone


def test_whisper_writes_down_one_file_or_a_line_a_file(chat, files):
    alone = chat("whisper", "--audio", files[0])
    assert chat("whisper", "--audio", *files[:2]).splitlines()[0] == f"{files[0]}\t{alone.strip()}"


def test_a_question_is_about_all_files_together(bases, chat, files):
    model, prompt = load_chat(str(bases["qwen2_audio"]))
    heard = [soundfile.read(file, dtype="float32")[0] for file in files[:2]]
    (together,) = answer(model, prompt, [("Who?", heard)], max_new_tokens=6)
    assert chat("qwen2_audio", "--audio", *files[:2], "Who?") == f"{together}\n"


@pytest.mark.parametrize(("family", "num_kept"), [("whisper", 0), ("qwen2_audio", 1)])
def test_an_answer_has_as_many_new_tokens_as_asked_for(bases, family, num_kept, monkeypatch):
    model, prompt = load_chat(str(bases[family]))
    model.generation_config.eos_token_id = None  # the answer goes on until it is stopped
    new = []
    # Whisper gives the answer alone, the other its question before it.
    monkeypatch.setattr(type(prompt), "read", lambda _, tokens, asked: new.append(tokens.shape[1] - num_kept * asked))
    for limit in (3, 6):
        answer(model, prompt, [(None, clips(9_000))], max_new_tokens=limit)
    assert new == [3, 6]


def test_a_long_file_is_split_with_a_message(chat, files, caplog):
    with caplog.at_level(logging.WARNING):
        chat("qwen2_audio", "--audio", files[2], "Who?")
    assert "has 5.0 s and the model hears 2 s at once: it is split into 3 clips" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        chat("qwen2_audio", "--audio", files[1], "Who?")
    assert "split" not in caplog.text


def test_whisper_answers_a_long_file_part_by_part(bases, chat, files):
    model, prompt = load_chat(str(bases["whisper"]))
    samples, _ = soundfile.read(files[2], dtype="float32")
    cuts = find_cuts(samples, prompt.max_samples)
    parts = [samples[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    assert len(parts) == 3
    said = [answer(model, prompt, [(None, [part])], max_new_tokens=6)[0] for part in parts]
    assert chat("whisper", "--audio", files[2]) == " ".join(said) + "\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_changes_what_is_said(chat, adapters, files, family):
    assert chat(family, "--audio", files[1]) != chat(family, "--audio", files[1], "--adapter", adapters[family])


def test_an_adapter_of_another_base_is_refused(chat, adapters, files):
    with pytest.raises(ValueError, match="must be used with the base that it was made for"):
        chat("whisper", "--audio", files[0], "--adapter", adapters["qwen2_audio"])


def test_a_question_to_whisper_is_refused(chat, files):
    with pytest.raises(ValueError, match="Whisper transcribes one clip and takes no question, got 'Who"):
        chat("whisper", "--audio", files[0], "Who speaks?")


def test_a_whisper_of_several_languages_must_be_told_which(bases, tmp_path):
    save_base("whisper", tmp_path)
    model = load_model(str(bases["whisper"]))
    model.generation_config.is_multilingual = True
    model.generation_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`language` must be given for a Whisper of several languages, got none"):
        load_chat(str(tmp_path))
    assert load_chat(str(tmp_path), language="en")[1].tokenizer.language == "en"
