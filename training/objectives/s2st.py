"""What speech translation minimises, and the Trainer that does it: four losses, each a mean over its own labels.

asr, st    CTC over encoder frames: what is said, what it means
mt         cross-entropy of the translation's next subword, with label smoothing
unit       CTC over the unit decoder's frames

The model adds its losses with the weights of its configuration; here each is weighed by its share in an optimizer
step too, so that a step of two batches of four is the step of one batch of eight.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers.trainer_utils import EvalLoopOutput

from data.left_out import MAX_SHARE, NUM_NAMED
from modeling import EchoStreamForSpeechToSpeechTranslation
from modeling.ctc import find_misfits
from training.trainer import AdapterTrainer, find_dropout_seed, has_adapters, set_frozen_modules_to_eval

logger = logging.getLogger(__name__)

# The heads and the labels of each.
LABELS = {"asr": "asr_labels", "st": "target_labels", "mt": "target_labels", "unit": "unit_labels"}
CTC_HEADS = ("asr", "st", "unit")
# Frames of the encoder's segment that training draws from, 40 ms each; 0 is the whole utterance.
SEGMENT_LENGTHS = (8, 16, 24, 32, 0)
ENCODER_PREFIX = "encoder."


def count_labels(
    model: EchoStreamForSpeechToSpeechTranslation, batch: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Returns over how many labels each head's loss of a batch is a mean, by the head's name.

    Rows that do not fit their frames do not count for CTC; the translation's end counts as a label of `mt`.

    Args:
        model: Tells the weights and the numbers of frames.
        batch: From a collator, with or without labels of each kind.
    """
    counts = {}
    frames = model.get_encoder_lengths(batch["input_features"], batch.get("attention_mask"))
    for head in model.config.loss_weights:
        labels = batch.get(LABELS[head])
        if labels is None or (head == "unit" and batch.get("target_labels") is None):
            continue
        num_labels = (labels >= 0).sum(-1)
        if head == "mt":
            num_labels = num_labels + (num_labels > 0)
        else:
            room = frames if head != "unit" else count_unit_frames(model, batch["target_labels"])
            num_labels = num_labels.masked_fill(find_misfits(labels, room.to(labels.device)), 0)
        counts[head] = num_labels.sum().float()
    return counts


def count_unit_frames(model: EchoStreamForSpeechToSpeechTranslation, target_labels: torch.Tensor) -> torch.Tensor:
    """Returns the frames in which each row may say units `(batch,)`: of its subwords and of the translation's end."""
    num_labels = (target_labels >= 0).sum(-1)
    return (num_labels + (num_labels > 0)) * model.config.unit_upsampling


