"""Trains the adapters of many speakers together on one frozen base, each as if it were alone.

In every step what remains of the base runs once on the rows of all speakers, and each adapter acts on its own rows.
A speaker's loss is the mean over the speaker's own rows, so its adapter gets the gradient that it would get alone;
order, dropout, schedule, clipping, early stopping and best state are each speaker's own too.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from modeling.adapter_blocks import seed_dropout
from modeling.adapters import find_adapter_layers
from recipes.trainer import AdapterTrainer, SeededSampler, find_dropout_seed, set_frozen_modules_to_eval


def check_stackable(arguments) -> None:
    """
    Makes sure that a stack can do what the training arguments ask for.

    Raises:
        ValueError: They ask for accumulated gradients, another metric than the loss, or mixed precision.
    """
    if arguments.gradient_accumulation_steps > 1:
        raise ValueError(
            "`gradient_accumulation_steps` must be 1 for several speakers, got "
            f"{arguments.gradient_accumulation_steps}. Raise `per_device_train_batch_size`: the rows of one speaker."
        )
    if arguments.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise ValueError(
            f"`metric_for_best_model` must be loss for several speakers, got {arguments.metric_for_best_model!r}."
        )
    if arguments.bf16 or arguments.fp16:
        raise ValueError("`bf16` and `fp16` must be off for several speakers. `cache_dtype` bfloat16 saves more.")


class StackMember:
    """
    One speaker of a stack: the adapter's blocks with an optimizer, a schedule and a best state of their own.

    Args:
        adapter_name: Name of the adapter in the model.
        blocks: The adapter's modules in the model.
        train_dataset: The speaker's utterances.
        eval_dataset: Utterances for early stopping and the best state, if the arguments ask for them.
        trainer: Makes optimizer and schedule; its arguments hold for every speaker.
    """

    def __init__(
        self,
        adapter_name: str,
        blocks: nn.ModuleList,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        *,
        trainer: AdapterTrainer,
    ):
        self.adapter_name, self.blocks = adapter_name, blocks
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.arguments = trainer.args
        self.steps_per_epoch = math.ceil(len(train_dataset) / self.arguments.train_batch_size)
        num_steps = math.ceil(self.arguments.num_train_epochs * self.steps_per_epoch)
        self.num_steps = self.arguments.max_steps if self.arguments.max_steps > 0 else num_steps
        trainer.optimizer = trainer.lr_scheduler = None
        self.optimizer = trainer.create_optimizer(blocks)
        self.scheduler = trainer.create_scheduler(self.num_steps, self.optimizer)
        self.step = 0
        self.best_loss, self.best_state, self.num_worse = math.inf, None, 0
        self.batches = self._draw_batches()

    @property
    def is_done(self) -> bool:
        """Whether the training is over, by steps or by early stopping."""
        patience = self.arguments.early_stopping_patience
        return self.step >= self.num_steps or (patience is not None and self.num_worse >= patience)

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the arguments ask for an evaluation after the last step."""
        strategy = self.arguments.eval_strategy
        if self.eval_dataset is None or strategy == IntervalStrategy.NO:
            return False
        every = self.steps_per_epoch if strategy == IntervalStrategy.EPOCH else self.arguments.eval_steps
        return self.step % every == 0 or (strategy == IntervalStrategy.EPOCH and self.step == self.num_steps)

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

    def update(self) -> None:
        """Takes an optimizer step with the gradients that are there."""
        if self.arguments.max_grad_norm and self.arguments.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.blocks.parameters(), self.arguments.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1

    def note_loss(self, loss: float) -> None:
        """Keeps the adapter's weights if `loss` is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss, self.num_worse = loss, 0
            self.best_state = {name: value.detach().clone() for name, value in self.blocks.state_dict().items()}
        else:
            self.num_worse += 1

    def finish(self) -> None:
        """Gives the adapter its best weights back, if the arguments ask for them."""
        if self.arguments.load_best_model_at_end and self.best_state is not None:
            self.blocks.load_state_dict(self.best_state)


def find_blocks(model: nn.Module, adapter_name: str) -> nn.ModuleList:
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
    progress = tqdm(total=sum(member.num_steps for member in members), desc="training", unit="step", disable=None)
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
            member.update()
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
        member.note_loss(total / len(member.eval_dataset))
    model.train()
    set_frozen_modules_to_eval(model)
