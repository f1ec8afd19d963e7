"""What an adapter for every row costs, and how long an adapter takes from the disk to its place.

    python -m benchmarks.serving

Rows: a batch of as many rows as users, each with an adapter of its own, over the same batch through the base alone;
the peer activates each user's adapter and recognises that user's row alone.

Activation: an adapter that is on the disk and not in memory (the files themselves are in the system's cache); the
peer is `torch.load` of the original's file, `{adapter_state_dict, input_dim, ...}`, and `load_state_dict`.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, pairwise
from pathlib import Path

import torch
from torch import nn

from benchmarks.results_file import RESULTS_FOLDER, keep_row, store_result
from benchmarks.timing import MIN_SAMPLE_SECONDS, Timing, alternate, copy_bytes_per_s, gemm_flops
from inference.adapter_store import AdapterStore
from modeling import DeepSpeech2Config, DeepSpeech2ForCTC, SpeechAdapterConfig
from modeling.adapter_files import save_adapter
from modeling.adapters import is_adapter_parameter
from publishing.report import format_table

GOAL_ROWS, GOAL_ACTIVATION_MS, GOAL_ACTIVATION_RATIO = 1.03, 0.25, 6.0
KINDS = ("mlp", "replacement")
HIDDEN_SIZES = [512, 256]
# Recordings of a batch are of about one duration, because batches are made of sorted ones.
SHORTEST_FRAMES, LONGEST_FRAMES = 475, 500  # 10 ms
BASE = {"num_mel_bins": 80, "hidden_size": 512, "num_hidden_layers": 5, "vocab_size": 2000}
QUICK_BASE = {"num_mel_bins": 16, "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 30, "conv_channels": 4}


def make_base(settings: dict[str, int]) -> DeepSpeech2ForCTC:
    """Returns a base with random weights, always the same."""
    torch.manual_seed(0)
    return DeepSpeech2ForCTC(DeepSpeech2Config(**settings)).eval()


def make_batch(num_rows: int, num_mel_bins: int) -> dict[str, torch.Tensor]:
    """Returns features `(batch, frames, mel)` of noise, of nearly the same length, and their mask."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(SHORTEST_FRAMES, LONGEST_FRAMES + 1, (num_rows,), generator=generator)
    features = torch.randn(num_rows, LONGEST_FRAMES, num_mel_bins, generator=generator)
    mask = torch.arange(LONGEST_FRAMES) < lengths.unsqueeze(1)
    return {"input_features": features, "attention_mask": mask.long()}


def write_adapters(settings: dict[str, int], kind: str, names: Sequence[str], folder: Path) -> int:
    """Saves a random adapter under each name, ours and as the original's file; returns the bytes of its weights."""
    model = make_base(settings)
    model.add_adapter(SpeechAdapterConfig(kind=kind, hidden_sizes=HIDDEN_SIZES), "user")
    parameters = [value for name, value in model.named_parameters() if is_adapter_parameter(name)]
    block = model.classifier.speech_adapter_blocks["user"]
    for name in names:
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(std=0.02)
        save_adapter(model, folder / "store" / name, "user")
        original = {"adapter_state_dict": block.state_dict(), "input_dim": block[0].in_features}
        original |= {"hidden_dims": HIDDEN_SIZES, "output_dim": block[-1].out_features, "adapter_name": name}
        torch.save(original, folder / f"{name}.pt")
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


@torch.inference_mode()
def measure_rows(settings: dict[str, int], kind: str, names: Sequence[str], folder: Path, **timing: float) -> dict:
    """Returns the time of a batch of as many rows as `names`, an adapter each, beside base alone and row by row."""
    base, alone = make_base(settings), make_base(settings)
    store = AdapterStore(base, folder / "store", capacity=len(names))
    for name in names:
        alone.load_adapter(str(folder / "store" / name), name)
    alone.eval()
    batch = make_batch(len(names), settings["num_mel_bins"])
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(len(names))]

    def run_base() -> torch.Tensor:
        return base(**batch).logits

    def run_ours() -> torch.Tensor:
        with store.rows(names):
            return base(**batch, output_base_logits=False).logits

    def run_row_by_row() -> torch.Tensor:
        logits = []
        for name, row in zip(names, rows, strict=True):
            alone.set_adapter(name)
            logits.append(alone(**row, output_base_logits=False).logits)
        return torch.cat(logits)

    difference = (run_ours() - run_row_by_row()).abs().max().item()
    timings = alternate({"base": run_base, "ours": run_ours, "row by row": run_row_by_row}, **timing)
    return {
        "kind": kind,
        "users": len(names),
        **{f"{name.replace(' ', '_')}_s": value.median_s for name, value in timings.items()},
        "over_base": timings["ours"].median_s / timings["base"].median_s,
        "row_by_row_over_base": timings["row by row"].median_s / timings["base"].median_s,
        "max_difference": difference,
        "adapter_flops": count_adapter_flops(batch, store.activate(names[0])),
        "notes": _notes(timings),
    }


def count_adapter_flops(batch: dict[str, torch.Tensor], blocks: dict[str, nn.Module]) -> float:
    """Returns the operations of one adapter on all frames of logits of a batch."""
    weights = [value for block in blocks.values() for value in block.parameters() if value.dim() == 2]
    num_frames = batch["attention_mask"].numel() / 2  # 20 ms
    return 2 * num_frames * sum(weight.numel() for weight in weights)