class S2STObjective:
    """
    What of a batch goes to the model, and what comes of its losses.

    Args:
        weights: Of the losses, by the head's name.
        segment_lengths: Frames of the encoder's segment, of which each optimizer step draws one; 0 is the whole
            utterance. None takes the configuration's.
        seed: Of what is drawn.

    Raises:
        ValueError: A segment length is negative, or there is none.
    """

    def __init__(self, weights: Mapping[str, float], *, segment_lengths: Sequence[int] | None, seed: int = 0):
        if segment_lengths is not None and (not segment_lengths or min(segment_lengths) < 0):
            raise ValueError(
                f"`segment_lengths` must be frames from 0 on, 0 for the whole utterance, got {list(segment_lengths)}."
            )
        self.weights, self.segment_lengths, self.seed = dict(weights), segment_lengths, seed

    def draw_segment_length(self, step: int) -> int | None:
        """Returns the segment length of optimizer step `step`: of seed and step alone, the same in all processes."""
        if self.segment_lengths is None:
            return None
        generator = torch.Generator().manual_seed(find_dropout_seed(self.seed, step))
        return self.segment_lengths[int(torch.randint(len(self.segment_lengths), (1,), generator=generator))]

    def add_up(
        self, losses: Mapping[str, torch.Tensor], shares: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Returns the weighted sum of losses by the head's name, each times its share in an optimizer step."""
        return sum(
            self.weights[name] * loss * (1.0 if shares is None else shares[name]) for name, loss in losses.items()
        )


def take_losses(output: Mapping[str, torch.Tensor], heads: Sequence[str]) -> dict[str, torch.Tensor]:
    """Returns the losses of an output by the head's name, of those heads that have labels."""
    return {name: output[f"{name}_loss"] for name in heads if output.get(f"{name}_loss") is not None}


class MisfitTally:
    """
    Counts rows whose labels do not fit their frames, and says which they are.

    Args:
        names: Of the utterances, by their number in the batch's `index`.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self.num_rows, self.num_misfits, self.named = 0, 0, {}

    def add(self, output: Mapping[str, torch.Tensor], index: torch.Tensor | None) -> None:
        """Counts a batch; a row that does not fit for several heads counts once."""
        flags = {head: output[f"{head}_misfits"] for head in CTC_HEADS if output.get(f"{head}_misfits") is not None}
        if not flags:
            return
        is_misfit = torch.stack(list(flags.values())).any(0)
        self.num_rows += len(is_misfit)
        self.num_misfits += int(is_misfit.sum())
        for row in is_misfit.nonzero().flatten().tolist():
            heads = ", ".join(head for head, rows in flags.items() if rows[row])
            name = self.names[int(index[row])] if index is not None and self.names else f"row {row} of a batch"
            self.named.setdefault(name, heads)

    def report(self) -> None:
        """
        Warns of the rows since the last report, and forgets them.

        Raises:
            ValueError: They are more than 5 % of all.
        """
        num_misfits, num_rows, named = self.num_misfits, self.num_rows, self.named
        self.clear()
        if not num_misfits:
            return
        shown = "; ".join(f"{name} ({heads})" for name, heads in list(named.items())[:NUM_NAMED])
        message = f"{num_misfits} of {num_rows} utterances have labels that do not fit their frames: {shown}."
        if num_misfits > MAX_SHARE * num_rows:
            raise ValueError(f"{message} Check them, or raise `unit_upsampling` if it is the units.")
        logger.warning("%s They have no part in these losses.", message)


class S2STTrainer(AdapterTrainer):
    """
    The Trainer of an EchoStream: logs each head's loss, gives encoder and decoders learning rates of their own, and
    keeps the decoders as they are for the first steps of a transfer.

    Args:
        objective: What is minimised.
        encoder_lr, decoder_lr: Highest learning rates. Default: `learning_rate`.
        num_encoder_steps: Optimizer steps in which the encoder alone trains.
    """

    def __init__(
        self,
        *args,
        objective: S2STObjective,
        encoder_lr: float | None = None,
        decoder_lr: float | None = None,
        num_encoder_steps: int = 0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.objective, self.num_encoder_steps = objective, num_encoder_steps
        self.encoder_lr, self.decoder_lr = encoder_lr, decoder_lr
        self.misfits = MisfitTally(getattr(self.train_dataset, "names", ()))
        self._noted: dict[str, torch.Tensor] = {}
        self._num_noted = 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with the encoder's parameters in groups of their own; the schedule is the same for all."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        lrs = {True: self.encoder_lr, False: self.decoder_lr}
        if not any(lrs.values()):
            return optimizer
        of_encoder = {
            id(value) for name, value in (model or self.model).named_parameters() if name.startswith(ENCODER_PREFIX)
        }
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for group in groups:
            for is_encoder, lr in lrs.items():
                own = [value for value in group["params"] if (id(value) in of_encoder) == is_encoder]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": lr or group["lr"]})
        return optimizer

    def training_step(self, model: nn.Module, *args, **kwargs) -> torch.Tensor:
        """As the Trainer's; while the encoder alone trains, what else has a gradient loses it before the update."""
        loss = super().training_step(model, *args, **kwargs)
        if self.state.global_step < self.num_encoder_steps:
            for name, parameter in self._unwrapped().named_parameters():
                if not name.startswith(ENCODER_PREFIX):
                    parameter.grad = None  # the optimizer passes over it, weight decay included
        return loss

    def get_batch_samples(self, *args, **kwargs):
        self._num_noted += 1
        return super().get_batch_samples(*args, **kwargs)

    def count_items(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return count_labels(self._unwrapped(), inputs)

    def compute_loss(self, model, inputs, return_outputs=False, **_kwargs):
        if model.training and has_adapters(self._unwrapped()):
            set_frozen_modules_to_eval(model)
        index = inputs.get("index")
        batch = {name: value for name, value in inputs.items() if name != "index"}
        segment_length = self.objective.draw_segment_length(self.state.global_step) if model.training else None
        outputs = model(**batch, segment_length=segment_length)
        losses = take_losses(outputs, tuple(self.objective.weights))
        shares = self.find_shares(inputs) if model.training else None
        loss = self.objective.add_up(losses, shares)
        if model.training:
            self.misfits.add(outputs, index)
            for name, value in losses.items():
                noted = (value * shares[name]).detach()
                self._noted[f"{name}_loss"] = self._noted.get(f"{name}_loss", 0.0) + noted
        return (loss, outputs) if return_outputs else loss

    def find_shares(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        counts = self.count_items(inputs)
        return {name: count.to(self.step_items[name]) / self.step_items[name].clamp(min=1) for name, count in counts.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the mean loss of each head since the last log of a training step."""
        if "loss" in logs and self._num_noted:
            noted = self.accelerator.reduce(self._noted, "mean")
            logs |= {name: round(float(value) / self._num_noted, 4) for name, value in noted.items()}
            self._noted, self._num_noted = {}, 0
            self.misfits.report()
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader, *_args, metric_key_prefix: str = "eval", **_kwargs) -> EvalLoopOutput:
        """Returns each loss as a mean over the labels of all utterances, and what `score` says."""
        dataset, state = dataloader.dataset, self.accelerator
        own = Subset(dataset, range(state.process_index, len(dataset), state.num_processes))
        with state.autocast():
            sums = sum_losses(self._unwrapped(), own, self.data_collator, batch_size=self.args.eval_batch_size)
        sums = state.reduce({name: value.to(self.args.device) for name, value in sums.items()})
        means = {name: sums[name] / sums[f"{name}_labels"].clamp(min=1) for name in self.objective.weights if name in sums}
        metrics = {f"{metric_key_prefix}_loss": float(self.objective.add_up(means))}
        metrics |= {f"{metric_key_prefix}_{name}_loss": float(value) for name, value in means.items()}
        if self.score:
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self.score().items()}
        return EvalLoopOutput(None, None, metrics, len(dataset))


@torch.no_grad()
def sum_losses(
    model: EchoStreamForSpeechToSpeechTranslation, dataset, collator, *, batch_size: int
) -> dict[str, torch.Tensor]:
    """
    Returns the sums of each head's losses over a dataset, and under `<head>_labels` the number of its labels.

    Args:
        model: It is left in evaluation or training mode as it was.
        dataset: Utterances.
        collator: Makes batches of them.
        batch_size: Utterances of a batch.
    """
    was_training, device = model.training, model.device
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collator):
        batch = {name: value.to(device) for name, value in batch.items() if name != "index"}
        counts = count_labels(model, batch)
        losses = take_losses(model(**batch), tuple(counts))
        for name, loss in losses.items():
            for key, value in ((name, loss.double() * counts[name]), (f"{name}_labels", counts[name].double())):
                sums[key] = sums.get(key, 0.0) + value.cpu()
    model.train(was_training)
    return sums
