"""Model cards of what a recipe made."""

import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling.files import write_whole

CARD_NAME = "README.md"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")

ADAPTER_USAGE = '''\
```python
from transformers import AutoModelForCTC, AutoProcessor

model = AutoModelForCTC.from_pretrained("{base}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{base}", trust_remote_code=True)
model.load_adapter("{repository}")
```
'''


@dataclass(frozen=True)
class CardSubject:
    """
    What a card is about.

    Args:
        base: Name of the base, as the user gave it.
        dataset: Name of the corpus, likewise.
        split: Split that the metrics belong to.
        description: One or two sentences on what was trained.
        usage: Code that loads it.
        library: `"peft"` for an adapter, `"transformers"` for a model.
        picture: File name of a picture of the results in the same folder.
    """

    base: str | None
    dataset: str
    split: str
    description: str
    usage: str
    library: str = "peft"
    picture: str | None = None


def public_name(name: str) -> str:
    """
    Returns `name` if it is a Hub name or relative; of an absolute path only its last part, so that cards tell nothing
    about the machine.

    Example:

    ```python
    >>> from recipes.hub import public_name

    >>> public_name("me/base"), public_name("/home/me/secret/base")
    ('me/base', 'base')

    ```
    """
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or ".." in path.parts else name


def training_command() -> str:
    """Returns the command line of this process, absolute paths shortened to their last part."""
    return " ".join(["accelerate launch", *(public_name(token) for token in sys.argv)])


def write_card(folder: str | Path, subject: CardSubject, results: Mapping[str, object]) -> None:
    """
    Writes `README.md`: metadata with the word error rate for the Hub's index, results, command, versions and usage.

    Args:
        folder: Output folder of the recipe.
        subject: What the card is about.
        results: What `eval_results.json` holds.
    """
    name = Path(folder).resolve().name
    dataset = public_name(subject.dataset)
    base = public_name(subject.base) if subject.base else None
    metrics = [
        EvalResult("automatic-speech-recognition", dataset, dataset, metric, results[f"eval_{metric}"], dataset_split=subject.split)
        for metric in ("wer", "cer")
    ]
    data = ModelCardData(
        model_name=name,
        base_model=base,
        library_name=subject.library,
        pipeline_tag="automatic-speech-recognition",
        tags=["speech-adapter", "automatic-speech-recognition"],
        eval_results=metrics,
    )
    rows = "\n".join(f"| {key} | {value:.4f} |" if isinstance(value, float) else f"| {key} | {value} |" for key, value in results.items())
    versions = ", ".join([f"python {platform.python_version()}", *(f"{library} {version(library)}" for library in LIBRARIES)])
    picture = f"![Results]({subject.picture})\n\n" if subject.picture else ""
    usage = subject.usage.format(base=base, repository=name)
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{subject.description}\n\n{picture}## Results on `{dataset}`, "
        f"split `{subject.split}`\n\n| name | value |\n| --- | --- |\n{rows}\n\n## Use\n\n{usage}\n"
        f"## Training\n\n```bash\n{training_command()}\n```\n\n{versions}\n"
    )
    with write_whole(folder) as scratch:
        ModelCard(re.sub(r"\n{3,}", "\n\n", text)).save(scratch / CARD_NAME)
