"""A corpus means the same in every form; cells that mean nothing are named; recordings stay where the corpus is."""

import io
import json
import unicodedata
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, Features, Value

from data.audio import read_audio
from data.corpora import load_corpus, take_seconds

SAMPLES = (0.1 * np.random.default_rng(0).standard_normal(1600)).astype(np.float32)
UNDECODED = {"path": Value("string"), "bytes": Value("binary")}


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "corpus").mkdir()
    soundfile.write(tmp_path / "corpus" / "a.wav", SAMPLES, 16_000, subtype="FLOAT")
    return tmp_path / "corpus"


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def as_wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="wav", subtype="FLOAT")
    return file.getvalue()


def load_both(folder: Path, table: Dataset, *, streaming: bool = False, **options) -> list[list[dict]]:
    """Loads a table as a single Parquet file and as a folder with it."""
    (folder / "tables").mkdir()
    table.to_parquet(folder / "tables" / "train.parquet")
    names = (folder / "tables" / "train.parquet", folder / "tables")
    return [list(load_corpus(str(name), streaming=streaming, **options)) for name in names]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "values", "feature", "expected"),
    [
        ("speaker_id", [None, "ann"], Value("string"), [None, "ann"]),
        ("speaker_id", [None, 7.0], Value("float64"), [None, "7"]),
        ("speaker_id", [8, 7], Value("int64"), ["8", "7"]),
        ("speaker_id", [0, 1], ClassLabel(names=["ann", "ben"]), ["ann", "ben"]),
        ("text", [4, 7], Value("int64"), ["4", "7"]),
        ("text", [0, 1], ClassLabel(names=["no", "yes"]), ["no", "yes"]),
        ("seconds", [1, 2**62], Value("int64"), None),
    ],
)
def test_a_folder_of_tables_is_read_as_the_single_table(folder, column, values, feature, expected, streaming):
    features = Features({"audio": UNDECODED, column: feature})
    rows = {"audio": [{"path": "x.wav", "bytes": as_wav(SAMPLES)}] * 2, column: values}
    table = Dataset.from_dict(rows, features=features).cast_column("audio", Audio())
    alone, inside = load_both(folder, table, streaming=streaming)
    assert alone == inside
    assert expected is None or [row[column] for row in alone] == expected
    np.testing.assert_array_equal(read_audio(alone[0]["audio"]), SAMPLES)


@pytest.mark.parametrize(
    "audio",
    [
        {"array": SAMPLES.tolist(), "sampling_rate": 16_000, "path": None},
        SAMPLES.tolist(),
        {"path": None, "bytes": as_wav(SAMPLES)},
        as_wav(SAMPLES),
    ],
    ids=["decoded", "floats", "bytes in a dict", "bytes"],
)
def test_recordings_in_a_table_are_read_in_every_form(folder, audio):
    table = Dataset.from_list([{"audio": audio, "sampling_rate": 16_000}])
    for rows in load_both(folder, table):
        np.testing.assert_array_equal(read_audio(rows[0]["audio"]), SAMPLES)


def test_whole_numbers_are_samples_of_16_bits_and_channels_are_found(folder):
    whole = np.round(SAMPLES * 32768).astype(int)
    rows = [{"audio": whole.tolist(), "sample_rate": 16_000}, {"audio": [whole.tolist()] * 2, "sample_rate": 16_000}]
    for row in load_corpus(write_rows(folder / "rows.jsonl", rows)):
        np.testing.assert_array_equal(read_audio(row["audio"]), (whole / 32768).astype(np.float32))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"audio": [0.1] * 900}, "must say the rate of its samples in `sampling_rate`, in Hz, got None"),
        ({"audio": ["a", "b"], "sampling_rate": 8000}, "must hold samples, got"),
        ({"audio": [40_000] * 900, "sampling_rate": 8000}, "samples of 16 bits or floats"),
        ({"audio": np.zeros((9, 9)).tolist(), "sampling_rate": 8000}, "one or a few channels, got an array of shape"),
        ({"audio": "https://x.org/a.wav"}, "must be a file here, got 'https://x.org/a.wav'"),
        ({"audio": "C:\\wav\\a.wav"}, "must be a file here, got 'C:"),
        ({"audio": "wav\ba.wav"}, "holds a control character: write /"),
        ({"audio": "A.WAV"}, r"must be an existing file, got 'A.WAV' \(there is 'a.wav': write that\)"),
        ({"audio": "b.wav"}, "must be an existing file, got 'b.wav'"),
        ({"audio": "a.mp3"}, r"existing file, got 'a.mp3' \(there is 'a.wav'"),
    ],
)
def test_a_cell_that_is_no_recording_is_named(folder, row, message):
    with pytest.raises(ValueError, match=rf"`audio` of row 1 in .*rows\.jsonl {message}|{message}"):
        load_corpus(write_rows(folder / "rows.jsonl", [row]))


