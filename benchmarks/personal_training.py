"""Time of training one person's adapter: ours, the original's loop, and what the machine allows.

    python -m benchmarks.personal_training

The unit is one forward pass of the frozen base over the speech (128 utterances of 2 to 8 seconds, batches of 32).
The peer is the original's loop: the base hears every utterance in every epoch, in padded batches in file order, then
the adapter, log-softmax and torch's CTC. Ours builds the cache and trains from it with this project's Trainer. Ten
epochs of ours are measured as one training; the peer's epochs are all alike, so that ten are ten times one.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.personal_loops import (
    FULL_SIZES,
    QUICK_SIZES,
    RandomUtterances,
    Sizes,
    add_adapter,
    build_from_scratch,
    draw_sorted_batches,
    make_base,
    make_collator,
    make_head,
    make_trainer,
    run_bare_epochs,
    run_original_epoch,
    run_padded_epoch,
    run_prefix,
)
from benchmarks.results_file import RESULTS_FOLDER, keep_row, store_result
from benchmarks.timing import MIN_SAMPLE_SECONDS, Timing, alternate, gemm_flops, judge_bf16
from benchmarks.training_memory import measure_memory
from data.state_cache import CachedUtterances
from modeling import DeepSpeech2ForCTC
from modeling.modeling_deepspeech2 import get_output_lengths
from publishing.report import format_table
from training.frozen_part import find_frozen_prefix
from training.trainer import AdapterTrainer

NAME = "personal_training"
PRECISIONS = ("fp32", "bf16")
KINDS, VOCAB_SIZES = ("replacement", "mlp"), (2000, 30)
EPOCHS, MORE_EPOCHS = 10, 50
GOAL_PASSES = {2000: 2.0, 30: 1.5}
GOAL_SPEEDUPS = {"fp32": (8, 13), "bf16": (18, 30)}  # after 10 and after 50 epochs
GOAL_PADDED_RATIO, GOAL_FRAMES, GOAL_TRAINER = 1.6, 1.05, 1.05
MEMORY_FACTORS = (1, 10)  # of the data
MEMORY_STEPS = 40


class Case:
    """
    One adapter in training: the functions that are timed in turn, and what they are compared with.

    Args:
        sizes: Of base, adapter and data.
        kind: Of the adapter.
        vocab_size: Classes.
        precision: "fp32", or "bf16" for ours in autocast with a cache in bf16; the peers stay in fp32.
        folder: Where caches go; emptied before each is built.
    """

    def __init__(self, sizes: Sizes, kind: str, vocab_size: int, precision: str, folder: Path):
        self.sizes, self.kind, self.vocab_size, self.precision, self.folder = (
            sizes,
            kind,
            vocab_size,
            precision,
            folder,
        )
        num_mel_bins = sizes.base["num_mel_bins"]
        self.utterances = RandomUtterances(sizes.num_utterances, num_mel_bins=num_mel_bins, vocab_size=vocab_size)
        self.collate = make_collator(num_mel_bins)
        self.base, self.model, plain = (make_base(sizes, vocab_size) for _ in range(3))
        for model in (self.model, plain):
            add_adapter(model, sizes, kind)
        self.prefix = find_frozen_prefix(plain)  # of a model that no Trainer has put under autocast
        self.cached = self.build()
        self.head, self.optimizer = make_head(self.base, sizes)
        self.trainer = self.make_trainer()
        self.check_precision()

    def check_precision(self) -> None:
        """
        Makes sure that what is measured has the precision that it is named by.

        Raises:
            ValueError: The cache or the Trainer, which a launcher can overrule, has another.
        """
        had = (str(self.cached.caches[0].dtype), self.trainer.accelerator.mixed_precision)
        wanted = {"fp32": ("torch.float32", "no"), "bf16": ("torch.bfloat16", "bf16")}[self.precision]
        if had != wanted:
            raise ValueError(f"`precision` must be {wanted} of cache and Trainer, got {had}. Launch it plainly.")

    def build(self) -> CachedUtterances:
        """Builds the cache anew and returns the cached utterances."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        is_bf16 = self.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16) if is_bf16 else nullcontext():
            cached, _ = build_from_scratch(
                self.model,
                self.utterances,
                self.collate,
                batch_size=self.sizes.batch_size,
                folder=self.folder / "cache",
                dtype="bfloat16" if is_bf16 else "float32",
            )
        return cached

    def make_trainer(self) -> AdapterTrainer:
        """Returns the Trainer of ten epochs over the cache."""
        return make_trainer(
            self.model,
            self.cached,
            batch_size=self.sizes.batch_size,
            folder=self.folder,
            num_epochs=EPOCHS,
            is_bf16=self.precision == "bf16",
        )

    def run_whole_training(self) -> None:
        """What a user waits for: the cache, then ten epochs."""
        self.cached = self.build()
        self.make_trainer().train()

    def run_bare(self) -> None:
        """Ten epochs from the cache without the Trainer."""
        with torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else nullcontext():
            run_bare_epochs(self.model, self.cached, batch_size=self.sizes.batch_size, num_epochs=EPOCHS)

    def run_original(self) -> None:
        """One epoch of the original."""
        run_original_epoch(
            self.base,
            self.head,
            self.optimizer,
            self.utterances,
            collate=self.collate,
            batch_size=self.sizes.batch_size,
            is_residual=self.kind == "mlp",
        )

    def run_padded(self) -> None:
        """One epoch on the cache with padding and plain autograd."""
        run_padded_epoch(self.head, self.optimizer, self.cached, self.sizes.batch_size)

    def run_pass(self) -> None:
        """One forward pass of the frozen part."""
        run_prefix(self.prefix, self.utterances, self.collate, self.sizes.batch_size)

    def functions(self) -> dict[str, Callable[[], None]]:
        """Returns what is timed; `pass`, the unit, is fp32 for every precision."""
        return {
            "pass": self.run_pass,
            "original_epoch": self.run_original,
            "padded_epoch": self.run_padded,
            "build": self.build,
            "bare_10": self.run_bare,
            "trainer_10": self.trainer.train,
            "whole_10": self.run_whole_training,
        }


