"""Every kind of corpus gives the same columns, and whatever is wrong with one is named when it is loaded."""

import csv
import doctest
import json
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, Features, IterableDataset, Value

import data.corpora
from data.audio import SAMPLING_RATE, read_audio
from data.corpora import load_corpus

SECONDS = {"a": 0.5, "b": 1.0, "c": 1.5, "d": 2.0}  # of the recordings in `folder`
ROWS = [
    {"file_name": "wav/a.wav", "speaker_id": "ann", "text": "go on", "split": "train"},
    {"file_name": "wav/b.wav", "speaker_id": "ann", "text": "stop", "split": "train"},
    {"file_name": "wav/c.wav", "speaker_id": "bob", "text": "go on", "split": "train"},
    {"file_name": "wav/d.wav", "speaker_id": "bob", "text": "null", "split": "test"},
]


def write_rows(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def with_column(column: str, values: list) -> list[dict]:
    return [row | {column: value} for row, value in zip(ROWS, values, strict=True)]


def count_samples(row: dict) -> dict[str, int]:
    return {"num_samples": read_audio(row["audio"]).size}


def collect(corpus: Dataset | IterableDataset, column: str) -> list:
    return [row[column] for row in corpus]


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "corpus" / "wav").mkdir(parents=True)
    for name, seconds in SECONDS.items():
        noise = 0.1 * np.random.default_rng(0).standard_normal(round(seconds * SAMPLING_RATE))
        soundfile.write(tmp_path / "corpus" / "wav" / f"{name}.wav", noise, SAMPLING_RATE)
    write_rows(tmp_path / "corpus" / "metadata.csv", ROWS)
    return tmp_path / "corpus"


@pytest.fixture
def parquet_folder(tmp_path, folder):
    """Two splits as `push_to_hub` writes them: recordings inside parquet files, whole numbers as speakers."""
    content = (folder / "wav" / "a.wav").read_bytes()
    rows = [{"audio": {"path": "x.wav", "bytes": content}, "sentence": text, "speaker": 7} for text in ("one", "two")]
    table = Dataset.from_list(rows).cast_column("audio", Audio())
    (tmp_path / "tables" / "data").mkdir(parents=True)
    for split, length in (("train", 2), ("test", 1)):
        table.select(range(length)).to_parquet(tmp_path / "tables" / "data" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "tables"


def test_docstring_examples_hold():
    result = doctest.testmod(data.corpora)
    assert (result.failed, result.attempted) == (0, 1)


def test_load_corpus_reads_a_folder(folder):
    corpus = load_corpus(str(folder), required_columns=("audio", "text", "speaker_id"))
    assert corpus.features["audio"] == Audio(decode=False)
    assert corpus["text"][:] == ["go on", "stop", "go on", "null"]
    assert corpus["speaker_id"][:] == ["ann", "ann", "bob", "bob"]
    assert corpus[1]["audio"] == {"path": str(folder / "wav" / "b.wav"), "bytes": None}
    assert [read_audio(source).size / SAMPLING_RATE for source in corpus["audio"]] == list(SECONDS.values())


@pytest.mark.parametrize(("split", "num_rows"), [("train", 3), ("test", 1), (None, 4)])
@pytest.mark.parametrize("streaming", [False, True])
def test_load_corpus_selects_a_split(folder, split, num_rows, streaming):
    assert len(collect(load_corpus(str(folder), split=split, streaming=streaming), "text")) == num_rows


def test_load_corpus_takes_a_relative_and_a_home_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load_corpus("corpus")[0]["audio"]["path"] == str(folder / "wav" / "a.wav")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_corpus("~/corpus")[0]["audio"]["path"] == str(folder / "wav" / "a.wav")


def test_load_corpus_takes_a_folder_without_splits_as_train(folder):
    write_rows(folder / "metadata.csv", [{"file_name": row["file_name"], "text": row["text"]} for row in ROWS])
    assert load_corpus(str(folder), split="train")["split"][:] == ["train"] * 4
    with pytest.raises(ValueError, match="`split` must be one of train in .*, got 'test'"):
        load_corpus(str(folder), split="test")


@pytest.mark.parametrize("streaming", [False, True])
def test_load_corpus_reads_metadata_in_split_folders(folder, streaming):
    (folder / "metadata.csv").unlink()
    for split, names in (("train", "abc"), ("test", "d")):
        write_rows(
            folder / split / "metadata.csv", [{"file_name": f"../wav/{name}.wav", "text": name} for name in names]
        )
    corpus = load_corpus(str(folder), streaming=streaming)
    assert collect(corpus, "text") == ["d", "a", "b", "c"]
    assert collect(corpus, "split") == ["test", "train", "train", "train"]
    test_split = load_corpus(str(folder), split="test", streaming=streaming)
    assert collect(test_split, "audio") == [{"path": str(folder / "wav" / "d.wav"), "bytes": None}]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["audio", "file_name", "path"])
