"""The code of the adapters beside an adapter's weights: with it, a stock model of transformers can load them."""

import ast
import hashlib
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .files import write_whole

# The file that registers the adapters when it is imported.
ENTRY_NAME = "adapters.py"


def find_adapter_code(folder: str | Path = Path(__file__).parent) -> list[Path]:
    """Returns the files in `folder` that an adapter needs. Default: of this code, wherever it runs from."""
    entry = Path(folder) / ENTRY_NAME
    return [entry, *map(Path, sorted(get_relative_import_files(entry)))]


def save_adapter_code(folder: str | Path) -> None:
    """
    Copies the code of the adapters into `folder`, the output of [`save_adapter`].

    The adapter of a stock model then loads in two lines where this project is not installed:

    Args:
        folder: Of an adapter.

    Example:

    ```python
    get_class_from_dynamic_module("adapters.SpeechAdapterConfig", "me/adapter")
    model = WhisperForConditionalGeneration.from_pretrained("me/adapter")
    ```
    """
    with write_whole(folder) as scratch:
        for path in find_adapter_code():
            (scratch / path.name).write_bytes(path.read_bytes())


def find_code_version(folder: str | Path) -> str:
    """Returns 16 hexadecimal digits over what the adapters' code in `folder` does; comments and docstrings aside."""
    digest = hashlib.blake2b(digest_size=8)
    for path in find_adapter_code(folder):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                del node.body[0]
        digest.update(f"{path.name}\0{ast.dump(tree)}\0".encode())
    return digest.hexdigest()


def check_same_code(first: str) -> None:
    """
    Makes sure that this code is that of the file `first`, which has registered the adapters in this process.

    Raises:
        ImportError: It does something else: adapters of one would run on the other.
    """
    folders = [Path(first).parent, Path(__file__).parent]
    if folders[0] == folders[1]:
        return
    versions = [find_code_version(folder) for folder in folders]
    if versions[0] != versions[1]:
        raise ImportError(
            f"The code of adapters must be of one version in a process, got {versions[1]} in {folders[1]} after "
            f"{versions[0]} in {folders[0]}. Use a process for each, or push both repositories with one version."
        )
