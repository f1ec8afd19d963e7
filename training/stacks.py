"""Trains the adapters of many speakers together on one frozen base, each as if it were alone.

In every step what remains of the base runs once on the rows of all speakers, and each adapter acts on its own rows.
A speaker's loss is the mean over the speaker's own rows, so its adapter gets the gradient that it would get alone;
order, dropout, schedule, clipping, early stopping and best state are each speaker's own too.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from modeling.adapters import find_adapter_layers
from training.adapter_dropout import seed_dropout
from training.honoured_arguments import HONOURED_BY_STACK, check_honoured, follows_metric
from training.trainer import (
    AdapterTrainer,
    RecipeTrainingArguments,
    SeededSampler,
    find_dropout_seed,
    set_frozen_modules_to_eval,
)


def check_stackable(arguments: RecipeTrainingArguments) -> None:
    """
    Makes sure that a stack can do what the training arguments ask for.

    Raises:
        ValueError: They ask for what [`train_stack`] does not honour, for checkpoints, or for mixed precision, which
            the launcher can ask for too.
    """
    check_honoured(arguments.changed, HONOURED_BY_STACK, loop="the training of several speakers")
    if "save_strategy" in arguments.changed and not arguments.load_best_model_at_end:
        raise ValueError(
            f"`save_strategy` must be no for several speakers, got {arguments.save_strategy.value}. No checkpoints "
            "are written; `resume_from_checkpoint` keeps the speakers that are finished."
        )
    if arguments.mixed_precision != "no":
        raise ValueError(
            "Mixed precision (`bf16`, or `mixed_precision` of the launcher) must be off for several speakers, got "
            f"{arguments.mixed_precision}. Launch with accelerate_configs/cpu.yaml or `--mixed_precision no`; "
            "`cache_dtype` bfloat16 saves more."
        )


class StackMember:
    """
    One speaker of a stack: the adapter's blocks with an optimizer, a schedule and a best state of their own.

    Args:
        adapter_name: Name of the adapter in the model.
        blocks: The adapter's modules in the model.
        train_dataset: The speaker's utterances.
        eval_dataset: Utterances for early stopping and the best state, if the arguments ask for them.
        trainer: Makes optimizer and schedule; its arguments hold for every speaker.
        speaker_id: The speaker, for the logs.
        score: Returns the error rates of the evaluation data, if the arguments compare models by one of them.

    Attributes:
        log_history (`list[dict]`): What was logged, as in the Trainer's state.
    """

    def __init__(
        self,
        adapter_name: str,
        blocks: nn.ModuleList,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        *,
        trainer: AdapterTrainer,
        speaker_id: str = "",
        score: Callable[[], Mapping[str, float]] | None = None,
    ):
        self.adapter_name, self.blocks, self.speaker_id, self.score = adapter_name, blocks, speaker_id, score
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.arguments: RecipeTrainingArguments = trainer.args
        self.steps_per_epoch = math.ceil(len(train_dataset) / self.arguments.train_batch_size)
        num_steps = math.ceil(self.arguments.num_train_epochs * self.steps_per_epoch)
        self.num_steps = self.arguments.max_steps if self.arguments.max_steps > 0 else num_steps
        trainer.optimizer = trainer.lr_scheduler = None
        self.optimizer = trainer.create_optimizer(blocks)
        self.scheduler = trainer.create_scheduler(self.num_steps, self.optimizer)
        self.step = 0
        self.best_rate, self.best_state, self.num_worse = None, None, 0
        self.batches = self._draw_batches()
        self.log_history: list[dict] = []
        self._losses: list[float] = []

    @property
    def is_done(self) -> bool:
        """Whether the training is over, by steps or by early stopping."""
        patience = self.arguments.early_stopping_patience
        return self.step >= self.num_steps or (patience is not None and self.num_worse >= patience)

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the arguments ask for an evaluation after the last step."""
        strategy, delay = self.arguments.eval_strategy, self.arguments.eval_delay
        if self.eval_dataset is None:
            return False
        if strategy == IntervalStrategy.STEPS:
            return delay <= self.step and (self._is_step_of(self.arguments.eval_steps) or self.step == self.num_steps)
        return strategy == IntervalStrategy.EPOCH and delay <= self._epoch and self._is_epoch_over

    @property
    def _is_log_due(self) -> bool:
        strategy = self.arguments.logging_strategy
        if self.step == 1 and self.arguments.logging_first_step:
            return True
        if strategy == IntervalStrategy.STEPS:
            return self._is_step_of(self.arguments.logging_steps)
        return strategy == IntervalStrategy.EPOCH and self._is_epoch_over

    def _is_step_of(self, every: float) -> bool:
        """Whether the last step is one of every so many; below 1, `every` is a share of all steps."""
        return self.step % (math.ceil(every * self.num_steps) if every < 1 else int(every)) == 0

    @property
    def _epoch(self) -> float:
        return self.step / self.steps_per_epoch

    @property
    def _is_epoch_over(self) -> bool:
        return self.step % self.steps_per_epoch == 0 or self.step == self.num_steps

    def _draw_batches(self) -> Iterator[list[dict]]:
        """Yields the rows of each step in the order in which a `Trainer` of this speaker alone would see them."""
        epoch = 0
        seed = self.arguments.seed if self.arguments.data_seed is None else self.arguments.data_seed
        while True:
            self.train_dataset.set_epoch(epoch)
            order = list(SeededSampler(self.train_dataset, seed=seed, find_epoch=lambda epoch=epoch: epoch))
            size = self.arguments.train_batch_size
            for start in range(0, len(order), size):
                yield [self._name(self.train_dataset[index]) for index in order[start : start + size]]
            epoch += 1

    def evaluation_batches(self) -> Iterator[list[dict]]:
        """Yields the rows of the evaluation data."""
        for start in range(0, len(self.eval_dataset), self.arguments.eval_batch_size):
            stop = min(start + self.arguments.eval_batch_size, len(self.eval_dataset))
            yield [self._name(self.eval_dataset[index]) for index in range(start, stop)]

    def _name(self, row: dict) -> dict:
        return {**row, "adapter_name": self.adapter_name}

    def update(self, loss: float) -> None:
        """Takes an optimizer step with the gradients that are there, of `loss`, and logs it when that is due."""
        # Without a limit nothing is changed, and the norm is known.
        norm = nn.utils.clip_grad_norm_(self.blocks.parameters(), self.arguments.max_grad_norm or math.inf)
        self.optimizer.step()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if not follows_metric(self.arguments):
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._losses.append(loss)
        if self._is_log_due:
            self._log(loss=fmean(self._losses), grad_norm=norm.item(), learning_rate=learning_rate)
            self._losses = []

    def note_evaluation(self, loss: float) -> None:
        """Keeps the adapter's weights if they are the best so far, by `loss` or by the error rate asked for."""
        metric = self.arguments.best_metric
        is_better = operator.gt if self.arguments.greater_is_better else operator.lt
        rates = {"loss": loss, **(self.score() if metric != "loss" and self.score else {})}
        rates = {name: rates[name] for name in self.arguments.metrics if name in rates}
        self._log(**{f"eval_{name}": rate for name, rate in rates.items()})
        if follows_metric(self.arguments):
            self.scheduler.step(rates[metric])
        if self.best_rate is None or is_better(rates[metric], self.best_rate):
            self.best_rate, self.num_worse = rates[metric], 0
            self.best_state = {name: value.detach().clone() for name, value in self.blocks.state_dict().items()}
        else:
            self.num_worse += 1

    def _log(self, **values: float) -> None:
        self.log_history.append({**values, "epoch": self._epoch, "step": self.step})
        shown = {name: f"{value:.4g}" for name, value in (values | {"epoch": self._epoch}).items()}
        tqdm.write(str({"speaker": self.speaker_id or self.adapter_name, **shown}))

    def finish(self) -> None:
        """Gives the adapter its best weights back, if the arguments ask for them."""
        if self.arguments.load_best_model_at_end and self.best_state is not None:
            self.blocks.load_state_dict(self.best_state)


