"""The code of the adapters beside an adapter's weights: with it, a stock model of transformers can load them."""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .files import write_whole

# The file that registers the adapters when it is imported.
ENTRY_NAME = "adapters.py"


def find_adapter_code() -> list[Path]:
    """Returns the files of this code that an adapter needs, wherever it runs from: one flat folder."""
    entry = Path(__file__).with_name(ENTRY_NAME)
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
