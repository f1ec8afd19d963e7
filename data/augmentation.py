"""What a training utterance goes through before it is heard: speed, pauses, rooms, devices, masks over features."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import librosa
import numpy as np
import torch
from audiomentations.core.utils import find_audio_files_in_paths

from . import rooms
from .audio import SAMPLING_RATE

MIN_PAUSE_SECONDS = 0.02
QUIET_SAMPLES = 320  # 20 ms: over so many samples, the quietest place of a clip is found


@dataclass(frozen=True)
class Augmentation:
    """
    What is done to a training utterance, drawn anew each epoch; a recipe's flags. The defaults do nothing.

    Raises:
        ValueError: The speeds are not positive or out of order, or a count is negative.

    Source: Ko et al., "Audio Augmentation for Speech Recognition" (2015); Park et al., SpecAugment (arXiv 1904.08779).
    """

    min_speed: float = field(default=1.0, metadata={"help": "Slowest speed perturbation; changes tempo and pitch."})
    max_speed: float = field(default=1.0, metadata={"help": "Fastest speed perturbation."})
    num_time_masks: int = field(default=0, metadata={"help": "SpecAugment: spans of frames set to the mean."})
    max_time_mask_frames: int = field(
        default=10, metadata={"help": "SpecAugment: longest span, 10 ms a frame, at most a tenth of the utterance."}
    )
    num_mel_masks: int = field(default=0, metadata={"help": "SpecAugment: bands of mel bins set to the mean."})
    max_mel_mask_bins: int = field(default=10, metadata={"help": "SpecAugment: widest band."})
    pause_share: float = field(
        default=0.0, metadata={"help": "Share of utterances with pauses before, after and between the words."}
    )
    max_pause_seconds: float = field(default=1.0, metadata={"help": "Longest pause."})
    room_share: float = field(
        default=0.0, metadata={"help": "Share of utterances in a room that answers, and of those in noise."}
    )
    device_share: float = field(
        default=0.0,
        metadata={"help": "Share of utterances at another level, and of those on a telephone, in a codec, gated."},
    )
    noise_dir: str | None = field(
        default=None, metadata={"help": "Folder of recorded noise for room_share. Default: coloured noise."}
    )
    impulse_dir: str | None = field(
        default=None, metadata={"help": "Folder of rooms' impulse responses for room_share. Default: simulated ones."}
    )

    def __post_init__(self):
        if not 0 < self.min_speed <= self.max_speed:
            raise ValueError(
                f"`min_speed` must be positive and at most `max_speed`, got {self.min_speed} and {self.max_speed}."
            )
        for name in ("num_time_masks", "max_time_mask_frames", "num_mel_masks", "max_mel_mask_bins"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        for name in ("pause_share", "room_share", "device_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be from 0 to 1, got {getattr(self, name)}. It is a share.")
        if not self.max_pause_seconds >= MIN_PAUSE_SECONDS:
            raise ValueError(
                f"`max_pause_seconds` must be at least {MIN_PAUSE_SECONDS}, got {self.max_pause_seconds}. "
                "Set `pause_share` to 0 for no pauses."
            )
        for name in ("noise_dir", "impulse_dir"):
            folder = getattr(self, name)
            if folder and not self.room_share:
                raise ValueError(f"`{name}` needs `room_share` above 0, got 0. Leave `{name}` out, or give a share.")
            if folder and not find_audio_files_in_paths(folder):
                raise ValueError(f"`{name}` must be a folder with audio files, got {folder}. Name another one.")

    @property
    def changes(self) -> bool:
        """Whether clips or features are changed at all."""
        shares = (self.num_time_masks, self.num_mel_masks, self.pause_share, self.room_share, self.device_share)
        return not self.min_speed == self.max_speed == 1.0 or any(share > 0 for share in shares)

    def change_speed(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Returns `samples` `(samples,)` at a random speed."""
        if self.min_speed == self.max_speed == 1.0:
            return samples
        # Resampling takes whole rates: a step of 1 % of speed is 100 Hz of 10 kHz.
        rate = round(10_000 / generator.uniform(self.min_speed, self.max_speed))
        return librosa.resample(samples, orig_sr=10_000, target_sr=rate, res_type="soxr_qq")

    def draw_pauses(self, num_places: int, generator: np.random.Generator) -> list[int]:
        """Returns samples of silence at each of `num_places`: before the first clip, between two, after the last."""
        pauses = [0] * num_places
        if generator.random() >= self.pause_share:
            return pauses
        ends = (0, num_places - 1)
        for place in range(num_places):
            if generator.random() < (0.7 if place in ends else 0.4):
                # As many pauses of .1 to .2 s as of .2 to .4 s.
                seconds = np.exp(generator.uniform(np.log(MIN_PAUSE_SECONDS), np.log(self.max_pause_seconds)))
                pauses[place] = round(seconds * SAMPLING_RATE)
        return pauses

    def hear(self, clips: Sequence[np.ndarray], pauses: Sequence[int], generator: np.random.Generator) -> np.ndarray:
        """
        Returns `clips`, each `(samples,)`, one after the other, at a random speed, in a random room and device.

        Args:
            clips: Of one utterance.
            pauses: From [`draw_pauses`]: one place more than clips, or three, to part a single clip.
            generator: Draws everything.
        """
        clips = [self.change_speed(clip, generator) for clip in clips]
        if len(pauses) > len(clips) + 1:
            clips = split_clip(clips[0]) if pauses[1] else clips
            pauses = pauses if pauses[1] else (pauses[0], pauses[2])
        if any(pauses):
            level = float(np.sqrt(np.mean(np.concatenate(clips) ** 2)))
            first, *others = [rooms.fill_pause(pause, level, generator) for pause in pauses]
            parts = [first]
            for clip, pause in zip(clips, others, strict=True):
                parts += [clip, pause]
            clips = parts
        samples = np.concatenate(clips)
        if generator.random() < self.room_share:
            samples = rooms.reverberate(samples, generator, self.impulse_dir)
        if generator.random() < self.room_share:
            samples = rooms.add_noise(samples, generator, self.noise_dir)
        if generator.random() < self.device_share:
            samples = rooms.change_level(samples, generator)
        if generator.random() < self.device_share:
            samples = rooms.pass_device(samples, generator)
        return samples

    def mask(self, features: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """Returns normalised `features` `(frames, mel)` with random spans and bands set to 0, their mean."""
        features = features.clone()
        num_frames, num_bins = features.shape
        longest = min(self.max_time_mask_frames, num_frames // 10)
        for _ in range(self.num_time_masks):
            start, size = _draw_span(num_frames, longest, generator)
            features[start : start + size] = 0.0
        for _ in range(self.num_mel_masks):
            start, size = _draw_span(num_bins, self.max_mel_mask_bins, generator)
            features[:, start : start + size] = 0.0
        return features


@dataclass(frozen=True)
class RecipeAugmentation(Augmentation):
    """[`Augmentation`] with the defaults of the recipes: what is trained has heard pauses, rooms and devices."""

    pause_share: float = field(
        default=0.4, metadata={"help": "Share of utterances with pauses before, after and between the words; 0: none."}
    )
    room_share: float = field(
        default=0.35, metadata={"help": "Share of utterances in a room that answers, and of those in noise; 0: none."}
    )
    device_share: float = field(
        default=0.3,
        metadata={"help": "Share of utterances at another level, and of those on a telephone, in a codec, gated."},
    )


def split_clip(samples: np.ndarray) -> list[np.ndarray]:
    """Returns `samples` `(samples,)` in two parts, cut at the quietest place of the middle half."""
    quarter = len(samples) // 4
    power = np.convolve(samples[quarter : len(samples) - quarter] ** 2, np.ones(QUIET_SAMPLES), "same")
    cut = quarter + int(power.argmin())
    return [samples[:cut], samples[cut:]]


def _draw_span(total: int, longest: int, generator: np.random.Generator) -> tuple[int, int]:
    size = int(generator.integers(0, min(longest, total) + 1))
    return int(generator.integers(0, total - size + 1)), size