def find_stacked_blocks(model: nn.Module, adapter_name: str) -> nn.ModuleList:
    """Returns the modules of a speech adapter in `model`."""
    blocks = [layer.find_block(adapter_name) for layer in find_adapter_layers(model)]
    return nn.ModuleList(block for block in blocks if block is not None)


def train_stack(
    model: PreTrainedModel, members: Sequence[StackMember], collate: Callable[[list[dict]], dict]
) -> dict[str, float]:
    """
    Trains all members to their ends.

    Args:
        model: The base with the adapters of all members; nothing else is trainable.
        members: The speakers.
        collate: Turns rows with `adapter_name` into arguments of `model`, among them `adapter_names`.

    Returns:
        The last training loss of each adapter, by name.

    Raises:
        ValueError: A speaker's loss is not finite.
    """
    model.train()
    set_frozen_modules_to_eval(model)
    losses: dict[str, float] = {}
    is_quiet = members[0].arguments.disable_tqdm or None
    num_steps = sum(member.num_steps for member in members)
    progress = tqdm(total=num_steps, desc="training", unit="step", disable=is_quiet)
    while active := [member for member in members if not member.is_done]:
        rows = []
        for member in active:
            seed_dropout(member.blocks, find_dropout_seed(member.arguments.seed, member.step))
            rows += next(member.batches)
        batch = collate(rows)
        output = model(**batch)
        output.loss.backward()
        names = dict.fromkeys(batch["adapter_names"])
        losses |= dict(zip(names, output.losses.tolist(), strict=True))
        for member in active:
            if not math.isfinite(losses[member.adapter_name]):
                raise ValueError(
                    f"The loss of {member.adapter_name!r} must be finite, got {losses[member.adapter_name]} at step "
                    f"{member.step}. Lower `learning_rate`."
                )
            member.update(losses[member.adapter_name])
        progress.update(len(active))
        _evaluate_due([member for member in active if member.is_evaluation_due], model, collate)
    progress.close()
    for member in members:
        member.finish()
    return losses


def _evaluate_due(members: Sequence[StackMember], model: PreTrainedModel, collate: Callable) -> None:
    if not members:
        return
    model.eval()
    for member in members:
        total = 0.0
        with torch.no_grad():
            for rows in member.evaluation_batches():
                total += len(rows) * model(**collate(rows)).loss.item()
        member.note_evaluation(total / len(member.eval_dataset))
    model.train()
    set_frozen_modules_to_eval(model)
