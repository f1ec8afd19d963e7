"""Memory and speed of a training step on Qwen2-Audio-7B, by every method of `recipes/adapt_domain.py` and stock PEFT.

    python -m benchmarks.domain_memory --dtypes bfloat16 4bit
    python -m benchmarks.domain_memory --config tiny --device cpu

The model has the true shape and random weights, which are made on the device: 17 GB in bfloat16. The first command
wants a GPU of 80 GB; the second shows in a few minutes that everything runs. Each row is a process of its own, so that
no peak holds what another row left behind.

domain_adapter_*, bottleneck, projector, lora_*   the recipe's step, task objective: tower, projector, language model
stock_lora_*                               `peft.get_peft_model` with the same LoRA, and the model's own `forward`
distill_*                                  the recipe's step on pairs of clips: the tower alone is in memory
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from accelerate import PartialState
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from benchmarks.results_file import RESULTS_FOLDER, keep_row, store_result
from benchmarks.training_memory import PeakMemory
from inference.audio_models import find_family, find_tower
from modeling.adapter_config import PRESETS
from publishing.report import format_table
from training.audio_tower import run_tower
from training.domain_methods import METHODS, DomainArguments, add_method, make_method_config
from training.planning import quantize_shapes

# "Qwen2-Audio Technical Report" (arXiv 2407.10759) and the published model's config.json. Its tower is the default of
# `Qwen2AudioConfig`; its text is not.
TRUE_TEXT = {
    "model_type": "qwen2", "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 156_032, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
TINY_TEXT = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 1024,
}  # fmt: skip
TINY_AUDIO = {
    "model_type": "qwen2_audio_encoder", "d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 500,
}  # fmt: skip
CONFIGS = {
    "qwen2_audio_7b": {"text_config": TRUE_TEXT},
    "tiny": {"text_config": TINY_TEXT, "audio_config": TINY_AUDIO, "audio_token_index": 63},
}
DTYPES = ("bfloat16", "4bit")
DEVICES = ("cuda", "cpu")

ADAPTERS = {f"domain_adapter_{preset}": {"method": "domain_adapter", "preset": preset} for preset in PRESETS}
ADAPTERS["bottleneck"] = {"method": "bottleneck"}
OURS = ADAPTERS | {
    method: {"method": method} for method in METHODS if method not in ("domain_adapter", "bottleneck", "none")
}
STOCK = {f"stock_{method}": {"method": method} for method in ("lora_projector", "lora_llm")}
DISTILL = {f"distill_{name}": {"objective": "distill", "tower_only": True} | flags for name, flags in ADAPTERS.items()}
# Name of a row to the recipe's flags.
ROWS = OURS | STOCK | DISTILL

MEL_HZ = 100  # a hop of 160 samples at 16 kHz
NUM_PROMPT_TOKENS, NUM_ANSWER_TOKENS = 24, 32  # a template with a short question; about 10 s of speech
NUM_WARMUPS = 2  # the optimizer makes its state in the first, libraries plan in both
DISTILL_LIMIT_BYTES = 4 * 10**9


def make_model(config: Qwen2AudioConfig, dtype: str, device: torch.device, *, tower_only: bool) -> PreTrainedModel:
    """
    Returns a frozen Qwen2-Audio with random weights, made part by part where it stays.

    Args:
        config: Its shape.
        dtype: `"bfloat16"`, or `"4bit"`: linear maps in NF4 with quantised scales, as the recipe loads them.
        device: Where the weights are made.
        tower_only: Give memory to the audio tower alone.
    """
    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    if dtype == "4bit":
        quantize_shapes(model)
        model.is_loaded_in_4bit = True  # what PEFT chooses its layers by
    part = find_tower(model) if tower_only else model
    for module in part.modules():
        if type(module).__name__ == "Linear4bit":  # by name: bitsandbytes takes seconds to import
            _draw_4bit(module, device, std=config.text_config.initializer_range)
        else:
            module.to_empty(device=device, recurse=False)
    part.initialize_weights()
    return model.requires_grad_(False)


def _draw_4bit(linear: nn.Linear, device: torch.device, *, std: float) -> None:
    """Gives a 4-bit map without memory random weights; one map at a time is in bfloat16."""
    drawn = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=device).normal_(std=std)
    weight = linear.weight
    linear.weight = type(weight)(drawn, requires_grad=False, **vars(weight)).to(device)
    if linear.bias is not None:
        linear.bias = nn.Parameter(torch.zeros_like(linear.bias, dtype=drawn.dtype, device=device))
    # As in `training.audio_tower.load_model`.
    linear.compute_dtype, linear.support_avx512bf16_for_cpu = torch.bfloat16, False
    linear._is_hf_initialized = True


def make_batch(
    model: PreTrainedModel, *, batch_size: int, seconds: float, device: torch.device, is_distilled: bool
) -> dict[str, torch.Tensor]:
    """
    Returns a batch as the recipe's collator makes it: prompt, placeholders and answer, or the features of pairs.

    Args:
        model: Its shape alone is read.
        batch_size: Clips.
        seconds: Of every clip; its features are padded to what the tower hears at once.
        device: Where it is made.
        is_distilled: For the objective distill.

    Raises:
        ValueError: `seconds` is out of range.
    """
    config = model.config
    max_frames = 2 * config.audio_config.max_source_positions  # the tower halves time once before its positions
    if not 1 <= seconds <= max_frames / MEL_HZ:
        raise ValueError(
            f"`seconds` must be from 1 to {max_frames / MEL_HZ:g}, got {seconds:g}. The tower hears no more at once."
        )
    mask = (torch.arange(max_frames, device=device) < round(seconds * MEL_HZ)).long().expand(batch_size, -1)
    _, num_frames = find_tower(model)._get_feat_extract_output_lengths(mask.sum(-1))
    shape = (batch_size, config.audio_config.num_mel_bins, max_frames)  # (batch, mel, frames)
    features = torch.randn(2, *shape, dtype=torch.bfloat16, device=device)
    batch = {"num_frames": num_frames, "feature_attention_mask": mask, "input_features": features[0]}
    if is_distilled:
        return batch | {"source_features": features[1]}
    num_placeholders = int(num_frames[0])
    num_tokens = NUM_PROMPT_TOKENS + num_placeholders + NUM_ANSWER_TOKENS
    # Placeholders have a number in the vocabulary's upper half.
    ids = torch.randint(config.text_config.vocab_size // 2, (batch_size, num_tokens), device=device)
    labels = ids.clone()
    labels[:, :-NUM_ANSWER_TOKENS] = -100
    ids[:, NUM_PROMPT_TOKENS : NUM_PROMPT_TOKENS + num_placeholders] = config.audio_token_index
    return batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class StockObjective(nn.Module):
    """A model of `peft.get_peft_model` behind the interface of [`training.objectives.domain.DomainObjective`]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, num_frames: torch.Tensor, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the model's own `loss`; the model counts frames itself."""
        del num_frames
        return {"loss": self.model(**batch).loss}


