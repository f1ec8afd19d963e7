"""The figures of README and docs are those that the benchmarks stored, and their tables those of the stored rows."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
from readme import README

from benchmarks import (
    audio_lm,
    audio_lm_memory,
    audio_lm_speed,
    cache_precision,
    domain_adapters,
    emformer,
    features,
    latency,
    personal_training,
    personalization,
    robustness,
    serving,
    speech_translation,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUMMARIES = {
    "audio_lm_barista": audio_lm.summarize,
    "audio_lm_memory": audio_lm_memory.summarize,
    "audio_lm_speed": audio_lm_speed.summarize,
    "cache_precision_fsdd": cache_precision.summarize,
    "domain_adapters_ablations": partial(domain_adapters.summarize, "ablations"),
    "domain_adapters_methods": partial(domain_adapters.summarize, "methods"),
    "emformer": emformer.summarize,
    "features": features.summarize,
    "latency": latency.summarize,
    "speech_translation": speech_translation.summarize,
    "personalization_fsdd": personalization.summarize,
    "robustness_fsdd": robustness.summarize,
    "robustness_synthetic": robustness.summarize,
    "serving": lambda rows: serving.summarize(rows[:-2], *rows[-2:]),
    # What was found of bf16 is words, not a row.
    "personal_training": lambda rows: personal_training.summarize(
        [row for row in rows if "kind" in row],
        [row for row in rows if "kind" not in row],
        re.search(r"^bf16: (.*)\.$", read_table("personal_training"), re.MULTILINE)[1],
    ),
}
METHODS = {
    "projector": "projector, task",
    "LoRA on the projector": "lora_projector, task",
    "LoRA on the decoder": "lora_llm, task",
}


def read_rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def read_table(name: str) -> str:
    return (RESULTS / f"{name}.md").read_text(encoding="utf-8")


def find_rows(text: str, first: str) -> dict[str, list[str]]:
    """Returns the table of `text` whose header begins with the cell `first`: a row's further cells by its first."""
    header = re.search(rf"^\| *{re.escape(first)} *\|.*\n\|[ |-]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in header[1].splitlines()]
    return {cells[0]: cells[1:] for cells in rows}


# The curve of a training was stored by the recipe's own log, and not by a benchmark.
CURVES = {"train_s2st_es"}


@pytest.mark.parametrize("name", sorted({path.stem for path in RESULTS.glob("*.json")} - CURVES))
def test_a_stored_table_is_that_of_the_stored_rows(name):
    assert read_table(name).startswith(SUMMARIES[name](read_rows(name)) + "\n\nprocessor ")


def test_readme_s_figures_of_people_are_the_stored_ones():
    shown = find_rows(README, "seconds of speech")
    assert shown == find_rows(read_table("personalization_fsdd"), "seconds of speech")
    assert len(shown) == 2


def test_readme_s_figures_of_conditions_are_the_worst_stored_ones():
    stored = [find_rows(read_table(f"robustness_{name}"), "condition") for name in ("fsdd", "synthetic")]
    shown = find_rows(README, "recorded")
    assert shown.pop("as it is") == [cell for rows in stored for cell in rows["as recorded"]]
    seconds = ("0.1", "0.3", "1", "3")
    for condition, cells in shown.items():
        pauses = [condition.replace(".1 to 3 s", f"{value} s") for value in seconds if ".1 to 3 s" in condition]
        columns = [[rows[name][place] for name in pauses or [condition]] for rows in stored for place in range(2)]
        worst = [max(column, key=lambda cell: float(cell.split("%")[0])) for column in columns]
        assert (condition, cells) == (condition, worst)
    # Each stored condition is shown, alone or as one of the pauses.
    assert len(stored[0]) == len(stored[1]) == 1 + len(shown) + 3 * sum(".1 to 3 s" in name for name in shown)


def test_readme_s_figures_of_another_domain_are_the_stored_ones():
    stored = find_rows(read_table("domain_adapters_methods"), "method, objective")
    shown = find_rows(README, "method")
    for method, (trainable, before, after, closed, microphone) in shown.items():
        row = stored[METHODS.get(method, method)]
        assert [trainable, before, after, closed, microphone] == [*row[:4], row[6]]
        assert row[5] == "3.6%"  # off, as the text says of all
    assert len(shown) == 7


@pytest.mark.parametrize(
    ("name", "first"),
    [("domain_adapters_methods", "method, objective"), ("domain_adapters_ablations", "domain adapter")],
)
def test_the_figures_of_the_domain_page_are_the_stored_ones(name, first):
    page = (ROOT / "docs" / "domain_adapters.md").read_text(encoding="utf-8")
    assert find_rows(page, first) == find_rows(read_table(name), first)


def test_readme_s_figures_of_speed_are_the_stored_ones():
    training = {(row.get("kind"), row.get("vocab_size")): row for row in read_rows("personal_training")}
    mlp, replacement = ([training[kind, classes] for classes in (2000, 30)] for kind in ("mlp", "replacement"))
    *rows, loading, rates = read_rows("serving")
    users = {row["kind"]: row for row in rows}
    limits = {kind: 1 + row["adapter_flops"] / rates["flops"] / row["base_s"] for kind, row in users.items()}
    clips = [row for row in read_rows("features") if row["batch"] == 1]

    def pair(rows: list[dict], form: str) -> str:
        return " / ".join(form.format(**row) for row in rows)

    def by_ten(rows: list[dict]) -> list[str]:
        peers = " / ".join(f"{row['speedup_10'] * row['passes_10']:.1f}" for row in rows)
        ours, ratio = pair(rows, "{passes_10:.2f}"), pair(rows, "{speedup_10:.1f}x")
        return [peers, ours, ratio, pair(rows, "{passes_10_limit:.2f}")]

    def by_user(kind: str) -> list[str]:
        row = users[kind]
        return [f"{row['row_by_row_over_base']:.2f}", f"{row['over_base']:.3f}", "", f"{limits[kind]:.3f}"]

    padded = " / ".join(f"{row['padded_epoch_s']:.2f}" for row in replacement)
    cached = " / ".join(f"{row['bare_10_s'] / 10:.2f}" for row in replacement)
    librosa, ours, speedup = (
        " / ".join(form.format(**row) for row in clips)
        for form in ("{librosa_ms:.2f}", "{ours_ms:.2f}", "{speedup:.1f}x")
    )
    expected = {
        "ten epochs of": by_ten(replacement),
        "the same, residual mlp": by_ten(mlp),
        "fifty epochs": ["", "", pair(replacement, "{speedup_50:.1f}x"), pair(replacement, "{speedup_50_limit:.1f}x")],
        "an epoch from the cache": [f"{padded} s", f"{cached} s", pair(replacement, "{padded_over_cached:.1f}x"), ""],
        "frames computed": [f"{replacement[0]['frames']['peer']:.2f}", "1.00", "", "1.00"],
        "32 users": by_user("mlp"),
        "the same, replacement": by_user("replacement"),
        "a 4.7 MB adapter": [
            f"{loading['peer_ms']:.2f} ms", f"{loading['ours_ms']:.2f} ms", f"{loading['speedup']:.1f}x",
            f"{loading['read_ms']:.2f} ms",
        ],
        "log-mel features": [f"{librosa} ms", f"{ours} ms", speedup, ""],
    }  # fmt: skip
    shown = find_rows(README, "what")
    assert len(shown) == len(expected)
    for (what, cells), (begins, figures) in zip(shown.items(), expected.items(), strict=True):
        assert what.startswith(begins)
        for cell, figure in zip(cells, figures, strict=True):
            # Words around the figures say what a peer is and where a limit comes from.
            assert (what, figure) == (what, figure if figure and figure in cell else cell)


def test_readme_s_figures_in_words_are_the_stored_ones():
    memory = [row["train_bytes"] / 1e6 for row in read_rows("personal_training") if "train_bytes" in row]
    batched = [row["speedup"] for row in read_rows("features") if row["batch"] == 8]
    precision = find_rows(read_table("cache_precision_fsdd"), "speaker")["mean"]
    text = " ".join(README.split())
    assert f"takes {memory[0]:.0f} MB with 64 utterances and {memory[1]:.0f} MB with 640" in text
    assert f"in one batch are there too, {min(batched):.1f} to {max(batched):.1f} times" in text
    assert [f"{float(cell.rstrip('%')):.1f} %" for cell in precision[1:3]] == ["6.4 %", "6.1 %"]
    assert "on real digits, 6.1 % and 6.4 % of 1,000 words wrong" in text