@pytest.mark.parametrize("streaming", [False, True])
def test_load_corpus_reads_manifests_alike(folder, suffix, column, streaming):
    rows = [{column: row["file_name"], **{name: row[name] for name in ("text", "speaker_id")}} for row in ROWS]
    writers = {
        "csv": lambda path: write_rows(path, rows),
        "tsv": lambda path: write_rows(path, rows, delimiter="\t"),
        "jsonl": lambda path: write_json_lines(path, rows),
        "parquet": lambda path: Dataset.from_list(rows).to_parquet(path),
    }
    path = folder / f"rows.{suffix}"
    writers[suffix](path)
    corpus = load_corpus(str(path), required_columns=("audio", "text"), streaming=streaming)
    assert collect(corpus, "text") == ["go on", "stop", "go on", "null"]
    assert collect(corpus, "audio") == [{"path": str(folder / row["file_name"]), "bytes": None} for row in ROWS]
    assert set(corpus.column_names) == {"audio", "text", "speaker_id", "split"}


@pytest.mark.parametrize("text", ["sentence", "transcription", "transcript"])
@pytest.mark.parametrize("speaker", ["speaker", "client_id"])
def test_load_corpus_renames_columns_to_the_project_s(folder, text, speaker):
    rows = [{"path": row["file_name"], text: row["text"], speaker: number} for number, row in enumerate(ROWS)]
    corpus = load_corpus(str(write_json_lines(folder / "rows.jsonl", rows)), required_columns=("text", "speaker_id"))
    assert corpus["text"][:] == ["go on", "stop", "go on", "null"]
    assert corpus["speaker_id"][:] == ["0", "1", "2", "3"]


def test_load_corpus_reads_domains_as_names(folder):
    rows = [row | {"domain": number} for number, row in enumerate(ROWS)]
    corpus = load_corpus(str(write_json_lines(folder / "rows.jsonl", rows)), required_columns=("domain",))
    assert corpus["domain"][:] == ["0", "1", "2", "3"]
    tables = folder.parent / "tables"
    tables.mkdir()
    table = Dataset.from_list([{"audio": {"path": "x.wav", "bytes": b"x"}, "domain": number} for number in (7, 8)])
    table.cast_column("audio", Audio()).to_parquet(tables / "train.parquet")
    assert load_corpus(str(tables), required_columns=("domain",))["domain"][:] == ["7", "8"]


def test_load_corpus_renames_the_first_of_several_texts_and_none_beside_a_text(folder):
    row = {"path": "wav/a.wav", "transcript": "three", "sentence": "one"}
    first = load_corpus(str(write_json_lines(folder / "several.jsonl", [row])))[0]
    kept = load_corpus(str(write_json_lines(folder / "named.jsonl", [row | {"text": "zero"}])))[0]
    assert (first["text"], sorted(first)) == ("one", ["audio", "split", "text"])
    assert kept["text"] == "zero"


