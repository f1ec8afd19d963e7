"""Latency of simultaneous translation: how far what is given out lags behind what is heard, in milliseconds.

Each metric is a function of one [`TranslationLog`]; [`score_latency`] is their mean over a corpus. Figures of text are
those of SimulEval 1.1.4 and OmniSTEval 0.1.10. Figures of speech follow SimulEval 1.1.0's rules: its later log forgets
that the output is speech, so that its ATD, discontinuities and computation-aware figures of speech are of no use.

With `computation_aware` a word's delay also has the time that computing took. Text is counted in words, speech in
chunks.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import numpy as np

SOURCE_TOKEN_MS = 300.0  # ATD cuts speech into tokens of the duration of a word
TARGET_TOKEN_MS = 300.0
MAX_DEGENERACY = 20.0  # points between the words that are simultaneous and those that their delay would let expect


@dataclass(frozen=True)
class TranslationLog:
    """
    What was given out of a translation, and when.

    Args:
        delays: Milliseconds of source that were read when each word, or each chunk of speech, was given out.
        source_ms: Duration of the source.
        reference_length: Words of the reference.
        elapsed: The same moments by the clock: `delays` and the time that computing took. None: not measured.
        durations: Milliseconds of speech in each chunk; None for text.
        prediction, reference: Texts, for logs that others read.

    Raises:
        ValueError: Times go back, are not as many, or are no durations; or there is no reference or no source.
    """

    delays: tuple[float, ...]
    source_ms: float
    reference_length: int
    elapsed: tuple[float, ...] | None = None
    durations: tuple[float, ...] | None = None
    prediction: str = ""
    reference: str = ""

    def __post_init__(self):
        for name in ("delays", "elapsed", "durations"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        for name in ("elapsed", "durations"):
            times = getattr(self, name)
            if times is not None and len(times) != len(self.delays):
                raise ValueError(f"`{name}` must have one entry a delay, {len(self.delays)}, got {len(times)}.")
        for name in ("delays", "elapsed"):
            times = getattr(self, name) or ()
            if any(later < earlier for earlier, later in pairwise(times)) or not all(time >= 0 for time in times):
                raise ValueError(f"`{name}` must be milliseconds that do not go back, got {list(times)}.")
        if self.elapsed is not None and any(map(float.__gt__, self.delays, self.elapsed)):
            raise ValueError("`elapsed` must be at least `delays`: nothing is given out before it is heard.")
        if self.durations is not None and not all(duration > 0 for duration in self.durations):
            raise ValueError(f"`durations` must be positive milliseconds, got {list(self.durations)}.")
        if not self.source_ms > 0 or self.reference_length < 1:
            raise ValueError(
                f"`source_ms` and `reference_length` must be positive, got {self.source_ms} and "
                f"{self.reference_length}. Leave out what has no speech or no reference."
            )

    @property
    def is_speech(self) -> bool:
        """Whether speech was given out."""
        return self.durations is not None

    def list_moments(self, *, computation_aware: bool = False) -> tuple[float, ...]:
        """
        Returns when each word or chunk was given out.

        Raises:
            ValueError: The computing was not measured.
        """
        if not computation_aware:
            return self.delays
        if self.elapsed is None:
            raise ValueError("`elapsed` must be there for computation-aware latency, got none. Measure the computing.")
        return self.elapsed

    def list_intervals(self, *, computation_aware: bool = False) -> list[tuple[float, float]]:
        """Returns start and end of each chunk of speech as it is heard, one after the other."""
        intervals: list[tuple[float, float]] = []
        moments = self.list_moments(computation_aware=computation_aware)
        for moment, duration in zip(moments, self.durations, strict=True):
            start = max(moment, intervals[-1][1]) if intervals else moment
            intervals.append((start, start + duration))
        return intervals


def average_lagging(log: TranslationLog, *, computation_aware: bool = False) -> float | None:
    """
    AL: mean lag behind an ideal translation of the reference's length, until the source has ended.

        AL = 1/tau sum_{i <= tau} d_i - (i - 1) X/Y,    tau the first i with d_i >= X

    Source: arXiv 1810.08398, for speech arXiv 2007.16193. None if nothing was given out.

    Example:
        >>> average_lagging(TranslationLog([1000, 1000, 2000, 3000], 3000, 4))
        625.0
    """
    return _lag(log, log.reference_length, computation_aware)


def length_adaptive_average_lagging(log: TranslationLog, *, computation_aware: bool = False) -> float | None:
    """
    LAAL: as AL with the longer of reference and translation, so that saying too much is no advantage.

    Source: arXiv 2206.05807.
    """
    return _lag(log, max(log.reference_length, len(log.delays)), computation_aware)


def _lag(log: TranslationLog, target_length: int, computation_aware: bool) -> float | None:
    moments = log.list_moments(computation_aware=computation_aware)
    if not moments:
        return None
    if moments[0] > log.source_ms:
        return moments[0]
    tau = next((number for number, moment in enumerate(moments, start=1) if moment >= log.source_ms), len(moments))
    return _mean_lag(moments[:tau], log.source_ms / target_length)


def _mean_lag(moments: Sequence[float], step_ms: float) -> float:
    return float(np.mean([moment - number * step_ms for number, moment in enumerate(moments)]))


def yaal(
    log: TranslationLog, *, computation_aware: bool = False, recording_end_ms: float | None = None
) -> float | None:
    """
    YAAL: as LAAL over the words that are simultaneous alone, those given out before the source has ended.

    Args:
        log: What was given out.
        computation_aware: With the time that computing took.
        recording_end_ms: Of a segment of a longer recording, the recording's end: words up to it count.

    Returns:
        None if no word is simultaneous.

    Source: arXiv 2509.17349, as OmniSTEval 0.1.10 computes it.
    """
    end_ms = log.source_ms if recording_end_ms is None else recording_end_ms
    moments = log.list_moments(computation_aware=computation_aware)
    tau = next((number for number, moment in enumerate(moments) if moment >= end_ms), len(moments))
    if not tau:
        return None
    return _mean_lag(moments[:tau], log.source_ms / max(log.reference_length, len(moments)))


def average_proportion(log: TranslationLog, *, computation_aware: bool = False) -> float | None:
    """
    AP: share of the source that was read, mean over the reference's words: sum of d_i over X Y.

    Source: arXiv 1606.02012. None if nothing was given out.
    """
    moments = log.list_moments(computation_aware=computation_aware)
    return sum(moments) / (log.source_ms * log.reference_length) if moments else None


def differentiable_average_lagging(log: TranslationLog, *, computation_aware: bool = False) -> float | None:
    """
    DAL: as AL, where each word given out takes its time, so that catching up at the end does not hide a lag.

        g_i = max(d_i, g_{i-1} + X/|translation|),    DAL = mean of g_i - (i - 1) X/|translation|

    Source: arXiv 1906.05218. None if nothing was given out.
    """
    moments = log.list_moments(computation_aware=computation_aware)
    if not moments:
        return None
    step_ms = log.source_ms / len(moments)
    delayed: list[float] = []
    for moment in moments:
        delayed.append(max(moment, delayed[-1] + step_ms) if delayed else moment)
    return _mean_lag(delayed, step_ms)


def average_token_delay(log: TranslationLog, *, computation_aware: bool = False) -> float | None:
    """
    ATD: from the end of a source token to the end of the target token that answers it, both 300 ms of speech.

    Token t of the target answers token t of the source, less what the target is ahead of the source in the chunks
    before, and at most the last one that was read. Text takes no time; a chunk of speech is cut into tokens.

    Source: arXiv 2211.13173, as SimulEval 1.1.0 computes it. None if nothing was given out.
    """
    moments = log.list_moments(computation_aware=computation_aware)
    if not moments:
        return None
    waits = np.diff([moment - delay for moment, delay in zip(moments, log.delays, strict=True)], prepend=0.0)
    source_ends, target_ends = [0.0], [0.0]
    lags: list[float] = []
    read_ms = 0.0
    for delay, rows in groupby(range(len(moments)), key=log.delays.__getitem__):
        num_before = (len(source_ends) - 1, len(target_ends) - 1)
        tokens = _cut_tokens(delay - read_ms, SOURCE_TOKEN_MS)
        source_ends += list(accumulate(tokens, initial=source_ends[-1]))[1:]
        read_ms = delay
        for token_ms, wait_ms in _list_target_tokens(log, list(rows), waits):
            target_ends.append(max(delay, target_ends[-1]) + token_ms + wait_ms)
            number = len(target_ends) - 1 - max(0, num_before[1] - num_before[0])
            lags.append(target_ends[-1] - source_ends[min(number, len(source_ends) - 1)])
    return float(np.mean(lags))


def _list_target_tokens(log: TranslationLog, rows: Sequence[int], waits: np.ndarray) -> list[tuple[float, float]]:
    """Returns how long each token takes that one read gives out, and how long computing it took."""
    if not log.is_speech:
        return [(0.0, float(waits[row])) for row in rows]
    tokens = _cut_tokens(sum(log.durations[row] for row in rows), TARGET_TOKEN_MS)
    return [(token, float(waits[rows].sum()) / len(tokens)) for token in tokens]


def _cut_tokens(duration_ms: float, token_ms: float) -> list[float]:
    """Returns tokens of `token_ms`, the last one shorter."""
    num_tokens, rest = divmod(duration_ms, token_ms)
    return [token_ms] * int(num_tokens) + ([rest] if rest else [])


def start_offset(log: TranslationLog, *, computation_aware: bool = False) -> float | None:
    """StartOffset: when the first word or chunk is given out; None if nothing is."""
    moments = log.list_moments(computation_aware=computation_aware)
    return moments[0] if moments else None


def end_offset(log: TranslationLog, *, computation_aware: bool = False) -> float | None:
    """EndOffset: from the source's end to the translation's, of speech when it has been heard; None if nothing is."""
    moments = log.list_moments(computation_aware=computation_aware)
    if not moments:
        return None
    end = log.list_intervals(computation_aware=computation_aware)[-1][1] if log.is_speech else moments[-1]
    return end - log.source_ms


def list_silences(log: TranslationLog, *, computation_aware: bool = False) -> list[float]:
    """Returns the silences in milliseconds between chunks of speech; none in text."""
    if not log.is_speech:
        return []
    intervals = log.list_intervals(computation_aware=computation_aware)
    return [after[0] - before[1] for before, after in pairwise(intervals) if after[0] > before[1]]


def compute_share(log: TranslationLog) -> float | None:
    """Returns the time that computing took over the source's duration; None if it was not measured."""
    if log.elapsed is None or not log.delays:
        return None
    return (log.elapsed[-1] - log.delays[-1]) / log.source_ms


