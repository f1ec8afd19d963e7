"""The embedded corpus: espeak-ng reads commands for a smart home in ordinary and in unusual voices."""

import _ctypes
import argparse
import csv
import ctypes
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from data.audio import SAMPLING_RATE

LANGUAGES = ("en", "ko")
SPLIT_SEED = 0  # of the sentences, and not the user's seed: what is a test sentence never changes
TEST_SHARE = 0.2  # of the distinct sentences
RATE_JITTER = 0.08
SNR_DB = (20.0, 35.0)
GAIN_DB = (-9.0, -1.0)
NUM_NAMED = 10  # voices that an error message lists

# enum values of espeak-ng's speak_lib.h
AUDIO_OUTPUT_SYNCHRONOUS, INITIALIZE_DONT_EXIT, CHARS_UTF8 = 2, 0x8000, 1
PARAMETER_RATE, PARAMETER_PITCH, PARAMETER_RANGE = 1, 3, 4
RATES_WPM, PITCHES = (80, 450), (0, 99)
SAMPLES_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Voice:
    """
    A speaker of espeak-ng.

    Args:
        speaker_id: The name in the corpus.
        voice: espeak-ng's name of a language or accent, "+" and one of `list_variants()`: "en-us+f3".
        rate_wpm: Words a minute, 80 to 450.
        pitch: 0 to 99; 50 is the variant's own.
        pitch_range: 0 (monotone) to 99.

    Raises:
        ValueError: A number is out of its range. Whether `voice` exists is found by `synthesize`.
    """

    speaker_id: str
    voice: str
    rate_wpm: int = 175
    pitch: int = 50
    pitch_range: int = 50

    def __post_init__(self) -> None:
        ranges = {"rate_wpm": RATES_WPM, "pitch": PITCHES, "pitch_range": PITCHES}
        for name, (lowest, highest) in ranges.items():
            value = getattr(self, name)
            if not lowest <= value <= highest:
                raise ValueError(f"`{name}` must be from {lowest} to {highest}, got {value}. Choose one between.")


ORDINARY_VOICES = (
    Voice("adam", "en-us+m1", 165, 45, 50),
    Voice("bella", "en-us+f1", 175, 50, 55),
    Voice("carl", "en-us+m3", 190, 40, 40),
    Voice("dora", "en-us+f2", 160, 55, 60),
    Voice("edgar", "en-us-nyc+m7", 180, 50, 45),
    Voice("fiona", "en-gb-scotland+f3", 170, 45, 55),
    Voice("george", "en+m2", 155, 35, 45),
    Voice("hanna", "en+f4", 185, 60, 50),
    Voice("ian", "en-gb-x-rp+m5", 170, 55, 60),
    Voice("julia", "en-gb-x-rp+f2", 195, 45, 45),
    Voice("kevin", "en-gb-x-gbclan+m4", 175, 50, 50),
    Voice("lucy", "en-029+f1", 165, 65, 60),
)
UNUSUAL_VOICES = (
    Voice("whisperer", "en-us+whisper", 160, 50, 50),  # no voiced sound at all
    Voice("croaker", "en-us+croak", 120, 20, 20),  # a hoarse, slow, low voice
    Voice("child", "en-us+f5", 230, 99, 90),  # very high and fast
    Voice("spaniard", "es+m3", 150, 50, 60),  # reads English by the rules of Spanish spelling
)
KOREAN_VOICES = (
    Voice("minjun", "ko+m1", 165, 45, 50),
    Voice("seoyeon", "ko+f2", 180, 55, 55),
    Voice("jiho", "ko+m3", 150, 60, 40),
)

_library_lock = threading.Lock()


def synthesize(text: str, voice: Voice) -> np.ndarray:
    """
    Returns a text as espeak-ng reads it; the same text and voice give the same samples in every process.

    Args:
        text: Text in the voice's language.
        voice: Who reads it.

    Returns:
        float32 array (samples,) in [-1, 1] at 16 kHz.

    Raises:
        ValueError: `text` has nothing to read, or espeak-ng has no such voice or variant.
        RuntimeError: espeak-ng cannot start.
    """
    if not any(character.isalnum() for character in text):
        raise ValueError(f"`text` must have a word to read, got {text!r}. Give a text in the voice's language.")
    _check_variant(voice)
    blocks: list[np.ndarray] = []

    @SAMPLES_CALLBACK
    def keep_samples(samples: ctypes.POINTER(ctypes.c_short), num_samples: int, _: int) -> int:
        if num_samples > 0:
            blocks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    with _load_library() as (library, library_rate):
        library.espeak_SetSynthCallback(keep_samples)
        if library.espeak_SetVoiceByName(voice.voice.encode()) != 0:
            raise _voice_error(voice, _list_voices())
        library.espeak_SetParameter(PARAMETER_RATE, voice.rate_wpm, 0)
        library.espeak_SetParameter(PARAMETER_PITCH, voice.pitch, 0)
        library.espeak_SetParameter(PARAMETER_RANGE, voice.pitch_range, 0)
        content = ctypes.create_string_buffer(text.encode())
        library.espeak_Synth(content, ctypes.sizeof(content), 0, 0, 0, CHARS_UTF8, None, None)
    samples = np.concatenate(blocks).astype(np.float32) / 2**15
    return np.clip(soxr.resample(samples, library_rate, SAMPLING_RATE, quality="HQ"), -1.0, 1.0)


