"""Two steps of a training on random speech, with random weights: how long they take, and what they keep."""

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from data.audio import SAMPLING_RATE
from training.objectives import Objective
from training.trainer import AdapterTrainer


@dataclass(frozen=True)
class Trial:
    """
    What two steps told.

    Args:
        activation_bytes: Kept for the backward pass of the longest batch.
        optimizer_bytes: Of the optimizer's states after a step.
        step_seconds: Of the step on a typical batch.
        frozen_seconds: Of the frozen part on a typical batch; 0 without one.
    """

    activation_bytes: int
    optimizer_bytes: int
    step_seconds: float
    frozen_seconds: float


class SavedBytes:
    """
    Counts the memory that autograd keeps for the backward pass while it is alive, each tensor's once.

    Args:
        ignored: Tensors that are there anyway: the parameters.
    """

    def __init__(self, ignored: Sequence[torch.Tensor]):
        self.peak = self._now = 0
        self._num_holders: dict[int, int] = {_identify(tensor): 1 for tensor in ignored}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is saved inside."""
        with saved_tensors_hooks(lambda tensor: _Saved(tensor, self), lambda saved: saved.tensor):
            yield

    def hold(self, tensor: torch.Tensor) -> None:
        """Notes that `tensor` is kept once more."""
        key = _identify(tensor)
        self._num_holders[key] = self._num_holders.get(key, 0) + 1
        if self._num_holders[key] == 1:
            self._now += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self._now)

    def release(self, tensor: torch.Tensor) -> None:
        """Notes that `tensor` is kept once less."""
        key = _identify(tensor)
        self._num_holders[key] -= 1
        if self._num_holders[key] == 0:
            self._now -= tensor.untyped_storage().nbytes()
            del self._num_holders[key]


class _Saved:
    def __init__(self, tensor: torch.Tensor, counter: SavedBytes):
        self.tensor, self.counter = tensor, counter
        counter.hold(tensor)

    def __del__(self):
        self.counter.release(self.tensor)


def _identify(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # one for all views


def draw_batch(model: PreTrainedModel, *, num_rows: int, seconds: float, num_tokens: int) -> dict[str, torch.Tensor]:
    """
    Returns a batch for a recogniser with stages: noise of equally long rows, and labels that CTC can align.

    Args:
        model: The recogniser.
        num_rows: Rows of the batch.
        seconds: Of audio a row.
        num_tokens: Labels a row.
    """
    config = model.config
    num_frames = max(2, round(seconds * SAMPLING_RATE / (config.inputs_to_logits_ratio // 2)))
    classes = [index for index in range(config.vocab_size) if index != config.pad_token_id]
    num_tokens = max(1, min(num_tokens, num_frames // 4))  # half the frames of logits: room for a blank beside each
    labels = torch.tensor([classes[index % len(classes)] for index in range(num_tokens)])
    return {
        "input_features": torch.randn(num_rows, num_frames, config.num_mel_bins),
        "attention_mask": torch.ones(num_rows, num_frames, dtype=torch.long),
        "labels": labels.expand(num_rows, -1).contiguous(),
    }


class _Watch(TrainerCallback):
    """Counts the memory of the first step, which warms up, and takes the time of the second."""

    def __init__(self, model: nn.Module):
        self.model, self.contexts = model, ExitStack()
        self.optimizer_bytes, self.step_seconds = 0, 0.0

    def on_step_begin(self, _args, state, _control, **_kwargs) -> None:
        if state.global_step == 0:
            self.saved = SavedBytes(list(self.model.parameters()))
            self.contexts.enter_context(self.saved.counting())
        self.start = read_clock()

    def on_step_end(self, _args, _state, _control, *, optimizer, **_kwargs) -> None:
        self.contexts.close()
        self.step_seconds = read_clock() - self.start
        values = (value for state in optimizer.state.values() for value in state.values())
        unique = {_identify(value): value.untyped_storage().nbytes() for value in values if torch.is_tensor(value)}
        self.optimizer_bytes = sum(unique.values())


def read_clock() -> float:
    """Returns seconds, when everything that was started is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_trial(
    objective: Objective,
    training_args: TrainingArguments,
    batches: Sequence[dict],
    *,
    adapter_names: Sequence[str] = (),
) -> Trial:
    """
    Returns what a step on each of two batches told, taken by the recipes' own Trainer.

    Args:
        objective: Of a model with memory; its weights change.
        training_args: Of the training; nothing is written where they say.
        batches: The longest and a typical one.
        adapter_names: Adapters that share the rows, if they are several.
    """
    objective.to(training_args.device)
    frozen_seconds = 0.0
    if getattr(objective, "prefix", None) is not None:
        packed = []
        for batch in batches:
            start = read_clock()
            packed.append(objective.run_frozen(batch | share_rows(adapter_names, len(batch["labels"]))))
            frozen_seconds = read_clock() - start
        batches = packed
    watch = _Watch(objective)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AdapterTrainer(
            objective,
            args=shorten_batch(training_args, folder, num_steps=len(batches)),
            train_dataset=list(batches),
            data_collator=lambda items: items[0],
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Trial(watch.saved.peak, watch.optimizer_bytes, watch.step_seconds, frozen_seconds)


def share_rows(adapter_names: Sequence[str], num_rows: int) -> dict[str, list[str]]:
    """Returns the adapter of each row, as many rows each, where there are several adapters."""
    if len(adapter_names) < 2:
        return {}
    return {"adapter_names": [adapter_names[row * len(adapter_names) // num_rows] for row in range(num_rows)]}


def shorten_batch(training_args: TrainingArguments, folder: str, *, num_steps: int) -> TrainingArguments:
    """Returns a copy of `training_args` for steps of one batch each that evaluates, saves and reports nothing."""
    shortened = copy.copy(training_args)
    shortened.output_dir, shortened.max_steps, shortened.per_device_train_batch_size = folder, num_steps, 1
    shortened.gradient_accumulation_steps, shortened.train_sampling_strategy = 1, "sequential"
    shortened.eval_strategy = shortened.logging_strategy = IntervalStrategy.NO
    shortened.save_strategy, shortened.load_best_model_at_end = SaveStrategy.NO, False
    shortened.report_to, shortened.push_to_hub, shortened.disable_tqdm = [], False, True
    shortened.dataloader_num_workers, shortened.dataloader_prefetch_factor = 0, None
    shortened.dataloader_persistent_workers = False
    return shortened
