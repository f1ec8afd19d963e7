"""What a saved adapter is, read from its files without loading it."""

import json
from math import prod
from pathlib import Path

from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open

from .adapters import ADAPTER_WEIGHTS_NAME


def describe_adapter(folder: str | Path) -> dict[str, object]:
    """
    Returns what the adapter in `folder` is; reads its configuration and the header of its weights, no weights.

    Args:
        folder: Output of [`save_adapter`] or of any PEFT method's `save_pretrained`.

    Returns:
        `kind` (of a speech adapter, else the PEFT method, such as `"lora"`), `hidden_sizes` (`None` where the method
        has none), `target_modules` (sorted names or a regular expression), `base` (its name or `None`), `parameters`
        (their number), `bytes` (of the file of weights) and `dtype` (as in safetensors, `"F32"`; several are joined
        by a comma).

    Raises:
        ValueError: A file is missing or damaged, or the configuration is no adapter's.
    """
    config_path, weights_path = Path(folder) / CONFIG_NAME, Path(folder) / ADAPTER_WEIGHTS_NAME
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ValueError(f"`adapter` must be a folder with {path.name}, got {folder}, which has none.")
    config = _read_config(config_path)
    shapes, dtypes = _read_header(weights_path)
    targets = config.get("target_modules")
    return {
        "kind": config.get("kind") or config["peft_type"].lower(),
        "hidden_sizes": config.get("hidden_sizes"),
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "base": config.get("base_model_name_or_path"),
        "parameters": sum(map(prod, shapes)),
        "bytes": weights_path.stat().st_size,
        "dtype": ",".join(sorted(set(dtypes))),
    }


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"`adapter` must have a JSON file as configuration, got {path}: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"`adapter` must have `peft_type` in its configuration, got none in {path}. Save it again.")
    return config


def _read_header(path: Path) -> tuple[list[list[int]], list[str]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]
            return [part.get_shape() for part in slices], [part.get_dtype() for part in slices]
    except SafetensorError as error:
        raise ValueError(
            f"`adapter` must have whole weights, got a damaged {path}: {error}. Fetch it again."
        ) from error
