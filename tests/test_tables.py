"""Tables as people have them give the rows that are meant, or an error that says what was found."""

import gzip
import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from data.tables import read_table

HEADER, ROWS = ["path", "text"], [["a.wav", "go on"], ["b.wav", "stop"]]
EXPECTED = [{"path": "a.wav", "text": "go on"}, {"path": "b.wav", "text": "stop"}]


def join(rows: list[list[str]], delimiter: str, end: str = "\n") -> str:
    return "".join(delimiter.join(cells) + end for cells in rows)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV", "rows.csv.gz", "rows.tsv.gz"])
def test_a_table_is_read_in_every_dialect(tmp_path, name, encoding, delimiter, end):
    content = join([HEADER, *ROWS], delimiter, end).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_table(tmp_path / name)) == EXPECTED


def test_excel_s_line_that_names_the_separator_is_no_header(tmp_path):
    (tmp_path / "rows.csv").write_text("sep=;\r\n" + join([HEADER, *ROWS], ";", "\r\n"))
    assert list(read_table(tmp_path / "rows.csv")) == EXPECTED


def test_empty_columns_and_lines_that_a_spreadsheet_leaves_are_passed_over(tmp_path):
    (tmp_path / "rows.csv").write_text("\npath;text;;\na.wav;go on;;\n\nb.wav;stop;;\n")
    assert list(read_table(tmp_path / "rows.csv")) == EXPECTED
    (tmp_path / "rows.csv").write_text("path;text;;\na.wav;go on;;x\n")
    with pytest.raises(ValueError, match="row 1 has 4, not 2, split at ';'"):
        list(read_table(tmp_path / "rows.csv"))


def test_quotes_in_a_tsv_are_characters(tmp_path):
    texts = ['"go', "on", '"stop', 'say "hi"', '"never"', '"she said ""go"""']
    (tmp_path / "rows.tsv").write_text("path\ttext\n" + "".join(f"{text[-1]}.wav\t{text}\n" for text in texts))
    read = [row["text"] for row in read_table(tmp_path / "rows.tsv")]
    assert read == ['"go', "on", '"stop', 'say "hi"', "never", 'she said "go"']


@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize(
    "texts", [['"go', '"stop', "on"], ['"go', "stop", 'on"', "yes"], ['"go" on', "stop"], ['"go', "stop"]]
)
def test_a_sentence_that_opens_a_quote_in_a_csv_loses_no_row(tmp_path, texts, delimiter):
    (tmp_path / "rows.csv").write_text(join([HEADER, *([f"{text[-1]}.wav", text] for text in texts)], delimiter))
    with pytest.raises(ValueError, match=r"must be a UTF-8 \.csv manifest, got \("):
        list(read_table(tmp_path / "rows.csv"))


def test_quoted_cells_of_a_csv_hold_delimiters_quotes_and_lines(tmp_path):
    (tmp_path / "rows.csv").write_text('path,text\na.wav,"go, ""now"""\nb.wav,"two\nlines"\n')
    assert [row["text"] for row in read_table(tmp_path / "rows.csv")] == ['go, "now"', "two\nlines"]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.ndjson", "rows.json.gz"])
@pytest.mark.parametrize("form", ["lines", "list", "indented list"])
def test_json_is_read_as_lines_and_as_a_list(tmp_path, name, form):
    forms = {
        "lines": "\n".join(map(json.dumps, EXPECTED)),
        "list": json.dumps(EXPECTED),
        "indented list": json.dumps(EXPECTED, indent=2),
    }
    content = forms[form].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_table(tmp_path / name)) == EXPECTED


def test_classes_of_parquet_are_read_by_name(tmp_path):
    features = Features({"path": Value("string"), "text": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"path": ["a", "b", "c"], "text": [1, 0, -1]}, features=features).to_parquet(
        tmp_path / "x.parquet"
    )
    assert [row["text"] for row in read_table(tmp_path / "x.parquet")] == ["yes", "no", None]


def test_a_table_without_header_is_read_as_ljspeech(tmp_path):
    (tmp_path / "metadata.csv").write_text('LJ1|Dr. "Who|Doctor "Who\nLJ2|No 2|No two\nLJ3|Yes.|\n')
    assert list(read_table(tmp_path / "metadata.csv")) == [
        {"path": "LJ1", "text": 'Doctor "Who'}, {"path": "LJ2", "text": "No two"}, {"path": "LJ3", "text": "Yes."},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("rows.txt.csv", b"a.wav|ann|go on\nb.wav|ben|stop\n", r"columns without names: \['a\.wav', 'ann', 'go on'\]"),
        ("rows.csv", b"path,text,text\na.wav,a,b\n", "several columns 'text'"),
        ("rows.csv", b"path,text\na.wav,go, on\n", r"row 1 has 3, not 2, split at ','.*text that holds ',' in quotes"),
        ("rows.csv", "path,text\na,größer\n".encode("cp1252"), r"can't decode.*Save it .*`iconv -f WINDOWS-1252"),
        ("rows.csv", "path,text\na.wav,go\n".encode("utf-16-le"), r"NUL characters, .*`iconv -f UTF-16LE -t UTF-8`"),
        ("rows.csv.gz", b"path,text\n", "gzipped"),
        ("rows.json", b'{"path":\n "a.wav"}', "Expecting value"),
        ("rows.json", b'{"path": "wav\\a.wav"}', "Invalid .escape"),
        ("rows.parquet", b"PAR1", "Parquet"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_described(tmp_path, name, content, detail):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"`.*{name}` must be .*{detail}"):
        list(read_table(tmp_path / name))
