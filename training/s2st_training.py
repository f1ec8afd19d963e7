"""Training of speech translation: arguments, learning rates of encoder and decoders, stages, evaluation by labels."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers.trainer_utils import EvalLoopOutput

from training.health import HealthMeter
from training.objectives.s2st import S2STObjective
from training.trainer import AdapterTrainer, RecipeTrainingArguments

ENCODER_PREFIX = "encoder."


@dataclass
class S2STTrainingArguments(RecipeTrainingArguments):
    """Training arguments with defaults for a model of a few million parameters, from scratch."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "wer")

    num_train_epochs: float = field(default=30, metadata={"help": "Passes over the speech."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Utterances of a step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Utterances evaluated together."})
    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": "How batches are made."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Decay of Adam's second moments."})
    lr_scheduler_type: str = field(default="inverse_sqrt", metadata={"help": "Schedule, as in TrainingArguments."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of the warm-up; below 1, a share of all."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Largest norm of the gradient."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints, as in TrainingArguments."})


class S2STTrainer(AdapterTrainer):
    """
    The Trainer of an [`S2STObjective`]: gives encoder and decoders learning rates of their own, and leaves the
    decoders as they are for the first steps of a transfer.

    An evaluation has the health figures of [`HealthMeter`], too.

    Args:
        encoder_lr: Highest learning rate of the encoder. Default: `learning_rate`.
        decoder_lr: Highest learning rate of everything else. Default: `learning_rate`.
        encoder_steps: Optimizer steps in which the encoder alone trains; below 1, a share of all.
    """

    def __init__(
        self,
        *args,
        encoder_lr: float | None = None,
        decoder_lr: float | None = None,
        encoder_steps: float = 0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.encoder_lr, self.decoder_lr = encoder_lr, decoder_lr
        self.encoder_steps, self.num_encoder_steps = encoder_steps, 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with the encoder's parameters in groups of their own; the schedule is the same for all."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not is_new or not (self.encoder_lr or self.decoder_lr):
            return optimizer
        of_encoder = {id(value) for name, value in self._unwrapped().named_parameters() if is_of_encoder(name)}
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for group in groups:
            for is_encoder, lr in ((True, self.encoder_lr), (False, self.decoder_lr)):
                own = [value for value in group["params"] if (id(value) in of_encoder) == is_encoder]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": lr or group["lr"]})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As the Trainer's; now the number of steps is known."""
        steps = self.encoder_steps
        self.num_encoder_steps = math.ceil(steps * num_training_steps) if steps < 1 else int(steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: nn.Module, *args, **kwargs) -> torch.Tensor:
        """As the Trainer's; while the encoder alone trains, all else loses its gradient before it is clipped."""
        self.objective.step = self.state.global_step
        loss = super().training_step(model, *args, **kwargs)
        if self.state.global_step < self.num_encoder_steps:
            for name, parameter in self._unwrapped().named_parameters():
                if not is_of_encoder(name):
                    parameter.grad = None  # the optimizer passes over it, weight decay included
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, and says which utterances do not fit."""
        if "loss" in logs:
            self.objective.misfits.report()
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader, *_args, metric_key_prefix: str = "eval", **_kwargs) -> EvalLoopOutput:
        """Returns each loss as a mean over the labels of all utterances, whatever the batches, and further figures."""
        dataset, state = dataloader.dataset, self.accelerator
        own = Subset(dataset, range(state.process_index, len(dataset), state.num_processes))
        meter = HealthMeter()
        self.objective.watch = partial(meter.update, self._unwrapped())
        with state.autocast():
            sums = sum_losses(self.objective, own, self.data_collator, batch_size=self.args.eval_batch_size)
        self.objective.watch = None
        sums = state.reduce({name: value.to(self.args.device) for name, value in sums.items()})
        means = {name: sums[name] / sums[items] for name, items in self.objective.ITEMS.items() if name in sums}
        figures = {"loss": float(self.objective.add_up(means)), **{name: float(mean) for name, mean in means.items()}}
        health = {name: torch.tensor(value) for name, value in meter.compute().items()}
        figures |= {name: float(value) for name, value in state.reduce(health, "mean").items()}
        if self.score:
            figures |= self.score()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        return EvalLoopOutput(None, None, metrics, len(dataset))


def is_of_encoder(name: str) -> bool:
    """Whether a parameter of that name in the model is the encoder's."""
    return name.startswith(ENCODER_PREFIX)


@torch.no_grad()
def sum_losses(
    objective: S2STObjective, dataset: Dataset, collator: Callable, *, batch_size: int
) -> dict[str, torch.Tensor]:
    """
    Returns the sums of the losses over a dataset by name, and of the labels that they are means over.

    Args:
        objective: It is left in evaluation or training mode as it was.
        dataset: Utterances.
        collator: Makes batches of them.
        batch_size: Utterances of a batch.
    """
    was_training, device = objective.training, objective.adapted_model.device
    objective.eval()
    sums: dict[str, torch.Tensor] = {}
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collator):
        batch = {name: value.to(device) for name, value in batch.items()}
        counts = objective.count_items(batch)
        losses = {name: mean * counts[objective.ITEMS[name]] for name, mean in objective.measure(batch).items()}
        for name, value in (counts | losses).items():
            sums[name] = sums.get(name, 0.0) + value.double().cpu()
    objective.train(was_training)
    return sums