@pytest.mark.parametrize("value", [float("nan"), {"en": "turn on"}, ["turn on"], 1.5, True, None, " ", "\ud800"])
def test_a_required_text_that_is_none_is_named(folder, value):
    path = write_rows(folder / "rows.jsonl", [{"audio": "a.wav", "text": "go"}, {"audio": "a.wav", "text": value}])
    with pytest.raises(ValueError, match=r"1 of 2 rows .*: `text` of row 2 in .*rows\.jsonl must (not )?be"):
        load_corpus(path, required_columns=("text",))
    assert load_corpus(path)["text"][:] == ["go", None]


def test_a_few_unusable_rows_are_left_out_and_named(folder, caplog):
    rows = [{"audio": "a.wav", "text": str(number)} for number in range(40)]
    rows[3]["text"], rows[7]["audio"] = float("nan"), "missing.wav"
    corpus = load_corpus(write_rows(folder / "rows.jsonl", rows), required_columns=("text",))
    assert corpus["text"][:] == [str(number) for number in range(40) if number not in (3, 7)]
    assert "2 of 40 rows cannot be used: `text` of row 4 in " in caplog.text
    assert "`audio` of row 8 in" in caplog.text
    streamed = load_corpus(str(folder / "rows.jsonl"), required_columns=("text",), streaming=True)
    assert [row["text"] for row in streamed] == corpus["text"][:]
    rows[9]["audio"] = "missing.wav"
    with pytest.raises(ValueError, match="3 of 40 rows .*: .*row 4.*; .*row 8.*; .*row 10.*Correct them or"):
        load_corpus(write_rows(folder / "rows.jsonl", rows), required_columns=("text",))


def test_a_column_named_seconds_does_not_stand_in_the_way(folder):
    path = write_rows(folder / "rows.jsonl", [{"audio": "a.wav", "text": "go", "seconds": 3}] * 2)
    assert take_seconds(load_corpus(path), 0.1, seed=0)["seconds"][:] == [0.1]
    assert take_seconds(load_corpus(path, required_columns=("seconds",)), 0.2, seed=0)["seconds"][:] == [0.1, 0.1]


