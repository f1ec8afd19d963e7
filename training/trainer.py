"""A Trainer that saves, resumes and restores adapters alone, and never trains a frozen base by accident."""

import inspect
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import (
    OPTIMIZER_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from data.shared_epoch import SharedEpochDataset
from modeling.adapter_files import save_adapter
from modeling.adapters import ADAPTER_WEIGHTS_NAME, find_active_adapters, is_adapter_parameter, name_on_disk
from modeling.files import make_scratch, move_folder, write_whole
from training.adapter_dropout import seed_dropout
from training.checkpoints import find_checkpoint, list_model_weights
from training.honoured_arguments import HONOURED_BY_TRAINER, check_honoured, check_needed, list_changed
from training.objectives import Objective


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with this project's defaults and the tri-stage schedule. What nothing honours is refused.

    Attributes:
        metrics: What `metric_for_best_model` may name; of all of them the smallest is the best.
        changed: Names of the arguments that were given other values than their defaults.
    """

    metrics: ClassVar[tuple[str, ...]] = ("loss",)

    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps; below 1, a share of all."})
    report_to: str = field(default="none", metadata={"help": "Where to report, as in TrainingArguments."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept beside the best one."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin batches in memory, for a GPU."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop what the model's forward does not name; collators here do that."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Make the repository on the Hub private."})
    resume_without_state: bool = field(
        default=False,
        metadata={"help": "Resume from weights alone: with a fresh optimizer, schedule and random state."},
    )
    tri_stage: bool = field(
        default=False, metadata={"help": "Warm up, hold, decay exponentially, in place of lr_scheduler_type."}
    )
    initial_lr: float = field(default=0.0, metadata={"help": "Tri-stage: learning rate before the warm-up."})
    final_lr: float = field(default=1e-5, metadata={"help": "Tri-stage: learning rate at the end; above 0."})
    hold_steps: float = field(
        default=0.0, metadata={"help": "Tri-stage: steps at learning_rate; below 1, a share of all steps."}
    )

    def __post_init__(self):
        self.changed = list_changed(self)
        check_honoured(self.changed, HONOURED_BY_TRAINER, loop="the training")
        self._check_best()
        check_needed(self, self.changed)
        super().__post_init__()
        if self.mixed_precision == "fp16" and self.device.type == "cpu":
            raise ValueError("`fp16` must be off on a CPU, where it does nothing, got on. Use `bf16` or neither.")
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower() == "true"
        if self.tri_stage and not 0 < self.final_lr <= self.learning_rate:
            raise ValueError(
                f"`final_lr` must be above 0 and at most `learning_rate` ({self.learning_rate}), got {self.final_lr}."
            )

    @property
    def best_metric(self) -> str:
        """Name of the error rate by which models are compared."""
        return (self.metric_for_best_model or "loss").removeprefix("eval_")

    def _check_best(self) -> None:
        if self.best_metric not in self.metrics:
            raise ValueError(
                f"`metric_for_best_model` must be {' or '.join(self.metrics)}, got {self.metric_for_best_model!r}."
            )
        if self.greater_is_better is None:
            self.greater_is_better = False  # the library takes all but losses for scores
        is_in_steps = self.load_best_model_at_end and self.save_strategy == self.eval_strategy == "steps"
        if is_in_steps and self.save_steps != (self.eval_steps or self.logging_steps):
            raise ValueError(
                f"`save_steps` must be `eval_steps` with `load_best_model_at_end`, got {self.save_steps} and "
                f"{self.eval_steps}. The best model could be one that was not saved."
            )


def tri_stage_factor(
    step: int, *, num_warmup: int, num_hold: int, num_steps: int, initial: float, final: float
) -> float:
    """
    Returns the factor on the peak learning rate at `step` of a tri-stage schedule.

    Linear from `initial` to 1 over `num_warmup` steps, 1 for `num_hold`, then exponential to `final` at `num_steps`.

    Args:
        step: Optimizer steps done.
        num_warmup: Steps of the warm-up.
        num_hold: Steps at the peak.
        num_steps: Steps of the whole training.
        initial: Factor before the first step.
        final: Factor after the last step.

    Source: SpecAugment (arXiv 1904.08779), section 4.2.

    Example:

    ```python
    >>> from training.trainer import tri_stage_factor

    >>> stages = {"num_warmup": 4, "num_hold": 2, "num_steps": 10, "initial": 0.0, "final": 0.01}
    >>> [round(tri_stage_factor(step, **stages), 3) for step in (0, 2, 4, 6, 8, 10)]
    [0.0, 0.5, 1.0, 1.0, 0.1, 0.01]

    ```
    """
    if step < num_warmup:
        return initial + (1 - initial) * step / num_warmup
    num_decay = max(1, num_steps - num_warmup - num_hold)
    decayed = min(1.0, max(0, step - num_warmup - num_hold) / num_decay)
    return math.exp(math.log(final) * decayed)


def has_adapters(model: nn.Module) -> bool:
    """Whether `model` is a `PeftModel` or has had adapters added through transformers' verbs."""
    return isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)


