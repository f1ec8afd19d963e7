"""How a clip could have been recorded: pauses, levels, noise, rooms, telephones, codecs, gates; none as in training.

Training draws coloured noise, tails of noise for rooms and its own filters; here are a pink noise with the hum of the
mains, rooms by the image method, and libsndfile's codecs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from itertools import product

import numpy as np
import soundfile
from scipy.signal import butter, lfilter, oaconvolve, sosfilt, sosfiltfilt

from data.audio import SAMPLING_RATE

PAUSE_PLACES = ("start", "end", "both ends", "middle")
PAUSE_SECONDS = (0.1, 0.3, 1.0, 3.0)
ROOM_NOISE_RMS = 3e-4  # -70 dB of full scale: a quiet room
GAINS_DB = (-30, -20, -10, 10)
SNRS_DB = (20, 10, 5)
SPEED_OF_SOUND = 343.0  # m/s
MICROPHONE_METRES = 1.0
MP3_LEVEL_32 = 0.85  # libsndfile's compression level of 32 kbit/s at 16 kHz
GATED_SHARE = 0.1

# Returns the samples of an utterance's clips, each `(samples,)`, as they would have been recorded.
Condition = Callable[[Sequence[np.ndarray], np.random.Generator], np.ndarray]


def list_conditions() -> dict[str, Condition]:
    """Returns every condition by its name in the table; the first is "as recorded"."""
    conditions: dict[str, Condition] = {"as recorded": lambda clips, _: np.concatenate(clips)}
    for kind, place, seconds in product(("zeros", "room noise"), PAUSE_PLACES, PAUSE_SECONDS):
        conditions[f"{seconds:g} s of {kind}, {place}"] = partial(add_pause, kind=kind, place=place, seconds=seconds)
    for gain in GAINS_DB:
        conditions[f"{gain:+d} dB"] = on_samples(change_level, gain_db=gain)
    conditions["10 dB over full scale, clipped"] = on_samples(overdrive, over_db=10)
    for snr in SNRS_DB:
        conditions[f"noise, {snr} dB"] = on_samples(add_noise, snr_db=snr)
    conditions["small room"] = on_samples(reverberate, size=(3.1, 2.6, 2.4), absorption=0.35)
    conditions["large room"] = on_samples(reverberate, size=(11.0, 8.2, 3.9), absorption=0.25)
    conditions["telephone band"] = on_samples(pass_telephone)
    conditions["mu-law"] = on_samples(encode, format="WAV", subtype="ULAW")
    mp3 = {"bitrate_mode": "CONSTANT", "compression_level": MP3_LEVEL_32}
    conditions["MP3, 32 kbit/s"] = on_samples(encode, format="MP3", subtype="MPEG_LAYER_III", **mp3)
    conditions["gated"] = on_samples(gate)
    return conditions


def on_samples(change: Callable[..., np.ndarray], **settings) -> Condition:
    """Returns the condition that calls `change(samples, generator, **settings)` on the joined clips."""
    return lambda clips, generator: change(np.concatenate(clips), generator, **settings)


def make_noise(num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """Returns pink noise with the hum of the mains `(num_samples,)`, of rms 1."""
    # Paul Kellet's filter: 3 dB an octave.
    white = generator.standard_normal(num_samples + SAMPLING_RATE // 10)
    zeros, poles = [0.049922, -0.095993, 0.050612, -0.004409], [1, -2.494956, 2.017266, -0.522189]
    pink = lfilter(zeros, poles, white)[-num_samples:] if num_samples else white[:0]
    pink = pink / np.sqrt(np.mean(pink**2))
    times = np.arange(num_samples) / SAMPLING_RATE
    hum = sum(np.sin(2 * np.pi * 50 * number * times + generator.uniform(0, 6)) / number for number in (1, 2, 3))
    noise = pink + 0.3 * hum
    return (noise / np.sqrt(np.mean(noise**2))).astype(np.float32)


def add_pause(
    clips: Sequence[np.ndarray], generator: np.random.Generator, *, kind: str, place: str, seconds: float
) -> np.ndarray:
    """
    Returns the clips with a pause of `seconds` at the start, at the end, at both ends or in the middle.

    The middle is between the two clips in the middle; a single clip has none and stays as it is.
    """

    def pause() -> np.ndarray:
        num_samples = round(seconds * SAMPLING_RATE)
        if kind == "zeros":
            return np.zeros(num_samples, np.float32)
        return make_noise(num_samples, generator) * np.float32(ROOM_NOISE_RMS)

    if place == "middle":
        half = len(clips) // 2
        return np.concatenate([*clips[:half], pause(), *clips[half:]] if half else clips)
    start = [pause()] if place in ("start", "both ends") else []
    end = [pause()] if place in ("end", "both ends") else []
    return np.concatenate([*start, *clips, *end])


def change_level(samples: np.ndarray, _: np.random.Generator, *, gain_db: float) -> np.ndarray:
    """Returns `samples` `(samples,)` by so many decibels louder, in the steps of 16 bits, clipped at full scale."""
    samples = samples * 10 ** (gain_db / 20)
    return (np.clip(np.round(samples * 2**15), -(2**15), 2**15 - 1) / 2**15).astype(np.float32)


def overdrive(samples: np.ndarray, generator: np.random.Generator, *, over_db: float) -> np.ndarray:
    """Returns `samples` `(samples,)` recorded so loud that their peak would be so many decibels over full scale."""
    return change_level(samples / np.abs(samples).max(), generator, gain_db=over_db)


def add_noise(samples: np.ndarray, generator: np.random.Generator, *, snr_db: float) -> np.ndarray:
    """Returns `samples` `(samples,)` with noise whose rms is `snr_db` below theirs."""
    rms = np.sqrt(np.mean(samples**2)) * 10 ** (-snr_db / 20)
    return samples + make_noise(len(samples), generator) * np.float32(rms)


def reverberate(
    samples: np.ndarray, generator: np.random.Generator, *, size: tuple[float, float, float], absorption: float
) -> np.ndarray:
    """
    Returns `samples` `(samples,)` in a room of `size` metres whose walls take `absorption` of the energy.

    The speaker stands where `generator` says, half a metre or more from the walls, a metre from the microphone.

    Source: Allen and Berkley, "Image method for efficiently simulating small-room acoustics" (1979).
    """
    room = np.array(size)
    source, direction = generator.uniform(0.5, room - 0.5), generator.standard_normal(3)
    direction *= MICROPHONE_METRES / np.linalg.norm(direction)
    inside = source + direction
    direction = np.where((inside > 0.1) & (inside < room - 0.1), direction, -direction)
    microphone = source + direction
    most = 12  # images on each axis: their sounds are weaker than the direct one by 30 dB and more
    counts = np.arange(-most, most + 1)
    axes = []
    for axis in range(3):
        # Image n of a wall pair: even ones are shifted, odd ones mirrored; it was reflected |n| times.
        mirrored = (counts + 1) * room[axis] - source[axis]
        axes.append(np.where(counts % 2 == 0, counts * room[axis] + source[axis], mirrored) - microphone[axis])
    squares = axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2][None, None, :] ** 2
    bounces = np.abs(counts)[:, None, None] + np.abs(counts)[None, :, None] + np.abs(counts)[None, None, :]
    distances = np.sqrt(squares).ravel()
    gains = ((1 - absorption) ** (bounces.ravel() / 2)) / distances
    delays = np.round(distances / SPEED_OF_SOUND * SAMPLING_RATE).astype(int)
    delays -= delays.min()
    response = np.bincount(delays, gains)[:SAMPLING_RATE].astype(np.float32)
    return oaconvolve(samples, response / np.abs(response).max()).astype(np.float32)


def pass_telephone(samples: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Returns `samples` `(samples,)` between 300 and 3400 Hz."""
    band = butter(4, (300, 3400), "bandpass", fs=SAMPLING_RATE, output="sos")
    return sosfilt(band, samples).astype(np.float32)


def encode(samples: np.ndarray, _: np.random.Generator, **settings) -> np.ndarray:
    """Returns `samples` `(samples,)` after a file of libsndfile's `settings`."""
    file = BytesIO()
    soundfile.write(file, samples, SAMPLING_RATE, **settings)
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0]


def gate(samples: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Returns `samples` `(samples,)` with a tenth of them zeroed: where the envelope over 20 Hz is lowest."""
    envelope = sosfiltfilt(butter(2, 20, fs=SAMPLING_RATE, output="sos"), np.abs(samples))
    return np.where(envelope < np.quantile(envelope, GATED_SHARE), 0.0, samples).astype(np.float32)
