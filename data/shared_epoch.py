"""An epoch that the processes which load data see too, where they outlive it."""

import torch


class SharedEpochDataset(torch.utils.data.Dataset):
    """
    A dataset that is at the same epoch in every process that has a copy of it.

    The copies of workers that persist are made once: they would never hear of `set_epoch`.

    Args:
        dataset: Has `set_epoch`; its other attributes are this one's too.
    """

    def __init__(self, dataset: torch.utils.data.Dataset):
        self.dataset, self._own_epoch = dataset, 0
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, here and in the other processes before their next item."""
        self._epoch.fill_(epoch)
        self._follow()

    def _follow(self) -> None:
        if self._own_epoch != int(self._epoch):
            self._own_epoch = int(self._epoch)
            self.dataset.set_epoch(self._own_epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        self._follow()
        return self.dataset[index]

    @property
    def lengths(self) -> list[int]:
        """As of the dataset, for batches of similar length."""
        return self.dataset.lengths


__all__ = ["SharedEpochDataset"]