def check_trainable(model: nn.Module, *, max_share: float) -> None:
    """
    Makes sure that what may train is what the recipe means to train.

    Args:
        model: The model, adapters added.
        max_share: Largest share of all parameters that may be trainable.

    Raises:
        ValueError: Nothing is trainable, or more than `max_share`.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = {name: value.numel() for name, value in model.named_parameters() if value.requires_grad}
    share = sum(trainable.values()) / total
    if not trainable:
        raise ValueError("The model must have trainable parameters, got 0. Add an adapter or unfreeze the base.")
    if share > max_share:
        outside = [name for name in trainable if not is_adapter_parameter(name)]
        raise ValueError(
            f"At most {max_share:.1%} of the parameters may train here, got {share:.1%} "
            f"({sum(trainable.values()):,} of {total:,}; outside adapters: {outside[:3] or 'none'}). "
            "Choose smaller adapters or freeze the base."
        )


def set_frozen_modules_to_eval(model: nn.Module) -> None:
    """
    Keeps BatchNorm, dropout, LayerDrop and SpecAugment of a frozen base still: its modules evaluate.

    Modules with an adapter below belong to the base too; adapters, parts that train and `model` itself stay as they
    are. So do recurrent layers: cuDNN computes their gradients in training mode only, and without dropout between
    layers the mode changes nothing. Layers with gradient checkpointing, which is off in evaluation mode, are in
    training mode until they run.
    """
    trained = {
        name[:end]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_adapter_parameter(name)
        for end in (place for place, letter in enumerate(name) if letter == ".")
    }
    for name, module in model.named_modules():
        is_adapter = is_adapter_parameter(name) or isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if not name or name in trained or is_adapter or (isinstance(module, nn.RNNBase) and not module.dropout):
            continue
        module.training = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        if module.training:
            _evaluate_within_checkpoint(module)


def _evaluate_within_checkpoint(layer: GradientCheckpointingLayer) -> None:
    function = layer._gradient_checkpointing_func
    if getattr(function, "func", None) is not _checkpoint:
        layer._gradient_checkpointing_func = partial(_checkpoint, layer, function)


def _checkpoint(layer: nn.Module, function: Callable, forward: Callable, *args) -> object:
    parameters = layer.named_parameters()
    is_trained = any(value.requires_grad for name, value in parameters if not is_adapter_parameter(name))
    return function(forward if is_trained else partial(_evaluate, layer, forward), *args)


def _evaluate(layer: nn.Module, forward: Callable, *args) -> object:
    layer.training = False
    try:
        return forward(*args)
    finally:
        layer.training = True


class SeededLengthSampler(LengthGroupedSampler):
    """
    Indices for batches of similar length, drawn by seed and epoch alone, so that a resumed run draws the same.

    The stock sampler reads the whole dataset to measure it, and draws from torch's global generator.

    Args:
        batch_size: Examples of an optimizer step.
        dataset: Has `lengths`, which may differ in each epoch.
        seed: Of the order.
        find_epoch: Returns the epoch that begins.
    """

    def __init__(self, batch_size: int, dataset, *, seed: int, find_epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=dataset.lengths)
        self.dataset, self.seed, self.find_epoch = dataset, seed, find_epoch

    def __iter__(self) -> Iterator[int]:
        self.lengths = self.dataset.lengths
        self.generator = torch.Generator().manual_seed(self.seed + self.find_epoch())
        return super().__iter__()


class SeededSampler(Sampler[int]):
    """
    Indices in an order drawn by seed and epoch alone, whatever else is drawn before.

    Args:
        dataset: Has a length, which may differ in each epoch.
        seed: Of the order.
        find_epoch: Returns the epoch that begins.
    """

    def __init__(self, dataset, *, seed: int, find_epoch: Callable[[], int]):
        self.dataset, self.seed, self.find_epoch = dataset, seed, find_epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.find_epoch())
        yield from torch.randperm(len(self.dataset), generator=generator).tolist()


class DropoutCallback(TrainerCallback):
    """Draws the adapters' dropout of each step from the seed and the step alone, as for each adapter of a stack."""

    def on_step_begin(self, args, state, _control, *, model, **_kwargs) -> None:
        seed_dropout(model, find_dropout_seed(args.seed, state.global_step))


