"""Says what a training will take, before it loads any weights: parameters, memory, cache and time.

python -m recipes.plan --config recipes/configs/personalize_synthetic.yaml \\
    --model_name_or_path outputs/base --speaker_id whisper

Everything but `--recipe`, `--output_file` and `--no_trial` is the recipe's own. A recipe can be planned that has a
function `plan_model(arguments)`: the model that it trains, adapters on it, made of configurations alone. Where a
recipe's batches are its own it has `draw_trial` too, and `count_planned_epochs` where it trains in stages.
"""

import argparse
import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import psutil
import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

from data.audio import SAMPLING_RATE
from data.augmentation import Augmentation
from data.state_cache import DTYPES
from modeling.files import write_text
from publishing.report import format_table
from training.arguments import parse_arguments
from training.endings import run_main
from training.objectives.recognition import CTCObjective
from training.planning import (
    DEFAULT_CHARACTERS,
    DEFAULT_SECONDS,
    CorpusSize,
    bytes_of,
    count_frame_bytes,
    count_groups,
    count_optimizer_bytes,
    count_steps,
    estimate_activations,
    estimate_widest,
    measure_corpus,
)
from training.trial import Trial, draw_batch, run_trial

RECIPES = Path(__file__).parent
# Where a container's limit of memory stands, in bytes or "max", and what it uses.
MEMORY_LIMIT, MEMORY_USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
# Memory that comes and goes: kept for the backward pass, the widest place of that, and of a pass without gradients.
BATCH_MEMORY = ("activations", "backward", "inference")
MB, GB = 1e6, 1e9


def list_recipes() -> list[str]:
    """Returns the recipes that can be planned, without importing them."""
    mark = "\ndef plan_model("
    return sorted(path.stem for path in RECIPES.glob("*.py") if mark in path.read_text(encoding="utf-8"))


def find_recipe(name: str | None, config: str | None) -> str:
    """
    Returns the recipe that is named, or that a configuration `<recipe>_<data>.yaml` is for.

    Raises:
        ValueError: Neither is given, or there is no such recipe.

    Example:

    ```python
    >>> from recipes.plan import find_recipe

    >>> find_recipe(None, "recipes/configs/train_ctc_fsdd.yaml")
    'train_ctc'

    ```
    """
    choices = list_recipes()
    if name is None and config is not None:
        fitting = [choice for choice in choices if Path(config).stem.startswith(f"{choice}_")]
        if not fitting:
            raise ValueError(
                f"`config` must be named <recipe>_<data>.yaml, with one of the recipes {', '.join(choices)}, got "
                f"{Path(config).name}. Give `--recipe`."
            )
        return max(fitting, key=len)
    if name not in choices:
        raise ValueError(f"`recipe` must be one of {', '.join(choices)}, got {name}. Or give its `--config`.")
    return name


@dataclass
class Plan:
    """
    What a training will take; sizes in bytes, times in seconds, `None` for what is not known.

    Args:
        recipe: Name of the recipe.
        device: Where it trains.
        groups: Parameters, trainable ones and bytes of each part of the model.
        num_rows: Utterances of a batch.
        longest_seconds: Of audio in the longest utterance.
        typical_seconds: Of audio in the mean utterance.
        num_steps: Optimizer steps of the training.
        memory: Bytes by what they are for.
        available_bytes: Free memory of the device.
        cache: What is kept of the frozen part on the disk: `variants`, `bytes_per_second` of audio, `bytes`.
        trial: What the trial measured, or why there was none.
        time: `step`, `frozen_pass` (the cache, or all steps' where nothing is cached), `training` (all of it).
    """

    recipe: str
    device: str
    groups: dict[str, dict[str, int]]
    num_rows: int
    longest_seconds: float
    typical_seconds: float
    num_steps: int | None
    memory: dict[str, int | None]
    available_bytes: int
    cache: dict[str, int | None] | None = None
    trial: dict | str = "left out (`--no_trial`)"
    time: dict[str, float | None] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most memory at a time: what stays, and the larger of a step and a pass without gradients."""
        size = {name: value or 0 for name, value in self.memory.items()}
        passing = size.pop("activations") + size.pop("backward"), size.pop("inference")
        return sum(size.values()) + max(passing)

    def to_dict(self) -> dict:
        """Returns everything as JSON has it."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}


