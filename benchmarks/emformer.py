"""Emformer of ours and of torchaudio: whole utterances, training steps, streams of one and of many.

    pip download --no-deps --dest WHEELS torchaudio
    python -m benchmarks.emformer --torchaudio WHEELS/torchaudio-*.whl

The peer is torchaudio's own file, taken out of its wheel and run alone, with the same weights on the same frames, in
turn with ours. Times are of the layers alone, as torchaudio's Emformer has no subsampling, and CPU times of one
thread, which other processes disturb least.
"""

import argparse
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import process_time
from types import ModuleType

import torch
from torch import nn

from benchmarks.results_file import RESULTS_FOLDER, keep_row, store_result
from benchmarks.timing import MIN_SAMPLE_SECONDS, Timing, alternate
from converters.torchaudio_emformer import to_torchaudio_name
from modeling import EmformerCache, EmformerConfig, EmformerModel
from publishing.report import format_table

HIDDEN_SIZE, NUM_HEADS, INTERMEDIATE_SIZE = 256, 4, 1024
UTTERANCE_LAYERS, STREAM_LAYERS = 4, 16
NUM_FRAMES = 512  # 20 s at 40 ms
# Segment, left context, right context, memories: EchoStream's, the RNN-T preset's, a right context of a segment.
CONTEXTS = {"memory": (4, 30, 0, 8), "preset": (4, 30, 1, 0), "lookahead": (4, 30, 4, 0)}
BATCHES = (1, 8)
NUM_STREAMS = 64
STREAM_SECONDS, FRAME_SECONDS = 60, 0.04
GOALS = {"forward": 3.0, "step": 2.8, "infer": 1.6, "streams": 6.0, "last segment": 1.1, "gradient": 1e-12}


def load_peer(wheel: str | Path, *, is_double: bool = False) -> ModuleType:
    """
    Returns torchaudio's file `emformer.py` as a module of its own.

    Args:
        wheel: Of torchaudio.
        is_double: Leave its softmax in the precision of the model; as it is, it is fp32 in float64 too.
    """
    source = zipfile.ZipFile(wheel).read("torchaudio/models/emformer.py").decode()
    if is_double:
        source = source.replace("attention_weights.float()", "attention_weights")
    peer = ModuleType("torchaudio_emformer")
    exec(compile(source, "emformer.py", "exec"), vars(peer))
    return peer


def make_pair(
    peer: ModuleType, context: tuple[int, int, int, int], *, num_layers: int, dropout: float = 0.0
) -> tuple[nn.Module, EmformerModel]:
    """Returns torchaudio's Emformer and ours with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    segment, left, right, memory = context
    theirs = peer.Emformer(
        HIDDEN_SIZE,
        NUM_HEADS,
        INTERMEDIATE_SIZE,
        num_layers,
        segment,
        dropout=dropout,
        left_context_length=left,
        right_context_length=right,
        max_memory_size=memory,
        tanh_on_mem=True,
    )
    config = EmformerConfig(
        num_mel_bins=HIDDEN_SIZE,
        subsampling="none",
        subsampling_factor=1,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=NUM_HEADS,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=num_layers,
        segment_length=segment,
        left_context_length=left,
        right_context_length=right,
        max_memory_size=memory,
        dropout=dropout,
    )
    ours, state = EmformerModel(config), theirs.state_dict()
    ours.load_state_dict({name: state[to_torchaudio_name(name, is_rnnt=False)] for name in ours.state_dict()})
    return theirs.eval(), ours.eval()


def train_step(model: nn.Module, encode: Callable[[], torch.Tensor]) -> None:
    """One forward and backward pass."""
    model.zero_grad()
    encoded = encode()
    # Not of its squares: they add up to a constant behind a layer norm.
    (encoded * torch.linspace(-1, 1, encoded.numel(), dtype=encoded.dtype).view_as(encoded).sin()).sum().backward()


def measure_utterances(peer: ModuleType, name: str, batch: int, time: Callable[..., dict[str, Timing]]) -> dict:
    """Returns the row of whole utterances: forward passes, and training steps with dropout .1."""
    context = CONTEXTS[name]
    frames = torch.randn(batch, NUM_FRAMES + context[2], HIDDEN_SIZE)
    lengths = torch.full((batch,), NUM_FRAMES)
    theirs, ours = make_pair(peer, context, num_layers=UTTERANCE_LAYERS, dropout=0.1)
    with torch.no_grad():
        forward = time({"peer": lambda: theirs(frames, lengths), "ours": lambda: ours(frames)})
        difference = (theirs(frames, lengths)[0] - ours(frames)[0][:, :NUM_FRAMES]).abs().max()
    theirs.train(), ours.train()
    step = time(
        {
            "peer": lambda: train_step(theirs, lambda: theirs(frames, lengths)[0]),
            "ours": lambda: train_step(ours, lambda: ours(frames)[0]),
        }
    )
    return describe(f"{name}, {batch} x {NUM_FRAMES} frames", forward=forward, step=step, difference=difference)


class Stream:
    """Streams of ours that go on with each call."""

    def __init__(self, model: EmformerModel, frames: torch.Tensor, starts: Sequence[int] | None = None):
        self.model, self.frames, self.segment = model, frames, model.config.segment_length
        self.cache = EmformerCache(model.config)
        if starts is not None:  # each stream has come so far already
            for start in range(0, max(starts), self.segment):
                counts = [min(self.segment, max(0, end - start)) for end in starts]
                mask = torch.arange(self.segment) < torch.tensor(counts)[:, None]
                self.run(mask)
        new = frames[:, self.segment :]  # the right context of the first segment
        model(inputs_embeds=new, past_key_values=self.cache, use_cache=True)

    def run(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes a segment."""
        new = self.frames[:, : self.segment]
        return self.model(inputs_embeds=new, attention_mask=mask, past_key_values=self.cache, use_cache=True)[0]