def count_computed_frames(case: Case) -> dict[str, float]:
    """Returns frames computed a real frame: of the adapter, in the pass that is cached, and in the peers' batches."""
    computed: list[int] = []
    layer = case.model.classifier.find_block("speaker")[0]
    handle = layer.register_forward_hook(lambda _layer, args, _output: computed.append(args[0][..., 0].numel()))
    run_bare_epochs(case.model, case.cached, batch_size=case.sizes.batch_size, num_epochs=1)
    handle.remove()
    lengths = torch.tensor(case.utterances.lengths)
    in_file_order = [rows.tolist() for rows in torch.arange(len(lengths)).split(case.sizes.batch_size)]
    in_sorted_order = list(draw_sorted_batches(case.utterances, case.sizes.batch_size))
    return {
        "adapter": sum(computed) / get_output_lengths(lengths).sum().item(),
        "pass": count_padded(lengths, in_sorted_order),
        "peer": count_padded(lengths, in_file_order),
    }


def count_padded(lengths: torch.Tensor, batches: Sequence[Sequence[int]]) -> float:
    """Returns the frames of padded `batches` (rows each) over their real frames, from `lengths` `(rows,)`."""
    padded = sum(len(rows) * lengths[rows].max().item() for rows in batches)
    return padded / lengths.sum().item()


def count_pass_flops(model: DeepSpeech2ForCTC, num_frames: int, *, with_classifier: bool) -> int:
    """Returns the operations of the frozen part on `num_frames` frames of 20 ms: products of matrices alone."""
    flops, bins = 0, model.config.num_mel_bins
    for module in model.encoder.modules():
        if isinstance(module, nn.Conv2d):
            bins = (bins + 1) // 2  # "same" padding and a stride of 2
            flops += 2 * module.weight.numel() * bins
        elif isinstance(module, nn.GRU):
            flops += 2 * sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)
    if with_classifier:
        flops += 2 * model.classifier.get_base_layer()[-1].weight.numel()
    return flops * num_frames


