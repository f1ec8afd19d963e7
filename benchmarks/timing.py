"""Timings on a machine that others use too: functions in turn, without the samples in which others computed."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

PROC_STAT = Path("/proc/stat")
# Fields of /proc/stat's first line in which a core computed, or was taken away ("steal"): all but idle, iowait and
# guest, which user includes.
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
MIN_KEPT = 3  # fewer undisturbed samples than this say nothing
MAX_ROUNDS_FACTOR = 2  # rounds at most, as a multiple of `repeats`
# /proc/stat counts in steps of 10 ms, which must be far below 4 % of a sample.
MIN_SAMPLE_SECONDS = 1.0
# With AMX, a bf16 product of matrices runs at about 7 times the rate of fp32, without it at 1 to 2 times.
MIN_BF16_SPEEDUP = 4.0


@dataclass(frozen=True)
class Timing:
    """
    Seconds of one call of a function.

    Args:
        median_s: Median over the kept samples, in seconds.
        min_s: Smallest of the kept samples, in seconds.
        num_kept: Samples that count.
        num_discarded: Samples left out because other processes computed meanwhile.
        is_disturbed: Too few undisturbed samples remained, so that all of them count.
        is_watched: Whether the machine tells what other processes use.
    """

    median_s: float
    min_s: float
    num_kept: int
    num_discarded: int = 0
    is_disturbed: bool = False
    is_watched: bool = True

    @property
    def note(self) -> str:
        """What a table says beside this timing."""
        if not self.is_watched:
            return f"{self.num_kept} samples, other processes not watched"
        if self.is_disturbed:
            return f"disturbed: {self.num_kept} samples, other processes busy"
        return f"{self.num_kept} samples" + (f", {self.num_discarded} discarded" if self.num_discarded else "")


@dataclass(frozen=True)
class Sample:
    """Seconds a call, and the share of one core that other processes used meanwhile (None: unknown)."""

    seconds: float
    other_share: float | None


def alternate(
    functions: dict[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    max_other_share: float = 0.04,
    min_sample_s: float = MIN_SAMPLE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    read_other_s: Callable[[], float | None] | None = None,
) -> dict[str, Timing]:
    """
    Times functions in turn, so that a slow minute of the machine falls on all of them alike.

        round 1: peer ours | round 2: peer ours | ... until each has `repeats` undisturbed samples, or twice the rounds

    Args:
        functions: Name -> function without arguments; its result is thrown away.
        repeats: Undisturbed samples wanted of each function.
        warmup: Calls of each function before the first sample; the last of them says how many calls a sample takes.
        max_other_share: Share of one core that other processes may use during a sample.
        min_sample_s: A sample takes at least about this many seconds; short functions run several times in one.
        clock: Returns the time in seconds.
        read_other_s: Returns the core seconds that other processes have used so far, or None where nothing tells.

    Returns:
        A [`Timing`] a function, under its name, seconds a call.

    Raises:
        ValueError: `functions` is empty, or `repeats` or `warmup` is under 1.

    Example:

    ```python
    >>> from benchmarks.timing import alternate

    >>> functions = {"peer": lambda: sum(range(90_000)), "ours": lambda: 90_000 * 89_999 // 2}
    >>> timings = alternate(functions, repeats=1, min_sample_s=0.01)
    >>> timings["peer"].median_s > timings["ours"].median_s
    True

    ```
    """
    if not functions:
        raise ValueError("`functions` must have at least one function, got none. Name what to time.")
    for name, value in (("repeats", repeats), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}. Raise it.")
    read_other_s = read_other_s or read_other_seconds
    num_calls = {name: count_calls(function, warmup, min_sample_s, clock) for name, function in functions.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in functions}
    for _ in range(MAX_ROUNDS_FACTOR * repeats):
        for name, function in functions.items():
            if len(keep_undisturbed(samples[name], max_other_share)) < repeats:
                samples[name].append(take_sample(function, num_calls[name], clock, read_other_s))
    return {name: summarize(taken, max_other_share, min(repeats, MIN_KEPT)) for name, taken in samples.items()}


def count_calls(function: Callable[[], object], warmup: int, min_sample_s: float, clock: Callable[[], float]) -> int:
    """Warms `function` up; returns how many calls take about `min_sample_s` seconds, at least 1."""
    for _ in range(warmup):
        start = clock()
        function()
        seconds = clock() - start
    return max(1, round(min_sample_s / max(seconds, 1e-7)))


def take_sample(
    function: Callable[[], object],
    num_calls: int,
    clock: Callable[[], float],
    read_other_s: Callable[[], float | None],
) -> Sample:
    """Returns the seconds a call over `num_calls` calls, and what others used meanwhile."""
    others_before, start = read_other_s(), clock()
    for _ in range(num_calls):
        function()
    seconds, others_after = clock() - start, read_other_s()
    if others_before is None or others_after is None:
        return Sample(seconds / num_calls, None)
    return Sample(seconds / num_calls, max(0.0, others_after - others_before) / max(seconds, 1e-9))


def keep_undisturbed(samples: list[Sample], max_other_share: float) -> list[Sample]:
    """Returns the samples during which others used at most `max_other_share` of a core, or may have."""
    return [sample for sample in samples if sample.other_share is None or sample.other_share <= max_other_share]


def summarize(samples: list[Sample], max_other_share: float, min_kept: int) -> Timing:
    """Returns the timing over the undisturbed samples; over all of them if fewer than `min_kept` are undisturbed."""
    undisturbed = keep_undisturbed(samples, max_other_share)
    is_disturbed = len(undisturbed) < min_kept
    kept = [sample.seconds for sample in (samples if is_disturbed else undisturbed)]
    return Timing(
        median_s=median(kept),
        min_s=min(kept),
        num_kept=len(kept),
        num_discarded=len(samples) - len(kept),
        is_disturbed=is_disturbed,
        is_watched=all(sample.other_share is not None for sample in samples),
    )


def read_other_seconds() -> float | None:
    """Returns the core seconds that other processes have used since the machine started; None without /proc/stat."""
    if not PROC_STAT.is_file():
        return None
    with PROC_STAT.open() as file:
        ticks = [int(count) for count in file.readline().split()[1:]]
    busy_s = sum(ticks[field] for field in BUSY_FIELDS) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy_s - time.process_time() - own.children_user - own.children_system


def gemm_flops(dtype: torch.dtype, *, size: int = 2048, seconds: float = 1.0) -> float:
    """Returns the operations a second of a product of square matrices of `size` in `dtype`, the best of `seconds`."""
    left, right = torch.randn(2, size, size).to(dtype)
    output = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / best_seconds(lambda: torch.mm(left, right, out=output), seconds)


def copy_bytes_per_s(*, num_bytes: int = 256 * 2**20, seconds: float = 1.0) -> float:
    """Returns the bytes a second that memory copies (each read once, written once), the best of `seconds`."""
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source).copy_(source)
    return num_bytes / best_seconds(lambda: target.copy_(source), seconds)


def best_seconds(function: Callable[[], object], seconds: float) -> float:
    """Returns the fastest of the calls that fit into `seconds`, at least three: what the machine can."""
    function()
    took: list[float] = []
    while len(took) < 3 or sum(took) < seconds:
        start = time.perf_counter()
        function()
        took.append(time.perf_counter() - start)
    return min(took)


def judge_bf16(speedup: float) -> tuple[bool, str]:
    """
    Returns whether bf16 is fast enough for its goals, and the sentence that tables carry.

    Example:

    ```python
    >>> from benchmarks.timing import judge_bf16

    >>> judge_bf16(1.3)
    (False, 'not applicable: bf16 GEMM is 1.3x fp32 here')

    ```
    """
    if speedup < MIN_BF16_SPEEDUP:
        return False, f"not applicable: bf16 GEMM is {speedup:.1f}x fp32 here"
    return True, f"bf16 GEMM is {speedup:.1f}x fp32 here"
