"""Recording without a microphone: takes are judged, kept whole, repeated, and a stopped recording goes on."""

import csv
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from data import record
from data.corpora import load_corpus

RATE = 48_000


def make_take(level: float = 0.3, *, seconds: float = 1.0, noise: float = 1e-4) -> np.ndarray:
    """A tone between two pauses, in faint noise."""
    samples = noise * np.random.default_rng(0).standard_normal(round(seconds * RATE))
    third = len(samples) // 3
    samples[third : 2 * third] += level * np.sin(np.arange(third) / 20)
    return samples.clip(-1, 1).astype(np.float32)


GOOD = make_take()
FAULTS = {
    "shorter than 0.3 s": make_take(seconds=0.2),
    "it is silent": make_take(0.0),
    "nothing rises above its noise": make_take(0.0, noise=0.05),
    "it is clipped": make_take(1.5),
}


class Person:
    """Gives prepared takes one after the other, and answers questions; stops like Ctrl-C where nothing is left."""

    def __init__(self, *takes: np.ndarray, answers: str = ""):
        self.takes, self.answers, self.asked = list(takes), list(answers), []

    def capture(self) -> record.Take:
        if not self.takes:
            raise KeyboardInterrupt
        return self.takes.pop(0), RATE

    def ask(self, question: str) -> str:
        self.asked.append(question)
        return self.answers.pop(0).strip() if self.answers else ""