METRICS: dict[str, Callable[..., float | None]] = {
    "AL": average_lagging,
    "LAAL": length_adaptive_average_lagging,
    "YAAL": yaal,
    "AP": average_proportion,
    "DAL": differentiable_average_lagging,
    "ATD": average_token_delay,
    "StartOffset": start_offset,
    "EndOffset": end_offset,
}


def score_latency(logs: Iterable[TranslationLog]) -> dict[str, float]:
    """
    Returns the mean of every metric over the logs that have it.

    Args:
        logs: Of a corpus.

    Returns:
        `METRICS`, likewise `<metric>_CA` where computing was measured; `NumChunks`; for speech `DiscontinuitySum`,
        `DiscontinuityAve` and `DiscontinuityNum` (milliseconds and numbers of silences); `ComputeShare`, all computing
        over all source; what [`find_degeneracy`] returns; and `num_empty`, the logs in which nothing was given out.
        A metric that no log has is NaN.

    Raises:
        ValueError: There is no log, or computing was measured in some alone.
    """
    logs = list(logs)
    if not logs:
        raise ValueError("`logs` must have at least one translation, got none.")
    measured = sum(log.elapsed is not None for log in logs)
    if measured not in (0, len(logs)):
        raise ValueError(f"`elapsed` must be measured in all {len(logs)} logs or in none, got {measured} with it.")
    scores = {}
    for is_aware in (False, True) if measured else (False,):
        for name, metric in METRICS.items():
            values = [metric(log, computation_aware=is_aware) for log in logs]
            scores[f"{name}_CA" if is_aware else name] = _mean_known(values)
    scores["NumChunks"] = _mean_known([len(log.delays) or None for log in logs])
    if spoken := [list_silences(log) for log in logs if log.is_speech and log.delays]:
        scores["DiscontinuitySum"] = float(np.mean([sum(silences) for silences in spoken]))
        scores["DiscontinuityAve"] = float(np.mean([np.mean(silences) if silences else 0.0 for silences in spoken]))
        scores["DiscontinuityNum"] = float(np.mean([len(silences) for silences in spoken]))
    if measured:
        computing = sum((compute_share(log) or 0.0) * log.source_ms for log in logs)
        scores["ComputeShare"] = computing / sum(log.source_ms for log in logs)
    return scores | find_degeneracy(logs) | {"num_empty": sum(not log.delays for log in logs)}


