"""Timings: functions in turn, disturbed samples left out, limits measured."""

import itertools
import os

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import MIN_BF16_SPEEDUP, Timing, alternate, copy_bytes_per_s, gemm_flops, judge_bf16


class Machine:
    """A clock that functions move, and a count of the core seconds that others have used."""

    def __init__(self):
        self.now_s, self.others_s, self.calls = 0.0, 0.0, []

    def function(self, name, seconds, shares=(0.0,)):
        """Returns a function that takes `seconds` a call, while others use `shares` of a core, call by call."""
        shares = itertools.cycle(shares)

        def run():
            self.calls.append(name)
            self.now_s += seconds
            self.others_s += next(shares) * seconds

        return run

    def alternate(self, functions, **options):
        """Returns the timings of functions on this machine, one call a sample unless said otherwise."""
        options = {"min_sample_s": 0.0, "clock": lambda: self.now_s, "read_other_s": lambda: self.others_s, **options}
        return alternate(functions, **options)


@pytest.fixture
def machine() -> Machine:
    """A machine at time 0."""
    return Machine()


def test_functions_take_turns_after_the_warmup(machine):
    functions = {"peer": machine.function("peer", 3.0), "ours": machine.function("ours", 1.0)}
    timings = machine.alternate(functions, repeats=3, warmup=2)

    assert machine.calls == ["peer"] * 2 + ["ours"] * 2 + ["peer", "ours"] * 3
    assert timings == {"peer": Timing(3.0, 3.0, 3), "ours": Timing(1.0, 1.0, 3)}


def test_the_median_and_the_smallest_are_of_the_kept_samples(machine):
    seconds = iter([9.0, 2.0, 5.0, 3.0])

    def run():
        machine.now_s += next(seconds)

    assert machine.alternate({"ours": run}, repeats=3)["ours"] == Timing(median_s=3.0, min_s=2.0, num_kept=3)


def test_a_short_function_runs_often_enough_for_a_sample(machine):
    timings = machine.alternate({"ours": machine.function("ours", 0.25)}, repeats=1, min_sample_s=2.0)

    assert len(machine.calls) == 1 + 8
    assert timings["ours"].median_s == 0.25


def test_a_disturbed_sample_is_discarded_and_repeated(machine):
    shares = [0.0, 0.5, 0.03, 0.0, 0.02]  # the warm-up, then a disturbed sample and three good ones
    timing = machine.alternate({"ours": machine.function("ours", 1.0, shares)}, repeats=3)["ours"]

    assert (timing.num_kept, timing.num_discarded, timing.is_disturbed) == (3, 1, False)
    assert timing.note == "3 samples, 1 discarded"


def test_a_function_with_enough_samples_waits_for_the_others(machine):
    functions = {
        "quiet": machine.function("quiet", 1.0),
        "unlucky": machine.function("unlucky", 1.0, [0.0, 0.9, 0.0, 0.0, 0.0]),
    }
    machine.alternate(functions, repeats=3)
    assert machine.calls[2:] == ["quiet", "unlucky"] * 3 + ["unlucky"]


def test_all_samples_are_kept_and_marked_when_others_never_stop(machine):
    timing = machine.alternate({"ours": machine.function("ours", 1.0, [0.3])}, repeats=4)["ours"]

    assert (timing.num_kept, timing.num_discarded, timing.is_disturbed) == (8, 0, True)
    assert timing.note == "disturbed: 8 samples, other processes busy"


def test_two_undisturbed_samples_of_many_say_nothing(machine):
    shares = [0.0, 0.0, 0.0, *[0.5] * 20]  # the warm-up, two good samples, then none
    timing = machine.alternate({"ours": machine.function("ours", 1.0, shares)}, repeats=5)["ours"]

    assert (timing.num_kept, timing.is_disturbed) == (10, True)


def test_nothing_is_discarded_where_nobody_watches(machine):
    timing = machine.alternate({"ours": machine.function("ours", 1.0, [0.9])}, repeats=2, read_other_s=lambda: None)[
        "ours"
    ]

    assert timing == Timing(1.0, 1.0, 2, is_watched=False)
    assert timing.note == "2 samples, other processes not watched"


@pytest.mark.parametrize(
    ("functions", "options", "message"),
    [
        ({}, {"repeats": 1}, "`functions` must have at least one function, got none"),
        ({"ours": list}, {"repeats": 0}, "`repeats` must be at least 1, got 0"),
        ({"ours": list}, {"repeats": 1, "warmup": 0}, "`warmup` must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_timed_is_refused(functions, options, message):
    with pytest.raises(ValueError, match=message):
        alternate(functions, **options)


def test_other_processes_are_busy_time_without_our_own(tmp_path, monkeypatch):
    ticks = os.sysconf("SC_CLK_TCK")
    # user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice
    counts = [100, 10, 20, 7000, 300, 1, 2, 3, 50, 5]
    (tmp_path / "stat").write_text("cpu  " + " ".join(str(count * ticks) for count in counts) + "\ncpu0 1 2 3\n")
    monkeypatch.setattr(timing, "PROC_STAT", tmp_path / "stat")
    monkeypatch.setattr(timing.time, "process_time", lambda: 30.0)
    monkeypatch.setattr(timing.os, "times", lambda: os.times_result((0.0, 0.0, 4.0, 2.0, 0.0)))

    assert timing.read_other_seconds() == 136 - 30 - 6


def test_a_machine_that_counts_nothing_gives_none(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "PROC_STAT", tmp_path / "absent")
    assert timing.read_other_seconds() is None


def test_rates_are_operations_and_bytes_a_second(monkeypatch):
    monkeypatch.setattr(timing, "best_seconds", lambda function, _seconds: function() is None or 0.5)
    assert gemm_flops(torch.float32, size=8) == 2 * 8**3 / 0.5
    assert copy_bytes_per_s(num_bytes=1000) == 1000 / 0.5


def test_the_best_of_at_least_three_calls_counts(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 29.0])
    calls = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))

    assert timing.best_seconds(lambda: calls.append(1), 0.0) == 2.0
    assert len(calls) == 4


def test_bf16_goals_hold_from_four_times_fp32():
    assert judge_bf16(MIN_BF16_SPEEDUP) == (True, "bf16 GEMM is 4.0x fp32 here")
    assert judge_bf16(3.9) == (False, "not applicable: bf16 GEMM is 3.9x fp32 here")
