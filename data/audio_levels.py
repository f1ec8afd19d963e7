"""How loud each channel of a recording is, and whether its channels say the same: seen before it is used."""

import numpy as np

MIN_SECONDS = 0.025  # one analysis window; a shorter clip has no frame
MAX_PEAK = 4.0  # up to it a recording is scaled to 1; integers saved as floats reach 32768
QUIET_PEAK = 1e-4  # -80 dB of full scale: below, there must be pauses from which something rises
FAINTEST_PEAK = 2.0**-23  # one step of 24 bits, which no converter records
RISE = 2.0  # of the loudest 25 ms over the quiet ones; those of hiss stay within 1.5
NUM_NOISE_VALUES = 7  # a channel without sound has no more different values: three steps to either side
NOISE_PEAK = 0.05  # three steps of 8 bits reach 0.0234
INVERTED = -0.5  # correlation below which a channel is another one upside down
SAME_WAVE = 0.4  # correlation above which two channels hear the same, one of them later perhaps
SAME_LOUDNESS = 0.8  # the same of loudness over time, where echoes of a room hide it
MAX_DELAY_SECONDS = 0.01  # 3 m
MIN_SHARE = 0.03  # of the loudest channel's level: -30 dB; a fainter channel holds no speech of its own
MIN_SPREAD = 0.3  # of loudness over its level: speech has more than .5, steady noise .05


class LevelMeter:
    """
    Collects, block by block, what is needed to judge a recording: a few numbers for every 25 ms and channel.

    Args:
        num_channels: Channels of every block.
        sampling_rate: In Hz.
    """

    def __init__(self, num_channels: int, sampling_rate: int):
        self.num_channels, self.sampling_rate = num_channels, sampling_rate
        self.num_samples = self.num_bad = 0
        self._window = max(1, round(MIN_SECONDS * sampling_rate))
        self._low, self._high = np.full(num_channels, np.inf), np.full(num_channels, -np.inf)
        self._counts: list[np.ndarray] = []  # of each 25 ms, (windows, 1)
        self._sums: list[np.ndarray] = []  # (windows, channels)
        self._squares: list[np.ndarray] = []
        self._reference: int | None = None  # the channel with which the others are compared, the loudest at first
        # Of each channel with it, 10 ms earlier to 10 ms later: the way of a sound from one microphone to another.
        self._lags = np.arange(-round(MAX_DELAY_SECONDS * sampling_rate), round(MAX_DELAY_SECONDS * sampling_rate) + 1)
        self._products = np.zeros((len(self._lags), num_channels))
        self._values: np.ndarray | None = np.empty(0, dtype=np.float32)  # None once there are many

    def add(self, block: np.ndarray) -> None:
        """Takes the next samples `(samples, channels)`."""
        self.num_samples += len(block)
        num_bad = block.size - int(np.isfinite(block).sum())
        if num_bad or not len(block):
            self.num_bad += num_bad
            return
        self._low = np.minimum(self._low, block.min(axis=0))
        self._high = np.maximum(self._high, block.max(axis=0))
        if self._values is not None:
            # In most recordings the first samples are already too many different ones.
            few = np.unique(block[: self._window])
            values = np.union1d(self._values, block) if len(few) <= NUM_NOISE_VALUES else few
            self._values = values if len(values) <= NUM_NOISE_VALUES else None
        block = block.astype(np.float64)
        starts = np.arange(0, len(block), self._window)
        self._counts.append(np.diff(starts, append=len(block))[:, None])
        self._sums.append(np.add.reduceat(block, starts))
        self._squares.append(np.add.reduceat(block**2, starts))
        if self.num_channels > 1:
            self._compare(block)

    def _compare(self, block: np.ndarray) -> None:
        if self._reference is None and self._squares[-1].any():
            self._reference = int(self._squares[-1].sum(axis=0).argmax())
        if self._reference is None:
            return
        size = len(block) + len(self._lags)  # with room for what would come around
        spectra = np.fft.rfft(block, size, axis=0)
        products = np.fft.irfft(spectra * spectra[:, self._reference, None].conj(), size, axis=0)
        self._products += products[self._lags]

    @property
    def peak(self) -> float:
        """Largest magnitude of any channel."""
        return float(max(np.abs(self._low).max(), np.abs(self._high).max())) if self._sums else 0.0

    @property
    def is_silent(self) -> bool:
        """
        Whether no channel holds sound: judged without the mean, and relative to the floor of the file itself.

        There is no sound in a constant, in what toggles between a few neighbouring values, as the last bits of a
        converter do, and in a hiss below -80 dB from which nothing rises.
        """
        if not self._sums:
            return True
        mean = self._mean
        peak = np.maximum(self._high - mean, mean - self._low).max()
        if peak < FAINTEST_PEAK or (self._values is not None and peak < NOISE_PEAK):
            return True
        return bool(peak < QUIET_PEAK and not self._rises())

    def _rises(self) -> bool:
        loudness = self._loudness.max(axis=1)
        loudness = loudness[loudness > 0]  # zeros stand before a recorder's first sample and in gated speech
        return len(loudness) > 0 and loudness.max() > RISE * np.percentile(loudness, 10)

    @property
    def signs(self) -> np.ndarray:
        """1 for each channel, -1 for one that is the loudest upside down and would cancel it."""
        correlations = self._correlations()
        return np.where(correlations[len(self._lags) // 2] < INVERTED, -1.0, 1.0)

    def find_different(self) -> np.ndarray:
        """
        Returns the channels, counted from 1, that hold sound of their own.

        It is neither the loudest channel's, as heard a little earlier or later, nor loud when that is loud.
        """
        if self._reference is None:
            return np.empty(0, dtype=int)
        loudness = self._loudness
        level, spread = np.sqrt((loudness**2).mean(axis=0)), loudness.std(axis=0)
        comes_and_goes = (level > MIN_SHARE * level.max()) & (spread > MIN_SPREAD * level)
        changes = loudness - loudness.mean(axis=0)
        together = np.einsum("wc,w->c", changes, changes[:, self._reference]) / len(changes)
        is_loud_together = _divide(together, spread * spread[self._reference]) > SAME_LOUDNESS
        is_same = is_loud_together | (np.abs(self._correlations()).max(axis=0) > SAME_WAVE)
        return np.flatnonzero(comes_and_goes & comes_and_goes[self._reference] & ~is_same) + 1

    def _correlations(self) -> np.ndarray:
        """Returns the correlation of each channel with the reference at each delay, `(lags, channels)`."""
        if self._reference is None:
            return np.ones((len(self._lags), self.num_channels))
        mean = self._mean
        variance = sum(squares.sum(axis=0) for squares in self._squares) / self.num_samples - mean**2
        covariance = self._products / self.num_samples - mean * mean[self._reference]
        return _divide(covariance, np.sqrt(variance * variance[self._reference])[None].repeat(len(covariance), axis=0))

    @property
    def _mean(self) -> np.ndarray:
        return sum(sums.sum(axis=0) for sums in self._sums) / self.num_samples

    @property
    def _loudness(self) -> np.ndarray:
        """Root mean square of each 25 ms without its mean, `(windows, channels)`."""
        counts, sums, squares = map(np.concatenate, (self._counts, self._sums, self._squares))
        return np.sqrt(np.maximum(squares / counts - (sums / counts) ** 2, 0.0))


def _divide(covariance: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns correlations; 1 for a channel that is constant."""
    return np.divide(covariance, scale, out=np.ones_like(scale), where=scale > 0)
