"""Latency by hand: text, speech with pauses, computing, logs of other projects, policies simultaneous in name only."""

import json
import math

import pytest

from data.latency import (
    TranslationLog,
    average_lagging,
    average_proportion,
    average_token_delay,
    compute_share,
    differentiable_average_lagging,
    end_offset,
    find_degeneracy,
    format_simuleval_logs,
    length_adaptive_average_lagging,
    list_silences,
    score_latency,
    start_offset,
    yaal,
)

FIRST = TranslationLog([1000, 1000, 2000, 3000], 3000, 4)
SECOND = TranslationLog([320, 640, 960, 1280, 2000], 2000, 4)
SPEECH = TranslationLog([1000, 2000, 3000], 3000, 4, durations=[500, 700, 400])


@pytest.mark.parametrize(
    ("metric", "first", "second"),
    [
        (average_lagging, 625, 40),
        (length_adaptive_average_lagging, 625, 240),
        (average_proportion, 7 / 12, 0.65),
        (differentiable_average_lagging, 1000, 336),
        (yaal, 583 + 1 / 3, 200),
        (start_offset, 1000, 320),
        (end_offset, 0, 0),
    ],
)
def test_metrics_of_text_are_those_that_a_hand_computes(metric, first, second):
    assert metric(FIRST) == pytest.approx(first)
    assert metric(SECOND) == pytest.approx(second)


def test_average_token_delay_of_text_pairs_each_word_with_300_ms_of_source():
    # Read 1000 ms: tokens end at 300, 600, 900, 1000; then 1300 ... Words 1 and 2 answer tokens 1 and 2, word 3 and 4
    # tokens 3 and 4: (1000 - 300 + 1000 - 600 + 2000 - 900 + 3000 - 1000) / 4.
    assert average_token_delay(FIRST) == pytest.approx(1050)


def test_average_token_delay_does_not_answer_what_was_not_read():
    # One read of 300 ms is one token: all three words answer it.
    assert average_token_delay(TranslationLog([300, 300, 300], 300, 3)) == pytest.approx(0)


def test_average_token_delay_of_speech_counts_until_it_has_been_heard():
    # 600 ms read, then 450 ms of speech: tokens of 300 and 150 ms that end at 900 and 1050, for those at 300 and 600.
    assert average_token_delay(TranslationLog([600], 600, 2, durations=[450])) == pytest.approx((600 + 450) / 2)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (average_lagging, 1250), (length_adaptive_average_lagging, 1250), (average_proportion, 0.5),
        (differentiable_average_lagging, 1000), (start_offset, 1000), (end_offset, 400),
    ],
)  # fmt: skip
def test_metrics_of_speech_are_those_that_a_hand_computes(metric, expected):
    assert metric(SPEECH) == pytest.approx(expected)


def test_speech_is_heard_one_chunk_after_the_other():
    late = TranslationLog([1000, 1100, 3000], 3000, 4, durations=[500, 700, 400])
    assert late.list_intervals() == [(1000, 1500), (1500, 2200), (3000, 3400)]
    assert list_silences(late) == [800]
    assert list_silences(SPEECH) == [500, 300]
    assert list_silences(FIRST) == []


def test_computing_is_added_where_it_is_asked_for():
    aware = TranslationLog([1000, 1000, 2000, 3000], 3000, 4, elapsed=[1100, 1200, 2300, 3300])
    assert average_lagging(aware) == 625
    # (1100 + 1200 - 750 + 2300 - 1500 + 3300 - 2250) / 4
    assert average_lagging(aware, computation_aware=True) == pytest.approx(850)
    assert compute_share(aware) == pytest.approx(0.1)
    # Each word ends with the computing that it took: 1100, 1200, 2100, 3000 less 300, 600, 900, 1000.
    assert average_token_delay(aware, computation_aware=True) == pytest.approx((800 + 600 + 1200 + 2000) / 4)


def test_speech_that_takes_long_to_compute_ends_later():
    slow = TranslationLog([1000, 2000, 3000], 3000, 4, elapsed=[1000, 2000, 3250], durations=[500, 700, 400])
    assert end_offset(slow, computation_aware=True) == 650
    assert end_offset(slow) == 400


def test_computation_aware_latency_needs_its_time():
    with pytest.raises(ValueError, match="`elapsed` must be there for computation-aware latency, got none"):
        average_lagging(FIRST, computation_aware=True)


def test_a_translation_that_begins_after_the_end_lags_by_its_first_word_and_has_no_yaal():
    late = TranslationLog([3500, 3600], 3000, 2)
    assert average_lagging(late) == length_adaptive_average_lagging(late) == 3500
    assert yaal(late) is None
    assert yaal(TranslationLog([3000, 3000], 3000, 2)) is None
    assert average_lagging(TranslationLog([3000, 3000], 3000, 2)) == 3000


