"""Model cards of what a recipe made, from facts that stay beside the results, so that a folder can be pushed later."""

import json
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME

from modeling.adapter_files import describe_adapter
from modeling.files import find_whole, write_whole
from publishing.card_metadata import check_languages, check_licence
from publishing.pictures import escape_control
from publishing.report import (
    RESULTS_NAME,
    escape_markdown,
    format_code,
    format_code_block,
    format_table,
    write_results,
)

CARD_NAME = "README.md"
RUN_KEY = "run"  # of eval_results.json: what the card says besides the results
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")
TASK = "automatic-speech-recognition"
RATES = ("wer", "cer")
EMBEDDED_CORPORA = ("synthetic", "synthetic_s2st")
SECRET_FLAGS = ("--hub_token", "--push_to_hub_token")

ADAPTER_USAGE = """\
The base and the adapter in one call:

```python
import torch
from transformers import AutoModelForCTC, AutoProcessor

model = AutoModelForCTC.from_pretrained("{repository}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{base}", trust_remote_code=True)

speech = torch.randn(16_000).numpy()  # a second of sound at 16 kHz; put a recording here
inputs = processor(speech, sampling_rate=16_000, return_tensors="pt")
with torch.inference_mode():
    print(processor.batch_decode(model(**inputs).logits.argmax(-1)))
```

The adapter on the base that it was trained on, which has other adapters too:

```python
model = AutoModelForCTC.from_pretrained("{base}", {revision}trust_remote_code=True)
model.load_adapter("{repository}", "{name}")
```
"""
MODEL_USAGE = """\
```python
import torch
from transformers import AutoModelForCTC, AutoProcessor

model = AutoModelForCTC.from_pretrained("{repository}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{repository}", trust_remote_code=True)

speech = torch.randn(16_000).numpy()  # a second of sound at 16 kHz; put a recording here
inputs = processor(speech, sampling_rate=16_000, return_tensors="pt")
with torch.inference_mode():
    print(processor.batch_decode(model(**inputs).logits.argmax(-1)))
```
"""


@dataclass
class CardArguments:
    """What the card says of the data."""

    language: list[str] | None = field(
        default=None,
        metadata={"help": "Language codes of the speech, such as en ko; the first one's rules normalise transcripts."},
    )
    dataset_licence: str | None = field(default=None, metadata={"help": "Licence of the data, such as cc-by-sa-4.0."})
    licence: str | None = field(default=None, metadata={"help": "Licence of what is trained, such as apache-2.0."})

    def __post_init__(self):
        self.language = check_languages(self.language)
        self.dataset_licence = check_licence(self.dataset_licence, flag="dataset_licence")
        self.licence = check_licence(self.licence, flag="licence")


def public_name(name: str) -> str:
    """
    Returns `name` if it is a Hub name or relative; of an absolute path what lies below the working directory, else
    only its last part, so that cards tell nothing about the machine.

    Example:

    ```python
    >>> from publishing.card import public_name

    >>> public_name("me/base"), public_name("/home/me/secret/base")
    ('me/base', 'base')

    ```
    """
    path = Path(name).expanduser()
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return path.name if path.is_absolute() or ".." in path.parts else name


def is_hub_name(name: str) -> bool:
    """Whether `name` looks like `user/name` and is no folder here."""
    is_pair = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
    return is_pair and not Path(name).exists() and name.split("/")[0] not in EMBEDDED_CORPORA


def training_command() -> str:
    """Returns the command line of this process without its token, absolute paths shortened by [`public_name`]."""
    return shlex.join(["accelerate", "launch", *_public_tokens(sys.argv)])


def _public_tokens(tokens: list[str]) -> Iterator[str]:
    is_secret = False
    for token in tokens:
        flag, equals, value = token.partition("=")
        if not is_secret and flag not in SECRET_FLAGS:
            yield f"{flag}={public_name(value)}" if equals else public_name(token)
        is_secret = flag in SECRET_FLAGS and not equals


def list_versions() -> str:
    """Returns the versions of Python and of the libraries that train."""
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in LIBRARIES)])