@pytest.mark.parametrize(("on_disk", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_is_found_in_either_form_of_its_accents(folder, on_disk, written):
    disk, cell = (unicodedata.normalize(form, "clips/jos\u00e9.wav") for form in (on_disk, written))
    (folder / disk).parent.mkdir()
    (folder / "a.wav").rename(folder / disk)
    assert disk != cell
    corpus = load_corpus(write_rows(folder / "rows.jsonl", [{"audio": cell}]))
    assert corpus[0]["audio"]["path"] == str(folder / disk)


def test_a_name_that_two_files_have_is_refused(folder):
    for form in ("NFC", "NFD"):
        (folder / unicodedata.normalize(form, "jose\u0301\u00e9.wav")).write_bytes((folder / "a.wav").read_bytes())
    with pytest.raises(ValueError, match="must be one file, got .* which is .* and "):
        load_corpus(write_rows(folder / "rows.jsonl", [{"audio": "jos\u00e9e\u0301.wav"}]))


def test_backslashes_are_read_as_slashes(folder):
    (folder / "wav").mkdir()
    (folder / "a.wav").rename(folder / "wav" / "b.wav")
    corpus = load_corpus(write_rows(folder / "rows.jsonl", [{"path": "wav\\b.wav"}]))
    assert corpus[0]["audio"]["path"] == str(folder / "wav" / "b.wav")


@pytest.mark.parametrize("streaming", [False, True])
def test_relative_paths_in_tables_begin_at_the_corpus_and_not_where_the_user_stands(folder, monkeypatch, streaming):
    elsewhere = folder.parent / "elsewhere"
    (folder / "tables").mkdir()
    elsewhere.mkdir()
    soundfile.write(elsewhere / "a.wav", SAMPLES[:800], 16_000, subtype="FLOAT")
    (folder / "a.wav").rename(folder / "tables" / "a.wav")
    table = Dataset.from_list([{"audio": {"path": "a.wav", "bytes": None}}], features=Features({"audio": UNDECODED}))
    table.to_parquet(folder / "tables" / "train.parquet")
    monkeypatch.chdir(elsewhere)
    for name in (folder / "tables", folder / "tables" / "train.parquet"):
        (row,) = load_corpus(str(name), streaming=streaming)
        assert row["audio"] == {"path": str(folder / "tables" / "a.wav"), "bytes": None}


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """The snapshot of a corpus of single recordings in the Hub's cache; returns its folder."""
    repository = tmp_path / "hub" / "datasets--me--orders"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    soundfile.write(repository / "blobs" / "abc", SAMPLES, 16_000, format="wav")
    (snapshot / "a.wav").symlink_to("../../blobs/abc")  # as the library writes it
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_downloaded_corpus_may_not_name_files_elsewhere(hub_folder, tmp_path):
    soundfile.write(tmp_path / "private.wav", SAMPLES, 16_000)
    (hub_folder / "link.wav").symlink_to(tmp_path / "private.wav")
    write_rows(hub_folder / "metadata.jsonl", [{"file_name": "a.wav"}])
    assert len(load_corpus("me/orders")) == 1
    for path in (str(tmp_path / "private.wav"), "../../../../private.wav", "link.wav"):
        write_rows(hub_folder / "metadata.jsonl", [{"file_name": path}])
        with pytest.raises(ValueError, match="`audio` of row 1 in .* must lie in .*datasets--me--orders, got"):
            load_corpus("me/orders")


def test_a_folder_may_not_name_files_elsewhere_but_a_named_manifest_may(folder, tmp_path):
    soundfile.write(tmp_path / "mine.wav", SAMPLES, 16_000)
    (folder / "link.wav").symlink_to(tmp_path / "mine.wav")
    for path in (str(tmp_path / "mine.wav"), "link.wav"):
        manifest = write_rows(folder / "metadata.jsonl", [{"file_name": path}])
        with pytest.raises(ValueError, match="must lie in .*corpus, got .*give the manifest itself as `dataset`"):
            load_corpus(str(folder))
        assert len(load_corpus(manifest)) == 1


def test_tables_may_not_name_files_elsewhere(folder, tmp_path):
    soundfile.write(tmp_path / "mine.wav", SAMPLES, 16_000)
    (folder / "tables").mkdir()
    for path in (str(tmp_path / "mine.wav"), "../../mine.wav"):
        table = Dataset.from_list([{"audio": {"path": path, "bytes": None}}], features=Features({"audio": UNDECODED}))
        table.to_parquet(folder / "tables" / "train.parquet")
        with pytest.raises(ValueError, match="`audio` of row 1 in .*tables must lie in .*tables, got"):
            load_corpus(str(folder / "tables"))


@pytest.fixture
def configured(folder):
    """Tables of two configurations, as a corpus on the Hub has them."""
    for config, text in (("en", "go"), ("ko", "\uac00")):
        rows = [{"audio": {"path": "x.wav", "bytes": as_wav(SAMPLES)}, "label": text, "spoken": f"{text}!"}]
        features = Features({"audio": UNDECODED, "label": Value("string"), "spoken": Value("string")})
        table = Dataset.from_list(rows, features=features)
        (folder / config).mkdir()
        table.to_parquet(folder / config / "train.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: en, data_files: en/*.parquet}\n- {config_name: ko, data_files: ko/*.parquet}\n---\n"
    )
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_and_a_column_of_text_are_named(configured, streaming):
    for config, text in (("en", "go!"), ("ko", "\uac00!")):
        options = {"dataset_config": config, "text_column": "spoken", "required_columns": ("text",)}
        corpus = load_corpus(configured, split="train", streaming=streaming, **options)
        assert [row["text"] for row in corpus] == [text]


def test_what_is_wrong_with_a_corpus_of_tables_is_said(configured, tmp_path):
    for config in (None, "fr"):
        with pytest.raises(ValueError, match=f"`dataset_config` must be one of en, ko for .*, got {config}"):
            load_corpus(configured, dataset_config=config)
    with pytest.raises(ValueError, match="`split` must be one of train in .*, got 'test'"):
        load_corpus(configured, dataset_config="en", split="test")
    with pytest.raises(ValueError, match=r"`text` must be a column of .*label, spoken.*Name it with `--text_column`"):
        load_corpus(configured, dataset_config="en", required_columns=("text",))
    with pytest.raises(ValueError, match="`text_column` must be a column of .*, got 'words' where the columns are"):
        load_corpus(configured, dataset_config="en", text_column="words")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="`dataset` must be a corpus that can be read, got .*broken'"):
        load_corpus(str(tmp_path / "broken"))


def test_a_configuration_of_what_has_none_is_refused(folder):
    path = write_rows(folder / "metadata.jsonl", [{"file_name": "a.wav"}])
    for name in (path, str(folder)):
        with pytest.raises(ValueError, match="`dataset_config` must be left out for .*, got 'en'"):
            load_corpus(name, dataset_config="en")