def test_load_corpus_keeps_the_project_s_columns_and_those_that_are_required(folder):
    rows = [row | {"age": 30 + number, "units": [number] * number} for number, row in enumerate(ROWS)]
    path = str(write_json_lines(folder / "rows.jsonl", rows))
    assert set(load_corpus(path).column_names) == {"audio", "speaker_id", "text", "split", "units"}
    corpus = load_corpus(path, required_columns=("age",))
    assert corpus["age"][:] == [30, 31, 32, 33]
    assert corpus["units"][2] == [2, 2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["age", "units"])
@pytest.mark.parametrize("values", [[30, "forty", 50, {}], [2**70, 1, 2, 3]], ids=["mixed", "large"])
def test_load_corpus_is_not_refused_for_a_column_that_nothing_needs(folder, column, values, streaming):
    path = str(write_json_lines(folder / "rows.jsonl", with_column(column, values)))
    corpus = load_corpus(path, required_columns=("text",), streaming=streaming)
    assert collect(corpus, "text") == ["go on", "stop", "go on", "null"]
    assert set(corpus.column_names) == {"audio", "speaker_id", "text", "split"}


def test_load_corpus_fills_columns_that_only_some_json_rows_have(folder):
    rows = [ROWS[0], ROWS[1] | {"domain": "loud"}]
    assert load_corpus(str(write_json_lines(folder / "rows.jsonl", rows)))["domain"][:] == [None, "loud"]


def test_load_corpus_keeps_recordings_inside_a_parquet_manifest(folder):
    content = (folder / "wav" / "a.wav").read_bytes()
    features = Features({"audio": {"path": Value("string"), "bytes": Value("binary")}})
    rows = [{"audio": {"path": "a.wav", "bytes": content}}, {"audio": {"path": "wav/b.wav", "bytes": None}}]
    Dataset.from_list(rows, features=features).to_parquet(folder / "rows.parquet")
    corpus = load_corpus(str(folder / "rows.parquet"))
    assert corpus["audio"][:] == [rows[0]["audio"], {"path": str(folder / "wav" / "b.wav"), "bytes": None}]


