"""What a training minimises: one module a system, each with the contract of [`Objective`]."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn


class Objective(nn.Module):
    """
    A model together with what is minimised: the Trainer knows no more of a system.

    Here, the loss that any model of transformers returns with its labels. A system with a loss of its own derives from
    this class and states `ITEMS` and `measure`. A batch has features or, in their place, cached states of what is
    frozen; collators pad and pack, and networks run in here. In an optimizer step:

        batches = [objective.prepare(batch) for batch in batches of the step]
        items   = number of each item in all of them, on all processes, by `count_items`
        for batch in batches:
            objective(**batch, shares=count_items(batch) / items)["loss"].backward()

    so the losses of a step add up to means over the items of the step, whatever the batches.

    Args:
        model: The model that trains, adapters added.

    Attributes:
        ITEMS (`Mapping[str, str]`): Part of the loss -> name of what that part is a mean over.

    Example:

    ```python
    >>> import torch
    >>> from training.objectives import Objective

    >>> class Distance(Objective):
    ...     ITEMS = {"distance": "frames"}
    ...
    ...     def measure(self, batch):
    ...         return {"distance": (self.model(batch["features"]) - batch["targets"]).square().mean()}
    ...
    ...     def count_items(self, batch):
    ...         return {"frames": torch.tensor(float(batch["features"].shape[0]))}

    >>> batch = {"features": torch.ones(3, 2), "targets": torch.zeros(3, 2)}
    >>> objective = Distance(torch.nn.Identity())
    >>> objective(**batch, shares={"frames": torch.tensor(0.25)})["loss"].item()  # three of the step's twelve frames
    0.25

    ```
    """

    ITEMS: ClassVar[Mapping[str, str]] = {"model_loss": "utterances"}
    # The Trainer would take `**batch` for a promise to divide by the number of tokens.
    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def adapted_model(self) -> nn.Module:
        """The model that is saved and loaded, or whose adapters are."""
        return self.model

    def prepare(self, batch: dict) -> dict:
        """Returns a batch with what `count_items` needs and what no gradient reaches; called once, in training."""
        return batch

    def count_items(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the number of each item in a prepared batch, `()` in fp32."""
        return {"utterances": torch.tensor(float(len(batch["labels"])))}

    def measure(self, batch: dict) -> dict[str, torch.Tensor]:
        """Returns the parts of the loss, each `()` and a mean over its items in the batch."""
        return {"model_loss": self.model(**batch).loss}

    def add_up(self, means: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the loss that the parts make."""
        return sum(means.values())

    def forward(
        self, return_loss: bool = True, shares: Mapping[str, torch.Tensor] | None = None, **batch
    ) -> dict[str, torch.Tensor]:
        """
        Returns `loss` and, where there are several, its parts without gradients, for the logs.

        Args:
            return_loss: Tells the Trainer that there is a loss in evaluations too; it is always returned.
            shares: Share of the batch in each item of an optimizer step. Default: all.
            batch: From the collator.
        """
        del return_loss
        means = self.measure(batch)
        if shares is not None:
            means = {name: value * shares[self.ITEMS[name]] for name, value in means.items()}
        parts = {name: value.detach() for name, value in means.items()} if len(means) > 1 else {}
        return {"loss": self.add_up(means), **parts}

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """As of the model, for the Trainer."""
        self.adapted_model.gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """Likewise; transformers has given it this name."""
        self.adapted_model.activation_checkpointing_enable(*args, **kwargs)