def count_adapter_flops(block: nn.Module, num_frames: int) -> int:
    """Returns the operations of an adapter's training on `num_frames` frames; its input needs no gradient."""
    weights = [value.numel() for value in block.parameters() if value.dim() == 2]
    return num_frames * (6 * sum(weights) - 2 * weights[0])


def measure_case(case: Case, rates: dict[str, float], **timing: float) -> dict[str, object]:
    """
    Returns the row of one case: seconds, their ratios and their limits.

    Args:
        case: What is measured.
        rates: Operations a second of products of matrices, by precision.
        timing: Of [`alternate`].
    """
    timings: dict[str, Timing] = alternate(case.functions(), **timing)
    seconds = {name: timing.median_s for name, timing in timings.items()}
    unit, peer, whole = seconds["pass"], seconds["original_epoch"], seconds["whole_10"]
    cached_epoch = (whole - seconds["build"]) / EPOCHS
    num_frames = int(get_output_lengths(torch.tensor(case.utterances.lengths)).sum())
    with_classifier = "base_output" in case.prefix.states
    pass_limit = count_pass_flops(case.model, num_frames, with_classifier=with_classifier) / rates["fp32"]
    block = case.model.classifier.find_block("speaker")
    epoch_limit = count_adapter_flops(block, num_frames) / rates[case.precision]
    more = seconds["build"] + MORE_EPOCHS * cached_epoch
    return {
        "kind": case.kind,
        "vocab_size": case.vocab_size,
        "precision": case.precision,
        "utterance_seconds": sum(case.utterances.lengths) / 100,
        **{f"{name}_s": value for name, value in seconds.items()},
        "cached_epoch_s": cached_epoch,
        "passes_10": whole / unit,
        "passes_10_limit": 1 + EPOCHS * epoch_limit / unit,
        "speedup_10": EPOCHS * peer / whole,
        "speedup_10_limit": EPOCHS * peer / (unit + EPOCHS * epoch_limit),
        "speedup_50": MORE_EPOCHS * peer / more,
        "speedup_50_limit": MORE_EPOCHS * peer / (unit + MORE_EPOCHS * epoch_limit),
        "padded_over_cached": EPOCHS * seconds["padded_epoch"] / seconds["bare_10"],
        "trainer_over_bare": seconds["trainer_10"] / seconds["bare_10"],
        "pass_over_limit": unit / pass_limit,
        "epoch_over_limit": seconds["bare_10"] / EPOCHS / epoch_limit,
        "frames": count_computed_frames(case),
        "notes": {name: timing.note for name, timing in timings.items()},
    }


def summarize(rows: list[dict], memory: list[dict], bf16: str) -> str:
    """Returns the table of README, one column a case, and the lines on memory and bf16 below it."""
    columns = {f"{row['kind']}, {row['vocab_size']} classes, {row['precision']}": row for row in rows}
    lines = [
        ("one frozen pass", lambda row: f"{row['pass_s']:.2f} s"),
        ("... over its products at the GEMM rate", lambda row: f"{row['pass_over_limit']:.1f}x"),
        ("the original's epoch", lambda row: f"{row['original_epoch_s']:.2f} s"),
        ("building the cache", lambda row: f"{row['build_s']:.2f} s"),
        ("a cached epoch", lambda row: f"{row['bare_10_s'] / EPOCHS:.3f} s"),
        ("... over its products at the GEMM rate", lambda row: f"{row['epoch_over_limit']:.1f}x"),
        ("10 epochs, in frozen passes", format_passes),
        ("10 epochs, the original's over ours", lambda row: format_speedup(row, 10, 0)),
        ("50 epochs, derived from epochs", lambda row: format_speedup(row, 50, 1)),
        (
            "a cached epoch, padded autograd over ours",
            lambda row: f"{row['padded_over_cached']:.2f} (goal {GOAL_PADDED_RATIO})",
        ),
        (
            "frames computed a real frame, adapter",
            lambda row: f"{row['frames']['adapter']:.2f} (goal {GOAL_FRAMES}; original {row['frames']['peer']:.2f})",
        ),
        ("... in the cached pass", lambda row: f"{row['frames']['pass']:.2f}"),
        ("the Trainer over a bare loop", lambda row: f"{row['trainer_over_bare']:.3f} (goal {GOAL_TRAINER})"),
        ("samples", lambda row: "; ".join(dict.fromkeys(row["notes"].values()))),
    ]
    table = format_table(
        [{"": name, **{column: show(row) for column, row in columns.items()}} for name, show in lines]
    )
    return f"{table}\n\n{describe_memory(memory)}\n\nbf16: {bf16}."


