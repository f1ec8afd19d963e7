"""The fingerprint of a checkpoint's weights, read a piece at a time, for a model of which a part is loaded."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from modeling.fingerprint import (
    CHECKPOINT_RECORDS,
    list_base_weights,
    record_pieces,
    rows_at_once,
    split_shape,
    sum_blocks,
)

logger = logging.getLogger(__name__)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Place:
    path: Path
    start: int
    end: int
    dtype: torch.dtype


def note_checkpoint(model: PreTrainedModel) -> None:
    """
    Lets `model`, of which a part is loaded, have the fingerprint of the whole checkpoint that it comes from.

    Every byte is read once and none is kept, nor mapped into memory. Where that cannot be done, because the files are
    no safetensors or their tensors are not the model's one by one, the fingerprint says nothing of those weights.

    Args:
        model: From [`load_tower_alone`].
    """
    try:
        places = _find_tensors(model)
        records = {}
        for weight in list_base_weights(model):
            if weight.read is None:
                place = places[weight.name]
                records[weight.name] = record_pieces(weight.shape, _read_pieces(place, weight.shape))
    except (OSError, ValueError, KeyError) as error:
        logger.warning("The adapter will not say which weights it was made for: they cannot be read (%s).", error)
        return
    setattr(model, CHECKPOINT_RECORDS, records)


def _find_tensors(model: PreTrainedModel) -> dict[str, _Place]:
    """Where each tensor of the checkpoint is, by its name in the model."""
    names = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    if not all(isinstance(transform, WeightRenaming) for transform in transforms):
        raise ValueError("tensors are put together while loading")
    places = {}
    for path in _list_files(model.name_or_path):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            name, _ = rename_source_key(key, transforms, [], model.base_model_prefix, names)
            start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            places[name] = _Place(path, start, end, DTYPES[entry["dtype"]])
    # A tied weight is in the files under one of its names.
    for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in places or other in places:
            places.setdefault(name, places.get(other))
            places.setdefault(other, places[name])
    return places


def _list_files(model_name_or_path: str) -> list[Path]:
    single = cached_file(model_name_or_path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [Path(single)]
    index = json.loads(Path(cached_file(model_name_or_path, SAFE_WEIGHTS_INDEX_NAME)).read_text(encoding="utf-8"))
    return [Path(cached_file(model_name_or_path, name)) for name in sorted(set(index["weight_map"].values()))]


def _read_pieces(place: _Place, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    num_rows, num_columns = split_shape(shape)
    if place.end - place.start != num_rows * num_columns * place.dtype.itemsize:
        raise ValueError(f"a tensor in {place.path} is not of the shape {shape}")
    piece_bytes = rows_at_once(num_columns) * num_columns * place.dtype.itemsize
    with place.path.open("rb") as file:
        file.seek(place.start)
        for start in range(place.start, place.end, piece_bytes):
            content = bytearray(min(piece_bytes, place.end - start))
            if file.readinto(content) != len(content):
                raise ValueError(f"{place.path} is truncated")
            yield torch.frombuffer(content, dtype=place.dtype).view(-1, num_columns)


def digest_base(model: nn.Module) -> str:
    """
    Returns 32 hexadecimal digits over every byte of the base's weights: the key of what was computed with them.

    Raises:
        ValueError: Some of them cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for weight in list_base_weights(model):
        if weight.read is None:
            raise ValueError(f"`model` must have all its weights for a digest of them, got none for {weight.name!r}.")
        sums = sum_blocks(weight.read()).tolist()
        digest.update(repr((weight.name, weight.shape, str(weight.dtype), sums)).encode())
    return digest.hexdigest()
