"""Corpora in the layouts that people have are read as they are meant, or an error names the layout and the command."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value

from data.audio import read_audio
from data.corpora import load_corpus


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder


def record(path: Path, number: int = 1) -> str:
    """Writes `number` tenths of a second of noise; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(number).standard_normal(1600 * number), 16_000)
    return str(path)


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def lengths(corpus: Dataset) -> list[int]:
    return [len(read_audio(source)) // 1600 for source in corpus["audio"]]


@pytest.mark.parametrize("name", ["clip.mp3", "clip"])
def test_common_voice_s_folder(folder, name):
    for split, number in (("train", 1), ("dev", 2), ("test", 3)):
        record(folder / "clips" / f"{split}_clip.flac", number)
        path = f"{split}_clip{'.flac' if '.' in name else ''}"
        write(folder / f"{split}.tsv", f'client_id\tpath\tsentence\tage\n{number}f\t{path}\t"Go {number}\ttwenties\n')
    write(folder / "validated.tsv", "client_id\tpath\tsentence\n1\tmissing.mp3\tno\n")
    write(folder / "clip_durations.tsv", "clip\tduration[ms]\n")
    corpus = load_corpus(str(folder), required_columns=("text", "speaker_id"))
    assert corpus["split"][:] == ["dev", "test", "train"]
    assert (corpus["text"][:], corpus["speaker_id"][:]) == (['"Go 2', '"Go 3', '"Go 1'], ["2f", "3f", "1f"])
    assert lengths(corpus) == [2, 3, 1]
    alone = load_corpus(str(folder / "test.tsv"))
    assert (alone["text"][:], lengths(alone)) == (['"Go 3'], [3])


def test_nemo_s_manifests(folder):
    record(folder / "long.wav", 10)
    rows = [
        {"audio_filepath": "long.wav", "offset": 0.2, "duration": 0.3, "text": "one"},
        {"audio_filepath": "long.wav", "duration": 0.4, "text": "two"},
        {"audio_filepath": "long.wav", "duration": 1.0, "text": "all"},
    ]
    write(folder / "train_manifest.json", "\n".join(map(json.dumps, rows)))
    write(folder / "test_manifest.json", json.dumps(rows[2]))
    assert lengths(load_corpus(str(folder), split="train")) == [3, 4, 10]
    assert lengths(load_corpus(str(folder / "test_manifest.json"))) == [10]


@pytest.mark.parametrize("above", [True, False])
def test_librispeech_s_folder(folder, above):
    chapter = folder / "dev-clean" / "84" / "121123"
    for number in (1, 2):
        record(chapter / f"84-121123-000{number}.flac", number)
    write(chapter / "84-121123.trans.txt", "84-121123-0001 GO DO YOU HEAR\n84-121123-0002 STOP\n")
    corpus = load_corpus(str(folder if above else folder / "dev-clean"), required_columns=("text", "speaker_id"))
    assert (corpus["text"][:], corpus["speaker_id"][:]) == (["GO DO YOU HEAR", "STOP"], ["84", "84"])
    assert corpus["split"][0] == ("dev-clean" if above else "train")
    assert lengths(corpus) == [1, 2]


def test_multilingual_librispeech_s_folder(folder):
    for split, number in (("train", 1), ("dev", 2)):
        record(folder / split / "audio" / "10" / "20" / "10_20_000001.flac", number)
        write(folder / split / "transcripts.txt", f"10_20_000001\tgo {split}\n")
    corpus = load_corpus(str(folder), split="dev", required_columns=("text", "speaker_id"))
    assert (corpus["text"][:], corpus["speaker_id"][:], lengths(corpus)) == (["go dev"], ["10"], [2])
    assert lengths(load_corpus(str(folder / "train"))) == [1]


@pytest.mark.parametrize(("place", "ending"), [("wav48", ".wav"), ("wav48_silence_trimmed", "_mic1.flac")])
def test_vctk_s_folder(folder, place, ending):
    record(folder / place / "p225" / f"p225_001{ending}", 2)
    record(folder / place / "p225" / "p225_001_mic2.flac", 3)
    write(folder / "txt" / "p225" / "p225_001.txt", "Please call Stella.\n")
    corpus = load_corpus(str(folder), required_columns=("text", "speaker_id"))
    assert (corpus["text"][:], corpus["speaker_id"][:], lengths(corpus)) == (["Please call Stella."], ["p225"], [2])


def test_ljspeech_s_folder(folder):
    record(folder / "wavs" / "LJ001-0001.wav", 2)
    write(folder / "metadata.csv", 'LJ001-0001|Dr. "Who, 2|Doctor "Who, two\n')
    corpus = load_corpus(str(folder))
    assert (corpus["text"][:], lengths(corpus)) == (['Doctor "Who, two'], [2])


@pytest.mark.parametrize("split", [None, "test"])
def test_kaldi_s_folder(folder, split):
    data = folder / split if split else folder
    record(data / "rec.wav", 10)
    write(data / "wav.scp", "rec rec.wav\n")
    write(data / "text", "utt1 go on\nutt2 stop\n")
    write(data / "utt2spk", "utt1 ann\nutt2 ben\n")
    write(data / "segments", "utt1 rec 0.1 0.3\nutt2 rec 0.3 0.6\n")
    corpus = load_corpus(str(folder), split=split or "train", required_columns=("text", "speaker_id"))
    assert (corpus["text"][:], corpus["speaker_id"][:], lengths(corpus)) == (["go on", "stop"], ["ann", "ben"], [2, 3])
    assert lengths(load_corpus(str(data / "wav.scp"))) == [2, 3]


def test_kaldi_s_commands_are_not_run(folder):
    write(folder / "wav.scp", f"utt touch {folder}/ran |\n")
    write(folder / "text", "utt go\n")
    with pytest.raises(ValueError, match=r"wav\.scp` must name files, got the command .* which is not run"):
        load_corpus(str(folder))
    (folder / "text").unlink()
    with pytest.raises(ValueError, match="with wav.scp but without the file `text`"):
        load_corpus(str(folder))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("by_split", [False, True])
def test_what_save_to_disk_wrote(folder, by_split):
    content = Path(record(folder.parent / "a.wav", 3)).read_bytes()
    undecoded = {"path": Value("string"), "bytes": Value("binary")}
    features = Features({"audio": undecoded, "text": ClassLabel(names=["no", "yes"]), "speaker": Value("int32")})
    rows = {"audio": [{"path": "a.wav", "bytes": content}], "text": [1], "speaker": [7]}
    table = Dataset.from_dict(rows, features=features).cast_column("audio", Audio())
    (DatasetDict({"test": table}) if by_split else table).save_to_disk(folder)
    corpus = load_corpus(str(folder), split="test" if by_split else "train")
    assert (corpus["text"][:], corpus["speaker_id"][:], lengths(corpus)) == (["yes"], ["7"], [3])


def test_a_damaged_save_is_named(folder):
    write(folder / "state.json", "{}")
    with pytest.raises(ValueError, match="`dataset` must be a whole dataset, got .*Save it again"):
        load_corpus(str(folder))


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_a_webdataset(folder):
    for split, number in (("train", 1), ("test", 2)):
        content = Path(record(folder.parent / "a.wav", number)).read_bytes()
        with tarfile.open(folder / f"{split}-0001.tar", "w") as archive:
            add_member(archive, "x/1.wav", content)
            add_member(archive, "x/1.txt", b"go on\n")
            add_member(archive, "x/2.json", json.dumps({"text": "stop", "speaker_id": 7}).encode())
            add_member(archive, "x/2.wav", content)
    corpus = load_corpus(str(folder), split="test")
    assert (corpus["text"][:], corpus["speaker_id"][:], lengths(corpus)) == (["go on", "stop"], [None, "7"], [2, 2])
    assert len(load_corpus(str(folder / "train-0001.tar"))) == 2
    streamed = list(load_corpus(str(folder), split="train", streaming=True))
    assert [row["text"] for row in streamed] == ["go on", "stop"]


def test_a_tar_of_other_files_is_to_be_unpacked(folder):
    with tarfile.open(folder / "all.tar", "w") as archive:
        add_member(archive, "metadata.csv", b"file_name,text\n")
    with pytest.raises(ValueError, match=r"must be a webdataset, .*`mkdir all && tar -xf all\.tar -C all`"):
        load_corpus(str(folder / "all.tar"))
    (folder / "all.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"all\.tar` must be a whole webdataset, got"):
        load_corpus(str(folder / "all.tar"))


SRT = "1\r\n00:00:00,100 --> 00:00:00,300\r\n<i>go</i>\r\non\r\n\r\n2\r\n00:00:00,5 --> 00:00:01,0\r\n{\\an8}stop\r\n"
VTT = "WEBVTT\n\nNOTE no\n\n00:00.100 --> 00:00.300 align:start\n<v Ann>go on</v>\n\n00:00.500 --> 00:01.000\nstop\n"
GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1
tiers? <exists>
size = {}
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1
        intervals: size = 3
        intervals [1]:
            xmin = 0.1
            xmax = 0.3
            text = "go on"
        intervals [2]:
            xmin = 0.3
            xmax = 0.5
            text = ""
        intervals [3]:
            xmin = 0.5
            xmax = 1
            text = "stop"
"""
SECOND_TIER = """    item [2]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 1
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 1
            text = "g ""o"
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("name", "content"), [("t.srt", SRT), ("t.vtt", VTT), ("t.TextGrid", GRID.format(1))])
def test_subtitles_beside_a_long_recording(folder, name, content, encoding):
    record(folder / "t.wav", 10)
    (folder / name).write_bytes(content.encode(encoding))
    corpus = load_corpus(str(folder), required_columns=("text",))
    assert (corpus["text"][:], lengths(corpus)) == (["go on", "stop"], [2, 5])


def test_of_several_tiers_one_is_named(folder):
    record(folder / "t.wav", 10)
    write(folder / "t.TextGrid", GRID.format(2) + SECOND_TIER)
    with pytest.raises(ValueError, match=r"`text_column` must name one of the tiers .* \(words, phones\), got None"):
        load_corpus(str(folder))
    assert load_corpus(str(folder), text_column="words")["text"][:] == ["go on", "stop"]
    assert load_corpus(str(folder), text_column="phones")["text"][:] == ['g "o']


def test_texts_beside_their_recordings(folder):
    for split, text in (("train", "go on"), ("test", "stop")):
        record(folder / split / "a.wav")
        write(folder / split / "a.txt", f"{text}\n")
    corpus = load_corpus(str(folder))
    assert list(zip(corpus["split"], corpus["text"], strict=True)) == [("test", "stop"), ("train", "go on")]


def test_two_texts_beside_a_recording_are_refused(folder):
    record(folder / "a.wav")
    write(folder / "a.txt", "go")
    write(folder / "a.srt", SRT)
    with pytest.raises(ValueError, match=r"must have one text beside a recording, got a\.srt and a\.txt"):
        load_corpus(str(folder))


def test_timit_s_sample_numbers_are_no_words(folder):
    record(folder / "SA1.wav")
    write(folder / "SA1.txt", "0 46797 She had your dark suit.\n")
    with pytest.raises(ValueError, match="must be a transcript alone, got '0 46797 She.*TIMIT"):
        load_corpus(str(folder))


def test_a_compressed_table(folder):
    record(folder / "a.wav", 2)
    (folder / "metadata.csv.gz").write_bytes(gzip.compress(b"file_name,text\na.wav,go\n"))
    assert lengths(load_corpus(str(folder))) == lengths(load_corpus(str(folder / "metadata.csv.gz"))) == [2]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("cv.zip", "archive: unpack it with `unzip cv.zip`"),
        ("cv.tar.gz", r"archive: unpack it with `tar -xf cv\.tar\.gz`"),
        ("cv.7z", r"unpack it with `7z x cv\.7z`"),
        ("rows.xlsx", "spreadsheet: save it as CSV UTF-8"),
        ("supervisions.jsonl.gz", "Lhotse's manifests. Export them with `lhotse kaldi export"),
        ("a.wav", "a recording: write a manifest|nothing says what is said"),
        ("rows.eaf", "annotation: export it as a table"),
        ("data-00000-of-00001.arrow", "what `save_to_disk` wrote: name its folder"),
    ],
)
def test_what_is_no_corpus_yet_is_named_with_the_command(folder, name, remedy):
    (folder / name).write_bytes(b"x")
    for dataset in (folder / name, folder)[name == "supervisions.jsonl.gz" :]:
        with pytest.raises(ValueError, match=f"`dataset` must be a corpus, got .*{remedy}"):
            load_corpus(str(dataset))


def test_a_folder_of_tables_without_a_split_s_name_lists_them(folder):
    write(folder / "recordings.csv", "file_name,text\n")
    with pytest.raises(ValueError, match=r"without metadata; name one of its tables: recordings\.csv"):
        load_corpus(str(folder))