class PeerStream:
    """A stream of torchaudio's that goes on with each call."""

    def __init__(self, model: nn.Module, frames: torch.Tensor):
        self.model, self.frames, self.states = model, frames, None
        self.lengths = torch.full((len(frames),), frames.shape[1])
        self.run()

    def run(self) -> torch.Tensor:
        """Encodes a segment."""
        encoded, _, self.states = self.model.infer(self.frames, self.lengths, self.states)
        return encoded


def measure_streams(peer: ModuleType, name: str, time: Callable[..., dict[str, Timing]], *, num_layers: int) -> dict:
    """Returns the row of streams: one, and many at positions of their own, a segment a call."""
    segment, _, right, _ = CONTEXTS[name]
    theirs, ours = make_pair(peer, CONTEXTS[name], num_layers=num_layers)
    frames = torch.randn(NUM_STREAMS, segment + right, HIDDEN_SIZE)
    with torch.no_grad():
        alone, peers = Stream(ours, frames[:1]), PeerStream(theirs, frames[:1])
        many = Stream(ours, frames, starts=[segment * (row % 16) for row in range(NUM_STREAMS)])
        timings = time({"peer": peers.run, "ours": alone.run, "many": many.run})
    infer = {"peer": timings["peer"], "ours": timings["ours"]}
    row = describe(f"{name}, a segment of a stream", infer=infer)
    row["streams_speedup"] = timings["peer"].median_s / (timings["many"].median_s / NUM_STREAMS)
    row["streams_ours_ms"] = 1000 * timings["many"].median_s / NUM_STREAMS
    row["notes"] += f"; {timings['many'].note}"
    return row


def measure_last_segment(
    name: str, *, seconds: float, num_layers: int, time: Callable[..., dict[str, Timing]]
) -> dict:
    """Returns the row of a long stream: its last segment's time over its first's, and the cache's size."""
    torch.manual_seed(0)
    segment, left, right, memory = CONTEXTS[name]
    ours = EmformerModel(
        EmformerConfig(
            num_hidden_layers=num_layers,
            segment_length=segment,
            left_context_length=left,
            right_context_length=right,
            max_memory_size=memory,
        )
    ).eval()
    frames = torch.randn(1, segment + right, HIDDEN_SIZE)
    with torch.no_grad():
        first, last = EmformerCache(ours.config), Stream(ours, frames)
        for _ in range(round(seconds / FRAME_SECONDS / segment)):
            last.run()

        def run_first() -> None:
            first.reset()
            ours(inputs_embeds=frames, past_key_values=first, use_cache=True)

        run_first()
        kept = last.cache.key_values.numel()
        timings = time({"first": run_first, "last": last.run})
    ratio = timings["last"].median_s / timings["first"].median_s
    row = {"case": f"{name}, after {seconds:g} s of a stream", "last_over_first": ratio, "cache_numbers": kept}
    return row | {"notes": "; ".join(timing.note for timing in timings.values())}


