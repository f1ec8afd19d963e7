"""Corpora as folders and archives: what each layout's rows are, and what to do with one that is not read."""

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets

from data.rows import AUDIO_SUFFIXES, Source
from data.subtitles import SUBTITLE_SUFFIXES, read_subtitles
from data.tables import TABLE_SUFFIXES, is_table, open_text, read_dataset, read_table

METADATA_NAMES = tuple(f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet", ".tsv", ".csv.gz"))
SPLIT_NAMES = ("train", "test", "dev", "valid", "validation", "val", "eval")
SPLIT_TABLE = re.compile(rf"({'|'.join(SPLIT_NAMES)})(_manifest)?\.(csv|tsv|jsonl?|ndjson)(\.gz)?", re.IGNORECASE)
RECORDING_FOLDERS = ("clips", "wavs")  # of Common Voice and of LJSpeech, whose tables name files in them
TEXT_MEMBERS = ("txt", "text", "transcript")  # endings in a webdataset of what is said
TIMIT_LINE = re.compile(r"\d+ \d+ ")  # its transcripts begin with sample numbers
CHOICES = (
    "Give a manifest (.csv, .tsv, .jsonl, .parquet), a folder with metadata.csv or in the layout of Common Voice, "
    "LibriSpeech, LJSpeech, Kaldi or a webdataset, a Hub name, or `synthetic`."
)
# What is no corpus yet, by ending, and what makes one of it.
ARCHIVE = "It is an archive: unpack it with `{} {{0}}` into a folder and name that."
REMEDIES = {
    ".zip": ARCHIVE.format("unzip"),
    **dict.fromkeys((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"), ARCHIVE.format("tar -xf")),
    ".7z": ARCHIVE.format("7z x"),
    ".rar": ARCHIVE.format("unrar x"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "It is a spreadsheet: save it as CSV UTF-8 and name that file."),
    ".arrow": "It is a part of what `save_to_disk` wrote: name its folder.",
    **dict.fromkeys(
        (".eaf", ".trs", ".stm", ".ctm"),
        "It is an annotation: export it as a table with the columns file_name, start, end, text.",
    ),
    **dict.fromkeys((".srt", ".vtt", ".textgrid"), "It has the times of a recording: name the folder of both."),
    **dict.fromkeys(AUDIO_SUFFIXES, "It is a recording: write a manifest with the columns file_name and text."),
}


def find_file_source(path: Path) -> Source:
    """
    Returns the rows of a file that the user named; a manifest may then name recordings anywhere.

    Raises:
        ValueError: It is no manifest; the message says what it is and what to do.
    """
    place = {"name": str(path), "roots": (path.parent,), "is_trusted": True}
    if path.name == "wav.scp":
        return Source(read=partial(_read_kaldi, path.parent), folders=(path.parent,), **place)
    if path.suffix.lower() == ".tar":
        return Source(read=partial(_read_tar, path), **place)
    if not is_table(path):
        remedy = next((text for end, text in REMEDIES.items() if path.name.lower().endswith(end)), CHOICES)
        raise ValueError(f"`dataset` must be a corpus, got the file {path}. {remedy.format(path.name)}")
    return Source(read=partial(read_table, path), folders=_list_recording_folders(path.parent), **place)


def find_folder_sources(folder: Path, text_column: str | None = None) -> list[Source]:
    """
    Returns the rows of a folder, by split; none for one of Parquet files, whose splits `datasets` finds.

    Args:
        folder: The corpus.
        text_column: Of several tiers of a TextGrid, the one that is read.

    Raises:
        ValueError: The folder has no layout that is read; the message says what is there and what to do.
    """
    finders = (_find_metadata, _find_saved, _find_split_tables, _find_kaldi, _find_mls, _find_vctk)
    for finder in finders:
        if sources := finder(folder):
            return sources
    if list_parquet(folder):
        return []
    if sources := _find_librispeech(folder) or _find_tars(folder) or _find_beside(folder, text_column):
        return sources
    raise ValueError(
        f"`dataset` must be a corpus, got the folder {folder} without metadata{_describe(folder)}. {CHOICES}"
    )


def list_parquet(folder: Path) -> list[Path]:
    """Returns the Parquet files of a folder and of those in it."""
    return sorted({*folder.glob("*.parquet"), *folder.glob("*/*.parquet"), *folder.glob("*/*/*.parquet")})


def _place(path: Path, folder: Path, split: str) -> dict:
    """Returns what the sources of a folder have in common: their recordings lie in it."""
    return {"name": str(path), "roots": (folder,), "default_split": split}


def _find_metadata(folder: Path) -> list[Source]:
    found = [(folder / name, "train") for name in METADATA_NAMES if (folder / name).is_file()][:1]
    if not found:
        paths = [path for name in METADATA_NAMES for path in sorted(folder.glob(f"*/{name}"))]
        found = [(path, path.parent.name) for path in paths]
    return [_make_table_source(path, folder, split) for path, split in found]


def _find_split_tables(folder: Path) -> list[Source]:
    """Tables named by their split, as those of Common Voice and NeMo."""
    found = [
        (path, match[1].lower()) for path in sorted(folder.iterdir()) if (match := SPLIT_TABLE.fullmatch(path.name))
    ]
    return [_make_table_source(path, folder, split) for path, split in found]


def _make_table_source(path: Path, folder: Path, split: str) -> Source:
    return Source(
        read=partial(read_table, path), folders=_list_recording_folders(path.parent), **_place(path, folder, split)
    )


def _list_recording_folders(folder: Path) -> tuple[Path, ...]:
    return (folder, *(folder / name for name in RECORDING_FOLDERS if (folder / name).is_dir()))


def _find_saved(folder: Path) -> list[Source]:
    """What `save_to_disk` wrote: a dataset, or several by split."""
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return []
    try:
        saved = datasets.load_from_disk(str(folder))
    except (ValueError, OSError) as error:
        raise ValueError(f"`dataset` must be a whole dataset, got {folder} ({error}). Save it again.") from error
    parts = saved if isinstance(saved, dict) else {"train": saved}
    return [make_dataset_source(part, str(folder), split, (folder,), (folder,)) for split, part in parts.items()]


def make_dataset_source(
    dataset: datasets.Dataset | datasets.IterableDataset,
    name: str,
    split: str,
    folders: tuple[Path, ...],
    roots: tuple[Path, ...],
) -> Source:
    """Returns the rows of a split that `datasets` reads."""
    has_fixed_split = bool(dataset.features) and "split" not in dataset.features
    return Source(name, partial(read_dataset, dataset), folders, roots, False, split, has_fixed_split)


def _find_kaldi(folder: Path) -> list[Source]:
    parts = [(folder, "train")] if (folder / "wav.scp").is_file() else []
    parts = parts or [(path.parent, path.parent.name) for path in sorted(folder.glob("*/wav.scp"))]
    return [
        Source(read=partial(_read_kaldi, part), folders=(part, folder), **_place(part / "wav.scp", folder, split))
        for part, split in parts
    ]


def _read_kaldi(folder: Path) -> Iterator[dict[str, object]]:
    if not (folder / "text").is_file():
        raise ValueError(f"`dataset` must have transcripts, got {folder} with wav.scp but without the file `text`.")
    recordings, speakers, segments = (_read_pairs(folder / name) for name in ("wav.scp", "utt2spk", "segments"))
    for utterance, text in _read_pairs(folder / "text").items():
        recording, *times = segments[utterance].split() if utterance in segments else [utterance]
        path = recordings.get(recording, "")
        if path.endswith("|"):
            raise ValueError(
                f"`{folder / 'wav.scp'}` must name files, got the command {path!r}, which is not run. Run it into a "
                "file and write that file's path."
            )
        start, end = times[:2] if times else (None, None)
        row = {"audio": path, "text": text, "start": start, "end": end}
        yield row | ({"speaker_id": speakers.get(utterance)} if speakers else {})


def _read_pairs(path: Path) -> dict[str, str]:
    """Returns the first word of each line and the rest; none of a file that is not there."""
    if not path.is_file():
        return {}
    with open_text(path) as file:
        pairs = [line.strip().split(maxsplit=1) for line in file if line.strip()]
    return {pair[0]: pair[1] if len(pair) > 1 else "" for pair in pairs}


def _find_librispeech(folder: Path) -> list[Source]:
    """`speaker/chapter/speaker-chapter.trans.txt` beside its recordings, below one or more splits."""
    sources = []
    for path in sorted(folder.rglob("*.trans.txt")):
        parts = path.relative_to(folder).parts
        split = parts[-4] if len(parts) >= 4 else "train"
        place = _place(path, folder, split) | {"folders": (path.parent,), "has_fixed_split": True}
        sources.append(Source(read=partial(_read_librispeech, path), **place))
    return sources


def _read_librispeech(path: Path) -> Iterator[dict[str, object]]:
    for utterance, text in _read_pairs(path).items():
        yield {"audio": utterance, "text": text, "speaker_id": utterance.split("-")[0]}


def _find_mls(folder: Path) -> list[Source]:
    """`transcripts.txt` beside `audio/speaker/book`, below one or more splits, as in Multilingual LibriSpeech."""
    paths = sorted({*folder.glob("transcripts.txt"), *folder.glob("*/transcripts.txt")})
    return [
        Source(
            read=partial(_read_mls, path), folders=(path.parent / "audio",), has_fixed_split=True,
            **_place(path, folder, path.parent.name if path.parent != folder else "train"),
        )
        for path in paths
    ]  # fmt: skip


def _read_mls(path: Path) -> Iterator[dict[str, object]]:
    for utterance, text in _read_pairs(path).items():
        speaker, book = (utterance.split("_") + [""])[:2]
        yield {"audio": f"{speaker}/{book}/{utterance}", "text": text, "speaker_id": speaker}


def _find_vctk(folder: Path) -> list[Source]:
    """Texts in `txt/speaker` and recordings in `wav48/speaker`, of the first microphone where two were there."""
    recordings = sorted(path for path in folder.glob("wav48*") if path.is_dir())[:1]
    if not recordings or not (folder / "txt").is_dir():
        return []
    read = partial(_read_vctk, folder / "txt", recordings[0])
    return [
        Source(read=read, folders=(recordings[0],), has_fixed_split=True, **_place(folder / "txt", folder, "train"))
    ]


def _read_vctk(texts: Path, recordings: Path) -> Iterator[dict[str, object]]:
    for path in sorted(texts.glob("*/*.txt")):
        name = f"{path.parent.name}/{path.stem}"
        microphone = "_mic1" if any(recordings.glob(f"{name}_mic1.*")) else ""
        with open_text(path) as file:
            yield {"audio": name + microphone, "text": " ".join(file.read().split()), "speaker_id": path.parent.name}


def _find_tars(folder: Path) -> list[Source]:
    paths = sorted({*folder.glob("*.tar"), *folder.glob("*/*.tar")})
    return [
        Source(read=partial(_read_tar, path), has_fixed_split=True, **_place(path, folder, _guess_split(path, folder)))
        for path in paths
    ]


def _guess_split(path: Path, folder: Path) -> str:
    """Returns the split that a file's name, or a folder's above it, begins with; "train" if none does."""
    for part in reversed(path.relative_to(folder).parts):
        if match := re.match(rf"({'|'.join(SPLIT_NAMES)})(?![a-z])", part, re.IGNORECASE):
            return match[1].lower()
    return "train"


def _read_tar(path: Path) -> Iterator[dict[str, object]]:
    """Yields the samples of a webdataset: members one after the other whose names differ after the first dot."""
    row: dict[str, object] = {}
    name = None
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, base = os.path.split(member.name)
                stem, _, ending = base.partition(".")
                if name not in (None, (folder, stem)):
                    yield _check_sample(row, path)
                    row = {}
                name = (folder, stem)
                row |= _read_member(member.name, ending.lower(), archive.extractfile(member).read())
    except (tarfile.TarError, EOFError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` must be a whole webdataset, got ({error}). Write it again.") from error
    if name is not None:
        yield _check_sample(row, path)


def _read_member(name: str, ending: str, content: bytes) -> dict[str, object]:
    if f".{ending}" in AUDIO_SUFFIXES:
        return {"audio": {"path": name, "bytes": content}}
    if ending in TEXT_MEMBERS:
        return {"text": content.decode("utf-8").strip()}
    if ending == "json":
        fields = json.loads(content)
        return fields if isinstance(fields, dict) else {}
    return {}


def _check_sample(row: dict[str, object], path: Path) -> dict[str, object]:
    if "audio" not in row:
        raise ValueError(
            f"`{path}` must be a webdataset, each recording beside its text (a.wav, a.txt), got an archive of other "
            f"files. Unpack it with `mkdir {path.stem} && tar -xf {path.name} -C {path.stem}` and name the folder."
        )
    return row


def _find_beside(folder: Path, text_column: str | None) -> list[Source]:
    """Recordings with subtitles, a TextGrid or a text of the same name beside them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    audio = {path.with_suffix(""): path for path in files if path.suffix.lower() in AUDIO_SUFFIXES}
    suffixes = (*SUBTITLE_SUFFIXES, ".txt", ".lab")
    texts = [path for path in files if path.suffix.lower() in suffixes and path.with_suffix("") in audio]
    counts = Counter(path.with_suffix("") for path in texts)
    if repeated := [path.name for path in texts if counts[path.with_suffix("")] > 1]:
        raise ValueError(
            f"`dataset` must have one text beside a recording, got {repeated[0]} and {repeated[1]}. Remove one."
        )
    return [
        Source(
            read=partial(_read_beside, path, audio[path.with_suffix("")], text_column), folders=(path.parent,),
            has_fixed_split=True, **_place(path, folder, _guess_split(path, folder)),
        )
        for path in texts
    ]  # fmt: skip


def _read_beside(path: Path, recording: Path, text_column: str | None) -> Iterator[dict[str, object]]:
    if path.suffix.lower() in SUBTITLE_SUFFIXES:
        for start, end, text in read_subtitles(path, tier=text_column):
            yield {"audio": recording.name, "start": start, "end": end, text_column or "text": text}
        return
    with open_text(path) as file:
        text = " ".join(file.read().split())
    if TIMIT_LINE.match(text):
        raise ValueError(
            f"`{path}` must be a transcript alone, got {text[:40]!r}, as in TIMIT's layout. Write a manifest with the "
            "columns file_name and text, without the sample numbers."
        )
    yield {"audio": recording.name, "text": text}


def _describe(folder: Path) -> str:
    """Returns what a folder holds that needs a step more."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    for name in names:
        for ending, remedy in REMEDIES.items():
            if name.lower().endswith(ending) and ending not in AUDIO_SUFFIXES:
                return f" but with {name}. {remedy.format(name)}"
    if "supervisions.jsonl.gz" in names:
        return (
            " but with Lhotse's manifests. Export them with `lhotse kaldi export recordings.jsonl.gz "
            "supervisions.jsonl.gz kaldi` and name the folder kaldi."
        )
    tables = [name for name in names if name.lower().endswith(TABLE_SUFFIXES)]
    if tables:
        return f"; name one of its tables: {', '.join(tables[:5])}"
    has_audio = any(path.suffix.lower() in AUDIO_SUFFIXES for path in folder.rglob("*"))
    return " but with recordings, of which nothing says what is said: write it into metadata.csv" if has_audio else ""