def format_passes(row: dict) -> str:
    """Returns ten epochs in frozen passes, with goal and limit."""
    goal = GOAL_PASSES.get(row["vocab_size"])
    return f"{row['passes_10']:.2f} (goal {goal}, limit {row['passes_10_limit']:.2f})"


def format_speedup(row: dict, num_epochs: int, index: int) -> str:
    """Returns how many times faster ours is than the original, with goal and limit."""
    goal = GOAL_SPEEDUPS[row["precision"]][index]
    return f"{row[f'speedup_{num_epochs}']:.1f}x (goal {goal}, limit {row[f'speedup_{num_epochs}_limit']:.1f})"


def describe_memory(memory: list[dict]) -> str:
    """Returns a line on the peak memory of training with more and more data."""
    if any(row["train_bytes"] is None for row in memory):
        return "Memory: this system does not tell."
    parts = [
        f"{row['train_bytes'] / 1e6:.0f} MB with {row['num_utterances']} utterances "
        f"(cache {row['cache_bytes'] / 1e6:.0f} MB)"
        for row in memory
    ]
    return f"Peak memory of training from the cache, pages of the cache file apart: {', '.join(parts)}."


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="Kinds of adapters.")
    parser.add_argument("--vocab_sizes", nargs="+", type=int, default=VOCAB_SIZES, help="Numbers of classes.")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, help="Default: fp32, and bf16 where its products are fast."
    )
    parser.add_argument("--num_hidden_layers", type=int, help="Recurrent layers of the base. Default: 5.")
    parser.add_argument("--num_utterances", type=int, help="Utterances of the speaker. Default: 128.")
    parser.add_argument("--repeats", type=int, default=3, help="Undisturbed samples of each function.")
    parser.add_argument("--results_folder", type=Path, default=RESULTS_FOLDER, help="Where the result is stored.")
    parser.add_argument("--quick", action="store_true", help="Tiny sizes, to see that it runs; not for figures.")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse_options(arguments)
    sizes, timing = FULL_SIZES, {"repeats": options.repeats, "min_sample_s": MIN_SAMPLE_SECONDS}
    if options.quick:
        sizes, timing = QUICK_SIZES, {"repeats": 1, "min_sample_s": 0.0}
    if options.num_hidden_layers:
        sizes = replace(sizes, base={**sizes.base, "num_hidden_layers": options.num_hidden_layers})
    if options.num_utterances:
        sizes = replace(sizes, num_utterances=options.num_utterances)
    gemm = {"size": 64, "seconds": 0.01} if options.quick else {}
    rates = {"fp32": gemm_flops(torch.float32, **gemm), "bf16": gemm_flops(torch.bfloat16, **gemm)}
    has_bf16, bf16 = judge_bf16(rates["bf16"] / rates["fp32"])
    precisions = options.precisions or (PRECISIONS if has_bf16 else PRECISIONS[:1])
    keep = partial(keep_row, NAME, folder=options.results_folder)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            keep(measure_case(Case(sizes, kind, vocab_size, precision, Path(folder)), rates, **timing))
            for kind in options.kinds
            for vocab_size in options.vocab_sizes
            for precision in precisions
        ]
        factors, num_steps = (MEMORY_FACTORS[:1], 2) if options.quick else (MEMORY_FACTORS, MEMORY_STEPS)
        memory = [
            measure_memory(
                factor * sizes.num_utterances, num_steps, Path(folder) / f"memory_{factor}", is_quick=options.quick
            )
            for factor in factors
        ]
    table = summarize(rows, memory, bf16)
    print(table)
    store_result(NAME, [*rows, *memory], table, source=__file__, folder=options.results_folder)


if __name__ == "__main__":
    main()
