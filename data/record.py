"""
Records a person who reads sentences into a corpus folder: a wav for each, and metadata.csv.

    python -m data.record prompts.txt mine/

The folder is whole after each take, so a recording that was stopped goes on where it ended.
"""

import argparse
import csv
import io
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import soundfile

COLUMNS = ["file_name", "text", "speaker_id", "split"]
METADATA = "metadata.csv"
# The second of each five takes is kept for the test: two takes have one of each split.
TAKES_A_TEST, TEST_PLACE = 5, 2
WINDOW_SECONDS = 0.025
MIN_SECONDS = 0.3
MIN_LOUDNESS = 0.01  # -40 dB of full scale, root mean square of the loudest 25 ms; a quiet room stays below -50 dB
MIN_RISE = 2.0  # of the loudest 25 ms over the quiet ones; those of steady noise stay within 1.5
FULL_SCALE, MAX_RUN = 0.99, 3  # so many samples in a row at full scale are a wave whose top is cut off

Take = tuple[np.ndarray, int]


def find_fault(samples: np.ndarray, sampling_rate: int) -> str | None:
    """
    Returns why a take should be read again, or None.

    Args:
        samples: float array (samples,), full scale 1.
        sampling_rate: In Hz.
    """
    if len(samples) < MIN_SECONDS * sampling_rate:
        return f"it is shorter than {MIN_SECONDS:g} s. Press Enter the second time after you have read."
    window = round(WINDOW_SECONDS * sampling_rate)
    windows = samples[: len(samples) // window * window].reshape(-1, window).astype(np.float64)
    loudness = windows.std(axis=1)
    if loudness.max() < MIN_LOUDNESS:
        return "it is silent. Is the microphone muted, or another one chosen (`--device`)?"
    if loudness.max() < MIN_RISE * np.percentile(loudness, 10):
        return "nothing rises above its noise. Leave a moment of silence before you read."
    if _longest_run(np.abs(samples) >= FULL_SCALE) >= MAX_RUN:
        return "it is clipped. Turn the microphone down, or go further from it."
    return None


def _longest_run(is_marked: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_marked.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def read_prompts(path: str | Path) -> list[str]:
    """
    Returns the sentences of a text file, one a line.

    Raises:
        ValueError: The file is missing, no text, or has no sentence.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`prompts` must be a text file, got {path} ({error}). Write one sentence a line.") from error
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"`prompts` must have a sentence a line, got {path} without one.")
    return prompts


def read_takes(folder: str | Path) -> list[dict[str, str]]:
    """
    Returns the rows of a folder's metadata.csv, none if there is no folder yet.

    Raises:
        ValueError: It has other columns than this recorder writes, or `folder` is a file.
    """
    path = Path(folder) / METADATA
    if Path(folder).is_file():
        raise ValueError(f"`folder` must be a folder, got the file {folder}. Name another one.")
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(
                f"`folder` must be new or one that this recorder made, got {path} with columns {reader.fieldnames}. "
                "Name another folder."
            )
        return list(reader)


def record(
    prompts: list[str],
    folder: str | Path,
    *,
    speaker_id: str,
    capture: Callable[[], Take],
    ask: Callable[[str], str] = input,
) -> list[dict[str, str]]:
    """
    Has a person read each prompt that the folder lacks, until the takes are good, and returns all rows.

    Args:
        prompts: Sentences.
        folder: Corpus folder; what it holds of this speaker is not read again.
        speaker_id: Who reads.
        capture: Records a take: samples (samples,) with full scale 1, and their rate in Hz.
        ask: Shows a question and returns the answer: nothing to start, `s` to skip, `q` to stop.

    Raises:
        ValueError: As [`read_takes`].
    """
    rows = read_takes(folder)
    there = Counter(row["text"] for row in rows if row["speaker_id"] == speaker_id)
    for number, text in enumerate(prompts, start=1):
        if there[text] > 0:
            there[text] -= 1
            continue
        print(f"\n{number} of {len(prompts)}: {text}")
        answer = ask("Enter to start, s to skip, q to stop: ").strip().lower()
        if answer == "q":
            break
        if answer != "s":
            keep_take(folder, rows, text, speaker_id, take_until_good(capture, ask))
    return rows


def take_until_good(capture: Callable[[], Take], ask: Callable[[str], str]) -> Take:
    """Returns the first take without a fault; each fault is told, and Enter starts the next take."""
    while True:
        samples, sampling_rate = capture()
        fault = find_fault(samples, sampling_rate)
        if fault is None:
            print(f"Kept: {len(samples) / sampling_rate:.1f} s.")
            return samples, sampling_rate
        ask(f"Not kept: {fault} Enter to read it again: ")


def keep_take(folder: str | Path, rows: list[dict[str, str]], text: str, speaker_id: str, take: Take) -> None:
    """Writes a take as 16-bit wav and adds its row, each whole; a killed process leaves a row only with its take."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(stem) for row in rows if (stem := Path(row["file_name"]).stem).isdecimal()), default=0) + 1
    split = "test" if (len(rows) + 1) % TAKES_A_TEST == TEST_PLACE else "train"
    row = dict(zip(COLUMNS, [f"{number:03d}.wav", text, speaker_id, split], strict=True))
    samples, sampling_rate = take
    content, table = io.BytesIO(), io.StringIO(newline="")
    soundfile.write(content, samples, sampling_rate, format="WAV", subtype="PCM_16")
    _replace(folder / row["file_name"], content.getvalue())
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, row])
    _replace(folder / METADATA, table.getvalue().encode())
    rows.append(row)


