"""Results come back from disk as they were, and tables and pictures can be read."""

import json
from unittest.mock import patch

import matplotlib.image
import pytest

from publishing.report import (
    draw_before_after,
    draw_speakers,
    escape_markdown,
    format_code,
    format_code_block,
    format_table,
    print_results,
    write_results,
)


def test_results_come_back_from_disk(tmp_path):
    results = {"eval_wer": 0.125, "speaker_id": "엄마", "trainable_parameters": 1170128}
    write_results(tmp_path / "new", results)

    assert [path.name for path in (tmp_path / "new").iterdir()] == ["eval_results.json"]
    assert json.loads((tmp_path / "new" / "eval_results.json").read_text(encoding="utf-8")) == results


def test_results_of_a_second_run_replace_the_first(tmp_path):
    write_results(tmp_path, {"eval_wer": 0.5, "more": 1})
    write_results(tmp_path, {"eval_wer": 0.25})
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"eval_wer": 0.25}


def test_print_results_aligns_values(capsys):
    print_results({"eval_wer": 0.12345, "speaker": "ann", "parameters": 12})
    assert capsys.readouterr().out == "eval_wer    0.1235\nspeaker     ann\nparameters  12\n"


def test_format_table_takes_its_columns_from_the_first_row():
    rows = [{"speaker": "ann", "WER": 0.5}, {"WER": 12.25, "speaker": "benjamin", "more": 1}]
    assert format_table(rows).splitlines() == [
        "| speaker  | WER   |",
        "| -------- | ----- |",
        "| ann      | 0.5   |",
        "| benjamin | 12.25 |",
    ]


def test_any_name_keeps_its_place_in_a_table_and_in_markdown():
    name = "a|b\nc"
    assert format_table([{"speaker": name, "WER": 1}]).splitlines()[-1] == r"| a\|b\nc | 1   |"
    assert escape_markdown("`<b>`a_b _x_ $y$ #1\n") == r"\`\<b\>\`a_b \_x\_ \$y\$ \#1\\n"
    assert format_code("a``b\n") == r"``` a``b\n ```"
    assert format_code_block("a\n```\nb", "bash") == "````bash\na\n```\nb\n````"


@pytest.mark.parametrize("num_speakers", [1, 6])
def test_picture_shows_two_bars_a_speaker(tmp_path, num_speakers):
    names = [f"speaker {index}" for index in range(num_speakers)]
    path = tmp_path / "out" / "results.png"
    draw_before_after(path, names=names, before=[0.8] * num_speakers, after=[0.2] * num_speakers)

    assert [entry.name for entry in path.parent.iterdir()] == ["results.png"]
    pixels = (matplotlib.image.imread(path)[:, :, :3] * 255).round().astype(int)
    areas = [(abs(pixels - colour).sum(-1) < 6).sum() for colour in ((0x9A, 0xA5, 0xB1), (0x1F, 0x7A, 0x8C))]
    # Bars of 80 % and 20 % are four to one, but for the legend's two equal patches.
    assert areas[0] / areas[1] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize(
    ("rate", "label", "bar"), [("wer", "word error rate (%)", 80), ("cer", "character error rate (%)", 40)]
)
def test_speakers_are_drawn_by_the_rate_that_judges(tmp_path, rate, label, bar):
    rows = [{"speaker_id": "ann", "base_wer": 0.8, "eval_wer": 0.2, "base_cer": 0.4, "eval_cer": 0.1, "rate": rate}]
    with patch("publishing.report.save_figure") as save:
        draw_speakers(tmp_path / "results.png", rows)
    (axes,) = save.call_args[0][0].axes
    assert axes.get_ylabel() == label
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([bar, bar / 4])
