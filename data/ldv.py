"""What a laser Doppler vibrometer hears: speech from a microphone, as a vibrating surface would pass it to a laser."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.signal
import soundfile
from datasets import Dataset

from .audio import SAMPLING_RATE, check_audio, read_audio
from .code_digest import map_versioned

LOW_CUT_ORDER = 2  # 12 dB an octave below the band
HIGH_CUT_ORDER = 4  # 24 dB an octave above it
SHOT_NOISE_CORNER_HZ = 2_000  # noise is white below and grows with the frequency above, 6 dB an octave
DRIFT_HZ = 15  # drift and rumble lie below
FADE_MS = 2  # in which a drop-out begins and ends
CLICK_MS = 1  # duration of a speckle click
PADDING_SECONDS = 0.5  # keeps the ringing of a clip's end out of its beginning
MAX_OUTPUT_PEAK = 0.99
MAX_SNR_DB = 80


class Resonance(NamedTuple):
    """A mode of a surface: `gain_db` above the response beside it, `frequency_hz / quality` wide."""

    frequency_hz: float
    quality: float
    gain_db: float


class Surface(NamedTuple):
    """Band that a surface passes, and its modes."""

    low_cut_hz: float
    high_cut_hz: float
    resonances: tuple[Resonance, ...]


# Typical of the material, not measured on one object: a pane is stiff and rings long, a wall is heavy and passes the
# least, paper is light and strongly damped.
SURFACES = {
    "glass": Surface(80, 3_000, (Resonance(190, 8, 12), Resonance(460, 12, 9), Resonance(1_100, 15, 6))),
    "wall": Surface(60, 1_600, (Resonance(90, 4, 10), Resonance(260, 6, 8), Resonance(620, 8, 5))),
    "paper_bag": Surface(150, 3_500, (Resonance(420, 2.5, 9), Resonance(1_300, 3, 7), Resonance(2_300, 4, 5))),
}


@dataclass(frozen=True)
class LDVChannel:
    """
    The way from a speaker to a vibrometer's output; a recipe's flags. Surfaces are "glass", "wall" and "paper_bag".

    Raises:
        ValueError: The surface is unknown, a value is out of its range, or the band is empty.

    Source: Li et al., "LDV Remote Voice Acquisition and Enhancement" (ICPR 2006): speech from objects near a speaker,
        and its noises; Rothberg, "Numerical simulation of speckle noise in laser vibrometry" (Applied Optics 45, 4523,
        2006): amplitude and phase of the Doppler signal where speckle changes; Wang et al., "Two-Sided LPC-Based
        Speckle Noise Removal for Laser Speech Detection Systems" (10.1587/transinf.2020EDP7254): speckle noise of
        speech as impulses from a process of two states. docs/ldv.md says what follows from which.
    """

    ldv_surface: str = field(default="glass", metadata={"help": f"Vibrating surface: {', '.join(SURFACES)}."})
    ldv_low_cut_hz: float | None = field(
        default=None, metadata={"help": "Lowest frequency passed (-3 dB); default: the surface's."}
    )
    ldv_high_cut_hz: float | None = field(
        default=None, metadata={"help": "Highest frequency passed (-3 dB); default: the surface's."}
    )
    ldv_resonance_jitter: float = field(
        default=0.15,
        metadata={"help": "Largest relative shift of a clip's resonances, as of another place or object."},
    )
    ldv_snr_db: float = field(default=15.0, metadata={"help": "Vibrating speech over the vibrometer's noise, in dB."})
    ldv_snr_jitter_db: float = field(default=5.0, metadata={"help": "Largest change of a clip's SNR, either way."})
    ldv_dropouts_per_second: float = field(default=2.0, metadata={"help": "Mean rate at which speckle turns dark."})
    ldv_dropout_ms: float = field(default=20.0, metadata={"help": "Mean duration of a drop-out."})
    ldv_dropout_depth_db: float = field(default=30.0, metadata={"help": "How much of the speech a drop-out takes."})
    ldv_click_level: float = field(
        default=3.0, metadata={"help": "Peak of the click in each drop-out, over the speech's RMS."}
    )
    ldv_drift_level: float = field(
        default=0.1, metadata={"help": f"RMS of drift and rumble below {DRIFT_HZ} Hz, over the speech's RMS."}
    )

    def __post_init__(self):
        if self.ldv_surface not in SURFACES:
            raise ValueError(f"`ldv_surface` must be one of {', '.join(SURFACES)}, got {self.ldv_surface!r}.")
        if not 0 < self.low_cut_hz < self.high_cut_hz:
            raise ValueError(
                "`ldv_low_cut_hz` must be positive and below `ldv_high_cut_hz`, got "
                f"{self.low_cut_hz} and {self.high_cut_hz}."
            )
        if not 0 <= self.ldv_resonance_jitter < 1:
            raise ValueError(
                f"`ldv_resonance_jitter` must be at least 0 and below 1, got {self.ldv_resonance_jitter}."
            )
        if not -MAX_SNR_DB <= self.ldv_snr_db <= MAX_SNR_DB:
            raise ValueError(f"`ldv_snr_db` must lie between -{MAX_SNR_DB} and {MAX_SNR_DB}, got {self.ldv_snr_db}.")
        for name in ("snr_jitter_db", "dropouts_per_second", "dropout_ms", "dropout_depth_db", "click_level",
                     "drift_level"):  # fmt: skip
            value = getattr(self, f"ldv_{name}")
            if not 0 <= value < float("inf"):
                raise ValueError(f"`ldv_{name}` must be at least 0 and finite, got {value}.")

    @property
    def low_cut_hz(self) -> float:
        """Lower end of the band."""
        return SURFACES[self.ldv_surface].low_cut_hz if self.ldv_low_cut_hz is None else self.ldv_low_cut_hz

    @property
    def high_cut_hz(self) -> float:
        """Upper end of the band."""
        return SURFACES[self.ldv_surface].high_cut_hz if self.ldv_high_cut_hz is None else self.ldv_high_cut_hz

    def gains(self, frequencies_hz: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        """
        Returns the factors `(frequencies,)` by which the surface passes `frequencies_hz`.

        Butterworth slopes at the band's ends; each resonance is a peak of its gain at its frequency and 1 far from it.

        Args:
            frequencies_hz: `(frequencies,)`.
            generator: Draws the shifts of the resonances; default: none is shifted.
        """
        over_low = (frequencies_hz / self.low_cut_hz) ** LOW_CUT_ORDER
        gains = over_low / np.hypot(1, over_low) / np.hypot(1, (frequencies_hz / self.high_cut_hz) ** HIGH_CUT_ORDER)
        for resonance in SURFACES[self.ldv_surface].resonances:
            shift = generator.uniform(-1, 1) * self.ldv_resonance_jitter if generator else 0.0
            ratio = frequencies_hz / (resonance.frequency_hz * (1 + shift))
            damping = ratio / resonance.quality
            gains *= np.hypot(1 - ratio**2, 10 ** (resonance.gain_db / 20) * damping)
            gains /= np.hypot(1 - ratio**2, damping)
        return gains


def simulate_ldv(
    samples: np.ndarray, sampling_rate: int, *, channel: LDVChannel, seed: int | Sequence[int]
) -> np.ndarray:
    """
    Returns a microphone's recording as a vibrometer would have heard it, sample for sample at the same time.

        samples -> surface -> level of the input -> drop-outs -> + clicks + noise + drift -> peak of at most 0.99

    The surface acts without delay: a real one rings after the sound only, here half of it comes before, so that pairs
    of clips are aligned. Drop-outs take speech, not noise, because the noise arises in the detector.

    Args:
        samples: float `(samples,)` in [-1, 1].
        sampling_rate: Of `samples` in Hz.
        channel: What happens to them.
        seed: Determines all that is random, for instance `[seed, clip]`. Each part draws from a stream of its own: a
            change of the SNR leaves the drop-outs where they are.

    Returns:
        float32 `(samples,)`. Its level is the input's; where noise takes the peak above .99, all is scaled to that.

    Raises:
        ValueError: `samples` has more than one dimension, or `sampling_rate` does not carry the band.
        AudioError: `samples` is shorter than 25 ms, not finite, silent or louder than 4.

    Example:

    ```python
    >>> import numpy as np
    >>> from data.ldv import LDVChannel, simulate_ldv

    >>> speech = 0.1 * np.random.default_rng(0).standard_normal(16_000)
    >>> heard = simulate_ldv(speech, 16_000, channel=LDVChannel(ldv_surface="wall"), seed=0)
    >>> heard.dtype, heard.shape
    (dtype('float32'), (16000,))

    ```
    """
    samples = _check_samples(samples, sampling_rate, channel)
    surface, snr, noise, dropouts, drift = np.random.default_rng(seed).spawn(5)
    num_samples, level = len(samples), _rms(samples)
    speech = _filter(samples, sampling_rate, lambda frequencies: channel.gains(frequencies, surface))
    speech *= level / _rms(speech)
    fading, clicks = _draw_dropouts(num_samples, sampling_rate, channel, dropouts)
    snr_db = channel.ldv_snr_db + snr.uniform(-1, 1) * channel.ldv_snr_jitter_db
    heard = speech * fading + level * clicks
    heard += level * 10 ** (-snr_db / 20) * _draw_noise(num_samples, sampling_rate, noise)
    heard += level * channel.ldv_drift_level * _draw_drift(num_samples, sampling_rate, drift)
    heard *= MAX_OUTPUT_PEAK / max(MAX_OUTPUT_PEAK, np.abs(heard).max())
    return heard.astype(np.float32)


def _check_samples(samples: np.ndarray, sampling_rate: int, channel: LDVChannel) -> np.ndarray:
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim != 1:
        raise ValueError(f"`samples` must have the shape (samples,), got {samples.shape}. Average the channels.")
    if sampling_rate <= 2 * channel.high_cut_hz:
        raise ValueError(
            f"`sampling_rate` must be above {2 * channel.high_cut_hz:g} Hz, twice the highest frequency of the band, "
            f"got {sampling_rate}. Resample, or lower `ldv_high_cut_hz`."
        )
    check_audio(samples, "samples", sampling_rate=sampling_rate)
    return samples


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(samples**2)))


def _filter(samples: np.ndarray, sampling_rate: int, find_gains: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Returns `samples` with each frequency times its gain, and no phase shifted."""
    num_samples = len(samples)
    num_padded = scipy.fft.next_fast_len(num_samples + round(PADDING_SECONDS * sampling_rate), real=True)
    gains = find_gains(scipy.fft.rfftfreq(num_padded, 1 / sampling_rate))
    return scipy.fft.irfft(scipy.fft.rfft(samples, num_padded) * gains, num_padded)[:num_samples]


