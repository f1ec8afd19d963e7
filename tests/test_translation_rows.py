"""Manifests of speech translation: both sides are read, archives too, and what is wrong is named and counted."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.audio import read_audio
from data.corpora import load_corpus
from data.rows import RowError
from data.translation_rows import read_units

COLUMNS = ("id", "src_audio", "src_n_frames", "src_text", "tgt_text", "tgt_audio", "tgt_n_frames")
SIDES = ("text", "target_text", "units")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Recordings of 1, 2 and 3 s, alone and in an archive without compression."""
    generator = np.random.default_rng(0)
    for seconds in (1, 2, 3):
        soundfile.write(tmp_path / f"{seconds}.flac", 0.1 * generator.standard_normal(seconds * 16_000), 16_000)
    with zipfile.ZipFile(tmp_path / "speech.zip", "w", zipfile.ZIP_STORED) as archive:
        for seconds in (1, 2, 3):
            archive.write(tmp_path / f"{seconds}.flac", f"{seconds}.flac")
        archive.writestr("features.npy", b"\x93NUMPY" + bytes(200))
    return tmp_path


def find_member(folder: Path, name: str) -> str:
    """Returns `file.zip:offset:length` of a member's content."""
    path = folder / "speech.zip"
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
        offset = info.header_offset + 30 + len(info.filename)
    return f"{path.name}:{offset}:{info.file_size}"


def make_row(**changes) -> dict[str, str]:
    row = {"id": "a", "src_audio": "2.flac", "src_n_frames": "198", "src_text": "hola", "tgt_text": "hello"}
    return {**row, "tgt_audio": "5 0 12", "tgt_n_frames": "3", **changes}


def write_manifest(folder: Path, *rows: dict[str, str], name: str = "train.tsv", columns=COLUMNS) -> str:
    lines = ["\t".join(columns), *("\t".join(row[column] for column in columns) for row in rows)]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def test_a_manifest_has_the_houses_columns(folder):
    corpus = load_corpus(write_manifest(folder, make_row()), required_columns=SIDES)
    assert {name: corpus[0][name] for name in SIDES} == {"text": "hola", "target_text": "hello", "units": [5, 0, 12]}
    assert read_audio(corpus[0]["audio"]).size == 32_000


def test_a_folder_of_manifests_has_a_split_for_each(folder):
    write_manifest(folder, make_row(), make_row(src_audio="1.flac", src_n_frames="98"))
    write_manifest(folder, make_row(src_audio="3.flac", src_n_frames="298"), name="dev.tsv")
    assert load_corpus(str(folder), split="train", required_columns=SIDES).num_rows == 2
    assert load_corpus(str(folder), split="dev", required_columns=SIDES)["split"][:] == ["dev"]


def test_recordings_in_an_archive_are_those_that_were_put_there(folder):
    rows = [
        make_row(src_audio=find_member(folder, f"{seconds}.flac"), src_n_frames=str(100 * seconds - 2))
        for seconds in (3, 1)
    ]
    corpus = load_corpus(write_manifest(folder, *rows), required_columns=SIDES)
    for row, seconds in zip(corpus, (3, 1), strict=True):
        np.testing.assert_array_equal(read_audio(row["audio"]), read_audio(str(folder / f"{seconds}.flac")))


@pytest.mark.parametrize("frames", ["198", "200", "32000", ""])
def test_a_recordings_frames_may_be_counted_in_10_ms_or_in_samples(folder, frames):
    assert load_corpus(write_manifest(folder, make_row(src_n_frames=frames))).num_rows == 1