@dataclass(frozen=True)
class CardSubject:
    """
    What a card is about, beside the results of the run.

    Args:
        dataset: Name of the corpus, as the user gave it.
        split: Split that the metrics belong to.
        description: One or two sentences on what was trained.
        base: Name of the base, likewise; None for a model of its own.
        base_revision: Commit of the base on the Hub.
        language: Language codes of the speech.
        dataset_licence: Licence of the corpus.
        licence: Licence of what was trained.
        is_dataset_on_hub: Whether `dataset` is a name on the Hub; [`write_card`] finds out, where the name is valid.
        is_base_on_hub: The same of `base`.
        picture: File name of a picture of the results in the same folder.
        usage: Text of the section on use, with `{repository}` and the like as in `ADAPTER_USAGE`. Default: that of
            a CTC recogniser.
        details: Sections after the facts, in Markdown.
        command: What was run.
        versions: Of the libraries that ran.
    """

    dataset: str
    split: str
    description: str
    base: str | None = None
    base_revision: str | None = None
    language: list[str] | None = None
    dataset_licence: str | None = None
    licence: str | None = None
    is_dataset_on_hub: bool = False
    is_base_on_hub: bool = False
    picture: str | None = None
    usage: str | None = None
    details: str | None = None
    command: str = field(default_factory=training_command)
    versions: str = field(default_factory=list_versions)


def write_card(folder: str | Path, subject: CardSubject, *, name: str | None = None) -> None:
    """
    Writes `README.md`, and notes `subject` in `eval_results.json`, so that a push makes the card anew with its names.

    Args:
        folder: Output folder of the recipe, with `eval_results.json` and the adapter or the model.
        subject: What the card is about.
        name: Of what was trained. Default: the folder's.
    """
    subject = replace(
        subject,
        dataset=public_name(subject.dataset),
        base=public_name(subject.base) if subject.base else None,
        is_dataset_on_hub=is_hub_name(subject.dataset),
        is_base_on_hub=subject.base is not None and is_hub_name(subject.base),
    )
    write_results(folder, read_results(folder) | {RUN_KEY: asdict(subject)})
    with write_whole(folder) as scratch:
        (scratch / CARD_NAME).write_text(render_card(folder, subject, repository=name), encoding="utf-8")


def read_results(folder: str | Path) -> dict:
    """Returns the results in `folder`; none where there is no file of them."""
    path = find_whole(folder, RESULTS_NAME)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_subject(folder: str | Path) -> CardSubject | None:
    """Returns what [`write_card`] noted in `folder`, if it did."""
    run = read_results(folder).get(RUN_KEY)
    return CardSubject(**run) if run else None


def render_card(folder: str | Path, subject: CardSubject, *, repository: str | None = None) -> str:
    """
    Returns the card: metadata with the error rates for the Hub's index, results, usage, command and versions.

    Args:
        folder: As for [`write_card`].
        subject: What the card is about.
        repository: Name on the Hub. Default: the folder's own name.
    """
    folder = Path(folder)
    repository = repository or folder.resolve().name
    name = repository.split("/")[-1]
    results = read_results(folder)
    is_adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
    usage = (subject.usage or (ADAPTER_USAGE if is_adapter else MODEL_USAGE)).format(
        repository=_escape_quoted(repository),
        base=_escape_quoted(subject.base or ""),
        revision=f'revision="{subject.base_revision}", ' if subject.base_revision else "",
        name=re.sub(r"[^\w-]", "_", name),
    )
    sections = [
        f"---\n{_metadata(subject, results, name, is_adapter).to_yaml()}\n---",
        f"# {escape_markdown(name)}\n\n{subject.description}",
        f"![Results]({subject.picture})" if subject.picture else "",
        f"> {results['caution']}" if results.get("caution") else "",
        f"## Results\n\n{_error_table(subject, results)}" if RATES[0] in _measured_rates(results) else "",
        f"## Facts\n\n{_fact_table(folder, subject, results, is_adapter)}",
        subject.details or "",
        f"## Use\n\n{usage}",
        f"## Training\n\n{format_code_block(subject.command, 'bash')}",
        subject.versions,
    ]
    text = "\n\n".join(section.strip() for section in sections if section) + "\n"
    return str(ModelCard(text))