@pytest.fixture
def run(tmp_path):
    """Runs the command over prompts, with a person in the place of microphone and keyboard."""

    def run(person: Person, prompts: str = "one\ntwo\n\nthree\n", *flags: str) -> list[dict[str, str]]:
        (tmp_path / "prompts.txt").write_text(prompts, encoding="utf-8")
        argv = [str(tmp_path / "prompts.txt"), str(tmp_path / "mine"), *flags]
        record.main(argv, capture=person.capture, ask=person.ask)
        with (tmp_path / "mine" / "metadata.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_takes_become_a_corpus_with_both_splits(run, tmp_path, capsys):
    rows = run(Person(*[GOOD] * 7), "\n".join("abcdefg"))
    assert [row["file_name"] for row in rows] == [f"00{number}.wav" for number in range(1, 8)]
    assert [row["split"] for row in rows] == ["train", "test", "train", "train", "train", "train", "test"]
    assert {row["speaker_id"] for row in rows} == {"me"}
    train = load_corpus(str(tmp_path / "mine"), split="train", required_columns=("audio", "text", "speaker_id"))
    assert train["text"] == ["a", "c", "d", "e", "f"]
    samples, rate = soundfile.read(tmp_path / "mine" / "001.wav")
    assert rate == RATE
    assert np.abs(samples - GOOD).max() < 2**-15
    assert capsys.readouterr().out.endswith("mine holds 7 takes, 7 s: 5 to train, 2 to test.\n")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_take_with_a_fault_is_read_again_and_leaves_nothing(run, tmp_path, fault):
    person = Person(FAULTS[fault], FAULTS[fault], GOOD)
    assert len(run(person, "one")) == 1
    assert [fault in question for question in person.asked] == [False, True, True]
    assert sorted(os.listdir(tmp_path / "mine")) == ["001.wav", "metadata.csv"]
    assert np.abs(soundfile.read(tmp_path / "mine" / "001.wav")[0] - GOOD).max() < 2**-15


@pytest.mark.parametrize(("top", "is_clipped"), [([1, 1, 1], True), ([1, 0.9, 1], False), ([-1, -1, -1], True)])
def test_a_take_is_clipped_by_a_flat_top_and_not_by_a_peak(top, is_clipped):
    samples = GOOD.copy()
    samples[30_000:30_003] = top
    assert ("clipped" in (record.find_fault(samples, RATE) or "")) == is_clipped


def test_a_constant_offset_is_no_speech():
    assert "silent" in record.find_fault(make_take(0.0) + np.float32(0.5), RATE)


def test_a_recording_that_was_stopped_goes_on_where_it_ended(run):
    assert [row["text"] for row in run(Person(GOOD))] == ["one"]  # Ctrl-C at the second
    person = Person(GOOD, GOOD)
    assert [row["text"] for row in run(person)] == ["one", "two", "three"]
    assert len(person.asked) == 2
    assert run(Person()) == run(Person())  # nothing is left to read


def test_skipped_prompts_are_asked_again_and_q_stops(run):
    assert [row["text"] for row in run(Person(GOOD, answers="s q"))] == ["two"]
    assert [row["text"] for row in run(Person(GOOD, GOOD))] == ["two", "one", "three"]


def test_a_sentence_that_stands_twice_is_read_twice_and_speakers_read_their_own(run):
    assert len(run(Person(GOOD, GOOD), "yes\nyes")) == 2
    rows = run(Person(GOOD, GOOD), "yes\nyes", "--speaker_id", "ann")
    assert [(row["file_name"], row["speaker_id"]) for row in rows[2:]] == [("003.wav", "ann"), ("004.wav", "ann")]


def test_a_take_that_cannot_be_written_leaves_the_folder_as_it_was(run, tmp_path, monkeypatch):
    before = run(Person(GOOD))
    replace = os.replace

    def fail(source, target):
        if str(target).endswith("metadata.csv"):
            raise OSError("No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(SystemExit):
        run(Person(GOOD))
    monkeypatch.undo()
    assert record.read_takes(tmp_path / "mine") == before
    assert not [name for name in os.listdir(tmp_path / "mine") if name.startswith(".")]
    assert [row["file_name"] for row in run(Person(GOOD))] == ["001.wav", "002.wav"]


@pytest.mark.parametrize(
    ("prompts", "metadata", "message"),
    [
        (None, None, "`prompts` must be a text file, got .*No such file"),
        ("\n \n", None, "`prompts` must have a sentence a line, got .*prompts.txt without one"),
        (
            "one",
            "path,text\n",
            r"`folder` must be new or one that this recorder made, got .*columns \['path', 'text'\]",
        ),
    ],
)
def test_wrong_input_ends_with_one_line(tmp_path, capsys, prompts, metadata, message):
    if prompts is not None:
        (tmp_path / "prompts.txt").write_text(prompts)
    if metadata:
        (tmp_path / "metadata.csv").write_text(metadata)
    with pytest.raises(SystemExit) as stop:
        record.main([str(tmp_path / "prompts.txt"), str(tmp_path)], capture=Person().capture)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: {message}", line)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="`folder` must be a folder, got the file"):
        record.read_takes(tmp_path / "mine")


def test_without_sounddevice_it_is_said_how_to_install_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("one")
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(SystemExit):
        record.main([str(tmp_path / "prompts.txt"), str(tmp_path / "mine")])
    assert "`python -m pip install sounddevice`" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`sounddevice` must be installed to record, got: "):
        record.find_microphone()


class Stream:
    """A microphone's stream that hears two blocks while it is open."""

    def __init__(self, *, callback, **settings):
        self.callback, self.settings = callback, settings

    def __enter__(self):
        for half in np.array_split(GOOD[:, None], 2):
            self.callback(half, len(half), None, None)

    def __exit__(self, *_error):
        pass


@pytest.fixture
def sounddevice(monkeypatch):
    """Stands in for the library, which needs hardware."""
    library = SimpleNamespace(
        PortAudioError=RuntimeError,
        query_devices=lambda *_: {"default_samplerate": 48_000.0},
        check_input_settings=lambda *_, **__: None,
        InputStream=Stream,
    )
    monkeypatch.setitem(sys.modules, "sounddevice", library)
    return library


@pytest.mark.usefixtures("sounddevice")
def test_a_microphone_is_heard_from_start_to_enter(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _question: "")
    samples, rate = record.find_microphone()()
    assert rate == RATE
    assert np.array_equal(samples, GOOD)


def test_a_device_that_is_no_microphone_is_named(sounddevice):
    def refuse(*_args, **_settings):
        raise sounddevice.PortAudioError("Invalid number of channels")

    sounddevice.check_input_settings = refuse
    with pytest.raises(ValueError, match=r"`device` must be a microphone, got 7 \(Invalid number of channels\)"):
        record.find_microphone("7")
