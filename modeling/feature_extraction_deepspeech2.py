"""Log-mel features of DeepSpeech2."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank

NORMALIZATIONS = ("utterance", "bin", "speech")
# Power below which a mel band counts as silence (-100 dB of full scale), so that the logarithm is finite.
POWER_FLOOR = 1e-10
# Standard deviations below it are digital silence; dividing by them would blow rounding errors up.
DEVIATION_FLOOR = 1e-5
# With `normalization="speech"`: a frame is speech if its power is at most so far below the utterance's level, ...
SPEECH_RANGE_DB = 20.0
# ... cells further below the level are set to it, and ...
FLOOR_DB = 45.0
# ... deviations below it (5 dB, in natural logarithms of power) are not of speech but of noise or of an empty band.
SPEECH_DEVIATION_FLOOR = 1.15
# Frames that are transformed together: their spectra stay in the cache of a core.
BLOCK_FRAMES = 256
# Mel bins whose filters are multiplied together, by the bins of the spectrum that any of them reads. Filters are zero
# nearly everywhere: 32 in a band need a third of the products that all 80 in one would.
BAND_MELS = 32


class DeepSpeech2FeatureExtractor(SequenceFeatureExtractor):
    r"""
    Turns audio into normalised log-mel features `(batch, frames, mel)`, one frame each 10 ms.

    Args:
        feature_size (`int`): Mel bins.
        sampling_rate (`int`): Rate of the audio in Hz.
        hop_length (`int`): Samples between frames (160 is 10 ms at 16 kHz).
        win_length (`int`): Samples of the Hann window (320 is 20 ms at 16 kHz).
        n_fft (`int`): Samples of the Fourier transform.
        normalization (`str`): `"utterance"` (one mean and deviation over the whole utterance, as KoSpeech) or `"bin"`
            (one for each mel bin, which also removes a constant channel), or `"speech"`: `"bin"` over the frames that
            carry speech, with a floor relative to their level, so that what a frame of speech looks like does not
            depend on how much silence stands around it, nor on the recording's level.
        padding_value (`float`): Value of frames beyond an utterance's end.
    """

    model_input_names = ["input_features", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16_000,
        hop_length: int = 160,
        win_length: int = 320,
        n_fft: int = 512,
        normalization: str = "utterance",
        padding_value: float = 0.0,
        return_attention_mask: bool = True,
        **kwargs,
    ):
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"`normalization` must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}.")
        if not 0 < win_length <= n_fft:
            raise ValueError(f"`win_length` must be from 1 to `n_fft` ({n_fft}), got {win_length}.")
        self.hop_length, self.win_length, self.n_fft = hop_length, win_length, n_fft
        self.normalization = normalization
        self.mel_filters = mel_filter_bank(
            num_frequency_bins=n_fft // 2 + 1,
            num_mel_filters=feature_size,
            min_frequency=0.0,
            max_frequency=sampling_rate / 2,
            sampling_rate=sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        ).astype(np.float32)  # (n_fft / 2 + 1, mel)
        self.mel_bands = split_into_bands(self.mel_filters)
        # Computed in float64: errors of the float32 cosine would leak into bins 120 dB below the loudest.
        self.window = torch.hann_window(win_length, dtype=torch.float64).float()

    def get_num_frames(self, num_samples: int) -> int:
        """Frames of `num_samples` samples: one at each multiple of the hop, the ends included."""
        return num_samples // self.hop_length + 1

    def log_mel(self, samples: np.ndarray) -> torch.Tensor:
        """Returns log-mel energies `(frames, mel)` of `samples` `(samples,)`, before normalisation."""
        num_frames = self.get_num_frames(len(samples))
        # As in `torch.stft` with `center=True`, frame t's window is in the middle of the n_fft samples around t * hop.
        left = self.n_fft // 2 - (self.n_fft - self.win_length) // 2
        padded = torch.zeros(max(left + len(samples), (num_frames - 1) * self.hop_length + self.win_length))
        padded[left : left + len(samples)] = torch.as_tensor(np.ascontiguousarray(samples, dtype=np.float32))
        frames = padded.unfold(0, self.win_length, self.hop_length)
        # The zeros of a frame may all stand behind it: a shift in time does not change the power.
        windowed = torch.zeros(min(num_frames, BLOCK_FRAMES), self.n_fft)
        energies = torch.empty(num_frames, self.feature_size)
        for start in range(0, num_frames, BLOCK_FRAMES):
            block = energies[start : start + BLOCK_FRAMES]
            inputs = windowed[: len(block)]
            torch.mul(frames[start : start + len(block)], self.window, out=inputs[:, : self.win_length])
            parts = torch.view_as_real(torch.fft.rfft(inputs)).square_()
            power = parts[..., 0] + parts[..., 1]  # (frames, n_fft / 2 + 1)
            for mels, bins, filters in self.mel_bands:
                torch.mm(power[:, bins], filters, out=block[:, mels])
        logarithms = energies.clamp_(min=POWER_FLOOR).numpy()
        return torch.from_numpy(np.log(logarithms, out=logarithms))  # numpy's takes a third of the time of torch's

    def normalize(self, features: torch.Tensor) -> torch.Tensor:
        """Returns `features` `(frames, mel)` with mean 0 and deviation 1 over the utterance, or over each bin."""
        if self.normalization == "speech":
            return normalize_speech(features)
        dim = 0 if self.normalization == "bin" else (0, 1)
        deviation, mean = torch.std_mean(features, dim=dim, keepdim=True, correction=0)
        return (features - mean) / deviation.clamp(min=DEVIATION_FLOOR)

    def __call__(
        self,
        raw_speech: np.ndarray | Sequence[float] | Sequence[np.ndarray] | Sequence[Sequence[float]],
        *,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            raw_speech: One utterance `(samples,)` or a batch of them.
            sampling_rate: Rate of `raw_speech` in Hz.
            padding: As in [`SequenceFeatureExtractor.pad`].
            return_tensors: `"pt"` or `"np"`.

        Returns:
            `input_features` `(batch, frames, mel)` and `attention_mask` `(batch, frames)`.

        Raises:
            ValueError: `sampling_rate` is not the extractor's, or an utterance is empty, not finite or has more than
                one channel.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"`sampling_rate` must be {self.sampling_rate}, got {sampling_rate}. Resample the audio first."
            )
        is_batch = isinstance(raw_speech, (list, tuple)) and len(raw_speech) > 0 and not np.isscalar(raw_speech[0])
        utterances = [np.asarray(row, dtype=np.float32) for row in (raw_speech if is_batch else [raw_speech])]
        for row, samples in enumerate(utterances):
            if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
                raise ValueError(
                    f"`raw_speech` must be finite samples of one channel, got shape {samples.shape} in row {row}"
                    f"{'' if np.isfinite(samples).all() else ' with NaN or infinite values'}."
                )
        features = [self.normalize(self.log_mel(samples)).numpy() for samples in utterances]
        return self.pad(
            BatchFeature({"input_features": features}), padding=padding, return_tensors=return_tensors, **kwargs
        )

    def to_dict(self) -> dict:
        """Leaves out the filters and the window, which follow from the other settings."""
        derived = ("mel_filters", "mel_bands", "window")
        return {key: value for key, value in super().to_dict().items() if key not in derived}


def normalize_speech(features: torch.Tensor) -> torch.Tensor:
    """
    Returns log-mel `features` `(frames, mel)` with mean 0 and deviation 1 over each bin of the frames of speech.

    The level of an utterance is the mean of its frames' power, weighted by this power, so silence has no part in it.
    """
    power = features.double().exp()
    frame_power = power.mean(dim=1)  # (frames,)
    level = (frame_power.square().sum() / frame_power.sum()).log()
    decibel = math.log(10) / 10
    floored = features.clamp(min=float(level) - FLOOR_DB * decibel)
    speech = floored[frame_power.log() >= level - SPEECH_RANGE_DB * decibel]
    deviation, mean = torch.std_mean(speech, dim=0, keepdim=True, correction=0)
    return (floored - mean) / deviation.clamp(min=SPEECH_DEVIATION_FLOOR)


def split_into_bands(mel_filters: np.ndarray) -> list[tuple[slice, slice, torch.Tensor]]:
    """
    Splits `mel_filters` `(bins, mel)` into bands `(mels, bins, filters)`: what each 32 mel bins read of a spectrum.

    Example:

    ```python
    >>> import numpy as np

    >>> from modeling.feature_extraction_deepspeech2 import split_into_bands

    >>> filters = np.eye(257, 80, dtype=np.float32)
    >>> [(mels.start, bins.start, bins.stop, tuple(part.shape)) for mels, bins, part in split_into_bands(filters)]
    [(0, 0, 32, (32, 32)), (32, 32, 64, (32, 32)), (64, 64, 80, (16, 16))]

    ```
    """
    bands = []
    for start in range(0, mel_filters.shape[1], BAND_MELS):
        mels = slice(start, start + BAND_MELS)
        read = np.flatnonzero(mel_filters[:, mels].any(axis=1)).tolist() or [0]  # filters may fall between two bins
        bins = slice(read[0], read[-1] + 1)
        bands.append((mels, bins, torch.from_numpy(np.ascontiguousarray(mel_filters[bins, mels]))))
    return bands