@torch.inference_mode()
def measure_activation(
    settings: dict[str, int], names: Sequence[str], folder: Path, adapter_bytes: int, **timing: float
) -> dict:
    """Returns the time from a file on the disk to weights in place, beside the peer's and that of a copy."""
    # Half of the adapters fit, and they come in turn: none of them is ever in memory.
    store = AdapterStore(make_base(settings), folder / "store", capacity=len(names) // 2)
    for name in names:
        store.activate(name)
    sizes = [2 * settings["hidden_size"], *HIDDEN_SIZES, settings["vocab_size"]]
    parts = [[nn.Linear(*pair), nn.ReLU(), nn.Dropout(0.1)] for pair in pairwise(sizes)]
    peer_block = nn.Sequential(*[part for group in parts for part in group][:-2]).eval()
    peer_names, our_names = cycle(names), cycle(names)

    def run_peer() -> None:
        checkpoint = torch.load(folder / f"{next(peer_names)}.pt", map_location="cpu", weights_only=True)
        peer_block.load_state_dict(checkpoint["adapter_state_dict"])

    read = make_plain_read([str(folder / f"{name}.pt") for name in names], adapter_bytes)
    functions = {"peer": run_peer, "ours": lambda: store.activate(next(our_names)), "read": read}
    timings = alternate(functions, **timing)
    return {
        "adapter_bytes": adapter_bytes,
        **{f"{name}_ms": 1000 * value.median_s for name, value in timings.items()},
        "speedup": timings["peer"].median_s / timings["ours"].median_s,
        "notes": _notes(timings),
    }


def make_plain_read(paths: Sequence[str], num_bytes: int) -> Callable[[], None]:
    """Returns a function that reads `num_bytes` of the next file into memory that is there: what reading must cost."""
    targets = [memoryview(torch.zeros(num_bytes, dtype=torch.uint8).numpy()) for _ in paths[::2]]
    turns: Iterator[tuple[str, memoryview]] = zip(cycle(paths), cycle(targets), strict=False)

    def read() -> None:
        path, target = next(turns)
        file = os.open(path, os.O_RDONLY)
        os.preadv(file, [target], 0)
        os.close(file)

    return read


def _notes(timings: dict[str, Timing]) -> str:
    return "; ".join(dict.fromkeys(timing.note for timing in timings.values()))


def summarize(rows: Sequence[dict], activation: dict, limits: dict[str, float]) -> str:
    """Returns both tables of README, with goals and limits beside what was reached."""
    serving = [
        {
            "rows": f"{row['users']} rows, {row['users']} users, {row['kind']}",
            "base alone": f"{row['base_s']:.2f} s",
            "an adapter a row": f"{row['ours_s']:.2f} s",
            f"over base alone (goal {GOAL_ROWS:g})": f"{row['over_base']:.3f}",
            "limit (operations)": f"{1 + row['adapter_flops'] / limits['flops'] / row['base_s']:.3f}",
            "row by row, over base alone": f"{row['row_by_row_over_base']:.2f}",
            "largest difference": f"{row['max_difference']:.1e}",
            "samples": row["notes"],
        }
        for row in rows
    ]
    loading = {
        "adapter": f"{activation['adapter_bytes'] / 1e6:.1f} MB",
        "torch.load, load_state_dict": f"{activation['peer_ms']:.3f} ms",
        f"store (goal {GOAL_ACTIVATION_MS:g} ms)": f"{activation['ours_ms']:.3f} ms",
        f"times as fast (goal {GOAL_ACTIVATION_RATIO:g})": f"{activation['speedup']:.1f}",
        "limit (plain read)": f"{activation['read_ms']:.3f} ms",
        "limit (copy in memory)": f"{1000 * activation['adapter_bytes'] / limits['copy_bytes_per_s']:.3f} ms",
        "samples": activation["notes"],
    }
    return f"{format_table(serving)}\n\n{format_table([loading])}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_users", type=int, default=32, help="Rows of the batch, and adapters on the disk.")
    parser.add_argument("--repeats", type=int, default=7, help="Undisturbed samples of each function.")
    parser.add_argument("--results_folder", type=Path, default=RESULTS_FOLDER, help="Where the result is stored.")
    parser.add_argument("--quick", action="store_true", help="A tiny base, to see that it runs; not for figures.")
    options = parser.parse_args(arguments)
    timing = {"repeats": options.repeats, "warmup": 2, "min_sample_s": MIN_SAMPLE_SECONDS}
    settings, num_users, product, copied = BASE, options.num_users, {}, {}
    if options.quick:
        settings, num_users, timing = QUICK_BASE, 4, {"repeats": 1, "min_sample_s": 0.0}
        product, copied = {"size": 64, "seconds": 0.0}, {"num_bytes": 2**20, "seconds": 0.0}
    names = [f"user_{number}" for number in range(num_users)]
    rows = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            adapter_bytes = write_adapters(settings, kind, names, Path(folder))
            row = measure_rows(settings, kind, names, Path(folder), **timing)
            rows.append(keep_row("serving", row, folder=options.results_folder))
            if kind == KINDS[0]:
                activation = measure_activation(settings, names, Path(folder), adapter_bytes, **timing)
    limits = {"flops": gemm_flops(torch.float32, **product), "copy_bytes_per_s": copy_bytes_per_s(**copied)}
    table = summarize(rows, activation, limits)
    print(table)
    store_result("serving", [*rows, activation, limits], table, source=__file__, folder=options.results_folder)


if __name__ == "__main__":
    main()
