"""Models that are whole: what a file lacks or what is no number in it is an error, and not a random model."""

import torch
from transformers import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

NAMED = 3  # tensors that a message names


def load_whole(
    model_class: type[PreTrainedModel] | type[_BaseAutoModelClass], model_name_or_path: str, **options
) -> PreTrainedModel:
    """
    Returns `model_class.from_pretrained(model_name_or_path)`, which alone fills what is missing with random numbers.

    Args:
        model_class: Of the model, an Auto class or its own.
        model_name_or_path: Folder or Hub name.
        options: As in `from_pretrained`.

    Raises:
        ValueError: The checkpoint has no values for some tensors, or values that are not finite.
    """
    options = {"trust_remote_code": False, "output_loading_info": True} | options
    model, report = model_class.from_pretrained(model_name_or_path, **options)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"`model_name_or_path` must have all weights of its model, got {model_name_or_path} without "
            f"{_name_some(missing)}. Fetch or save it again, or name the model that it is of."
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    broken = [name for name, value in tensors.items() if not _is_finite(value)]
    if broken:
        raise ValueError(
            f"`model_name_or_path` must have finite weights, got NaN or infinity in {_name_some(broken)} of "
            f"{model_name_or_path}. Take an earlier checkpoint."
        )
    return model


def _name_some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _is_finite(value: torch.Tensor) -> bool:
    if value.is_meta or not value.is_floating_point():  # on a disk, or quantised
        return True
    return bool(torch.isfinite(value).all())
