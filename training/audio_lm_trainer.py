"""The Trainer of audio language models: a learning rate a part, checkpoints of what trains, stage after stage."""

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling.audio_lm_modes import group_parameters, set_training_mode
from modeling.files import write_whole
from training.audio_lm_setup import Stage
from training.objectives.audio_lm import AlignObjective, AnswerObjective, project_windows
from training.trainer import AdapterTrainer, RecipeTrainingArguments

logger = logging.getLogger(__name__)

STAGE_FOLDER = "stage-{number}"
STAGE_DONE = "stage.json"


@dataclass
class AudioLMTrainingArguments(RecipeTrainingArguments):
    """Training arguments with defaults for some hundred to some thousand clips."""

    num_train_epochs: float = field(
        default=3, metadata={"help": "Passes over the data, unless a stage says how many."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Conversations of a step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Conversations evaluated together."})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Not honoured here: each part has its own, `projector_lr` and so on."}
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Schedule of each stage, as in TrainingArguments."}
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of a stage's warm-up; below 1, a share of all."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints, as in TrainingArguments."})
    train_sampling_strategy: str = field(
        default="random", metadata={"help": "Order of the conversations; rows are packed in any."}
    )

    def __post_init__(self):
        if self.learning_rate != type(self).learning_rate:
            raise ValueError(
                f"`learning_rate` must be left out, got {self.learning_rate}. Give `projector_lr`, `encoder_lr` or "
                "`llm_lr`."
            )
        super().__post_init__()


class AudioLMTrainer(AdapterTrainer):
    """
    The Trainer of an [`AnswerObjective`] or an [`AlignObjective`].

    Args:
        learning_rates: Highest learning rate of each part.
    """

    def __init__(self, *args, learning_rates: Mapping[str, float], **kwargs):
        super().__init__(*args, **kwargs)
        self.learning_rates = dict(learning_rates)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with a group for each part's matrices and one for its biases and norms."""
        del model
        if self.optimizer is not None:
            return self.optimizer
        objective = self.objective
        groups = group_parameters(objective.model, self.learning_rates, weight_decay=self.args.weight_decay)
        own = [value for value in objective.parameters(recurse=False) if value.requires_grad]
        if own:  # what stands for no token, which is no part of the model
            groups.append({"params": own, "lr": self.learning_rates["projector"], "weight_decay": 0.0})
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, objective)
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _adapter_model(self) -> None:
        return None  # a checkpoint holds all that trains, adapters and whole weights alike

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        del state_dict
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        save_trained(self.objective, folder)
        torch.save(self.args, str(Path(folder) / TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        del model
        load_trained(self.objective, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_trained(self.objective, self.state.best_model_checkpoint)


def list_trained(objective: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the tensors that train, by name; of those that share memory one."""
    return {name: value.detach() for name, value in objective.named_parameters() if value.requires_grad}


def save_trained(objective: nn.Module, folder: str | Path) -> None:
    """Writes what trains as `model.safetensors`, whole."""
    with write_whole(folder) as scratch:
        save_file(
            {name: value.contiguous() for name, value in list_trained(objective).items()},
            scratch / SAFE_WEIGHTS_NAME,
            metadata={"format": "pt"},
        )


def load_trained(objective: nn.Module, folder: str | Path) -> None:
    """
    Puts what [`save_trained`] wrote back into its place.

    Raises:
        ValueError: The file holds other tensors than those that train now.
    """
    saved, there = load_file(Path(folder) / SAFE_WEIGHTS_NAME), list_trained(objective)
    if differing := sorted(saved.keys() ^ there.keys()):
        raise ValueError(
            f"`{folder}` must fit what trains, got unknown or missing {differing[:3]}. Resume with the modes that it "
            "was trained with."
        )
    with torch.no_grad():
        for name, value in saved.items():
            there[name].copy_(value)


def train_stage(
    model: nn.Module,
    stage: Stage,
    *,
    number: int,
    train_dataset,
    eval_dataset,
    collator,
    arguments: AudioLMTrainingArguments,
    processor,
    callbacks: Sequence = (),
) -> dict[str, float]:
    """
    Trains one stage, or takes what an earlier run has made of it; returns what the Trainer says of it.

    Args:
        model: An audio language model whose modes are those of the stage.
        stage: What trains, and how.
        number: Of the stage, from 1; its checkpoints are in a folder of its own.
        train_dataset, eval_dataset, collator: Of the stage; without `eval_dataset` nothing is evaluated meanwhile.
        arguments: Of the run.
        processor: Of the model.
        callbacks: Of the Trainer.
    """
    folder = Path(arguments.output_dir) / STAGE_FOLDER.format(number=number)
    is_align = stage.objective == "align"
    objective = AlignObjective(model, train_dataset.vocabulary) if is_align else AnswerObjective(model)
    done = folder / STAGE_DONE
    if arguments.resume_from_checkpoint and done.is_file():
        load_trained(objective, folder)
        return json.loads(done.read_text(encoding="utf-8"))
    set_training_mode(model, gradient_checkpointing=arguments.gradient_checkpointing)
    own = copy.copy(arguments)
    own.output_dir, own.num_train_epochs = str(folder), stage.num_train_epochs
    own.learning_rate = max(stage.learning_rates.values())  # what the log shows; groups have their own
    if eval_dataset is None:
        own.eval_strategy, own.load_best_model_at_end = "no", False
    trainer = AudioLMTrainer(
        model=objective,
        args=own,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=list(callbacks),
        learning_rates=stage.learning_rates,
    )
    metrics = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint).metrics
    if stage.objective == "align":
        match_lengths(objective, train_dataset, collator)
    metrics = {key: metrics[key] for key in ("train_runtime", "train_loss", "epoch") if key in metrics}
    if trainer.is_world_process_zero():
        save_trained(objective, folder)
        with write_whole(folder) as scratch:
            (scratch / STAGE_DONE).write_text(json.dumps(metrics) + "\n", encoding="utf-8")
    return metrics


@torch.no_grad()
def match_lengths(objective: AlignObjective, dataset, collator, *, num_clips: int = 32) -> None:
    """Gives a projector that has learned directions the length of embeddings, seen in the first clips of a dataset."""
    batch = collator([dataset[index] for index in range(min(num_clips, len(dataset)))])
    device = objective.model.device
    objective.match_length(project_windows(objective.model, {key: value.to(device) for key, value in batch.items()}))


__all__ = [
    "AudioLMTrainer",
    "AudioLMTrainingArguments",
    "list_trained",
    "load_trained",
    "match_lengths",
    "save_trained",
    "train_stage",
]
