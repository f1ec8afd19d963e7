"""The benchmarks run, compare like with like, and count operations, frames and memory as a hand does."""

import json
import mmap
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import features, personal_training, training_memory
from benchmarks.personal_loops import (
    QUICK_SIZES,
    RandomUtterances,
    add_adapter,
    build_from_scratch,
    make_base,
    make_collator,
    make_head,
    pad_cached,
    run_bare_epochs,
    run_original_epoch,
    run_padded_epoch,
)
from benchmarks.personal_training import Case, count_adapter_flops, count_padded, count_pass_flops
from benchmarks.results_file import digest_source, store_result
from benchmarks.training_memory import PeakMemory, measure_memory
from data.collators import pack_states
from data.utterances import count_ctc_frames
from training.objectives.recognition import CTCObjective

VOCAB_SIZE = 12


@pytest.fixture
def utterances() -> RandomUtterances:
    """Six utterances of noise."""
    return RandomUtterances(6, num_mel_bins=16, vocab_size=VOCAB_SIZE)


@pytest.fixture
def adapted():
    """Returns a function that makes a tiny base with an adapter of a kind."""

    def make(kind):
        model = make_base(QUICK_SIZES, VOCAB_SIZE)
        add_adapter(model, QUICK_SIZES, kind)
        return model

    return make


def copy_weights(head, model) -> None:
    """Gives the original's adapter random weights, and ours the same."""
    block = model.classifier.find_block("speaker")
    for ours, theirs in zip(block.parameters(), head.mlp.parameters(), strict=True):
        nn.init.normal_(theirs, std=0.1)
        ours.data.copy_(theirs)


def test_utterances_last_two_to_eight_seconds_and_can_be_aligned():
    utterances = RandomUtterances(200, num_mel_bins=16, vocab_size=30)

    assert (min(utterances.lengths), max(utterances.lengths)) == (200, 800)
    assert np.median(utterances.lengths) == pytest.approx(400, rel=0.1)
    assert all(utterances[row]["input_features"].shape == (utterances.lengths[row], 16) for row in (0, 50, 199))
    needed = [count_ctc_frames(labels.tolist()) for labels in utterances.labels]
    assert all(count < frames // 2 for count, frames in zip(needed, utterances.lengths, strict=True))


@pytest.mark.parametrize("kind", ["replacement", "mlp"])
def test_peers_and_ours_have_one_loss(utterances, adapted, kind, tmp_path):
    model, base = adapted(kind), make_base(QUICK_SIZES, VOCAB_SIZE)
    head, _ = make_head(base, QUICK_SIZES)
    copy_weights(head.eval(), model.eval())
    collate = make_collator(16)
    cached, _ = build_from_scratch(model, utterances, collate, batch_size=3, folder=tmp_path)
    examples = [cached[row] for row in range(6)]

    ours = CTCObjective(model)(**pack_states(examples))["loss"]
    padded = head(**pad_cached(examples))
    batch = collate([utterances[row] for row in range(6)])
    output = base(batch["input_features"], batch["attention_mask"], output_hidden_states=True)
    is_residual = {"replacement": False, "mlp": True}[kind]
    original = head(
        output.hidden_states[-1], output.logits_lengths, batch["labels"], output.logits if is_residual else None
    )
    torch.testing.assert_close(ours, padded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, original, atol=1e-5, rtol=1e-5)


def test_all_loops_learn(utterances, adapted, tmp_path):
    model, base = adapted("replacement"), make_base(QUICK_SIZES, VOCAB_SIZE)
    cached, _ = build_from_scratch(model, utterances, make_collator(16), batch_size=3, folder=tmp_path)
    head, optimizer = make_head(base, QUICK_SIZES)
    copy_weights(head, model)
    batch = pad_cached([cached[row] for row in range(6)])
    losses = []
    for run in (
        lambda: run_original_epoch(
            base, head, optimizer, utterances, collate=make_collator(16), batch_size=3, is_residual=False
        ),
        lambda: run_padded_epoch(head, optimizer, cached, 3),
    ):
        losses.append(head.eval()(**batch).item())
        head.train()
        run()
    losses.append(head.eval()(**batch).item())
    assert losses[0] > losses[1] > losses[2]

    packed, objective = pack_states([cached[row] for row in range(6)]), CTCObjective(model)
    before = objective.eval()(**packed)["loss"].item()
    run_bare_epochs(model, cached, batch_size=3, num_epochs=2)
    assert objective.eval()(**packed)["loss"].item() < before


def test_computed_frames_are_counted_by_batches():
    lengths = torch.tensor([4, 2, 1, 1])
    assert count_padded(lengths, [[0, 2], [1, 3]]) == (8 + 4) / 8
    assert count_padded(lengths, [[0, 1], [2, 3]]) == (8 + 2) / 8


def test_operations_of_the_frozen_pass_are_two_a_weight_and_use(adapted):
    model = adapted("mlp")
    first, second = 2 * (2 * 41 * 11) * 8, 2 * (2 * 2 * 21 * 11) * 4  # of 16 mel bins, 8 and then 4 come out
    recurrent = 2 * 2 * 3 * 8 * (2 * 4 + 8)  # two directions, three gates, input 8 wide, state 8 wide
    classifier = 2 * 16 * VOCAB_SIZE

    assert count_pass_flops(model, 10, with_classifier=False) == 10 * (first + second + recurrent)
    assert count_pass_flops(model, 1, with_classifier=True) == first + second + recurrent + classifier


def test_operations_of_an_adapter_are_three_products_but_two_of_the_first_layer():
    block = nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 3))
    assert count_adapter_flops(block, 5) == 5 * (2 * 2 * 40 + 3 * 2 * 12)


