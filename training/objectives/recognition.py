"""What CTC minimises: a whole recogniser, adapters behind what is frozen, and stacks of speakers, in one module."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from data.collators import pack_states
from modeling.adapters import SpeechAdapterLayer
from training.frozen_part import STATES_OF_KIND, find_frozen_prefix
from training.objectives import Objective
from training.packed_deepspeech2 import PackedBatch
from training.recurrence import quick_recurrences


class CTCObjective(Objective):
    """
    A recogniser and the mean of its loss over utterances.

    A recogniser is any model whose `forward` takes what its processor makes, with `labels` that are -100 beyond a
    transcript's end, and returns `loss`: each `AutoModelForCTC`. Where it offers

        stages()                the modules that run one after the other, by name, with all of its parameters
        get_logits_lengths()    the frames of logits for a batch of features

    as [`DeepSpeech2ForCTC`], what is frozen runs without gradients, or not at all where its states are cached, and the
    rest on frames without padding. A recogniser that does not, or adapters that look at whole rows, train on batches.

    Args:
        model: The recogniser, adapters added.

    Attributes:
        prefix ([`FrozenPrefix`] or `None`): What is frozen, if it can run apart.

    Raises:
        ValueError: Nothing is trainable.
    """

    ITEMS = {"ctc_loss": "utterances"}

    def __init__(self, model: nn.Module):
        super().__init__(model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.prefix = find_frozen_prefix(base) if hasattr(base, "stages") and _acts_by_frame(base) else None

    def measure(self, batch: dict) -> dict[str, torch.Tensor]:
        """
        Returns the loss of features or of cached states.

        Args:
            batch: From [`CTCCollator`].
        """
        if self.prefix is not None or "frozen_states" in batch or "adapter_names" in batch:
            return {"ctc_loss": self.measure_adapters(batch).sum()}
        with quick_recurrences(self.model):
            return {"ctc_loss": self.model(**batch).loss}

    def measure_adapters(self, batch: Mapping[str, object]) -> torch.Tensor:
        """
        Returns the loss of each adapter's rows, by the order in which they appear, or of all rows `(adapters,)`.

        Args:
            batch: From [`CTCCollator`]; with `adapter_names`, one a row, each adapter acts on its own rows and gets
                the gradient that they alone would give it.

        Raises:
            ValueError: Nothing frozen can run apart, or the states or adapters are not those of the recogniser.
        """
        if self.prefix is None:
            raise ValueError(
                "`frozen_states` and `adapter_names` must go with a recogniser whose frozen part can run apart, got "
                f"{type(self.model).__name__} where nothing can. Give features alone."
            )
        if "frozen_states" not in batch:
            batch = self.run_frozen(batch)
        states, lengths = batch["frozen_states"], batch["logits_lengths"]
        with quick_recurrences(self.model):
            packed = PackedBatch(self.prefix, states, lengths, batch.get("adapter_names"))
            return packed.compute_losses(batch["labels"])

    def run_frozen(self, batch: Mapping[str, object]) -> dict[str, object]:
        """Returns a batch of features with the states of the frozen part in their place, packed."""
        states, lengths = self.prefix(batch)
        rows = []
        for row, num_frames in enumerate(lengths.tolist()):
            own = {name: value[row, :num_frames] for name, value in states.items()}
            rows.append({"states": own, "labels": batch["labels"][row]})
            if "adapter_names" in batch:
                rows[-1]["adapter_name"] = batch["adapter_names"][row]
        return pack_states(rows)


def _acts_by_frame(model: nn.Module) -> bool:
    """Whether each adapter changes the output of its module frame by frame, so that frames without padding do."""
    layers = [module for module in model.modules() if isinstance(module, SpeechAdapterLayer)]
    blocks = [block for layer in layers for block in layer.speech_adapter_blocks.values()]
    return all(block.kind in STATES_OF_KIND and getattr(block, "position", None) != "before" for block in blocks)


def average_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Has a CTC model of transformers return its loss as a mean over utterances: many checkpoints ask for the sum."""
    if not hasattr(model, "stages") and hasattr(model.config, "ctc_loss_reduction"):
        model.config.ctc_loss_reduction = "mean"
    return model