def make_objective(row: str, config: Qwen2AudioConfig, dtype: str, device: torch.device) -> nn.Module:
    """Returns what the row `row` minimises, with its model."""
    arguments = DomainArguments("qwen2_audio", **ROWS[row])
    model = make_model(config, dtype, device, tower_only=arguments.tower_only)
    if row in STOCK:
        return StockObjective(get_peft_model(model, make_method_config(arguments, find_family(config))))
    return add_method(model, arguments)


@torch.no_grad()
def take_from_cache(objective: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns `batch` as it comes in later epochs, with the tower's output and without its padding."""
    cached = dict(batch)
    mask, max_frames = batch["feature_attention_mask"], int(batch["num_frames"].max())
    for features, states in (("input_features", "states"), ("source_features", "source_states")):
        if features in batch:
            audio = {"input_features": cached.pop(features), "feature_attention_mask": mask}
            cached[states] = run_tower(objective.adapted_model, audio)[:, :max_frames].clone()
    return cached


def make_step(objective: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Returns a function that trains one step on `batch` and returns the loss before it."""
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)  # the Trainer's default

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = objective(**batch)["loss"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def watch_steps(step: Callable[[], torch.Tensor], num_steps: int, device: torch.device) -> dict[str, float | None]:
    """Returns the median `seconds` of a step and `peak_bytes`: of tensors on a GPU, else of the process."""
    is_cuda = device.type == "cuda"
    for _ in range(NUM_WARMUPS):
        loss = step().item()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    with PeakMemory() as process:
        for _ in range(num_steps):
            start = time.perf_counter()
            loss = step().item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    if not torch.tensor(loss).isfinite():
        raise RuntimeError(f"The loss must stay finite, got {loss}: these steps are none that anybody takes.")
    peak_bytes = torch.cuda.max_memory_allocated() if is_cuda else process.peak_bytes
    return {"seconds": median(seconds), "peak_bytes": peak_bytes}


def measure(
    row: str, config_name: str, dtype: str, *, device: str, batch_size: int, seconds: float, num_steps: int
) -> dict[str, object]:
    """Returns what a table says of one row, measured in this process."""
    place = PartialState(cpu=device == "cpu").device
    torch.manual_seed(0)
    objective = make_objective(row, Qwen2AudioConfig(**CONFIGS[config_name]), dtype, place).train()
    model = objective.model.get_base_model() if row in STOCK else objective.adapted_model
    is_distilled = row in DISTILL
    batch = make_batch(model, batch_size=batch_size, seconds=seconds, device=place, is_distilled=is_distilled)
    num_tokens = int(batch["num_frames"].sum() if is_distilled else batch["attention_mask"].sum())
    trainable = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    result = {
        "row": row,
        "dtype": dtype,
        "device": torch.cuda.get_device_name() if place.type == "cuda" else "CPU",
        "batch_size": batch_size,
        "clip_seconds": seconds,
        "tokens": num_tokens,
        "trainable_parameters": trainable,
        **watch_steps(make_step(objective, batch), num_steps, place),
    }
    if row not in STOCK:
        batch = take_from_cache(objective, batch)
        cached = watch_steps(make_step(objective, batch), num_steps, place)
        result |= {f"cached_{key}": value for key, value in cached.items()}
    return result


def measure_apart(row: str, dtype: str, options: argparse.Namespace) -> dict[str, object]:
    """Returns what [`measure`] does, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.domain_memory", "--one_row", "--rows", row, "--dtypes", dtype]
    for flag in ("config", "device", "batch_size", "seconds", "num_steps"):
        command += [f"--{flag}", str(getattr(options, flag))]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if finished.returncode:
        raise RuntimeError(f"The row {row} in {dtype} failed:\n{finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def summarize(rows: list[dict]) -> str:
    """Returns the table of the documentation, with the limit of distillation beside what it took."""
    first = rows[0]
    table = format_table(
        [
            {
                "step": row["row"],
                "weights": row["dtype"],
                "trainable": f"{row['trainable_parameters']:,}",
                "peak memory": _in_gb(row["peak_bytes"])
                + (f" (limit {_in_gb(DISTILL_LIMIT_BYTES)})" if row["row"] in DISTILL else ""),
                "tokens a second": f"{row['tokens'] / row['seconds']:,.0f}",
                "peak memory, tower cached": _in_gb(row.get("cached_peak_bytes")),
                "tokens a second, tower cached": (
                    f"{row['tokens'] / row['cached_seconds']:,.0f}" if "cached_seconds" in row else ""
                ),
            }
            for row in rows
        ]
    )
    about = (
        f"{first['device']}; {first['batch_size']} clips of {first['clip_seconds']:g} s a step, AdamW, no gradient "
        f"checkpointing. Tokens: placeholders of audio, {NUM_PROMPT_TOKENS} of the prompt and {NUM_ANSWER_TOKENS} of "
        "the answer a clip; of distill, placeholders alone. Memory: "
        + ("of the process." if first["device"] == "CPU" else "of tensors on the GPU.")
    )
    return f"{table}\n\n{about}"


def _in_gb(num_bytes: float | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e9:.2f} GB"


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(CONFIGS), default="qwen2_audio_7b", help="Shape of the model.")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="Of the frozen weights.")
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="Where to train.")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="What to measure.")
    parser.add_argument("--batch_size", type=int, default=4, help="Clips of a step.")
    parser.add_argument("--seconds", type=float, default=10.0, help="Of every clip.")
    parser.add_argument("--num_steps", type=int, default=5, help="Steps that are timed.")
    parser.add_argument("--results_folder", type=Path, default=RESULTS_FOLDER, help="Where the result is stored.")
    parser.add_argument("--one_row", action="store_true", help="Measure the first row in this process; print JSON.")
    return parser


