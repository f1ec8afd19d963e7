"""What a domain adaptation minimises, and the Trainer that does it: on transcripts, on pairs of clips, or on both.

task      the model's own loss on the transcript or the answer; prompts are ignored
distill   adapter(tower(target)) toward tower(source), frame by frame; nothing behind the tower is needed
both      their sum
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, ProcessorMixin
from transformers.trainer_utils import EvalLoopOutput

from data.code_digest import digest_code
from data.collators import IGNORED_LABEL
from data.domain_utterances import CachedDomain, DomainCollator, DomainUtterances, PairedUtterances
from data.state_cache import build_cache, resolve_cache_folder
from inference.audio_models import find_family, find_tower
from modeling.fingerprint import digest_base, fingerprint_processor
from training.audio_tower import apply_block, run_tower, tower_skipped
from training.trainer import AdapterTrainer, RecipeTrainingArguments

OBJECTIVES = ("task", "distill", "both")
# Feature distances under these names in logs and results.
DISTANCES = ("cosine_distance", "l2_distance")
# What the parts of a loss are means over: frames, the energy of their targets, tokens of the transcripts.
ITEMS = {"cosine_distance": "frames", "l2_distance": "energy", "task_loss": "tokens"}


@dataclass
class DomainTrainingArguments(RecipeTrainingArguments):
    """Training arguments with defaults for some hundred to some thousand clips."""

    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the clips."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Clips of a step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Clips evaluated together."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Highest learning rate."})
    scale_lr: float = field(default=1e-3, metadata={"help": "Highest learning rate of a domain adapter's scale."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule, as in TrainingArguments."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of the warm-up; below 1, a share of all."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints, as in TrainingArguments."})


def measure_distances(
    features: torch.Tensor, targets: torch.Tensor, num_frames: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    Returns how far features are from targets, over the frames that are no padding.

    Args:
        features: `(batch, frames, hidden)`.
        targets: What they shall be, of the same shape.
        num_frames: Frames `(batch,)` that are no padding.

    Returns:
        `cosine_distance`, one minus the cosine similarity, mean over frames, and `l2_distance`, the squared difference
        over the squared norm of the targets.

    Example:

    ```python
    >>> import torch
    >>> from training.objectives.domain import measure_distances

    >>> targets = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]])  # the second frame is padding
    >>> distances = measure_distances(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), targets, torch.tensor([1]))
    >>> {name: value.item() for name, value in distances.items()}
    {'cosine_distance': 1.0, 'l2_distance': 2.0}

    ```
    """
    is_frame = torch.arange(features.shape[1], device=features.device) < num_frames.to(features.device).unsqueeze(1)
    features, targets = features[is_frame].float(), targets[is_frame].float()  # (frames of all, hidden)
    return {
        "cosine_distance": 1 - nn.functional.cosine_similarity(features, targets, dim=-1).mean(),
        "l2_distance": (features - targets).square().sum() / targets.square().sum(),
    }