def list_variants() -> list[str]:
    """Returns the names that may follow "+" in `Voice.voice`, sorted."""
    return sorted(path.name for path in Path(espeakng_loader.get_data_path(), "voices", "!v").iterdir())


def write_synthetic_corpus(folder: str | Path, *, language: str = "en", seed: int = 0) -> Path:
    """
    Writes the embedded corpus: 16-bit wav files and `metadata.csv` with a row for each.

    Each recording has its own rate (within 8 % of the voice's), loudness and background noise (20 to 35 dB below it).
    No sentence is in both splits. The folder appears when everything is written.

    Args:
        folder: Where to write; must be new or empty.
        language: "en": 12 ordinary voices, 90 + 10 recordings each (train + test), and 4 unusual ones, 60 + 40 each;
            "ko": 3 voices, 32 + 8 each.
        seed: Chooses sentences, rates, loudness and noise.

    Returns:
        `folder`.

    Raises:
        ValueError: `language` is unknown, or `folder` holds files.
    """
    if language not in LANGUAGES:
        raise ValueError(f"`language` must be one of {', '.join(LANGUAGES)}, got {language!r}. Choose one of them.")
    with new_corpus_folder(folder) as scratch:
        _write_recordings(scratch, language, seed)
    return Path(folder)


@contextmanager
def new_corpus_folder(folder: str | Path) -> Iterator[Path]:
    """
    Gives a scratch folder that becomes `folder` on leaving without an error, and is removed otherwise.

    Args:
        folder: Must be new or empty; its parents are made.

    Raises:
        ValueError: `folder` is a file or holds files.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder` must be new or empty, got {folder}, which holds files. Name another one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp's folders are closed to the other users of a shared cache
        yield scratch
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_metadata(folder: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes `metadata.csv` with a header and rows of cells into a corpus folder."""
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def list_sentences(language: str) -> dict[str, list[str]]:
    """Returns the distinct sentences of each split, `{"train": [...], "test": [...]}`; no sentence is in both."""
    sentences = list(_iterate_english() if language == "en" else _iterate_korean())
    random.Random(SPLIT_SEED).shuffle(sentences)
    num_test = round(TEST_SHARE * len(sentences))
    return {"train": sentences[num_test:], "test": sentences[:num_test]}


@contextmanager
def _load_library() -> Iterator[tuple[ctypes.CDLL, int]]:
    """
    Gives espeak-ng and its sampling rate in Hz, freshly loaded.

    espeak-ng keeps the phase of its oscillators and a random state in static variables that no call resets, so that a
    reading would depend on the readings before it. Loading takes 1 ms.
    """
    with _library_lock:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        try:
            data_path = espeakng_loader.get_data_path().encode()
            sampling_rate = library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, INITIALIZE_DONT_EXIT)
            if sampling_rate <= 0:
                raise RuntimeError(f"espeak-ng cannot read {data_path.decode()}. Reinstall espeakng-loader.")
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))
            yield library, sampling_rate
        finally:
            library.espeak_Terminate()
            unload = _ctypes.FreeLibrary if os.name == "nt" else _ctypes.dlclose
            unload(library._handle)


def _check_variant(voice: Voice) -> None:
    variant = voice.voice.partition("+")[2]
    if variant and variant not in list_variants():  # espeak-ng itself would read without the variant, in silence
        language = voice.voice.partition("+")[0]
        raise _voice_error(voice, [f"{language}+{known}" for known in list_variants()])


def _list_voices() -> list[str]:
    folder = Path(espeakng_loader.get_data_path(), "lang")
    return sorted(path.name.lower() for path in folder.rglob("*") if path.is_file())


def _voice_error(voice: Voice, known: list[str]) -> ValueError:
    shown = get_close_matches(voice.voice, known, NUM_NAMED, cutoff=0.0)
    return ValueError(
        f"`voice` must be one of espeak-ng's {len(known)} (such as {', '.join(shown)}), got {voice.voice!r}. "
        "Choose one of them."
    )


