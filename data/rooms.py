"""Rooms, noises and devices that a clip is heard through in training, drawn by seed; audiomentations has most of them.

It draws from Python's and NumPy's global generators, so these are seeded around each of its calls and put back.
RoomSimulator needs pyroomacoustics, which has to be compiled, and takes longer than a training step: without a folder
of impulse responses, a decaying tail of noise stands for a room.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO

import librosa
import numpy as np
import soundfile
import soxr
from audiomentations import AddBackgroundNoise, AddColorNoise, ApplyImpulseResponse, BandPassFilter
from audiomentations.core.transforms_interface import BaseWaveformTransform
from scipy.signal import oaconvolve

from .audio import SAMPLING_RATE

SNR_DB = (5.0, 40.0)  # of background noise
PAUSE_NOISE_DB = (-70.0, -18.0)  # of the noise in a pause, relative to the speech
NOISE_SLOPE_DB = (-8.0, 3.0)  # an octave: from rumble to hiss
REVERBERATION_SECONDS = (0.1, 1.2)  # until the tail is 60 dB down
DIRECT_DB = (-8.0, 15.0)  # the direct sound over the tail
GAIN_DB = (-35.0, 12.0)
CLIPPED_DB = (0.0, 14.0)  # how far the peaks of a clipped recording would rise above full scale
GATED_SHARE = (0.02, 0.4)  # of the samples that a gate zeroes
GATE_SAMPLES = 80  # 5 ms, over which a gate measures
TELEPHONE_RATE = 8_000
MP3_LEVELS = (0.6, 0.95)  # libsndfile's compression levels: 64 to 16 kbit/s at 16 kHz


@contextmanager
def seeded(generator: np.random.Generator) -> Iterator[None]:
    """Seeds the global generators by a draw of `generator`, and puts their states back."""
    states = random.getstate(), np.random.get_state()
    seed = int(generator.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@cache
def _make_transform(kind: type[BaseWaveformTransform], **settings) -> BaseWaveformTransform:
    return kind(**settings, p=1.0)


def _transform(samples: np.ndarray, generator: np.random.Generator, kind: type, **settings) -> np.ndarray:
    with seeded(generator):
        return _make_transform(kind, **settings)(samples, SAMPLING_RATE)


def fill_pause(num_samples: int, level: float, generator: np.random.Generator) -> np.ndarray:
    """Returns a pause `(num_samples,)` of zeros or of noise whose colour and rms, below `level`, are drawn."""
    if generator.random() < 0.4 or not num_samples or not level:
        return np.zeros(num_samples, np.float32)
    rms = level * 10 ** (generator.uniform(*PAUSE_NOISE_DB) / 20)
    noise = generator.standard_normal(num_samples, dtype=np.float32)
    if generator.random() < 0.5:
        noise = oaconvolve(noise, generator.standard_normal(16, dtype=np.float32), "same")
        noise /= np.sqrt(np.mean(noise**2))
    return (noise * rms).astype(np.float32)


def reverberate(samples: np.ndarray, generator: np.random.Generator, folder: str | None = None) -> np.ndarray:
    """Returns `samples` `(samples,)` in a room: a recorded one of `folder`, or a simulated one."""
    if folder:
        return _transform(samples, generator, ApplyImpulseResponse, ir_path=folder)
    seconds = generator.uniform(*REVERBERATION_SECONDS)
    times = np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    tail = generator.standard_normal(len(times)) * 10 ** (-3 * times / seconds)  # 60 dB down at its end
    tail[: round(generator.uniform(0.001, 0.01) * SAMPLING_RATE)] = 0.0  # until the nearest wall answers
    tail *= 10 ** (-generator.uniform(*DIRECT_DB) / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    return oaconvolve(samples, tail.astype(np.float32))[: len(samples)]


def add_noise(samples: np.ndarray, generator: np.random.Generator, folder: str | None = None) -> np.ndarray:
    """Returns `samples` `(samples,)` in noise: a recorded one of `folder`, or a coloured one."""
    low, high = SNR_DB
    if folder:
        settings = {"sounds_path": folder, "min_snr_db": low, "max_snr_db": high}
        return _transform(samples, generator, AddBackgroundNoise, **settings)
    flattest, steepest = max(NOISE_SLOPE_DB), min(NOISE_SLOPE_DB)
    settings = {"min_snr_db": low, "max_snr_db": high, "min_f_decay": steepest, "max_f_decay": flattest}
    return _transform(samples, generator, AddColorNoise, **settings)


def change_level(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns `samples` `(samples,)` at another level, clipped at full scale."""
    return np.clip(samples * np.float32(10 ** (generator.uniform(*GAIN_DB) / 20)), -1.0, 1.0)