def find_degeneracy(logs: Iterable[TranslationLog]) -> dict[str, float]:
    """
    Returns whether a policy is simultaneous in name only: a few early words, and the rest after the end.

    Args:
        logs: Of a corpus.

    Returns:
        `SWF`, percent of all words that are given out before their source has ended; `EFSW`, percent of the source
        that lies behind the mean delay, where words would be simultaneous; `is_degenerate`, 1 if they differ by more
        than 20 points.

    Source: arXiv 2509.17349, as OmniSTEval 0.1.10 computes it.
    """
    logs = list(logs)
    num_words = sum(len(log.delays) for log in logs)
    early = sum(delay < log.source_ms for log in logs for delay in log.delays)
    lags = [(yaal(log), log.source_ms) for log in logs]
    known = [(lag, source_ms) for lag, source_ms in lags if lag is not None]
    simultaneous = 100 * early / num_words if num_words else math.nan
    expected = math.nan
    if known:
        left_ms = sum(max(0.0, source_ms - lag) for lag, source_ms in known)
        expected = 100 * left_ms / sum(source_ms for _, source_ms in known)
    is_degenerate = abs(expected - simultaneous) > MAX_DEGENERACY
    return {"SWF": simultaneous, "EFSW": expected, "is_degenerate": float(is_degenerate)}


def _mean_known(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def format_simuleval_logs(logs: Iterable[TranslationLog]) -> str:
    """Returns `instances.log` of SimulEval, a JSON object a line; OmniSTEval reads it too."""
    return "".join(json.dumps(_describe_log(index, log), ensure_ascii=False) + "\n" for index, log in enumerate(logs))


def _describe_log(index: int, log: TranslationLog) -> dict[str, object]:
    described = {
        "index": index,
        "prediction": log.prediction,
        "delays": list(log.delays),
        "elapsed": list(log.elapsed or log.delays),
        "prediction_length": len(log.delays),
        "reference": log.reference,
        "source": [f"{index}.wav", "samplerate: 16000"],
        "source_length": log.source_ms,
    }
    if log.is_speech:
        intervals = [[start, end - start] for start, end in log.list_intervals()]
        offset = log.delays[0] if log.delays else 0.0
        described |= {"durations": list(log.durations), "prediction_offset": offset, "intervals": intervals}
    return described