class Planner:
    """
    Makes the plan of one training.

    Args:
        recipe: Module with `plan_model`.
        arguments: As its `main` gets them.

    Raises:
        ValueError: The corpus or the model does not exist, or an optimizer's states are not known.
    """

    def __init__(self, recipe: ModuleType, arguments: Sequence[object]):
        self.recipe, self.arguments = recipe, arguments
        self.flags = {name: value for argument in arguments for name, value in vars(argument).items()}
        self.training_args = next(argument for argument in arguments if isinstance(argument, TrainingArguments))
        self.libraries = psutil.Process().memory_info().rss
        self.corpus: CorpusSize | None = measure_corpus(self.flags)
        with torch.device("meta"):
            self.model: PreTrainedModel = recipe.plan_model(arguments)
        self.adapter_names = list(getattr(self.model, "peft_config", {}))
        self.has_stages = hasattr(self.model, "stages")
        self.prefix = CTCObjective(self.model).prefix if self.has_stages else None
        self.num_variants = self._count_variants()

    def _count_variants(self) -> int:
        if self.prefix is None:
            return 0
        augmentation = next((argument for argument in self.arguments if isinstance(argument, Augmentation)), None)
        is_random = self.flags.get("concatenate_max", 1) > 1 or (augmentation is not None and augmentation.changes)
        return self.flags["cache_variants"] if is_random else 1

    def make_plan(self) -> Plan:
        """Returns the plan, without a trial."""
        args, num_together = self.training_args, max(1, len(self.adapter_names))
        plan = Plan(
            recipe=self.recipe.__name__.rpartition(".")[2],
            device=str(args.device),
            groups=count_groups(self.model),
            num_rows=args.per_device_train_batch_size * num_together,
            longest_seconds=self.corpus.longest_seconds if self.corpus else DEFAULT_SECONDS,
            typical_seconds=self.corpus.typical_seconds if self.corpus else DEFAULT_SECONDS,
            num_steps=count_steps(
                self.corpus,
                batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
                num_epochs=self._count_epochs(),
                max_steps=args.max_steps,
                num_together=num_together,
            ),
            memory=self._count_memory(),
            available_bytes=find_available_bytes(args.device),
        )
        plan.memory |= self._estimate_batch(plan)
        plan.cache = self._describe_cache()
        return plan

    def _count_epochs(self) -> float:
        """Passes over the corpus: those of the stage that is planned, where a recipe has stages of training."""
        count = getattr(self.recipe, "count_planned_epochs", None)
        return count(self.arguments) if count else self.training_args.num_train_epochs

    def _count_memory(self) -> dict[str, int | None]:
        parameters = list(self.model.parameters())
        optim = OptimizerNames(self.training_args.optim).value
        return {
            "libraries": self.libraries if self.training_args.device.type == "cpu" else 0,
            "weights": sum(map(bytes_of, parameters)),
            "buffers": sum(map(bytes_of, self.model.buffers())),
            "gradients": sum(bytes_of(parameter) for parameter in parameters if parameter.requires_grad),
            "optimizer": count_optimizer_bytes(self.model, optim, self.training_args.optim_args),
        }

    def _estimate_batch(self, plan: Plan) -> dict[str, int | None]:
        if not self.has_stages:
            return dict.fromkeys(BATCH_MEMORY)
        frames = plan.longest_seconds * SAMPLING_RATE / self.model.config.inputs_to_logits_ratio
        num_frames, is_packed = round(frames * plan.num_rows), self.prefix is not None
        heard_frames = round(frames * self.training_args.per_device_eval_batch_size)
        return {
            "activations": estimate_activations(self.model, num_frames=num_frames, is_packed=is_packed),
            "backward": estimate_widest(self.model, num_frames=num_frames, is_backward=True),
            "inference": estimate_widest(self.model, num_frames=heard_frames),
        }

    def _describe_cache(self) -> dict[str, int | None] | None:
        if not self.num_variants:
            return None
        frame = count_frame_bytes(self.prefix, DTYPES[self.flags["cache_dtype"]])
        frames_per_second = SAMPLING_RATE / self.model.config.inputs_to_logits_ratio
        total = None
        if self.corpus:  # an utterance has a frame at its start and at its end
            num_frames = self.corpus.seconds * frames_per_second + self.corpus.num_utterances
            total = round(frame * num_frames) * self.num_variants
        return {"variants": self.num_variants, "bytes_per_second": round(frame * frames_per_second), "bytes": total}

    def try_out(self, plan: Plan) -> None:
        """Runs two steps on random weights and random speech and adds what they took, or why they did not run."""
        draw = getattr(self.recipe, "draw_trial", None)
        if not self.has_stages and draw is None:
            plan.trial = "not possible: the batches of this kind of model are not known here"
            return
        if any(hasattr(parameter, "quant_state") for parameter in self.model.parameters()):
            plan.trial = "not possible: there are no random weights in 4 bits"
            return
        if plan.peak_bytes > plan.available_bytes:
            plan.trial = "left out: it would not fit into memory"
            return
        model = self.recipe.plan_model(self.arguments)
        characters = self.corpus.characters_per_second if self.corpus else DEFAULT_CHARACTERS / DEFAULT_SECONDS
        seconds = (plan.longest_seconds, plan.typical_seconds)
        if draw is not None:
            objective, batches = draw(
                self.arguments, model, num_rows=plan.num_rows, seconds=seconds, characters_per_second=characters
            )
        else:
            batches = [
                draw_batch(model, num_rows=plan.num_rows, seconds=long, num_tokens=round(characters * long))
                for long in seconds
            ]
            objective = CTCObjective(model)
        trial = run_trial(objective, self.training_args, batches, adapter_names=self.adapter_names)
        plan.trial = asdict(trial)
        plan.memory |= {"activations": trial.activation_bytes, "optimizer": trial.optimizer_bytes}
        plan.time = self._add_up_time(plan, trial)

    def _add_up_time(self, plan: Plan, trial: Trial) -> dict[str, float | None]:
        num_batches = None
        if plan.num_steps is not None:
            num_batches = plan.num_steps * self.training_args.gradient_accumulation_steps
        if self.num_variants:
            heard = trial.frozen_seconds / (plan.num_rows * plan.typical_seconds)  # for a second of audio
            frozen = heard * self.corpus.seconds * self.num_variants if self.corpus else None
        else:
            frozen = None if num_batches is None else trial.frozen_seconds * num_batches
        training = None if None in (num_batches, frozen) else trial.step_seconds * num_batches + frozen
        return {"step": trial.step_seconds, "frozen_pass": frozen, "training": training}


