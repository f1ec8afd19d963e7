"""A few unusable rows are left out and named; many of them refuse the corpus."""

import pytest

from data.left_out import StreamedRows, report_left_out

TEXTS = {"what": "rows are bad", "remedy": "Correct them."}


def test_five_in_a_hundred_are_named_and_left_out(caplog):
    report_left_out(["a.wav", "b.wav", "c.wav", "d.wav", "e.wav"], 100, **TEXTS)
    assert "5 of 100 rows are bad: a.wav; b.wav; c.wav; d.wav; e.wav. They are left out." in caplog.text


def test_nothing_is_said_of_none(caplog):
    report_left_out([], 0, **TEXTS)
    assert caplog.text == ""


def test_six_in_a_hundred_are_refused_and_five_of_them_named():
    names = [f"{number}.wav" for number in range(6)]
    with pytest.raises(ValueError, match=r"^6 of 100 rows are bad: 0.wav; .*; 4.wav and 1 more\. Correct them\.$"):
        report_left_out(names, 100, **TEXTS)


def test_a_stream_leaves_a_few_rows_out_and_goes_on(caplog):
    rows = StreamedRows(**TEXTS)
    for number in range(5):
        rows.note(f"{number}.wav is silent")
    for _ in range(114):
        rows.note(None)
    rows.note("5.wav is silent")  # 6 of 120 are 5 %
    assert "4.wav is silent. It is left out." in caplog.text
    with pytest.raises(ValueError, match="7 of 121 rows are bad"):
        rows.note("6.wav is silent")


def test_a_stream_of_which_many_are_unusable_is_refused():
    rows = StreamedRows(**TEXTS)
    for number in range(5):
        rows.note(f"{number}.wav")
    with pytest.raises(ValueError, match="6 of 6 rows are bad: 0.wav; .* and 1 more. Correct them."):
        rows.note("5.wav")