def _draw_noise(num_samples: int, sampling_rate: int, generator: np.random.Generator) -> np.ndarray:
    """
    Returns noise `(samples,)` of RMS 1.

    The detector's shot noise is white in phase, which is displacement, and so grows with the frequency in velocity;
    below a few kHz speckle noise covers it.

    Source: "Laser vibrometry from a moving ground vehicle" (Applied Optics, 2011).
    """
    noise = _filter(
        generator.standard_normal(num_samples),
        sampling_rate,
        lambda frequencies: np.hypot(1, frequencies / SHOT_NOISE_CORNER_HZ),
    )
    return noise / _rms(noise)


def _draw_drift(num_samples: int, sampling_rate: int, generator: np.random.Generator) -> np.ndarray:
    """Returns drift `(samples,)` of RMS 1 below `DRIFT_HZ`: the surface's or the instrument's slow motion."""
    drift = _filter(generator.standard_normal(num_samples), sampling_rate, lambda frequencies: frequencies < DRIFT_HZ)
    return drift / _rms(drift)


def _draw_dropouts(
    num_samples: int, sampling_rate: int, channel: LDVChannel, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns the factors `(samples,)` of the speech, and clicks `(samples,)` over its RMS.

    A Poisson process of drop-outs of exponential duration; where the light is darkest the phase jumps, which velocity
    shows as a click.
    """
    num_dropouts = generator.poisson(channel.ldv_dropouts_per_second * num_samples / sampling_rate)
    starts = generator.integers(0, num_samples, num_dropouts)
    durations = generator.exponential(channel.ldv_dropout_ms * sampling_rate / 1000, num_dropouts)
    signs = generator.choice([-1.0, 1.0], num_dropouts)
    is_dark, clicks = np.zeros(num_samples), np.zeros(num_samples)
    for start, duration, sign in zip(starts, durations, signs, strict=True):
        end = min(start + round(duration), num_samples)
        is_dark[start:end] = 1.0
        clicks[(start + end) // 2] += sign
    fade, click = (scipy.signal.windows.hann(2 * round(ms * sampling_rate / 2000) + 1) for ms in (FADE_MS, CLICK_MS))
    depth = scipy.signal.convolve(is_dark, fade / fade.sum(), mode="same")
    clicks = channel.ldv_click_level * scipy.signal.convolve(clicks, click, mode="same")
    return 10 ** (-channel.ldv_dropout_depth_db * depth / 20), clicks


def simulate_clips(clips: Dataset, sampling_rate: int, *, channel: LDVChannel, seed: int) -> Dataset:
    """
    Returns decoded clips as the vibrometer hears them; cached by the fingerprint of clips, channel and code.

    Args:
        clips: A column `samples`, as from [`decode_clips`]; the other columns stay.
        sampling_rate: Of the samples in Hz.
        channel: What happens to them.
        seed: With a clip's row it determines what is random; give another split another seed.

    Raises:
        ValueError: As [`simulate_ldv`].
    """
    heard = map_versioned(
        clips.with_format("numpy", columns=["samples"], output_all_columns=True),
        _simulate_row,
        fn_kwargs={"sampling_rate": sampling_rate, "channel": channel, "seed": seed},
        with_indices=True,
        features=clips.features,
        desc="simulating a vibrometer",
    )
    return heard.with_format(None)


def _simulate_row(row: dict, index: int, *, sampling_rate: int, channel: LDVChannel, seed: int) -> dict:
    return {"samples": simulate_ldv(row["samples"], sampling_rate, channel=channel, seed=[seed, index])}


def main(arguments: list[str] | None = None) -> None:
    """Writes what a vibrometer would have heard of the recording named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.ldv", description=__doc__, allow_abbrev=False)
    parser.add_argument("recording", help="What a microphone recorded: wav, flac, ogg or mp3.")
    parser.add_argument("out", type=Path, help="The .wav to write, 16 bit at 16 kHz.")
    parser.add_argument("--seed", type=int, default=0, help="Determines all that is random.")
    for parameter in fields(LDVChannel):
        value_type = str if parameter.name == "ldv_surface" else float
        flag = f"--{parameter.name.removeprefix('ldv_')}"
        parser.add_argument(
            flag, dest=parameter.name, type=value_type, default=parameter.default, help=parameter.metadata["help"]
        )
    options = parser.parse_args(arguments)
    if options.out.suffix != ".wav":
        parser.error(f"`{options.out}` must end in .wav.")
    try:
        channel = LDVChannel(**{parameter.name: getattr(options, parameter.name) for parameter in fields(LDVChannel)})
        samples = read_audio(options.recording)
        heard = simulate_ldv(samples, SAMPLING_RATE, channel=channel, seed=options.seed)
    except ValueError as error:
        parser.error(str(error).replace("`ldv_", "`"))  # the flags here have no prefix
    path = options.out.resolve()  # a link stays
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    soundfile.write(scratch, heard, SAMPLING_RATE, subtype="PCM_16")
    os.replace(scratch, path)


if __name__ == "__main__":
    main()
