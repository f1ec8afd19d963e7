"""Domain training: arguments, a learning rate by parameter, evaluation by items, the tower's output kept on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, ProcessorMixin
from transformers.trainer_utils import EvalLoopOutput

from data.code_digest import digest_code
from data.domain_utterances import CachedDomain, DomainCollator, DomainUtterances, PairedUtterances
from data.state_cache import build_cache, resolve_cache_folder
from inference.audio_models import find_family, find_tower
from modeling.fingerprint import fingerprint_processor
from training.audio_tower import run_tower
from training.checkpoint_digest import digest_base
from training.objectives.domain import divide_parts, sum_parts
from training.trainer import AdapterTrainer, RecipeTrainingArguments


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


class DomainTrainer(AdapterTrainer):
    """
    The Trainer of a [`DomainObjective`]: gives parameters of some names a learning rate of their own.

    Args:
        parameter_lrs: Last part of a parameter's name to its highest learning rate. Default: a domain adapter's scale
            with `scale_lr`.
    """

    def __init__(self, *args, parameter_lrs: Mapping[str, float] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.parameter_lrs = {"scale": self.args.scale_lr} if parameter_lrs is None else dict(parameter_lrs)

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

    def evaluation_loop(self, dataloader, *_args, metric_key_prefix: str = "eval", **_kwargs) -> EvalLoopOutput:
        """Returns the loss as a mean over the items of all utterances: it does not depend on batches or processes."""
        dataset, state = dataloader.dataset, self.accelerator
        own = Subset(dataset, range(state.process_index, len(dataset), state.num_processes))
        with state.autocast():
            totals = sum_parts(self.objective, own, self.data_collator, batch_size=self.args.eval_batch_size)
        totals = state.reduce({name: value.to(self.args.device) for name, value in totals.items()})
        loss = self.objective.add_up(divide_parts(totals)).item()
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss}, len(dataset))


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
