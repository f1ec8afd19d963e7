"""The Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset) as a corpus folder."""

import argparse
import re
import shutil
from pathlib import Path

from tqdm import tqdm

from data.audio import audio_seconds
from data.synthesis import new_corpus_folder, write_metadata

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RECORDING_NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[a-zA-Z]+)_(?P<index>\d+)\.wav")
NUM_TEST_RECORDINGS = 10  # of every digit and speaker; the other 40 are for training


def prepare_fsdd(clone: str | Path, out: str | Path) -> Path:
    """
    Copies the recordings into a folder a speaker and writes `metadata.csv` (file_name, speaker_id, text, split).

    Recordings 0 to 9 of each digit and speaker are the split "test", the others "train". The folder appears when
    everything is written.

    Args:
        clone: A clone of the dataset's repository: `recordings/{digit}_{speaker}_{index}.wav`.
        out: Where to write; must be new or empty.

    Returns:
        `out`.

    Raises:
        ValueError: `clone` has no recordings, one is not named as above or is not audio, or `out` holds files.
    """
    recordings = _find_recordings(Path(clone) / "recordings")
    with new_corpus_folder(out) as scratch:
        rows = []
        for path, match in tqdm(recordings, desc="fsdd", unit="file"):
            audio_seconds(path)  # raises where the file is not audio
            (scratch / match["speaker"]).mkdir(exist_ok=True)
            shutil.copyfile(path, scratch / match["speaker"] / path.name)
            split = "test" if int(match["index"]) < NUM_TEST_RECORDINGS else "train"
            rows.append([f"{match['speaker']}/{path.name}", match["speaker"], DIGITS[int(match["digit"])], split])
        write_metadata(scratch, ["file_name", "speaker_id", "text", "split"], rows)
    return Path(out)


def _find_recordings(folder: Path) -> list[tuple[Path, re.Match]]:
    if not folder.is_dir():
        raise ValueError(
            f"`clone` must hold the folder recordings, got {folder.parent} without it. "
            "Clone the repository of the Free Spoken Digit Dataset and name the clone."
        )
    recordings = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # left there by a file manager
            continue
        match = RECORDING_NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(
                f"`clone` must hold recordings named <digit>_<speaker>_<index>.wav, got {path}. Rename or remove it."
            )
        recordings.append((path, match))
    if not recordings:
        raise ValueError(f"`clone` must hold recordings, got the empty folder {folder}. Pull the repository again.")
    return recordings


def main(arguments: list[str] | None = None) -> None:
    """Writes the corpus folder named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare_fsdd", description=__doc__, allow_abbrev=False)
    parser.add_argument("clone", type=Path, help="Clone of the dataset's repository.")
    parser.add_argument("out", type=Path, help="Folder to write; must be new or empty.")
    options = parser.parse_args(arguments)
    prepare_fsdd(options.clone, options.out)


if __name__ == "__main__":
    main()