def test_load_corpus_accepts_absolute_paths_repeated_rows_and_a_byte_order_mark(folder, tmp_path):
    rows = [{"audio": str(folder / "wav" / "a.wav"), "text": "go"}] * 2
    path = write_rows(tmp_path / "elsewhere" / "rows.csv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_corpus(str(path))["text"][:] == ["go", "go"]


def test_load_corpus_lets_map_find_its_features_until_a_recording_changes(folder):
    first, again = (load_corpus(str(folder)).map(count_samples) for _ in range(2))
    assert first["num_samples"][:] == [8_000, 16_000, 24_000, 32_000]
    assert again.cache_files == first.cache_files
    soundfile.write(folder / "wav" / "a.wav", 0.1 * np.sin(np.arange(4_000)), SAMPLING_RATE)
    changed = load_corpus(str(folder)).map(count_samples)
    assert changed["num_samples"][:] == [4_000, 16_000, 24_000, 32_000]
    assert changed.cache_files != first.cache_files


@pytest.mark.parametrize("streaming", [False, True])
def test_load_corpus_reads_a_folder_of_hub_tables(parquet_folder, folder, streaming):
    required_columns = ("audio", "text", "speaker_id")
    corpus = load_corpus(str(parquet_folder), split="train", required_columns=required_columns, streaming=streaming)
    assert collect(corpus, "text") == ["one", "two"]
    assert collect(corpus, "speaker_id") == ["7", "7"]
    for source in collect(corpus, "audio"):
        np.testing.assert_array_equal(read_audio(source), read_audio(folder / "wav" / "a.wav"))
    assert len(collect(load_corpus(str(parquet_folder), streaming=streaming), "text")) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_load_corpus_reads_recordings_downloaded_from_the_hub(folder, tmp_path, monkeypatch, streaming):
    repository = tmp_path / "hub" / "datasets--me--orders"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    corpus = load_corpus("me/orders", split="test", streaming=streaming)
    assert [read_audio(source).size for source in collect(corpus, "audio")] == [32_000]


def test_load_corpus_makes_the_synthetic_corpus_once(tmp_path):
    corpus = load_corpus("synthetic/ko", split="train", required_columns=("audio", "text", "speaker_id"))
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.wav")}
    assert (len(corpus), len(made)) == (96, 120)
    load_corpus("synthetic/ko", split="test")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.wav")} == made


def test_load_corpus_refuses_a_language_without_a_synthetic_corpus():
    with pytest.raises(
        ValueError, match='`dataset` must be one of "synthetic/en", "synthetic/ko", got .synthetic/xx.'
    ):
        load_corpus("synthetic/xx")


@pytest.mark.parametrize("dataset", ["/no/such/folder", "./none", "~/none", "none.csv", "a/b/c"])
def test_load_corpus_refuses_a_path_that_does_not_exist(dataset):
    with pytest.raises(ValueError, match=rf"`dataset` must be a corpus, got {dataset}, which does not exist\. Give a"):
        load_corpus(dataset)


@pytest.mark.parametrize("name", ["nobody/nothing", "not a name!"])
def test_load_corpus_refuses_a_hub_name_that_cannot_be_reached(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"`dataset` must be a corpus, got '{name}'"):
        load_corpus(name)


def test_load_corpus_refuses_a_folder_without_metadata(folder):
    with pytest.raises(ValueError, match="`dataset` must be a corpus, got the folder .*wav without metadata"):
        load_corpus(str(folder / "wav"))


def test_load_corpus_refuses_a_file_that_is_no_manifest(folder):
    with pytest.raises(ValueError, match=r"`dataset` must be a corpus, got the file .*a\.wav"):
        load_corpus(str(folder / "wav" / "a.wav"))


@pytest.mark.parametrize("streaming", [False, True])
def test_load_corpus_lists_the_splits_when_one_is_unknown(folder, parquet_folder, streaming):
    with pytest.raises(ValueError, match="`split` must be one of test, train in .*, got 'dev'"):
        load_corpus(str(folder), split="dev", streaming=streaming)
    with pytest.raises(ValueError, match="`split` must be one of test, train in .*tables, got 'dev'"):
        load_corpus(str(parquet_folder), split="dev", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_load_corpus_lists_the_columns_when_one_is_missing(folder, parquet_folder, streaming):
    with pytest.raises(ValueError, match=r"`units` must be a column of .*metadata\.csv, got the columns audio, spe"):
        load_corpus(str(folder), required_columns=("units",), streaming=streaming)
    with pytest.raises(ValueError, match="`units` must be a column of .*tables, got the columns audio, text, spe"):
        load_corpus(str(parquet_folder), required_columns=("units",), streaming=streaming)


def test_load_corpus_names_the_audio_columns_when_there_is_none(folder):
    path = write_rows(folder / "rows.csv", [{"wav": "wav/a.wav"}])
    with pytest.raises(ValueError, match=r"`audio` \(or file_name, path, .*\) must be a column of .*rows\.csv, got"):
        load_corpus(str(path))


@pytest.mark.parametrize("streaming", [False, True])
def test_load_corpus_names_row_and_file_of_a_missing_recording(folder, streaming):
    (folder / "wav" / "c.wav").unlink()
    with pytest.raises(
        ValueError, match=r"`audio` of row 3 in .*data\.csv must be an existing file, got 'wav/c\.wav'"
    ):
        load_corpus(str(folder), split="train", streaming=streaming)


def test_load_corpus_checks_only_the_rows_of_the_split(folder):
    (folder / "wav" / "c.wav").unlink()
    assert len(load_corpus(str(folder), split="test")) == 1


@pytest.mark.parametrize("empty", ["", "  "])
@pytest.mark.parametrize("column", ["text", "speaker_id", "domain"])
def test_load_corpus_names_the_row_of_an_empty_required_cell(folder, column, empty):
    write_rows(folder / "metadata.csv", with_column(column, ["a", empty, "c", "d"]))
    assert len(load_corpus(str(folder))) == 4
    with pytest.raises(ValueError, match=rf"`{column}` of row 2 in .*metadata\.csv must not be empty"):
        load_corpus(str(folder), required_columns=(column,))


def test_load_corpus_names_the_row_of_an_empty_text_in_hub_tables(tmp_path):
    rows = [{"audio": {"path": "x.wav", "bytes": b"x"}, "text": text} for text in ("one", " ")]
    (tmp_path / "tables").mkdir()
    Dataset.from_list(rows).cast_column("audio", Audio()).to_parquet(tmp_path / "tables" / "train.parquet")
    with pytest.raises(ValueError, match="`text` of row 2 in .*tables must not be empty"):
        load_corpus(str(tmp_path / "tables"), required_columns=("text",))


@pytest.mark.parametrize(("streaming", "detail"), [(False, "corresponds to no data"), (True, "got the empty corpus")])
def test_load_corpus_refuses_hub_tables_without_rows(tmp_path, streaming, detail):
    features = Features({"audio": Audio(decode=False), "text": Value("string")})
    (tmp_path / "tables").mkdir()
    Dataset.from_dict({"audio": [], "text": []}, features=features).to_parquet(tmp_path / "tables" / "train.parquet")
    with pytest.raises(ValueError, match=detail):
        load_corpus(str(tmp_path / "tables"), split="train", streaming=streaming)


@pytest.mark.parametrize("value", [None, 7, {"path": None, "bytes": None}])
def test_load_corpus_refuses_a_cell_that_names_no_recording(folder, value):
    path = write_json_lines(folder / "rows.jsonl", [{"audio": value}])
    with pytest.raises(ValueError, match=r"`audio` of row 1 in .*rows\.jsonl must"):
        load_corpus(str(path))


@pytest.mark.parametrize("name", ["../outside.wav", "wav/../../outside.wav"])
def test_load_corpus_refuses_a_path_that_leaves_the_corpus(folder, name):
    (folder.parent / "outside.wav").write_bytes((folder / "wav" / "a.wav").read_bytes())
    write_rows(folder / "metadata.csv", with_column("file_name", ["wav/../wav/a.wav", name, "wav/c.wav", "wav/d.wav"]))
    with pytest.raises(ValueError, match=rf"`audio` of row 2 in .* must lie in {folder}, got '{name}'"):
        load_corpus(str(folder))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_load_corpus_refuses_a_corpus_without_rows(folder, name, streaming):
    (folder / name).write_text("")
    with pytest.raises(ValueError, match="`dataset` must have rows, got the empty corpus"):
        load_corpus(str(folder / name), streaming=streaming)


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("rows.csv", b"audio,text\nwav/a.wav,one,two\n", "number of cells"),
        ("rows.csv", b"audio,text\nwav/a.wav\n", "number of cells"),
        ("rows.csv", "audio,text\nwav/a.wav,caf\u00e9\n".encode("latin-1"), "codec can't decode"),
        ("rows.jsonl", b'{"audio": "wav/a.wav"}\n{"audio": \n', "Expecting value"),
        ("rows.jsonl", b"[1, 2]\n", "a row that is no object"),
        ("rows.parquet", b"not a table", "Parquet"),
    ],
)
def test_load_corpus_names_a_manifest_that_cannot_be_parsed(folder, name, content, detail):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"`.*{name}` must be a UTF-8 \.\w+ manifest, got \(.*{detail}"):
        load_corpus(str(folder / name))


@pytest.mark.parametrize("values", [[30, "forty", 50, 60], [2**70, 1, 2, 3]])
def test_load_corpus_names_a_required_column_of_several_types(folder, values):
    path = write_json_lines(folder / "rows.jsonl", with_column("age", values))
    with pytest.raises(ValueError, match=r"`age` of .*rows\.jsonl must hold one type"):
        load_corpus(str(path), required_columns=("age",))
