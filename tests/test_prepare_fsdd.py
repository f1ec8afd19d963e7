"""A clone of the Free Spoken Digit Dataset becomes a corpus folder, whole or not at all."""

import csv

import pytest
import soundfile

from data.audio import SAMPLING_RATE, AudioError
from data.prepare_fsdd import main, prepare_fsdd
from data.synthesis import ORDINARY_VOICES, synthesize


@pytest.fixture
def clone(tmp_path):
    recordings = tmp_path / "clone" / "recordings"
    recordings.mkdir(parents=True)
    for digit, word in enumerate(["zero", "one", "two"]):
        for voice in ORDINARY_VOICES[:2]:
            samples = synthesize(word, voice)
            for index in (0, 9, 10, 49):
                name = f"{digit}_{voice.speaker_id}_{index}.wav"
                soundfile.write(recordings / name, samples, SAMPLING_RATE)
    (recordings / ".DS_Store").touch()
    return tmp_path / "clone"


def read_rows(folder):
    with (folder / "metadata.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_prepare_fsdd_writes_a_row_for_each_copied_recording(clone, tmp_path):
    out = prepare_fsdd(clone, tmp_path / "corpora" / "fsdd")
    header, *rows = read_rows(out)
    assert header == ["file_name", "speaker_id", "text", "split"]
    assert rows[:4] == [
        ["adam/0_adam_0.wav", "adam", "zero", "test"],
        ["adam/0_adam_10.wav", "adam", "zero", "train"],
        ["adam/0_adam_49.wav", "adam", "zero", "train"],
        ["adam/0_adam_9.wav", "adam", "zero", "test"],
    ]
    assert len(rows) == 3 * 2 * 4
    for file_name, *_ in rows:
        original = clone / "recordings" / file_name.partition("/")[2]
        assert (out / file_name).read_bytes() == original.read_bytes()


def test_prepare_fsdd_lays_the_clone_out_as_the_tests_have_it(fsdd_folder, tmp_path):
    (tmp_path / "clone").mkdir()
    header, *rows = read_rows(fsdd_folder)
    recordings = tmp_path / "clone" / "recordings"
    recordings.mkdir()
    kept = [row for row in rows if row[2] in {"zero", "nine"} and row[1] in {"george", "theo"}]
    for file_name, *_ in kept:
        (recordings / file_name.partition("/")[2]).symlink_to((fsdd_folder / file_name).resolve())
    assert read_rows(prepare_fsdd(tmp_path / "clone", tmp_path / "out")) == [header, *kept]


def test_prepare_fsdd_runs_from_the_command_line(clone, tmp_path):
    main([str(clone), str(tmp_path / "out")])
    assert len(read_rows(tmp_path / "out")) == 25


def test_prepare_fsdd_refuses_a_folder_that_is_no_clone(tmp_path):
    with pytest.raises(ValueError, match=f"`clone` must hold the folder recordings, got {tmp_path} without it"):
        prepare_fsdd(tmp_path, tmp_path / "out")


def test_prepare_fsdd_refuses_a_clone_without_recordings(tmp_path):
    (tmp_path / "recordings").mkdir()
    with pytest.raises(ValueError, match="`clone` must hold recordings, got the empty folder"):
        prepare_fsdd(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["zero_adam_0.wav", "0_adam.wav", "0_adam_0.mp3", "10_adam_0.wav", "0_.._0.wav"])
def test_prepare_fsdd_names_a_badly_named_file(clone, tmp_path, name):
    (clone / "recordings" / name).touch()
    with pytest.raises(ValueError, match=f"named <digit>_<speaker>_<index>.wav, got .*{name}"):
        prepare_fsdd(clone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prepare_fsdd_leaves_nothing_behind_when_a_file_is_not_audio(clone, tmp_path):
    (clone / "recordings" / "2_zoe_0.wav").write_text("not audio")
    with pytest.raises(AudioError, match=r"2_zoe_0\.wav` must be wav"):
        prepare_fsdd(clone, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["clone"]


def test_prepare_fsdd_refuses_a_folder_that_holds_files(clone, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=f"`folder` must be new or empty, got {tmp_path / 'out'}"):
        prepare_fsdd(clone, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