def test_yaal_of_a_part_of_a_recording_goes_on_to_the_recordings_end():
    assert yaal(FIRST, recording_end_ms=9000) == pytest.approx(625)


@pytest.mark.parametrize("metric", [average_lagging, average_proportion, differentiable_average_lagging, yaal,
                                    average_token_delay, start_offset, end_offset, compute_share])  # fmt: skip
def test_nothing_that_was_said_has_no_latency(metric):
    assert metric(TranslationLog([], 3000, 4, elapsed=[])) is None


def test_a_policy_that_says_a_few_words_early_and_the_rest_after_the_end_is_degenerate():
    # One of ten words early: SWF 10; its delay of 300 ms would let 90 % of the words be simultaneous.
    degenerate = find_degeneracy([TranslationLog([300, *[3000] * 9], 3000, 10)])
    assert degenerate == {"SWF": 10, "EFSW": 90, "is_degenerate": 1}
    # Half of the words early, 1500 - 0, ...: lag 1500 ms, so half of the source lies behind it.
    steady = find_degeneracy([TranslationLog([1500, 1800, 2100, 2400, 2700, *[3000] * 5], 3000, 10)])
    assert steady == {"SWF": 50, "EFSW": 50, "is_degenerate": 0}


def test_degeneracy_of_what_is_never_simultaneous_is_not_known():
    found = find_degeneracy([TranslationLog([3000], 3000, 1)])
    assert found["SWF"] == 0
    assert math.isnan(found["EFSW"])
    assert found["is_degenerate"] == 0


def test_scores_of_a_corpus_are_means_over_the_logs_that_have_them():
    scores = score_latency([FIRST, SECOND, TranslationLog([], 1000, 2), TranslationLog([1000], 1000, 1)])
    assert scores["AL"] == pytest.approx((625 + 40 + 1000) / 3)
    assert scores["YAAL"] == pytest.approx((583.3333 + 200) / 2)
    assert scores["NumChunks"] == pytest.approx((4 + 5 + 1) / 3)
    assert scores["num_empty"] == 1
    assert "AL_CA" not in scores
    assert "DiscontinuitySum" not in scores


def test_scores_of_speech_count_its_silences():
    scores = score_latency([SPEECH, TranslationLog([1000], 2000, 4, durations=[500])])
    assert scores["DiscontinuitySum"] == 400
    assert scores["DiscontinuityAve"] == 200
    assert scores["DiscontinuityNum"] == 1
    assert scores["EndOffset"] == pytest.approx((400 - 500) / 2)


def test_compute_share_of_a_corpus_is_all_computing_over_all_audio():
    logs = [TranslationLog([1000], 1000, 1, elapsed=[1500]), TranslationLog([3000], 3000, 1, elapsed=[3100])]
    scores = score_latency(logs)
    assert scores["ComputeShare"] == pytest.approx(0.15)
    assert scores["AL_CA"] == pytest.approx((1500 + 3100) / 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delays": [2, 1]}, "`delays` must be milliseconds that do not go back, got"),
        ({"delays": [float("nan")]}, "`delays` must be milliseconds that do not go back, got"),
        ({"elapsed": [5]}, "`elapsed` must have one entry a delay, 2, got 1"),
        ({"elapsed": [0.5, 2]}, "`elapsed` must be at least `delays`"),
        ({"durations": [1, 0]}, "`durations` must be positive milliseconds, got"),
        ({"source_ms": 0}, "`source_ms` and `reference_length` must be positive, got 0 and 2"),
        ({"reference_length": 0}, "`source_ms` and `reference_length` must be positive, got 9 and 0"),
    ],
)
def test_a_log_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TranslationLog(**{"delays": [1, 2], "source_ms": 9, "reference_length": 2, **fields})


def test_scores_of_nothing_and_of_half_measured_logs_are_refused():
    with pytest.raises(ValueError, match="`logs` must have at least one translation, got none"):
        score_latency([])
    measured = TranslationLog([1000], 1000, 1, elapsed=[1000])
    with pytest.raises(ValueError, match="`elapsed` must be measured in all 2 logs or in none, got 1 with it"):
        score_latency([FIRST, measured])


def test_logs_are_written_as_simuleval_does():
    spoken = TranslationLog([1000, 1100], 3000, 2, [1050, 1200], [500, 700], "out.wav", "press one")
    first, second = map(json.loads, format_simuleval_logs([FIRST, spoken]).splitlines())
    assert first["delays"] == first["elapsed"] == [1000, 1000, 2000, 3000]
    assert (first["index"], first["prediction_length"], first["source_length"]) == (0, 4, 3000)
    assert "durations" not in first
    assert second["intervals"] == [[1000, 500], [1500, 700]]
    assert (second["prediction_offset"], second["durations"], second["reference"]) == (1000, [500, 700], "press one")
