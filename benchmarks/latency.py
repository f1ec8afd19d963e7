"""Latency figures of ours beside those of OmniSTEval and SimulEval, on random logs: how far they are apart.

pip install --no-deps --target peers/omnisteval omnisteval==0.1.10
pip install --no-deps --target peers/simuleval simuleval==1.1.4
python -m benchmarks.latency --omnisteval peers/omnisteval --simuleval peers/simuleval

Both pin old packages, so they stay out of this environment; they read the logs that ours writes.
"""

import argparse
import importlib
import sys
import types
from pathlib import Path

import numpy as np

from benchmarks.results_file import store_result
from data.latency import TranslationLog, format_simuleval_logs, score_latency
from publishing.report import format_table

NUM_LOGS = 500
OF_SIMULEVAL = ("AL", "LAAL", "AP", "DAL", "ATD", "StartOffset", "EndOffset", "NumChunks")
OF_OMNISTEVAL = ("AL", "LAAL", "YAAL", "AP", "DAL")


def draw_logs(num_logs: int, seed: int) -> list[TranslationLog]:
    """Returns logs of text in which words come in steps of 320 ms, some of them after the source's end."""
    generator = np.random.default_rng(seed)
    logs = []
    for _ in range(num_logs):
        source_ms, num_words = float(generator.integers(1000, 12_000)), int(generator.integers(1, 30))
        delays = np.sort(np.minimum(generator.integers(1, 40, num_words) * 320.0, source_ms))
        waits = np.cumsum(generator.uniform(0, 40, num_words))
        texts = [" ".join(["word"] * number) for number in (num_words, int(generator.integers(1, 30)))]
        logs.append(TranslationLog(delays, source_ms, len(texts[1].split()), delays + waits, None, *texts))
    return logs


def score_by_omnisteval(folder: str, log_file: Path) -> dict[str, float]:
    """Returns OmniSTEval's figures of a log."""
    sys.path.insert(0, folder)
    io, scoring = (importlib.import_module(f"omnisteval.{name}") for name in ("io", "scoring"))
    instances = io.load_shortform_instances(str(log_file), None, "delays", "elapsed")
    scores = {}
    for is_aware in (False, True):
        for name in OF_OMNISTEVAL:
            scorer = getattr(scoring, f"{name}Scorer")(computation_aware=is_aware)
            scores[f"{name}_CA" if is_aware else name] = scorer(instances)
    degeneracy = scoring.ShortformDegeneracyScorer()(instances)
    return scores | {"SWF": degeneracy["swf"], "EFSW": degeneracy["efsw"]}


def score_by_simuleval(folder: str, log_file: Path) -> dict[str, float]:
    """Returns SimulEval's figures of a log; what it imports for forced alignment is not needed."""
    sys.path.insert(0, folder)
    sys.modules.setdefault("textgrid", types.ModuleType("textgrid"))
    instance = importlib.import_module("simuleval.evaluator.instance")
    latency_scorer = importlib.import_module("simuleval.evaluator.scorers.latency_scorer")
    lines = log_file.read_text(encoding="utf-8").splitlines()
    instances = {index: instance.LogInstance(line) for index, line in enumerate(lines)}
    scorers = latency_scorer.LATENCY_SCORERS_DICT
    return {name: scorers[name](computation_aware=False)(instances) for name in OF_SIMULEVAL}


def summarize(rows: list[dict]) -> str:
    """Returns the rows as a table."""
    shown = [
        {
            **row,
            "theirs": f"{row['theirs']:.4f}",
            "ours": f"{row['ours']:.4f}",
            "difference": f"{row['difference']:.0e}",
        }
        for row in rows
    ]
    return format_table(shown)


def main() -> None:
    """Compares and stores the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omnisteval", required=True, help="Folder in which OmniSTEval is installed.")
    parser.add_argument("--simuleval", required=True, help="Folder in which SimulEval is installed.")
    parser.add_argument("--log_file", type=Path, default=Path("outputs/latency/instances.log"))
    options = parser.parse_args()
    logs = draw_logs(NUM_LOGS, seed=0)
    options.log_file.parent.mkdir(parents=True, exist_ok=True)
    options.log_file.write_text(format_simuleval_logs(logs), encoding="utf-8")
    ours = score_latency(logs)
    theirs = {
        "OmniSTEval 0.1.10": score_by_omnisteval(options.omnisteval, options.log_file),
        "SimulEval 1.1.4": score_by_simuleval(options.simuleval, options.log_file),
    }
    rows = [
        {"peer": peer, "figure": name, "theirs": value, "ours": ours[name], "difference": abs(value - ours[name])}
        for peer, scores in theirs.items()
        for name, value in scores.items()
    ]
    table = summarize(rows)
    print(table)
    store_result("latency", rows, table, source=__file__)


if __name__ == "__main__":
    main()