def pass_telephone(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns `samples` `(samples,)` in a telephone's band, at its rate, by its mu-law."""
    band = {"min_center_freq": 1400, "max_center_freq": 2100, "min_rolloff": 12, "max_rolloff": 24}
    band |= {"min_bandwidth_fraction": 1.3, "max_bandwidth_fraction": 1.8}
    samples = _transform(samples, generator, BandPassFilter, **band).astype(np.float32)
    low = soxr.resample(samples, SAMPLING_RATE, TELEPHONE_RATE, quality="LQ")
    return soxr.resample(pass_mu_law(low), TELEPHONE_RATE, SAMPLING_RATE, quality="LQ")[: len(samples)]


def pass_mu_law(samples: np.ndarray) -> np.ndarray:
    """Returns `samples` `(samples,)` after 8 bits of mu-law."""
    codes = librosa.mu_compress(np.clip(samples, -1.0, 1.0), mu=255, quantize=True)
    return librosa.mu_expand(codes, mu=255, quantize=True).astype(np.float32)


def pass_mp3(samples: np.ndarray, level: float) -> np.ndarray:
    """Returns `samples` `(samples,)` after an MP3 of `level`, from 0 (best) to 1 (smallest)."""
    file = BytesIO()
    options = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "CONSTANT", "compression_level": level}
    soundfile.write(file, samples, SAMPLING_RATE, **options)
    file.seek(0)
    decoded = soundfile.read(file, dtype="float32")[0][: len(samples)]
    return np.pad(decoded, (0, len(samples) - len(decoded)))


def gate(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns `samples` `(samples,)` with the quietest of them, one by one or in blocks of 5 ms, set to zero."""
    width = 1 if generator.random() < 0.3 else GATE_SAMPLES
    blocks = np.pad(samples, (0, -len(samples) % width)).reshape(-1, width)
    levels = np.abs(blocks).max(axis=1)
    heard = levels[levels > 0]  # a pause of zeros is no part of what a gate closes on
    if not len(heard):
        return samples
    threshold = np.quantile(heard, generator.uniform(*GATED_SHARE))
    return np.where(levels[:, None] >= threshold, blocks, 0).reshape(-1)[: len(samples)].astype(np.float32)


def clip(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns `samples` `(samples,)` with their peaks cut off."""
    most = np.abs(samples).max() * 10 ** (-generator.uniform(*CLIPPED_DB) / 20)
    return np.clip(samples, -most, most).astype(np.float32)


def pass_device(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns `samples` `(samples,)` through a telephone, mu-law, an MP3, a noise gate or a clipping one."""
    device = generator.choice(["telephone", "mu-law", "mp3", "gate", "clip"], p=[0.3, 0.1, 0.15, 0.25, 0.2])
    if device == "telephone":
        return pass_telephone(samples, generator)
    if device == "mu-law":
        return pass_mu_law(samples)
    if device == "mp3":
        return pass_mp3(samples, generator.uniform(*MP3_LEVELS))
    if device == "clip":
        return clip(samples, generator)
    return gate(samples, generator)