def _write_recordings(folder: Path, language: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    sentences = list_sentences(language)
    rows = []
    for voice, split, num_recordings in tqdm(_plan_recordings(language), desc=f"synthetic/{language}", unit="list"):
        (folder / voice.speaker_id).mkdir(exist_ok=True)
        chosen = generator.choice(sentences[split], num_recordings, replace=False).tolist()
        for number, text in enumerate(chosen):
            jittered = round(voice.rate_wpm * generator.uniform(1 - RATE_JITTER, 1 + RATE_JITTER))
            samples = synthesize(text, replace(voice, rate_wpm=int(np.clip(jittered, *RATES_WPM))))
            file_name = f"{voice.speaker_id}/{split}_{number:03d}.wav"
            soundfile.write(folder / file_name, add_room(samples, generator), SAMPLING_RATE, subtype="PCM_16")
            rows.append([file_name, voice.speaker_id, text, split, "microphone", voice.voice])
    write_metadata(folder, ["file_name", "speaker_id", "text", "split", "domain", "voice"], rows)


def _plan_recordings(language: str) -> list[tuple[Voice, str, int]]:
    """Returns which voice reads how many sentences of which split."""
    counts = [(KOREAN_VOICES, 32, 8)] if language == "ko" else [(ORDINARY_VOICES, 90, 10), (UNUSUAL_VOICES, 60, 40)]
    return [
        (voice, split, num_recordings)
        for voices, num_train, num_test in counts
        for voice in voices
        for split, num_recordings in (("train", num_train), ("test", num_test))
    ]


def add_room(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the samples at another loudness, in white noise: readings of one sentence are not clones."""
    peak = 10 ** (generator.uniform(*GAIN_DB) / 20)
    samples = samples * (peak / np.abs(samples).max())
    noise_level = np.sqrt(np.mean(samples**2)) * 10 ** (-generator.uniform(*SNR_DB) / 20)
    noise = generator.standard_normal(samples.size, dtype=np.float32) * np.float32(noise_level)
    return np.clip(samples + noise, -1.0, 1.0)


def _iterate_english() -> Iterator[str]:
    rooms = ("kitchen", "bedroom", "bathroom", "garage", "hall", "office")
    hours = "one two three four five six seven eight nine ten eleven twelve".split()
    degrees = ["fifteen", "twenty", "thirty", *(f"twenty {unit}" for unit in hours[:9])]
    for verb, room, device in product(
        ("turn on", "turn off", "switch on", "switch off"), rooms, ("light", "lamp", "fan", "heater", "camera")
    ):
        yield f"{verb} the {room} {device}"
    for verb, room, thing in product(("open", "close"), rooms, ("window", "door", "curtains")):
        yield f"{verb} the {room} {thing}"
    for verb, sound, room in product(("play", "stop"), ("music", "news", "radio"), rooms):
        yield f"{verb} the {sound} in the {room}"
    for room, degree in product(rooms, degrees):
        yield f"set the {room} to {degree} degrees"
    for verb, hour, minutes in product(("wake", "remind"), hours, ("", " fifteen", " thirty")):
        yield f"{verb} me at {hour}{minutes}"
    for person, ending in product(("mother", "brother", "sister", "doctor"), ("", " now", " please")):
        yield f"call my {person}{ending}"


def _iterate_korean() -> Iterator[str]:
    rooms = ("거실", "안방", "부엌", "현관", "화장실")
    hours = ("한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉", "열")
    for room, device, verb in product(rooms, ("불", "선풍기", "난방", "에어컨"), ("켜 줘", "꺼 줘")):
        yield f"{room} {device} {verb}"
    for room, thing, verb in product(rooms, ("문", "창문", "커튼"), ("열어 줘", "닫아 줘")):
        yield f"{room} {thing} {verb}"
    for sound, verb in product(("음악", "라디오", "뉴스"), ("틀어 줘", "꺼 줘")):
        yield f"{sound} {verb}"
    for hour, half in product(hours, ("", " 반")):
        yield f"{hour} 시{half}에 깨워 줘"


def main(arguments: list[str] | None = None) -> None:
    """Writes the embedded corpus into the folder named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.synthesis", description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path, help="Folder to write; must be new or empty.")
    parser.add_argument(
        "--language", choices=LANGUAGES, default=LANGUAGES[0], help="Language of voices and sentences."
    )
    parser.add_argument("--seed", type=int, default=0, help="Chooses sentences, rates, loudness and noise.")
    options = parser.parse_args(arguments)
    write_synthetic_corpus(options.out, language=options.language, seed=options.seed)


if __name__ == "__main__":
    main()