def list_runs(options: argparse.Namespace) -> list[tuple[str, str]]:
    """
    Returns the rows and dtypes to measure.

    Raises:
        ValueError: There is no GPU or no bitsandbytes though it is asked for, nothing to measure, or a number below 1.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "`device` must be one that torch sees, got cuda. Use `--config tiny --device cpu` to see that it runs."
        )
    if "4bit" in options.dtypes and find_spec("bitsandbytes") is None:
        raise ValueError("`dtypes` must be bfloat16 without bitsandbytes, got 4bit. Install bitsandbytes.")
    for name in ("batch_size", "num_steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(options, name)}. Raise it.")
    # The recipe quantises no tower that it loads alone.
    runs = [(row, dtype) for dtype in options.dtypes for row in options.rows if dtype != "4bit" or row not in DISTILL]
    if not runs:
        raise ValueError(f"`dtypes` must have bfloat16 for {', '.join(options.rows)}, got 4bit. Add it.")
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = make_parser().parse_args(arguments)
    runs = list_runs(options)
    if options.one_row:
        flags = {name: getattr(options, name) for name in ("device", "batch_size", "seconds", "num_steps")}
        row, dtype = runs[0]
        print(json.dumps(measure(row, options.config, dtype, **flags)))
        return
    rows, name = [], f"domain_memory_{options.config}_{options.device}"
    for row, dtype in runs:
        rows.append(keep_row(name, measure_apart(row, dtype, options), folder=options.results_folder))
        print(json.dumps(rows[-1]), flush=True)
    table = summarize(rows)
    print(table)
    store_result(name, rows, table, source=__file__, folder=options.results_folder)


if __name__ == "__main__":
    main()
