"""Training behind a frozen base that runs once: its states are cached, or computed a batch at a time."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from data.code_digest import digest_code
from data.collators import CTCCollator
from data.state_cache import CachedUtterances, PackedCollator, resolve_cache_folder
from data.utterances import UtteranceDataset
from modeling.fingerprint import fingerprint_processor
from training.frozen_prefix import FrozenPrefix, find_frozen_prefix

logger = logging.getLogger(__name__)


@dataclass
class CacheArguments:
    """What is kept of the frozen part of the model, so that it runs once."""

    cache_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the cached states; bfloat16 halves the file."}
    )
    cache_variants: int = field(
        default=0,
        metadata={"help": "Augmented versions of every utterance that are cached; 0: new ones in every epoch."},
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the caches. Default: below the Hugging Face cache."}
    )

    def __post_init__(self):
        if self.cache_variants < 0:
            raise ValueError(f"`cache_variants` must be at least 0, got {self.cache_variants}.")


@dataclass(frozen=True)
class LoadingCollator:
    """
    Makes batches in processes that do not have the model: cached rows are packed, the others wait for `forward`.

    Args:
        pad: For rows with features.
        pack: For rows with states.
    """

    pad: CTCCollator
    pack: PackedCollator

    def __call__(self, rows: list[dict]) -> dict:
        return (self.pack if "states" in rows[0] else self.pad)(rows)


class FrozenPart:
    """
    Runs what stands before the first trainable parameter of a model, and gives what the rest trains on.

    Args:
        model: With its adapters, on its device.
        processor: Of the model.
        arguments: What is cached.
        batch_size: Utterances that the frozen part hears together.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, arguments: CacheArguments, *, batch_size: int
    ):
        self.prefix: FrozenPrefix | None = find_frozen_prefix(model)
        self.processor, self.arguments, self.batch_size = processor, arguments, batch_size
        self.code = digest_code(model, processor.feature_extractor)
        self._pad = CTCCollator(processor)

    def prepare(self, dataset: UtteranceDataset) -> Dataset:
        """
        Returns `dataset` with cached states in place of features, or as it is where nothing can be cached.

        Utterances that differ from epoch to epoch are cached in as many versions as `cache_variants` asks for.
        """
        if self.prefix is None:
            logger.warning("The frozen part is not cached: the first layer is trainable.")
            return dataset
        if dataset.is_random and not self.arguments.cache_variants:
            logger.warning(
                "The frozen part is not cached: utterances are augmented or joined anew in every epoch. "
                "`cache_variants` 4 keeps four versions of each."
            )
            return dataset
        key = {"prefix": self.prefix.name, "weights": self.prefix.digest, "model_code": self.code}
        build = partial(
            CachedUtterances.build,
            dataset,
            self.prefix,
            collate=self._pad,
            key={**key, **fingerprint_processor(self.processor)},
            folder=resolve_cache_folder(self.arguments.cache_dir),
            batch_size=self.batch_size,
            dtype=self.arguments.cache_dtype,
            num_variants=max(1, self.arguments.cache_variants),
        )
        with PartialState().local_main_process_first():
            return build()

    def collator(self, *, num_workers: int = 0) -> Callable[[list[dict]], dict]:
        """
        Returns what makes a batch of cached or uncached rows.

        Args:
            num_workers: Processes that load the data; the model is not in them, so the frozen part runs in `forward`.
        """
        if self.prefix is None:
            return self._pad
        return LoadingCollator(self._pad, PackedCollator(self.prefix.name)) if num_workers else self.collate

    def collate(self, rows: list[dict]) -> dict:
        """Returns arguments of the model's `forward` behind the frozen part, packed."""
        if "states" not in rows[0]:
            rows = self._run(rows)
        return PackedCollator(self.prefix.name)(rows)

    def _run(self, rows: list[dict]) -> list[dict]:
        states, lengths = self.prefix(self._pad(rows))
        return [
            {
                **{key: value for key, value in row.items() if key != "input_features"},
                "states": {name: value[index, :num_frames] for name, value in states.items()},
            }
            for index, (row, num_frames) in enumerate(zip(rows, lengths.tolist(), strict=True))
        ]
