"""Results as files, tables and pictures in an output folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from modeling.files import write_whole

RESULTS_NAME = "eval_results.json"


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

    Example:

    ```python
    >>> from recipes.report import format_table

    >>> print(format_table([{"speaker": "ann", "WER": "12.5 %"}]))
    | speaker | WER    |
    | ------- | ------ |
    | ann     | 12.5 % |

    ```
    """
    columns = list(rows[0])
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in columns}
    lines = [[f"{name:<{widths[name]}}" for name in columns], ["-" * widths[name] for name in columns]]
    lines += [[f"{row[name]!s:<{widths[name]}}" for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_before_after(
    path: str | Path, *, names: Sequence[str], before: Sequence[float], after: Sequence[float]
) -> None:
    """
    Draws error rates before and after adaptation as pairs of bars into a PNG file, whole.

    Args:
        path: The picture.
        names: One name a pair, such as speakers.
        before: Word error rates of the base, as shares.
        after: Word error rates with the adapter.
    """
    path = Path(path)
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
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("word error rate (%)")
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with write_whole(path.parent) as scratch:
        figure.savefig(scratch / path.name, dpi=150)
