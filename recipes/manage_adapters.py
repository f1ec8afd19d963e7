"""Looks after a store of adapters: a folder with one sub-folder for each.

python recipes/manage_adapters.py list STORE
python recipes/manage_adapters.py info STORE/alice STORE/bob
python recipes/manage_adapters.py copy STORE/alice STORE/alice_at_work
python recipes/manage_adapters.py delete STORE/bob
python recipes/manage_adapters.py merge STORE/alice STORE/alice_at_work --weights 1 3 --output_dir STORE/both
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from training.endings import run_main

if TYPE_CHECKING:
    from modeling.adapter_loading import SavedAdapter

# `list` answers at once: what needs torch is imported by the commands that need it.
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MODEL_CONFIG_NAME = "config.json"
# Entries of a configuration in which adapters that can be averaged may differ.
FREE_ENTRIES = {"base_model_name_or_path", "revision", "dropout", "lora_dropout", "inference_mode", "base_fingerprint"}
FREE_ENTRIES |= {"auto_mapping", "base_mismatch_allowed", "init_lora_weights", "peft_version"}
MAX_CONFIG_BYTES = 1 << 20  # as in modeling/adapter_files.py
COLUMNS = ("name", "kind", "hidden sizes", "KiB", "saved", "base")


def list_adapters(store: Path) -> list[dict[str, str]]:
    """
    Returns a row for each adapter of `store`, sorted by name; reads configurations alone, never weights.

    Raises:
        ValueError: `store` is no folder.
    """
    if not store.is_dir():
        raise ValueError(f"`list` must be given a folder of adapters, got {store}. Correct the path.")
    with os.scandir(store) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [_describe_briefly(store / name) for name in names if os.path.lexists(store / name / CONFIG_NAME)]


def _describe_briefly(folder: Path) -> dict[str, str]:
    try:
        if (folder / CONFIG_NAME).stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is too large")
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        status = (folder / WEIGHTS_NAME).stat()
        kind = config.get("kind") or config["peft_type"].lower()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # One damaged adapter must not hide the others.
        return dict.fromkeys(COLUMNS, "") | {"name": folder.name, "kind": f"damaged ({type(error).__name__})"}
    sizes = "-".join(map(str, config.get("hidden_sizes") or ()))
    saved = datetime.fromtimestamp(status.st_mtime).strftime("%Y-%m-%d %H:%M")
    base = config.get("base_model_name_or_path") or ""
    values = (folder.name, kind, sizes, f"{status.st_size / 1024:.0f}", saved, base)
    return dict(zip(COLUMNS, map(str, values), strict=True))


def describe_adapters(folders: Sequence[Path]) -> list[dict[str, object]]:
    """
    Returns everything that the files of each adapter say of it, without loading weights.

    Raises:
        ValueError: A folder is no adapter, or a damaged one.
    """
    from modeling.adapter_files import describe_adapter

    return [{"folder": str(folder), **describe_adapter(folder)} for folder in folders]


def copy_adapter(source: Path, target: Path) -> None:
    """
    Copies the adapter `source` to `target`, whole or not at all, without checkpoints and pickles of its training.

    Raises:
        ValueError: `source` is no adapter, `target` exists, or its last part cannot name an adapter.
    """
    from modeling.adapter_files import describe_adapter
    from modeling.adapters import check_adapter_name

    describe_adapter(source)
    check_adapter_name(target.name)
    if os.path.lexists(target):
        raise ValueError(f"`copy` must go to a new folder, got {target}, which exists. Delete it or choose another.")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".copying-", dir=target.parent))
    try:
        shutil.copytree(
            source,
            scratch / target.name,
            ignore=shutil.ignore_patterns("checkpoint-*", ".*", "*.bin", "*.pt", "*.pth", "__pycache__"),
        )
        os.rename(scratch / target.name, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_deletable(folder: Path) -> None:
    """
    Makes sure that `folder` holds an adapter and nothing besides.

    Raises:
        ValueError: It is a link, no adapter, a model too, or has folders that no training of an adapter makes.
    """
    if folder.is_symlink() or not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"`delete` must be given folders of adapters, got {folder}, which is none. Correct the path.")
    if (folder / MODEL_CONFIG_NAME).exists():
        raise ValueError(f"`delete` must be given folders of adapters alone, got {folder}, which holds a model too.")
    for path in folder.iterdir():
        if path.is_dir() and not path.name.startswith((".", "checkpoint-")):
            raise ValueError(
                f"`delete` must be given folders of adapters alone, got {folder}, which holds the folder {path.name} "
                "too. Move it out first."
            )


def delete_adapters(folders: Sequence[Path]) -> None:
    """
    Deletes adapters; each is gone at once, and none is if one of them must not be.

    Raises:
        ValueError: As [`check_deletable`].
    """
    for folder in folders:
        check_deletable(folder)
    for folder in folders:
        folder = folder.resolve()
        scratch = Path(tempfile.mkdtemp(prefix=".deleting-", dir=folder.parent))
        os.rename(folder, scratch / folder.name)
        shutil.rmtree(scratch)


def merge_adapters(folders: Sequence[Path], output_dir: Path, weights: Sequence[float] | None = None) -> None:
    """
    Writes the weighted mean of adapters' parameters, computed in fp32, as an adapter of its own.

    It is exact for parameters; for outputs it is as good as averaging fine-tuned models is.

    Args:
        folders: At least two adapters of one kind, size and base.
        output_dir: A new folder.
        weights: Positive, one each; only their ratios count. Default: all the same.

    Raises:
        ValueError: Fewer than two, unlike ones, weights that do not fit, or `output_dir` exists.

    Source: Wortsman et al., "Model soups" (arXiv 2203.05482), section 2.
    """
    import torch
    from safetensors.torch import save

    from modeling.adapter_loading import read_adapter
    from modeling.adapters import check_adapter_name
    from modeling.files import write_whole

    shares = _check_weights(weights, len(folders))
    check_adapter_name(output_dir.name)
    if os.path.lexists(output_dir):
        raise ValueError(f"`output_dir` must be a new folder, got {output_dir}, which exists. Choose another.")
    adapters = [read_adapter(folder) for folder in folders]
    _check_alike(adapters)
    states = [adapter.tensors for adapter in adapters]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    for folder, found in zip(folders, shapes, strict=True):
        if found != shapes[0]:
            name = min(name for name, _ in found.items() ^ shapes[0].items())
            raise ValueError(f"`merge` must be given adapters of one size, got {folders[0]} and {folder}: {name}.")
    mean = {
        name: sum(share * state[name].to(torch.float32) for share, state in zip(shares, states, strict=True))
        for name in states[0]
    }
    mean = {name: tensor.to(states[0][name].dtype).contiguous() for name, tensor in mean.items()}
    with write_whole(output_dir) as scratch:
        (scratch / WEIGHTS_NAME).write_bytes(save(mean, metadata=adapters[0].file.metadata() or {"format": "pt"}))
        shutil.copyfile(folders[0] / CONFIG_NAME, scratch / CONFIG_NAME)


def _check_weights(weights: Sequence[float] | None, num_adapters: int) -> list[float]:
    if num_adapters < 2:
        raise ValueError(f"`merge` must be given two adapters or more, got {num_adapters}.")
    weights = [1.0] * num_adapters if weights is None else list(weights)
    if len(weights) != num_adapters or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"`weights` must be {num_adapters} positive numbers, one an adapter, got {weights}.")
    return [weight / sum(weights) for weight in weights]


def _check_alike(adapters: "Sequence[SavedAdapter]") -> None:
    from modeling.fingerprint import find_version, list_differences

    first, *others = adapters
    for other in others:
        ours, theirs = first.config.to_dict(), other.config.to_dict()
        for key in sorted((ours.keys() | theirs.keys()) - FREE_ENTRIES):
            if ours.get(key) != theirs.get(key):
                raise ValueError(
                    f"`merge` must be given adapters of one kind and size, got {first.source} with `{key}` "
                    f"{ours.get(key)!r} and {other.source} with {theirs.get(key)!r}."
                )
        # A fingerprint says more than a name: one base may have several.
        bases = [adapter.base_fingerprint for adapter in (first, other)]
        names = [adapter.config.base_model_name_or_path for adapter in (first, other)]
        if all(bases):  # of two versions nothing can be said; saving the older one again gives it the new one
            names = [base.get("weights") for base in bases]
            is_other = find_version(bases[0]) != find_version(bases[1]) or bool(list_differences(*bases))
        else:
            is_other = names[0] != names[1]
        if is_other:
            raise ValueError(
                f"`merge` must be given adapters of one base, got {first.source} of {names[0]} and {other.source} of "
                f"{names[1]}."
            )


def print_rows(rows: Sequence[dict[str, str]]) -> None:
    """Prints rows as an aligned table."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in COLUMNS}
    for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]:
        print("  ".join(f"{row[name]:<{widths[name]}}" for name in COLUMNS).rstrip())


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the five commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, many, text in (
        ("list", None, "Print a line for each adapter of a store."),
        ("info", "+", "Print what adapters are, as JSON."),
        ("copy", 2, "Copy an adapter to a new folder."),
        ("delete", "+", "Delete adapters, without asking."),
        ("merge", "+", "Average adapters of one kind, size and base."),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("folders", type=Path, nargs=many, help="Folders.")
        if name == "merge":
            command.add_argument("--weights", type=float, nargs="+", help="One an adapter; default: all the same.")
            command.add_argument("--output_dir", type=Path, required=True, help="A new folder.")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs one command."""
    arguments = build_parser().parse_args(argv)
    folders = arguments.folders
    if arguments.command == "list":
        rows = list_adapters(folders)
        print_rows(rows) if rows else print(f"No adapters in {folders}.")
    elif arguments.command == "info":
        print(json.dumps(describe_adapters(folders), indent=2, ensure_ascii=False))
    elif arguments.command == "copy":
        copy_adapter(*folders)
    elif arguments.command == "delete":
        delete_adapters(folders)
    else:
        merge_adapters(folders, arguments.output_dir, arguments.weights)


if __name__ == "__main__":
    run_main(main)