class RuntimeCallback(TrainerCallback, ExportableState):
    """Keeps count of the seconds of training, those before the run was resumed among them."""

    def __init__(self):
        self.seconds_before, self._start = 0.0, 0.0

    def on_train_begin(self, _args, _state, _control, **_kwargs) -> None:
        self._start = time.time()

    def state(self) -> dict:
        """Returns what a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds_before": self.seconds_before + time.time() - self._start}}


def find_dropout_seed(seed: int, step: int) -> int:
    """Returns the seed of the dropout masks of optimizer step `step` in a training with `seed`."""
    return seed * 1_000_003 + step


class AdapterTrainer(Trainer):
    """
    The Trainer of every recipe. With adapters on the model, checkpoints hold adapters only, a resumed run equals the
    uninterrupted one, and the best adapter comes back at the end; without, it is the stock Trainer.

    Args:
        model: An [`Objective`], or a model that has its own loss.
        score: Returns the error rates of the evaluation data by name, `wer` and `cer`, if the best model is chosen by
            one of them.
    """

    def __init__(self, model: nn.Module, *args, score: Callable[[], Mapping[str, float]] | None = None, **kwargs):
        # What accelerate and torch put around it stays out of here.
        self.objective = model if isinstance(model, Objective) else Objective(model)
        super().__init__(self.objective, *args, **kwargs)
        if self.args.dataloader_persistent_workers and hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset = SharedEpochDataset(self.train_dataset)
        self.score = score
        self.loss_is_scaled_for_ga = True  # by `find_shares`: batches differ in size
        self._noted: dict[str, torch.Tensor] = {}
        self._num_noted = 0
        self.step_items: dict[str, torch.Tensor] = {}
        self.add_callback(DropoutCallback())
        self._runtime, self._scratch = RuntimeCallback(), None
        self.add_callback(self._runtime)

    def _set_signature_columns_if_needed(self) -> None:
        """Columns of a data set are those that the model in the objective takes, whose own `forward` takes any."""
        if self._signature_columns is None:
            names = inspect.signature(self.objective.adapted_model.forward).parameters
            self._signature_columns = list({*names, "label", "label_ids", *self.label_names})

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """
        As the Trainer's; true resumes from the newest whole checkpoint, or starts anew where there is none.

        Raises:
            ValueError: As [`find_checkpoint`].
        """
        checkpoint = find_checkpoint(
            resume_from_checkpoint,
            self.args.output_dir,
            list_weights=self._list_weights,
            state_names=() if getattr(self.args, "resume_without_state", False) else self._list_state_names(),
        )
        output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        output.metrics["train_runtime"] += self._runtime.seconds_before
        return output

    def _list_weights(self, checkpoint: Path) -> list[Path]:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return []  # in files of the engine's own, which it checks
        if self._adapter_model() is None:
            return list_model_weights(checkpoint)
        return [folder / ADAPTER_WEIGHTS_NAME for folder in self._adapter_folders(checkpoint).values()]

    def _list_state_names(self) -> list[str]:
        is_alone = self.args.world_size <= 1
        names = [SCHEDULER_NAME, "rng_state.pth" if is_alone else f"rng_state_{self.args.process_index}.pth"]
        names += [] if self.is_deepspeed_enabled or self.is_fsdp_enabled else [OPTIMIZER_NAME]
        return names + ([SCALER_NAME] if getattr(self.accelerator, "scaler", None) else [])

    def _init_training_state(self, max_steps: int, *args) -> tuple[int, int]:
        """As the Trainer's; a stream's passes are counted, which the Trainer takes for one of `max_steps` steps."""
        position = super()._init_training_state(max_steps, *args)
        checkpoint = args[2]
        if checkpoint is None or hasattr(self.train_dataset, "__len__") or self.args.ignore_data_skip:
            return position
        saved = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        num_passes, share = divmod(saved.epoch, 1)
        return int(num_passes), round(share * saved.max_steps * self.args.gradient_accumulation_steps)

    def _load_callback_state(self) -> None:
        """Gives callbacks what a checkpoint keeps of them, such as the patience that is left."""
        states = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                saved = states.setdefault(type(callback).__name__, callback.state())
                if callback is not self.control:
                    vars(callback).update(saved["attributes"])

    def _run_epoch(self, *args, **kwargs) -> None:
        """As the Trainer's, which would take a step of an epoch in which a finished run was resumed."""
        has_lost_patience = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        if self.state.global_step >= self.state.max_steps or has_lost_patience:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return str(self._scratch or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """As the Trainer's, but beside its place; it appears whole, and then older ones go."""
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._shared_scratch(folder) as scratch:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(scratch / name):
                self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(scratch / name / TRAINER_STATE_NAME))
                move_folder(scratch / name, folder / name)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            limit = self.args.save_total_limit
            rotate_checkpoints(str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    @contextmanager
    def _shared_scratch(self, folder: Path) -> Iterator[Path]:
        """A scratch folder that all processes save into meanwhile."""
        with make_scratch(folder) as own:
            paths = [str(own)]
            broadcast_object_list(paths)
            self._scratch = Path(paths[0])
            try:
                yield self._scratch
                self.accelerator.wait_for_everyone()
            finally:
                self._scratch = None

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        if has_adapters(self._unwrapped()):
            set_frozen_modules_to_eval(model)
        inputs = {**inputs, "shares": self.find_shares(inputs)}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        for name in self.objective.ITEMS:
            if name in outputs:
                self._noted[name] = self._noted.get(name, 0.0) + outputs[name]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the means of the loss's parts since the last log of a training step."""
        if "loss" in logs and self._noted:
            noted = self.accelerator.reduce(self._noted, "mean")
            logs |= {name: value.item() / self._num_noted for name, value in noted.items()}
            self._noted, self._num_noted = {}, 0
        super().log(logs, start_time)

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        """As the Trainer's, and counts the items of all batches of an optimizer step, of all processes."""
        self._num_noted += 1
        batches, num_items = super().get_batch_samples(map(self._prepare_batch, epoch_iterator), *args, **kwargs)
        counts = [self.objective.count_items(batch) for batch in batches]
        totals = {name: sum(count[name] for count in counts).to(self.args.device) for name in (counts or [{}])[0]}
        # The mean over processes, because they average their gradients.
        self.step_items = self.accelerator.reduce(totals, "mean")
        return batches, num_items

    def _prepare_batch(self, batch: dict) -> dict:
        with self.accelerator.autocast():
            return self.objective.prepare(self._prepare_inputs(batch))

    def find_shares(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the share of a batch in the items of its optimizer step, by name, times the number of processes."""
        counts = self.objective.count_items(inputs)
        return {name: counts[name].to(total.device) / total for name, total in self.step_items.items()}

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.score and self.args.best_metric != "loss":
            rates = self.score()
            output.metrics.update({f"{metric_key_prefix}_{name}": rates[name] for name in ("wer", "cer")})
        return output

    def _unwrapped(self) -> nn.Module:
        return self.objective.adapted_model

    @contextmanager
    def _without_objective(self) -> Iterator[None]:
        """Makes the Trainer save and load the model, whose files know nothing of what was minimised."""
        objective = self.model
        self.model = objective if self.is_deepspeed_enabled or self.is_fsdp_enabled else self._unwrapped()
        try:
            yield
        finally:
            self.model = objective

    def _adapter_model(self) -> nn.Module | None:
        """The model, if its adapters are ours to save and load: engines that shard do it themselves."""
        model = self._unwrapped()
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return model if has_adapters(model) and not is_sharded and not self._trains_base() else None

    def _trains_base(self) -> bool:
        return any(
            parameter.requires_grad and not is_adapter_parameter(name)
            for name, parameter in self._unwrapped().named_parameters()
        )

    def _adapter_folders(self, folder: str | Path) -> dict[str, Path]:
        """Where each active adapter is in a checkpoint: a single one at the top, several in folders of their name."""
        names = find_active_adapters(self._unwrapped(), even_if_off=True)
        return {name: Path(folder) if len(names) == 1 else Path(folder) / name for name in names}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self._adapter_model()
        output_dir = output_dir or self.args.output_dir
        if state_dict:  # of an engine that shards
            state_dict = {name.removeprefix("model."): value for name, value in state_dict.items()}
        if not self.args.should_save:
            return super()._save(output_dir, state_dict) if model is None else None
        if model is None:
            with write_whole(output_dir) as scratch, self._without_objective():
                return super()._save(str(scratch), state_dict)
        for name, folder in self._adapter_folders(output_dir).items():
            save_adapter(model, folder, name, processor=self.processing_class)
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))
        return None

    def _load_adapters(self, folder: str | Path) -> None:
        for name, path in self._adapter_folders(folder).items():
            model = self._unwrapped()
            state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            keys, saved = {name_on_disk(key): key for key in state}, load_peft_weights(str(path), device="cpu")
            if differing := sorted(keys.keys() ^ saved.keys()):
                raise ValueError(f"`{path}` must fit adapter {name!r}, got unknown or missing {differing[:3]}.")
            set_peft_model_state_dict(model, {key: saved[on_disk] for on_disk, key in keys.items()}, adapter_name=name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._adapter_model() is None:
            with self._without_objective():
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_adapters(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self._adapter_model() is None:
            with self._without_objective():
                super()._load_best_model()
        else:
            self._load_adapters(self.state.best_model_checkpoint)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        draw = {
            "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
            "find_epoch": lambda: int(self.state.epoch or 0),
        }
        if self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "lengths"):
            batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return SeededLengthSampler(batch_size, dataset, **draw)
        if self.args.train_sampling_strategy == "random" and hasattr(dataset, "__len__"):
            return SeededSampler(dataset, **draw)
        return super()._get_train_sampler(train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if not getattr(self.args, "tri_stage", False) or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        hold = self.args.hold_steps
        stages = {
            "num_warmup": self.args.get_warmup_steps(num_training_steps),
            "num_hold": math.ceil(hold * num_training_steps) if hold < 1 else int(hold),
            "num_steps": num_training_steps,
            "initial": self.args.initial_lr / self.args.learning_rate,
            "final": self.args.final_lr / self.args.learning_rate,
        }
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: tri_stage_factor(step, **stages))
        self._created_lr_scheduler = True
        return self.lr_scheduler