class DomainObjective(nn.Module):
    """
    A model together with what is minimised; `forward` takes a batch and returns the loss, as the Trainer expects.

    Args:
        model: With adapters; whole for a task, or with its tower alone.
        objective: `"task"`, `"distill"` or `"both"`.
        speech_adapter_block: The adapter on the tower's output, for distillation.
        distill_weight: Factor of the distances where there is a task too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: str,
        *,
        speech_adapter_block: nn.Module | None = None,
        distill_weight: float = 1.0,
    ):
        super().__init__()
        self.objective, self.distill_weight = objective, distill_weight
        # A model of which the tower alone is loaded has parts without memory, which no device can take.
        self.kept = {"model": model}
        self.model = find_tower(model) if objective == "distill" else model
        self.speech_adapter_block = speech_adapter_block

    @property
    def adapted_model(self) -> PreTrainedModel:
        """The model that has the adapters."""
        return self.kept["model"]

    def forget_weights(self) -> None:
        """Gives the memory of all weights back; names and shapes stay, for what tells of them."""
        for module in self.adapted_model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)

    def gradient_checkpointing_enable(self, **options) -> None:
        """As of the model, for the Trainer."""
        self.adapted_model.gradient_checkpointing_enable(**options)

    def forward(
        self, return_loss: bool = True, shares: Mapping[str, torch.Tensor] | None = None, **batch: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Returns `loss` and, of pairs, the distances.

        Args:
            return_loss: Tells the Trainer that there is a loss in evaluations too; it is always returned.
            shares: Share of the batch in the items of an optimizer step, as from [`count_items`]. Default: all.
            batch: From [`DomainCollator`].
        """
        del return_loss
        means = self.measure(batch)
        if shares is not None:
            means = {name: value * shares[ITEMS[name]] for name, value in means.items()}
        distances = {name: means[name].detach() for name in DISTANCES if name in means}
        return {"loss": self.add_up(means), **distances}

    def measure(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the model's own loss as `task_loss` and, of pairs, the distances: each a mean over its `ITEMS`."""
        model = self.adapted_model
        num_frames = batch.pop("num_frames")
        states = _find_states(model, batch, "states", "input_features")
        means = {}
        if self.objective != "task":
            targets = _find_states(model, batch, "source_states", "source_features")
            if self.objective == "distill":  # a clip of 10 s fills a third of the tower's 30 s; padding says nothing
                longest = int(num_frames.max())
                states, targets = states[:, :longest], targets[:, :longest]
            features = apply_block(self.speech_adapter_block, states, num_frames.to(states.device))
            means |= measure_distances(features, targets, num_frames)
        if self.objective != "distill":
            with tower_skipped(model):
                means["task_loss"] = model(input_features=states, **batch).loss
        return means

    def add_up(self, means: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the loss that the parts of [`measure`] make."""
        weight = self.distill_weight if self.objective == "both" else 1.0
        return sum(value * (weight if name in DISTANCES else 1.0) for name, value in means.items())

    def count_items(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns how many items of each of `ITEMS` a batch has, in which pairs have their states."""
        counts = {}
        if self.objective != "task":
            targets, num_frames = batch["source_states"], batch["num_frames"]
            is_frame = torch.arange(targets.shape[1], device=targets.device) < num_frames.to(targets.device)[:, None]
            counts["frames"] = num_frames.sum().float()
            counts["energy"] = targets[is_frame].float().square().sum()
        if self.objective != "distill":
            counts["tokens"] = (batch["labels"] != IGNORED_LABEL).sum().float()
        return counts

    @torch.no_grad()
    def run_tower(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns a batch of pairs with states in place of features: their energy is asked for before the loss is."""
        if self.objective == "task":
            return batch
        states = {
            name: _find_states(self.adapted_model, batch, name, features)
            for name, features in (("states", "input_features"), ("source_states", "source_features"))
        }
        return batch | states


def _find_states(model: PreTrainedModel, batch: dict, states: str, features: str) -> torch.Tensor:
    """The tower's output `(batch, frames, hidden)`: taken out of the batch, or computed now."""
    if states in batch:
        tower = find_tower(model)
        return batch.pop(states).to(tower.device, tower.dtype)
    mask = find_family(model.config).mask
    return run_tower(model, {"input_features": batch.pop(features), mask: batch[mask]})


class DomainTrainer(AdapterTrainer):
    """
    The Trainer of a [`DomainObjective`]: saves its model's adapters, logs the distances, and gives parameters of some
    names a learning rate of their own.

    Args:
        parameter_lrs: Last part of a parameter's name to its highest learning rate. Default: a domain adapter's scale
            with `scale_lr`.
    """

    def __init__(self, *args, parameter_lrs: Mapping[str, float] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.parameter_lrs = {"scale": self.args.scale_lr} if parameter_lrs is None else dict(parameter_lrs)
        # The Trainer would take `**batch` for a promise to divide by the tokens of all batches, as `shares` do.
        self.model_accepts_loss_kwargs = False
        self._noted: dict[str, torch.Tensor] = {}
        self._num_noted = 0

    def _unwrapped(self) -> nn.Module:
        return super()._unwrapped().adapted_model

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the matrices: the Trainer's rule would spare all of an adapter that stands inside a norm."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with the groups of parameters split by name; the schedule is the same for all."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        names = {id(value): name for name, value in (model or self.model).named_parameters()}
        for group in list(optimizer.param_groups):
            for suffix, lr in self.parameter_lrs.items():
                own = [value for value in group["params"] if names[id(value)].rpartition(".")[2] == suffix]
                if own:
                    own_ids = set(map(id, own))
                    group["params"] = [value for value in group["params"] if id(value) not in own_ids]
                    optimizer.add_param_group({**group, "params": own, "lr": lr})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        """As the Trainer's, with the states of pairs: whatever is a mean over a step is known before it begins."""
        self._num_noted += 1
        return super().get_batch_samples(map(self._run_tower, epoch_iterator), *args, **kwargs)

    def _run_tower(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with self.accelerator.autocast():
            return self._objective().run_tower(self._prepare_inputs(batch))

    def _objective(self) -> DomainObjective:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def count_items(self, inputs):
        return self._objective().count_items(inputs)

    def _weigh(self, result, inputs, *, is_training: bool):
        del inputs, is_training  # the objective does, each part of its loss for itself
        return result

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if model.training:
            inputs = {**inputs, "shares": self.find_shares(inputs)}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        for name in DISTANCES:
            if model.training and name in outputs:
                self._noted[name] = self._noted.get(name, 0.0) + outputs[name]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the mean distances since the last log of a training step."""
        if "loss" in logs:
            noted = self.accelerator.reduce(self._noted, "mean")
            logs |= {name: value.item() / self._num_noted for name, value in noted.items()}
            self._noted, self._num_noted = {}, 0
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader, *_args, metric_key_prefix: str = "eval", **_kwargs) -> EvalLoopOutput:
        """Returns the loss as a mean over the items of all utterances: it does not depend on batches or processes."""
        dataset, state = dataloader.dataset, self.accelerator
        own = Subset(dataset, range(state.process_index, len(dataset), state.num_processes))
        with state.autocast():
            totals = sum_parts(self._objective(), own, self.data_collator, batch_size=self.args.eval_batch_size)
        totals = state.reduce({name: value.to(self.args.device) for name, value in totals.items()})
        loss = self._objective().add_up(divide_parts(totals)).item()
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss}, len(dataset))


@torch.no_grad()
def sum_parts(
    objective: DomainObjective, dataset: Dataset, collator: DomainCollator, *, batch_size: int
) -> dict[str, torch.Tensor]:
    """
    Returns the sums of the parts of a loss over a dataset, by the names of `ITEMS`, and of their items.

    Args:
        objective: It is left in evaluation or training mode as it was.
        dataset: Utterances or pairs.
        collator: Makes batches of them.
        batch_size: Utterances of a batch.
    """
    was_training, device = objective.training, find_tower(objective.adapted_model).device
    objective.eval()
    totals: dict[str, torch.Tensor] = {}
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collator):
        batch = objective.run_tower({name: value.to(device) for name, value in batch.items()})
        counts = objective.count_items(batch)
        sums = {name: value * counts[ITEMS[name]] for name, value in objective.measure(batch).items()}
        for name, value in (counts | sums).items():
            totals[name] = totals.get(name, 0.0) + value.double().cpu()
    objective.train(was_training)
    return totals


def divide_parts(totals: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the means of what [`sum_parts`] has summed."""
    return {name: totals[name] / totals[items] for name, items in ITEMS.items() if name in totals}


def evaluate_distances(
    objective: DomainObjective, dataset: Dataset, collator: DomainCollator, *, batch_size: int
) -> dict[str, float]:
    """
    Returns the distances of [`measure_distances`] over pairs, as if they were one batch.

    Args:
        objective: Of pairs; it is left in evaluation or training mode as it was.
        dataset: The pairs.
        collator: Makes batches of them.
        batch_size: Pairs of a batch.
    """
    means = divide_parts(sum_parts(objective, dataset, collator, batch_size=batch_size))
    return {name: means[name].item() for name in DISTANCES}


def _keeps_padding(collator: DomainCollator) -> bool:
    """Whisper's decoder looks at padding too; a distance does not."""
    return collator.prompt.hears_padding and collator.has_answers


def _run_pairs(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], *, keeps_padding: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns what the tower makes of a batch, of pairs of both sides, and the frames to keep."""
    mask = find_family(model.config).mask
    states = {"states": run_tower(model, batch)}
    if "source_features" in batch:
        source = {"input_features": batch["source_features"], mask: batch[mask]}
        states["source_states"] = run_tower(model, source)
    lengths = batch["num_frames"]
    return states, torch.full_like(lengths, states["states"].shape[1]) if keeps_padding else lengths


def cache_tower(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    variants: list[DomainUtterances | PairedUtterances],
    collator: DomainCollator,
    *,
    folder: str | Path | None,
    dtype: str,
    batch_size: int,
) -> CachedDomain:
    """
    Returns utterances with the tower's output in place of their samples, computed once and kept on the disk.

    Args:
        model: On its device; the tower's weights are part of the caches' key.
        processor: Of the model, likewise.
        variants: The utterances, once a simulated channel; epoch e takes variant e modulo their number.
        collator: Makes batches of them.
        folder: Of all caches. Default: as [`resolve_cache_folder`].
        dtype: `"float32"` or `"bfloat16"`.
        batch_size: Utterances that the tower hears together.
    """
    keeps_padding = _keeps_padding(collator)
    key = {
        "tower": digest_base(find_tower(model)),
        "keeps_padding": keeps_padding,
        "model_code": digest_code(run_tower, find_tower(model), collator.prompt.extractor),
        **fingerprint_processor(processor),
    }
    audio_collator = DomainCollator(collator.prompt, has_answers=False)
    run = partial(_run_pairs, model, keeps_padding=keeps_padding)
    caches = [
        build_cache(
            dataset, run, collate=audio_collator, key=key, folder=resolve_cache_folder(folder),
            batch_size=batch_size, dtype=dtype,
        )
        for dataset in variants
    ]  # fmt: skip
    return CachedDomain(list(zip(variants, caches, strict=True)))
