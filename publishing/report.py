"""Results as files, tables and pictures in an output folder."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from modeling.files import write_whole
from publishing.pictures import as_written, escape_control, save_figure, shorten_name

RESULTS_NAME = "eval_results.json"
RATE_LABELS = {"wer": "word error rate (%)", "cer": "character error rate (%)"}


def write_results(folder: str | Path, results: dict) -> None:
    """Writes `results` as `eval_results.json` into `folder`, whole."""
    with write_whole(folder) as scratch:
        (scratch / RESULTS_NAME).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def print_results(results: dict) -> None:
    """Prints one line a result, names aligned."""
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{name:<{width}}  {value}")


def format_table(rows: Sequence[dict[str, object]]) -> str:
    """
    Returns `rows` as a Markdown table with aligned columns, which are the keys of the first row.

    A "|" and control characters in a cell are escaped, so that any name keeps its place.

    Example:

    ```python
    >>> from publishing.report import format_table

    >>> print(format_table([{"speaker": "ann", "WER": "12.5 %"}]))
    | speaker | WER    |
    | ------- | ------ |
    | ann     | 12.5 % |

    ```
    """
    columns = list(rows[0])
    rows = [{name: _escape_cell(str(row[name])) for name in columns} for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    lines = [[f"{name:<{widths[name]}}" for name in columns], ["-" * widths[name] for name in columns]]
    lines += [[f"{row[name]:<{widths[name]}}" for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escape_markdown(text: str) -> str:
    r"""
    Returns `text` so that Markdown shows it as it is, on one line: no formatting, HTML or formula.

    Example:

    ```python
    >>> from publishing.report import escape_markdown

    >>> print(escape_markdown("<b>a_b*"))
    \<b\>a_b\*

    ```
    """
    return re.sub(r"[\\`*{}\[\]<>#$~&!|]|\b_|_\b", r"\\\g<0>", escape_control(text))


def format_code(text: str) -> str:
    """
    Returns `text` as Markdown's code on one line, fenced by more backticks than it has.

    Example:

    ```python
    >>> from publishing.report import format_code

    >>> format_code("a`b"), format_code("ann")
    ('`` a`b ``', '`ann`')

    ```
    """
    text = escape_control(text)
    fence = "`" * (_longest_run(text) + 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def format_code_block(text: str, language: str) -> str:
    """Returns `text` as a block of code that no backticks in it end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    """The most backticks in a row."""
    return max(map(len, re.findall("`+", text)), default=0)


def _escape_cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", escape_control(text))


def find_rate(rows: Sequence[Mapping]) -> str:
    """Returns what judges speakers who are shown together: "cer" if spaces part no words in some one's references."""
    return "cer" if any(row.get("rate") == "cer" for row in rows) else "wer"


def draw_speakers(path: str | Path, rows: Sequence[Mapping]) -> None:
    """Draws the results of speakers, rows of `eval_results.json`, by [`draw_before_after`]."""
    rate = find_rate(rows)
    before, after = ([row[f"{state}_{rate}"] for row in rows] for state in ("base", "eval"))
    draw_before_after(path, names=[row["speaker_id"] for row in rows], before=before, after=after, rate=rate)


def draw_before_after(
    path: str | Path, *, names: Sequence[str], before: Sequence[float], after: Sequence[float], rate: str = "wer"
) -> None:
    """
    Draws error rates before and after adaptation as pairs of bars into a PNG file, whole.

    Args:
        path: The picture.
        names: One name a pair, such as speakers.
        before: Error rates of the base, as shares.
        after: Error rates with the adapter.
        rate: "wer" or "cer", what they are.
    """
    figure = Figure(figsize=(max(4.0, 1.2 * len(names) + 2.0), 3.2), layout="constrained")
    axes = figure.add_subplot()
    for offset, values, label, color in ((-0.2, before, "base", "#9aa5b1"), (0.2, after, "with adapter", "#1f7a8c")):
        bars = axes.bar(
            [position + offset for position in range(len(names))],
            [100 * value for value in values],
            width=0.38,
            label=label,
            color=color,
        )
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_xticks(range(len(names)), [shorten_name(name) for name in names], **as_written(names))
    axes.set_ylabel(RATE_LABELS[rate])
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
