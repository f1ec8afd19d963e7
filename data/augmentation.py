"""What a training utterance goes through before it is heard: another speed, and masks over its features."""

from dataclasses import dataclass, field

import librosa
import numpy as np
import torch


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

    def __post_init__(self):
        if not 0 < self.min_speed <= self.max_speed:
            raise ValueError(
                f"`min_speed` must be positive and at most `max_speed`, got {self.min_speed} and {self.max_speed}."
            )
        for name in ("num_time_masks", "max_time_mask_frames", "num_mel_masks", "max_mel_mask_bins"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")

    @property
    def changes(self) -> bool:
        """Whether clips or features are changed at all."""
        return not self.min_speed == self.max_speed == 1.0 or self.num_time_masks > 0 or self.num_mel_masks > 0

    def change_speed(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Returns `samples` `(samples,)` at a random speed."""
        if self.min_speed == self.max_speed == 1.0:
            return samples
        # Resampling takes whole rates: a step of 1 % of speed is 100 Hz of 10 kHz.
        rate = round(10_000 / generator.uniform(self.min_speed, self.max_speed))
        return librosa.resample(samples, orig_sr=10_000, target_sr=rate, res_type="soxr_qq")

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


def _draw_span(total: int, longest: int, generator: np.random.Generator) -> tuple[int, int]:
    size = int(generator.integers(0, min(longest, total) + 1))
    return int(generator.integers(0, total - size + 1)), size