@pytest.mark.parametrize("column", COLUMNS[3:6])
def test_a_manifest_without_a_column_is_refused_with_those_that_it_has(folder, column):
    columns = [name for name in COLUMNS if name != column]
    name = {"src_text": "text", "tgt_text": "target_text", "tgt_audio": "units"}[column]
    with pytest.raises(ValueError, match=f"`{name}` must be a column of .*train.tsv, got the columns .*tgt_n_frames"):
        load_corpus(write_manifest(folder, make_row(), columns=columns), required_columns=SIDES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"src_audio": "4.flac"}, "`audio` of row 1 in .* must be an existing file, got '4.flac'"),
        ({"tgt_text": ""}, "`target_text` of row 1 in .* must not be empty"),
        ({"tgt_audio": ""}, "`units` of row 1 in .* must not be empty"),
        ({"tgt_audio": "5 x 12"}, "`units` of row 1 .* whole numbers with spaces between them, got 'x'"),
        ({"tgt_audio": "5 -1 12"}, "`units` of row 1 .* whole numbers with spaces between them, got '-1'"),
        ({"tgt_n_frames": "4"}, "`tgt_n_frames` of row 1 .* the number of its units, 3, got 4"),
        ({"src_n_frames": "120"}, "`src_n_frames` of row 1 .* about 200, got 120"),
        ({"src_n_frames": "many"}, "`src_n_frames` of row 1 .* about 200, got many"),
        ({"src_audio": "speech.zip:0:900000"}, "must lie inside .*speech.zip', got 900000 bytes from 0"),
        ({"src_audio": "speech.zip:5:100"}, "must be a recording stored without compression, got other bytes from 5"),
        ({"src_audio": "none.zip:5:100"}, "must be an existing file, got 'none.zip'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_and_counted(folder, changes, message):
    manifest = write_manifest(folder, make_row(**changes))
    with pytest.raises(ValueError, match=f"1 of 1 rows cannot be used: .*{message}"):
        load_corpus(manifest, required_columns=SIDES)


def test_features_in_an_archive_are_no_recording(folder):
    manifest = write_manifest(folder, make_row(src_audio=find_member(folder, "features.npy")))
    with pytest.raises(ValueError, match="must be a recording, got an array of features; store the audio itself"):
        load_corpus(manifest, required_columns=SIDES)


def test_a_few_bad_rows_are_left_out_with_a_warning(folder, caplog):
    rows = [make_row(id=str(number)) for number in range(39)]
    corpus = load_corpus(write_manifest(folder, *rows, make_row(src_n_frames="7")), required_columns=SIDES)
    assert corpus.num_rows == 39
    assert "1 of 40 rows cannot be used: `src_n_frames` of row 40" in caplog.text


def test_durations_must_be_one_a_unit(folder):
    columns = (*COLUMNS, "tgt_durations")
    good = write_manifest(folder, make_row(tgt_durations="1 2 1"), columns=columns)
    assert load_corpus(good, required_columns=SIDES)[0]["durations"] == [1, 2, 1]
    bad = write_manifest(folder, make_row(tgt_durations="1 2"), columns=columns)
    with pytest.raises(ValueError, match="`durations` of row 1 .* must be one a unit, 3, got 2"):
        load_corpus(bad, required_columns=SIDES)


def test_target_recordings_are_recordings_and_required_ones_must_be_there(folder):
    rows = [{"audio": "1.flac", "target_audio": "2.flac"}, {"audio": "1.flac", "target_audio": "9.flac"}]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    corpus = load_corpus(str(path))
    assert read_audio(corpus[0]["target_audio"]).size == 32_000
    assert corpus[1]["target_audio"] is None
    with pytest.raises(ValueError, match="`target_audio` of row 2 in .* must be an existing file, got '9.flac'"):
        load_corpus(str(path), required_columns=("target_audio",))


def test_a_changed_target_recording_changes_the_fingerprint(folder):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"audio": "1.flac", "target_audio": "2.flac"}), encoding="utf-8")
    before = load_corpus(str(path))._fingerprint
    assert load_corpus(str(path))._fingerprint == before
    soundfile.write(folder / "2.flac", np.zeros(100), 16_000)
    assert load_corpus(str(path))._fingerprint != before


@pytest.mark.parametrize(
    ("value", "expected"), [("3  1", [3, 1]), ([3, 1], [3, 1]), (np.array([3, 1]), [3, 1]), (7, [7]), ("", None),
                            (None, None), ([], None)],
)  # fmt: skip
def test_read_units_reads_lists_and_texts(value, expected):
    assert read_units(value, "`units`") == expected


def test_read_units_refuses_what_is_no_unit():
    with pytest.raises(RowError, match=r"`units` must be whole numbers with spaces between them, got '1.5'"):
        read_units([1.5], "`units`")