def _metadata(subject: CardSubject, results: Mapping, name: str, is_adapter: bool) -> ModelCardData:
    dataset, split = subject.dataset, subject.split
    evaluations = [
        EvalResult(TASK, dataset, dataset, rate, results[f"eval_{rate}"], dataset_split=split)
        for rate in _measured_rates(results)
    ]
    if "others_eval_wer" in results:
        others = {"dataset_name": f"{dataset}, other speakers", "dataset_config": "other_speakers"}
        evaluations += [
            EvalResult(TASK, dataset, metric_type=rate, metric_value=results[f"others_eval_{rate}"],
                       dataset_split=split, **others)
            for rate in RATES
        ]  # fmt: skip
    return ModelCardData(
        model_name=name,
        base_model=subject.base if subject.is_base_on_hub else None,
        base_model_relation="adapter" if is_adapter else None,
        datasets=[dataset] if subject.is_dataset_on_hub else None,
        language=subject.language,
        license=subject.licence,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=TASK,
        metrics=list(RATES),
        tags=["speech-adapter", TASK] if is_adapter else [TASK],
        eval_results=evaluations or None,
    )


def _escape_quoted(name: str) -> str:
    """A name as it stands between double quotes in Python."""
    return escape_control(name.replace("\\", "\\\\").replace('"', '\\"'))


def _measured_rates(results: Mapping) -> list[str]:
    """The error rates that there are: none where a part of a model was trained without the rest."""
    return [rate for rate in RATES if f"eval_{rate}" in results]


def _error_table(subject: CardSubject, results: Mapping) -> str:
    """Error rates on the target, and on the base's own test data where they were measured; before too, if known."""
    where = f"{format_code(subject.dataset)}, split {format_code(subject.split)}"
    places = [("", where)]
    if "others_eval_wer" in results:
        others = ", ".join(map(escape_markdown, results["base_eval_speakers"]))
        places.append(("others_", f"{where}, the base's speakers {others}"))
    rows = []
    for prefix, place in places:
        for rate in RATES:
            before = results.get(f"{prefix}base_{rate}")
            row = {"data": place, "metric": rate.upper()}
            row |= {} if before is None else {"before": f"{before:.2%}"}
            rows.append(row | {"after" if row.get("before") else "result": f"{results[f'{prefix}eval_{rate}']:.2%}"})
    return format_table(rows)


def _fact_table(folder: Path, subject: CardSubject, results: Mapping, is_adapter: bool) -> str:
    facts = {}
    if subject.base:
        facts["base"] = format_code(subject.base) + (f" at `{subject.base_revision}`" if subject.base_revision else "")
    if is_adapter:
        adapter = describe_adapter(folder)
        sizes = f", hidden sizes {adapter['hidden_sizes']}" if adapter["hidden_sizes"] else ""
        facts["adapter"] = adapter["kind"] + sizes
        facts["size"] = f"{adapter['parameters']:,} parameters, {adapter['bytes']:,} bytes"
    facts["parameters"] = (
        f"{results['total_parameters']:,} with the base" if is_adapter else f"{results['total_parameters']:,}"
    )
    if "trainable_parameters" in results:
        share = results["trainable_parameters"] / results["total_parameters"]
        facts["trainable"] = f"{results['trainable_parameters']:,} ({share:.2%})"
    seconds = results.get("train_seconds")  # unknown of a stream
    facts["speech"] = "streamed" if seconds is None else f"{seconds / 3600:.3g} hours ({seconds:,.0f} s)"
    facts["data"] = format_code(subject.dataset)
    if subject.licence:
        facts["licence"] = subject.licence
    facts["licence of the data"] = subject.dataset_licence or "not stated"
    facts["language"] = ", ".join(subject.language) if subject.language else "not stated"
    facts["training time"] = f"{results['train_runtime']:.0f} s"
    return format_table([{"fact": name, "value": value} for name, value in facts.items()])