def test_peak_memory_is_the_largest_that_was_seen():
    readings = iter([5, 9])
    with PeakMemory(lambda: next(readings, 7)) as memory:
        pass
    assert memory.peak_bytes == 9


def test_peak_memory_sees_what_its_block_holds():
    num_bytes = 64 * 2**20
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        # Pages of its own: an allocator may give back what an earlier test has used.
        held = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for start in range(0, num_bytes, mmap.PAGESIZE):
            held[start] = 1
    assert memory.peak_bytes - before.peak_bytes == pytest.approx(len(held), rel=0.2)


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(training_memory, "PROC_STATUS", tmp_path / "absent")
    with PeakMemory() as memory:
        pass
    assert memory.peak_bytes is None


def test_a_measurement_of_memory_that_fails_says_why(monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=1, stderr="no space left")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: failed)
    with pytest.raises(RuntimeError, match="measurement of memory failed:\nno space left"):
        measure_memory(1, 1, tmp_path)


def test_features_of_ours_are_librosas(tmp_path, capsys):
    features.main(["--quick", "--results_folder", str(tmp_path)])
    rows = json.loads((tmp_path / "features.json").read_text())["rows"]

    assert [(row["clip_seconds"], row["batch"]) for row in rows] == [(1, 1), (1, 2)]
    assert all(row["max_difference"] < 1e-4 for row in rows)
    assert "2 x 1 s" in capsys.readouterr().out


def test_personal_training_is_measured_against_its_peers_and_limits(tmp_path, capsys):
    options = ["--kinds", "mlp", "--precisions", "fp32", "bf16", "--vocab_sizes", "30", "--quick"]
    personal_training.main([*options, "--results_folder", str(tmp_path)])
    *rows, memory = json.loads((tmp_path / "personal_training.json").read_text())["rows"]
    cases = [("mlp", precision) for precision in ("fp32", "bf16")]
    assert [(row["kind"], row["precision"]) for row in rows] == cases
    row = rows[-1]

    assert row["frames"]["adapter"] == 1.0
    assert row["frames"]["peer"] >= row["frames"]["pass"] > 1.0
    assert row["speedup_10"] == pytest.approx(10 * row["original_epoch_s"] / row["whole_10_s"])
    assert row["passes_10"] == pytest.approx(row["whole_10_s"] / row["pass_s"])
    derived = row["build_s"] + 50 * (row["whole_10_s"] - row["build_s"]) / 10
    assert row["speedup_50"] == pytest.approx(50 * row["original_epoch_s"] / derived)
    assert memory["train_bytes"] > 1e8
    assert memory["cache_bytes"] > 0
    assert "the Trainer over a bare loop" in capsys.readouterr().out


def test_memory_that_is_unknown_is_said_to_be():
    assert personal_training.describe_memory([{"train_bytes": None}]) == "Memory: this system does not tell."


def test_fewer_layers_make_a_smaller_base():
    options = personal_training.parse_options(["--num_hidden_layers", "2"])
    sizes = replace(QUICK_SIZES, base={**QUICK_SIZES.base, "num_hidden_layers": options.num_hidden_layers})
    assert len(make_base(sizes, VOCAB_SIZE).encoder.rnn_layers) == 2


def test_results_are_stored_with_machine_and_table(tmp_path):
    store_result("speed", [{"seconds": 1.5}], "| seconds |", source=features.__file__, folder=tmp_path)
    stored = json.loads((tmp_path / "speed.json").read_text())

    assert stored["machine"]["source"] == "features.py"
    assert stored["machine"]["source_digest"] == digest_source(features.__file__) != digest_source(__file__)

    assert stored["rows"] == [{"seconds": 1.5}]
    assert stored["machine"]["threads"] == torch.get_num_threads()
    assert (tmp_path / "speed.md").read_text().startswith("| seconds |\n\nprocessor ")


def test_a_digest_is_of_the_benchmark_and_of_what_it_imports_from_its_folder(tmp_path):
    benchmark = tmp_path / "benchmark.py"
    digests = set()
    for text in (
        "x = 1\n",
        "x = 2\n",
        "from benchmarks.timing import alternate\n",
        "from benchmarks.timing  import a\n",
    ):
        benchmark.write_text(text)
        digests.add(digest_source(benchmark))
    assert len(digests) == 4


def test_rows_are_kept_as_they_are_measured_and_replaced_by_the_result(tmp_path, monkeypatch):
    options = ["--quick", "--results_folder", str(tmp_path)]
    measure = features.measure

    def fail_at_the_second(seconds, batch, **timing):
        if batch == 2:
            raise RuntimeError("killed")
        return measure(seconds, batch, **timing)

    monkeypatch.setattr(features, "measure", fail_at_the_second)
    with pytest.raises(RuntimeError, match="killed"):
        features.main(options)
    (row,) = map(json.loads, (tmp_path / "features.rows.jsonl").read_text().splitlines())
    assert (row["clip_seconds"], row["batch"]) == (1, 1)
    assert row["ours_ms"] > 0
    monkeypatch.undo()
    features.main(options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.json", "features.md"]


def test_a_precision_that_a_launcher_overrules_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"`precision` must be \('torch.float32', 'no'\) .*, got .*'bf16'"):
        Case(QUICK_SIZES, "mlp", VOCAB_SIZE, "fp32", tmp_path)
