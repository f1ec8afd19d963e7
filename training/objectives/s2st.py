"""What speech translation minimises: four losses, each a mean over its own labels.

asr, st    CTC over encoder frames: what is said, what it means
mt         cross-entropy of the translation's next subword, with label smoothing
unit       CTC over the unit decoder's frames
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from data.left_out import MAX_SHARE, NUM_NAMED
from modeling import EchoStreamForSpeechToSpeechTranslation
from modeling.ctc import find_misfits
from modeling.modeling_echostream import EchoStreamOutput
from training.objectives import Objective

logger = logging.getLogger(__name__)

# The heads and the labels of each.
LABELS = {"asr": "asr_labels", "st": "target_labels", "mt": "target_labels", "unit": "unit_labels"}
CTC_HEADS = ("asr", "st", "unit")
# Frames of the encoder's segment that training draws from, 40 ms each; 0 is the whole utterance.
SEGMENT_LENGTHS = (8, 16, 24, 32, 0)


class S2STObjective(Objective):
    """
    The losses of an EchoStream's heads, with the weights of its configuration.

    Args:
        model: The model.
        segment_lengths: Frames of the encoder's segment, of which each optimizer step draws one; 0 is the whole
            utterance. None, and every evaluation, take the configuration's.
        seed: Of what is drawn.
        names: Of the utterances to train on, by their number in the batch's `index`, to name those that do not fit.

    Raises:
        ValueError: A segment length is negative or shorter than the right context, or there is none.
    """

    ITEMS = {"asr_loss": "asr_labels", "st_loss": "st_labels", "mt_loss": "mt_labels", "unit_loss": "unit_labels"}

    def __init__(
        self,
        model: EchoStreamForSpeechToSpeechTranslation,
        *,
        segment_lengths: Sequence[int] | None = None,
        seed: int = 0,
        names: Sequence[str] = (),
    ):
        super().__init__(model)
        shortest = max(1, model.config.right_context_length)
        is_legal = segment_lengths is None or all(not length or length >= shortest for length in segment_lengths)
        if not is_legal or segment_lengths == []:
            raise ValueError(
                f"`segment_lengths` must be frames from {shortest} on, or 0 for the whole utterance, got "
                f"{list(segment_lengths)}."
            )
        self.segment_lengths, self.seed = segment_lengths, seed
        self.step = 0  # of the optimizer; the Trainer tells it
        self.misfits = MisfitTally(names)
        self.watch: Callable[[EchoStreamOutput, Mapping], None] | None = None  # sees an evaluation's outputs

    def draw_segment_length(self) -> int | None:
        """Returns this optimizer step's segment length: drawn by seed and step alone, the same in all processes."""
        if self.segment_lengths is None or not self.training:
            return None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        return self.segment_lengths[int(torch.randint(len(self.segment_lengths), (1,), generator=generator))]

    def measure(self, batch: dict) -> dict[str, torch.Tensor]:
        """Returns the losses of the heads that have labels and a weight, each a mean over its labels."""
        index = batch.pop("index", None)
        output = self.model(**batch, segment_length=self.draw_segment_length())
        if self.training:
            self.misfits.add(output, index)
        elif self.watch:
            self.watch(output, batch)
        names = (f"{head}_loss" for head in self.adapted_model.config.loss_weights)
        return {name: output[name] for name in names if output.get(name) is not None}

    def add_up(self, means: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the weighted sum of the losses."""
        weights = self.adapted_model.config.loss_weights
        return sum(weights[name.removesuffix("_loss")] * value for name, value in means.items())

    def count_items(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Returns how many labels of each head a batch has, `()` in fp32.

        Rows that do not fit their frames do not count for CTC; the translation's end counts for `mt`.
        """
        model, counts = self.adapted_model, {}
        frames = model.get_encoder_lengths(batch["input_features"], batch.get("attention_mask"))
        for head in model.config.loss_weights:
            labels = batch.get(LABELS[head])
            # At least a small number, by which a step can be divided in which nothing fits.
            counts[f"{head}_labels"] = batch["input_features"].new_tensor(1e-6)
            if labels is None or (head == "unit" and batch.get("target_labels") is None):
                continue
            num_labels = (labels >= 0).sum(-1)
            if head == "mt":
                num_labels = num_labels + (num_labels > 0)
            else:
                room = count_unit_frames(model, batch["target_labels"]) if head == "unit" else frames
                num_labels = num_labels.masked_fill(find_misfits(labels, room.to(labels.device)), 0)
            counts[f"{head}_labels"] = num_labels.sum().float().clamp(min=1e-6)
        return counts


def count_unit_frames(model: EchoStreamForSpeechToSpeechTranslation, target_labels: torch.Tensor) -> torch.Tensor:
    """Returns the frames in which each row may say units `(batch,)`: of its subwords and of the translation's end."""
    num_labels = (target_labels >= 0).sum(-1)
    return (num_labels + (num_labels > 0)) * model.config.unit_upsampling


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