def measure_gradients(wheel: str | Path) -> dict:
    """Returns the row of the largest difference between gradients in float64."""
    theirs, ours = make_pair(load_peer(wheel, is_double=True), (4, 30, 2, 3), num_layers=2)
    theirs, ours = theirs.double(), ours.double()
    frames = torch.randn(1, 152, HIDDEN_SIZE, dtype=torch.double)
    train_step(theirs, lambda: theirs(frames, torch.tensor([150]))[0])
    train_step(ours, lambda: ours(frames)[0][:, :150])
    parameters = dict(theirs.named_parameters())
    difference = max(
        float((value.grad - parameters[to_torchaudio_name(name, is_rnnt=False)].grad).abs().max())
        for name, value in ours.named_parameters()
    )
    return {"case": "gradients in float64", "max_difference": difference}


def describe(case: str, *, difference: torch.Tensor | None = None, **timings: dict[str, Timing]) -> dict:
    """Returns a row of a peer's and our times under the names of what was timed."""
    row: dict[str, object] = {"case": case, "notes": ""}
    for name, pair in timings.items():
        row[f"{name}_peer_ms"], row[f"{name}_ours_ms"] = (1000 * pair[key].median_s for key in ("peer", "ours"))
        row[f"{name}_speedup"] = pair["peer"].median_s / pair["ours"].median_s
        row["notes"] += f"{'; ' if row['notes'] else ''}{name}: {pair['peer'].note}, {pair['ours'].note}"
    return row if difference is None else row | {"max_difference": float(difference)}


def summarize(rows: list[dict]) -> str:
    """Returns the table, a line a measurement, with the goals beside what was reached."""
    lines = []
    for row in rows:
        for name in ("forward", "step", "infer", "streams"):
            if f"{name}_speedup" in row:
                times = f"{row[f'{name}_ours_ms']:.2f} ms"
                peer = f"{row[f'{name}_peer_ms']:.2f} ms" if f"{name}_peer_ms" in row else "one alone"
                lines.append([row["case"], name, peer, times, f"{row[f'{name}_speedup']:.2f}x", f"{GOALS[name]:g}x"])
        if "last_over_first" in row:
            lines.append([row["case"], "last segment", "", "", f"{row['last_over_first']:.2f} of the first", "1.1"])
        elif "forward_speedup" not in row and "max_difference" in row:
            lines.append([row["case"], "difference", "", "", f"{row['max_difference']:.1e}", f"{GOALS['gradient']:g}"])
    columns = ("case", "what", "torchaudio", "ours", "reached", "goal")
    return format_table([dict(zip(columns, line, strict=True)) for line in lines])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchaudio", type=Path, required=True, help="Wheel of torchaudio.")
    parser.add_argument("--repeats", type=int, default=5, help="Undisturbed samples of each row.")
    parser.add_argument("--results_folder", type=Path, default=RESULTS_FOLDER, help="Where the result is stored.")
    parser.add_argument("--quick", action="store_true", help="One short row each, to see that it runs; no figures.")
    options = parser.parse_args(arguments)
    repeats, min_sample_s = (1, 0.0) if options.quick else (options.repeats, MIN_SAMPLE_SECONDS)
    torch.set_num_threads(1)
    time = partial(alternate, repeats=repeats, min_sample_s=min_sample_s, clock=process_time)
    keep = partial(keep_row, "emformer", folder=options.results_folder)
    peer = load_peer(options.torchaudio)
    contexts, batches = (["memory"], (1,)) if options.quick else (list(CONTEXTS), BATCHES)
    layers, seconds = (2, 2) if options.quick else (STREAM_LAYERS, STREAM_SECONDS)
    rows = [keep(measure_gradients(options.torchaudio))]
    rows += [keep(measure_streams(peer, name, time, num_layers=layers)) for name in contexts]
    rows += [keep(measure_last_segment(name, seconds=seconds, num_layers=layers, time=time)) for name in contexts]
    rows += [keep(measure_utterances(peer, name, batch, time)) for batch in batches for name in contexts]
    table = summarize(rows)
    print(table)
    store_result("emformer", rows, table, source=__file__, folder=options.results_folder)


if __name__ == "__main__":
    main()