def find_available_bytes(device: torch.device) -> int:
    """Returns the free memory of a GPU, or of this machine within the limit of the container that this runs in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # What this process has counts as free: the training will have it in its place.
    own, available = psutil.Process().memory_info().rss, psutil.virtual_memory().available
    if MEMORY_LIMIT.is_file() and (limit := MEMORY_LIMIT.read_text().strip()).isdecimal():
        available = min(available, int(limit) - int(MEMORY_USED.read_text()))
    return own + available


def format_plan(plan: Plan) -> str:
    """Returns the plan as tables."""
    totals = {key: sum(group[key] for group in plan.groups.values()) for key in ("parameters", "trainable", "bytes")}
    parts = [
        {
            "part": name,
            "parameters": f"{group['parameters']:,}",
            "trainable": f"{group['trainable']:,}",
            "share": f"{group['trainable'] / max(1, group['parameters']):.1%}",
            "weights": f"{group['bytes'] / MB:.1f} MB",
        }
        for name, group in [*plan.groups.items(), ("all", totals)]
    ]
    is_measured = isinstance(plan.trial, dict)
    memory = [
        {"memory": name, "size": _format_size(value), "how": _describe_source(name, value, is_measured=is_measured)}
        for name, value in plan.memory.items()
    ]
    memory += [
        {"memory": "peak", "size": _format_size(plan.peak_bytes), "how": "of a step, or of a pass without gradients"},
        {"memory": f"available ({plan.device})", "size": _format_size(plan.available_bytes), "how": ""},
    ]
    return "\n\n".join([format_table(parts), format_table(memory), format_table(_list_rest(plan))])


def _describe_source(name: str, value: int | None, *, is_measured: bool) -> str:
    if value is None:
        return "left out of the peak"
    if name in ("activations", "optimizer") and is_measured:
        return "measured in the trial"
    if name == "libraries":
        return "measured, of this process"
    return "estimated, of the longest batch" if name in BATCH_MEMORY else "counted"


def _list_rest(plan: Plan) -> list[dict[str, str]]:
    audio = f"{plan.num_rows} utterances of {plan.typical_seconds:.1f} s, at most {plan.longest_seconds:.1f} s"
    rows = {"batch": audio, "steps": "not known" if plan.num_steps is None else f"{plan.num_steps:,}"}
    rows["cache"] = "none"
    if plan.cache:
        rate, variants = plan.cache["bytes_per_second"] / 1e3, plan.cache["variants"]
        rows["cache"] = f"{_format_size(plan.cache['bytes'])}: {rate:.1f} kB a second of audio, {variants} variants"
    if isinstance(plan.trial, str):
        rows["trial"] = plan.trial
    else:
        rows["a step"] = f"{1e3 * plan.time['step']:.0f} ms"
        if plan.time["frozen_pass"] != 0:
            rows["frozen part"] = f"{_format_seconds(plan.time['frozen_pass'])} in all"
        rows["all steps"] = f"{_format_seconds(plan.time['training'])}, without reading speech and evaluating"
    return [{"training": name, "plan": value} for name, value in rows.items()]


def _format_size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "not known"
    return f"{num_bytes / GB:.2f} GB" if num_bytes >= GB else f"{num_bytes / MB:.1f} MB"


def _format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def parse_options(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Returns what the command line says to this command, and the recipe's own tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", help="Recipe to plan. Default: that of `--config`.")
    parser.add_argument("--config", help="YAML file <recipe>_<data>.yaml of the recipe's flags.")
    parser.add_argument("--output_file", type=Path, help="JSON file for the plan.")
    parser.add_argument("--no_trial", action="store_true", help="Only count: no steps on random weights and speech.")
    options, tokens = parser.parse_known_args(argv)
    return options, [*tokens, f"--config={options.config}"] if options.config else tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    options, tokens = parse_options(argv)
    recipe = importlib.import_module(f"recipes.{find_recipe(options.recipe, options.config)}")
    planner = Planner(recipe, parse_arguments(*recipe.ARGUMENTS, argv=tokens))
    plan = planner.make_plan()
    if not options.no_trial:
        planner.try_out(plan)
    print(format_plan(plan))
    if options.output_file:
        write_text(options.output_file, json.dumps(plan.to_dict(), indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
