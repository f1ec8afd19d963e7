"""Memory of a process that trains from the cache, for the benchmark of personal training.

    python -m benchmarks.training_memory --num_utterances 128 --num_steps 40 --folder outputs/memory

Prints JSON. Noise stands in for what the base says, so that ten times the data takes no longer than its cache.
"""

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.personal_loops import (
    FULL_SIZES,
    QUICK_SIZES,
    RandomUtterances,
    add_adapter,
    make_base,
    make_collator,
    make_trainer,
)
from data.state_cache import CachedUtterances
from modeling.modeling_deepspeech2 import get_output_lengths

PROC_STATUS = Path("/proc/self/status")
SECONDS_BETWEEN = 0.005
VOCAB_SIZE = 2000


def read_anonymous_bytes() -> int | None:
    """Returns the memory of this process that no file backs, in bytes; None where the system does not tell."""
    if not PROC_STATUS.is_file():
        return None
    found = [line.split()[1] for line in PROC_STATUS.read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(found[0]) if found else None


class PeakMemory:
    """
    Reads the process's memory every 5 ms while its block runs, and keeps the largest in `peak_bytes`.

    Args:
        read: Returns bytes, or None where the system does not tell.
    """

    def __init__(self, read: Callable[[], int | None] = read_anonymous_bytes):
        self.read, self.peak_bytes = read, read()
        self._is_over, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN):
            self._look()

    def _look(self) -> None:
        if self.peak_bytes is not None:
            self.peak_bytes = max(self.peak_bytes, self.read())

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_exception) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()


def make_noise_states(width: int) -> Callable[[dict], tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Returns what stands in for the base: states `(batch, frames, width)` of the right lengths, at no cost."""
    noise = torch.randn(1, 1, width)

    def run(batch: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        lengths = get_output_lengths(batch["attention_mask"].sum(1))
        return {"hidden_states": noise.expand(len(lengths), int(lengths.max()), width)}, lengths

    return run


def train_and_watch(num_utterances: int, num_steps: int, folder: Path, *, is_quick: bool) -> dict[str, int | None]:
    """Returns the peak memory of building a cache and of training from it, and the size of the cache, in bytes."""
    sizes = QUICK_SIZES if is_quick else FULL_SIZES
    num_mel_bins = sizes.base["num_mel_bins"]
    model = make_base(sizes, VOCAB_SIZE)
    add_adapter(model, sizes, "replacement")
    utterances = RandomUtterances(num_utterances, num_mel_bins=num_mel_bins, vocab_size=VOCAB_SIZE)
    with PeakMemory() as building:
        cached = CachedUtterances.build(
            utterances,
            make_noise_states(2 * model.config.hidden_size),
            collate=make_collator(num_mel_bins),
            key={"states": "noise"},
            folder=folder / "cache",
            batch_size=sizes.batch_size,
        )
    trainer = make_trainer(model, cached, batch_size=sizes.batch_size, folder=folder, max_steps=num_steps)
    with PeakMemory() as training:
        trainer.train()
    return {
        "num_utterances": num_utterances,
        "build_bytes": building.peak_bytes,
        "train_bytes": training.peak_bytes,
        "cache_bytes": cached.caches[0].nbytes,
    }


def measure_memory(num_utterances: int, num_steps: int, folder: Path, *, is_quick: bool = False) -> dict:
    """Returns what [`train_and_watch`] does, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training_memory", "--num_utterances", str(num_utterances)]
    command += ["--num_steps", str(num_steps), "--folder", str(folder), *(["--quick"] if is_quick else [])]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if finished.returncode:
        raise RuntimeError(f"The measurement of memory failed:\n{finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_utterances", type=int, required=True, help="Utterances of 2 to 8 seconds.")
    parser.add_argument("--num_steps", type=int, required=True, help="Steps of training.")
    parser.add_argument("--folder", type=Path, required=True, help="Where the cache goes.")
    parser.add_argument("--quick", action="store_true", help="A tiny model.")
    options = parser.parse_args(arguments)
    print(
        json.dumps(train_and_watch(options.num_utterances, options.num_steps, options.folder, is_quick=options.quick))
    )


if __name__ == "__main__":
    main()