def _replace(path: Path, content: bytes) -> None:
    """Writes a file beside its place, to the disk, and moves it there."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)  # mkstemp's files are closed to other users
        os.replace(scratch, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(scratch)
        raise


def find_microphone(device: str | None = None) -> Callable[[], Take]:
    """
    Returns a function that records until Enter is pressed, at the microphone's own rate.

    Args:
        device: Number or part of the name of an input; the system's default without.

    Raises:
        ValueError: sounddevice or its library is not installed, or there is no such microphone.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the library under it is missing
        raise ValueError(
            f"`sounddevice` must be installed to record, got: {error}. Run `python -m pip install sounddevice`, on "
            "Linux also `sudo apt-get install libportaudio2`; or put your own wavs beside a metadata.csv."
        ) from error
    name = int(device) if device and device.isdecimal() else device
    try:
        rate = int(sounddevice.query_devices(name, "input")["default_samplerate"])
        sounddevice.check_input_settings(name, channels=1, samplerate=rate)
    except (ValueError, sounddevice.PortAudioError) as error:
        raise ValueError(
            f"`device` must be a microphone, got {device or 'the default'} ({error}). "
            "`python -m sounddevice` lists them."
        ) from error

    def capture() -> Take:
        blocks: list[np.ndarray] = []
        keep = lambda block, *_: blocks.append(block[:, 0].copy())  # noqa: E731
        with sounddevice.InputStream(samplerate=rate, device=name, channels=1, callback=keep):
            input("Recording. Enter when you have read it: ")
        return np.concatenate([np.zeros(0, dtype=np.float32), *blocks]), rate

    return capture


def describe_takes(folder: str | Path, rows: list[dict[str, str]]) -> str:
    """Returns what a folder holds now, in one line."""
    splits = Counter(row["split"] for row in rows)
    seconds = sum(soundfile.info(Path(folder) / row["file_name"]).duration for row in rows)
    return f"{folder} holds {len(rows)} takes, {seconds:.0f} s: {splits['train']} to train, {splits['test']} to test."


def main(
    argv: list[str] | None = None,
    *,
    capture: Callable[[], Take] | None = None,
    ask: Callable[[str], str] = input,
) -> None:
    """Runs the command; `capture` takes the place of the microphone, `ask` that of the keyboard."""
    parser = argparse.ArgumentParser(
        prog="python -m data.record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompts", type=Path, help="Text file, a sentence a line.")
    parser.add_argument("folder", type=Path, help="Corpus folder: new, or one to go on with.")
    parser.add_argument("--speaker_id", default="me", help="Who reads.")
    parser.add_argument("--device", help="Microphone: a number or a part of a name, of `python -m sounddevice`.")
    options = parser.parse_args(argv)
    try:
        prompts = read_prompts(options.prompts)
        read_takes(options.folder)  # before anything is read aloud
        capture = capture or find_microphone(options.device)
        record(prompts, options.folder, speaker_id=options.speaker_id, capture=capture, ask=ask)
    except (KeyboardInterrupt, EOFError):
        print()  # the takes so far are there
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(describe_takes(options.folder, read_takes(options.folder)))


if __name__ == "__main__":
    main()
