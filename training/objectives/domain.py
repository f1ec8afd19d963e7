"""What a domain adaptation minimises: on transcripts, on pairs of clips, or on both.

task      the model's own loss on the transcript or the answer; prompts are ignored
distill   adapter(tower(target)) toward tower(source), frame by frame; nothing behind the tower is needed
both      their sum
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from data.collators import IGNORED_LABEL
from data.domain_utterances import DomainCollator
from inference.audio_models import find_family, find_tower
from training.audio_tower import apply_block, run_tower, tower_skipped
from training.objectives import Objective

OBJECTIVES = ("task", "distill", "both")
# Feature distances under these names in logs and results.
DISTANCES = ("cosine_distance", "l2_distance")


def measure_distances(
    features: torch.Tensor, targets: torch.Tensor, num_frames: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    Returns how far features are from targets, over the frames that are no padding.

    Args:
        features: `(batch, frames, hidden)`.
        targets: What they shall be, of the same shape.
        num_frames: Frames `(batch,)` that are no padding.

    Returns:
        `cosine_distance`, one minus the cosine similarity, mean over frames, and `l2_distance`, the squared difference
        over the squared norm of the targets.

    Example:

    ```python
    >>> import torch
    >>> from training.objectives.domain import measure_distances

    >>> targets = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]])  # the second frame is padding
    >>> distances = measure_distances(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), targets, torch.tensor([1]))
    >>> {name: value.item() for name, value in distances.items()}
    {'cosine_distance': 1.0, 'l2_distance': 2.0}

    ```
    """
    is_frame = torch.arange(features.shape[1], device=features.device) < num_frames.to(features.device).unsqueeze(1)
    features, targets = features[is_frame].float(), targets[is_frame].float()  # (frames of all, hidden)
    return {
        "cosine_distance": 1 - nn.functional.cosine_similarity(features, targets, dim=-1).mean(),
        "l2_distance": (features - targets).square().sum() / targets.square().sum(),
    }


class DomainObjective(Objective):
    """
    A model whose loss, distances between two recordings of the same speech, or both, are minimised.

    Args:
        model: With adapters; whole for a task, or with its tower alone.
        objective: `"task"`, `"distill"` or `"both"`.
        speech_adapter_block: The adapter on the tower's output, for distillation.
        distill_weight: Factor of the distances where there is a task too.
    """

    # Frames, the energy of their targets, tokens of the transcripts.
    ITEMS = {"cosine_distance": "frames", "l2_distance": "energy", "task_loss": "tokens"}

    def __init__(
        self,
        model: PreTrainedModel,
        objective: str,
        *,
        speech_adapter_block: nn.Module | None = None,
        distill_weight: float = 1.0,
    ):
        # A model of which the tower alone is loaded has parts without memory, which no device can take.
        super().__init__(find_tower(model) if objective == "distill" else model)
        self.kept = {"model": model}
        self.objective, self.distill_weight = objective, distill_weight
        self.speech_adapter_block = speech_adapter_block

    @property
    def adapted_model(self) -> PreTrainedModel:
        """The whole model, also where its tower alone is loaded."""
        return self.kept["model"]

    def forget_weights(self) -> None:
        """Gives the memory of all weights back; names and shapes stay, for what tells of them."""
        for module in self.adapted_model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)

    def measure(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the model's own loss as `task_loss` and, of pairs, the distances: each a mean over its `ITEMS`."""
        model = self.adapted_model
        num_frames = batch.pop("num_frames")
        states = _find_states(model, batch, "states", "input_features")
        means = {}
        if self.objective != "task":
            targets = _find_states(model, batch, "source_states", "source_features")
            if self.objective == "distill":  # a clip of 10 s fills a third of the tower's 30 s; padding says nothing
                longest = int(num_frames.max())
                states, targets = states[:, :longest], targets[:, :longest]
            features = apply_block(self.speech_adapter_block, states, num_frames.to(states.device))
            means |= measure_distances(features, targets, num_frames)
        if self.objective != "distill":
            with tower_skipped(model):
                means["task_loss"] = model(input_features=states, **batch).loss
        return means

    def add_up(self, means: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the loss that the parts of [`measure`] make."""
        weight = self.distill_weight if self.objective == "both" else 1.0
        return sum(value * (weight if name in DISTANCES else 1.0) for name, value in means.items())

    def count_items(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns how many items of each of `ITEMS` a batch has, in which pairs have their states."""
        counts = {}
        if self.objective != "task":
            targets, num_frames = batch["source_states"], batch["num_frames"]
            is_frame = torch.arange(targets.shape[1], device=targets.device) < num_frames.to(targets.device)[:, None]
            counts["frames"] = num_frames.sum().float()
            counts["energy"] = targets[is_frame].float().square().sum()
        if self.objective != "distill":
            counts["tokens"] = (batch["labels"] != IGNORED_LABEL).sum().float()
        return counts

    @torch.no_grad()
    def prepare(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns a batch of pairs with states in place of features: their energy is asked for before the loss is."""
        if self.objective == "task":
            return batch
        states = {
            name: _find_states(self.adapted_model, batch, name, features)
            for name, features in (("states", "input_features"), ("source_states", "source_features"))
        }
        return batch | states


def _find_states(model: PreTrainedModel, batch: dict, states: str, features: str) -> torch.Tensor:
    """The tower's output `(batch, frames, hidden)`: taken out of the batch, or computed now."""
    if states in batch:
        tower = find_tower(model)
        return batch.pop(states).to(tower.device, tower.dtype)
    mask = find_family(model.config).mask
    return run_tower(model, {"input_features": batch.pop(features), mask: batch[mask]})


@torch.no_grad()
def sum_parts(
    objective: DomainObjective, dataset: Dataset, collator: DomainCollator, *, batch_size: int
) -> dict[str, torch.Tensor]:
    """
    Returns the sums of the parts of a loss over a dataset, by name, and of their items.

    Args:
        objective: It is left in evaluation or training mode as it was.
        dataset: Utterances or pairs.
        collator: Makes batches of them.
        batch_size: Utterances of a batch.
    """
    was_training, device = objective.training, find_tower(objective.adapted_model).device
    objective.eval()
    totals: dict[str, torch.Tensor] = {}
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collator):
        batch = objective.prepare({name: value.to(device) for name, value in batch.items()})
        counts = objective.count_items(batch)
        sums = {name: value * counts[objective.ITEMS[name]] for name, value in objective.measure(batch).items()}
        for name, value in (counts | sums).items():
            totals[name] = totals.get(name, 0.0) + value.double().cpu()
    objective.train(was_training)
    return totals


def divide_parts(totals: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the means of what [`sum_parts`] has summed."""
    return {name: totals[name] / totals[items] for name, items in DomainObjective.ITEMS.items() if name in totals}


def evaluate_distances(
    objective: DomainObjective, dataset: Dataset, collator: DomainCollator, *, batch_size: int
) -> dict[str, float]:
    """
    Returns the distances of [`measure_distances`] over pairs, as if they were one batch.

    Args:
        objective: Of pairs; it is left in evaluation or training mode as it was.
        dataset: The pairs.
        collator: Makes batches of them.
        batch_size: Pairs of a batch.
    """
    means = divide_parts(sum_parts(objective, dataset, collator, batch_size=batch_size))
    return {name: means[name].item() for name in DISTANCES}
