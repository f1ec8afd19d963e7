"""Filter bank features of EchoStream: frames that end with their samples, normalised by statistics of the corpus."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank, window_function

# Kaldi computes on 16-bit samples; statistics of checkpoints made with it are of energies at this scale.
SAMPLE_SCALE = 2.0**15
PREEMPHASIS = 0.97
MIN_FREQUENCY_HZ = 20.0
ENERGY_FLOOR = 1.1920928955078125e-07  # as Kaldi's: the smallest step of fp32 at 1
# Deviations below it are of a bin that never changes; dividing by them would blow rounding errors up.
DEVIATION_FLOOR = 1e-5


class EchoStreamFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Turns audio into log filter bank energies `(batch, frames, mel)`, 25 ms a frame, one each 10 ms.

    As Kaldi's `compute-fbank-feats` without dither. A frame is made of its own samples alone, so features of a stream
    equal those of the whole recording:

        samples   0 ........ 400
        frame 0   [ 400 samples ]
        frame 1        [ 400 samples ]     begins 160 later

    Normalisation is global: each bin less its mean over the training corpus, over its deviation there. Of an utterance
    one could say its mean at its end only.

    Args:
        feature_size (`int`): Mel bins.
        sampling_rate (`int`): Rate of the audio in Hz.
        hop_length (`int`): Samples between frames (160 is 10 ms at 16 kHz).
        win_length (`int`): Samples of a frame (400 is 25 ms at 16 kHz).
        n_fft (`int`): Samples of the Fourier transform.
        mean (`list[float]`): Mean of each bin over a corpus, from [`measure`]. Default: nothing is subtracted.
        std (`list[float]`): Standard deviation of each bin, likewise.
        padding_value (`float`): Value of frames beyond an utterance's end.

    Raises:
        ValueError: One of `mean` and `std` is missing, or they have not one finite number a bin, or a deviation is not
            positive; or a frame is longer than the Fourier transform.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling import EchoStreamFeatureExtractor

    >>> extractor = EchoStreamFeatureExtractor()
    >>> extractor(np.zeros(16_000), sampling_rate=16_000, return_tensors="pt")["input_features"].shape
    torch.Size([1, 98, 80])

    ```
    """

    model_input_names = ["input_features", "attention_mask"]
    has_whole_windows = True

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16_000,
        hop_length: int = 160,
        win_length: int = 400,
        n_fft: int = 512,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
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
        if not 0 < win_length <= n_fft:
            raise ValueError(f"`win_length` must be from 1 to `n_fft` ({n_fft}), got {win_length}.")
        self.hop_length, self.win_length, self.n_fft = hop_length, win_length, n_fft
        self.set_statistics(mean, std)
        filters = mel_filter_bank(
            num_frequency_bins=n_fft // 2 + 1,
            num_mel_filters=feature_size,
            min_frequency=MIN_FREQUENCY_HZ,
            max_frequency=sampling_rate / 2,
            sampling_rate=sampling_rate,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )  # (n_fft / 2 + 1, mel)
        self.mel_filters = torch.from_numpy(filters.astype(np.float32))
        self.window = torch.from_numpy(window_function(win_length, "povey", periodic=False).astype(np.float32))

    def set_statistics(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        """
        Normalises by these from now on; see the class.

        Raises:
            ValueError: As the class.
        """
        if (mean is None) != (std is None):
            raise ValueError(
                f"`mean` and `std` must be given together, got {'std' if mean is None else 'mean'} alone."
            )
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and (len(values) != self.feature_size or not np.isfinite(values).all()):
                raise ValueError(
                    f"`{name}` must be {self.feature_size} finite numbers, one a mel bin, got {len(values)} numbers"
                    f"{'' if np.isfinite(values).all() else ' with NaN or infinity'}."
                )
        if std is not None and min(std) <= 0:
            raise ValueError(f"`std` must be positive, got {min(std)}.")
        self.mean = None if mean is None else [float(value) for value in mean]
        self.std = None if std is None else [float(value) for value in std]

    def get_num_frames(self, num_samples: int) -> int:
        """Frames of `num_samples` samples: those that fit wholly, 0 for fewer samples than a frame has."""
        return max(0, (num_samples - self.win_length) // self.hop_length + 1)

    def log_mel(self, samples: np.ndarray) -> torch.Tensor:
        """Returns log energies `(frames, mel)` of `samples` `(samples,)`, before normalisation."""
        signal = torch.as_tensor(np.ascontiguousarray(samples, dtype=np.float32)) * SAMPLE_SCALE
        frames = signal.unfold(0, self.win_length, self.hop_length)  # (frames, win_length)
        frames = frames - frames.mean(dim=1, keepdim=True)
        before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
        frames = (frames - PREEMPHASIS * before) * self.window
        power = torch.view_as_real(torch.fft.rfft(frames, n=self.n_fft)).square_().sum(-1)
        return (power @ self.mel_filters).clamp_(min=ENERGY_FLOOR).log_()

    def normalize(self, features: torch.Tensor) -> torch.Tensor:
        """Returns `features` `(frames, mel)` less the corpus's mean, over its deviation."""
        if self.mean is None:
            return features
        return (features - torch.tensor(self.mean)) / torch.tensor(self.std)

    def measure(self, clips: Iterable[np.ndarray]) -> tuple[list[float], list[float]]:
        """
        Returns the mean and the standard deviation of each bin over the frames of `clips`, for [`set_statistics`].

        Raises:
            ValueError: There is no frame.
        """
        total = squares = torch.zeros(self.feature_size, dtype=torch.float64)
        num_frames = 0
        for samples in clips:
            if len(samples) >= self.win_length:
                features = self.log_mel(samples).double()
                total, squares = total + features.sum(0), squares + features.square().sum(0)
                num_frames += len(features)
        if not num_frames:
            raise ValueError(f"`clips` must have a frame of {self.win_length} samples, got none.")
        mean = total / num_frames
        deviation = (squares / num_frames - mean.square()).clamp(min=DEVIATION_FLOOR**2).sqrt()
        return mean.tolist(), deviation.tolist()

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
            ValueError: `sampling_rate` is not the extractor's, or an utterance is shorter than a frame, not finite or
                has more than one channel.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"`sampling_rate` must be {self.sampling_rate}, got {sampling_rate}. Resample the audio first."
            )
        is_batch = isinstance(raw_speech, (list, tuple)) and len(raw_speech) > 0 and not np.isscalar(raw_speech[0])
        utterances = [np.asarray(row, dtype=np.float32) for row in (raw_speech if is_batch else [raw_speech])]
        for row, samples in enumerate(utterances):
            if samples.ndim != 1 or len(samples) < self.win_length or not np.isfinite(samples).all():
                raise ValueError(
                    f"`raw_speech` must be at least {self.win_length} finite samples of one channel, got shape "
                    f"{samples.shape} in row {row}{'' if np.isfinite(samples).all() else ' with NaN or infinity'}."
                )
        features = [self.normalize(self.log_mel(samples)).numpy() for samples in utterances]
        return self.pad(
            BatchFeature({"input_features": features}), padding=padding, return_tensors=return_tensors, **kwargs
        )

    def to_dict(self) -> dict:
        """Leaves out the filters and the window, which follow from the other settings."""
        return {key: value for key, value in super().to_dict().items() if key not in ("mel_filters", "window")}
