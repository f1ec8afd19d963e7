"""What a domain adaptation has come to: error rates of what was saved, its report, its card."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from data.domain_utterances import DomainCollator, DomainUtterances, PairedUtterances
from data.prompts import Prompt
from data.text import normalize_text
from inference.answering import load_chat
from inference.audio_models import find_family
from inference.scoring import score_answers
from modeling.adapters import ADAPTER_WEIGHTS_NAME, adapters_off
from publishing.card import CardArguments, CardSubject, write_card
from publishing.domain_report import (
    DomainReportCallback,
    draw_clip_maps,
    find_transformer_blocks,
    list_trainable_names,
    write_domain_report,
)
from publishing.hub import HubTarget
from publishing.report import escape_markdown, find_rate, format_code, print_results, write_results
from training.audio_tower import apply_block, run_tower
from training.corpus_arguments import CorpusArguments
from training.domain_methods import DomainArguments
from training.objectives.domain import DomainObjective, evaluate_distances

USAGE = """\
The base and the adapter; the first line makes the kind of adapter known to the library:

```python
from transformers import AutoProcessor, {model_class}
from transformers.dynamic_module_utils import get_class_from_dynamic_module

get_class_from_dynamic_module("adapters.SpeechAdapterConfig", "{{repository}}")
model = {model_class}.from_pretrained("{{repository}}").eval()
processor = AutoProcessor.from_pretrained("{{repository}}")  # gives the mask of the features, which the adapter needs
```
"""


def measure_errors(
    arguments: DomainArguments,
    adapter: str | None,
    datasets: Mapping[str, DomainUtterances],
    *,
    batch_size: int,
    language: str | None = None,
) -> dict[str, float]:
    """
    Returns the error rates of the base as it is on the disk, and with the saved adapter on and off.

    Args:
        arguments: Of the recipe.
        adapter: Folder of the adapter; None for the base alone.
        datasets: The evaluation's utterances by domain, the source first.
        batch_size: Clips answered together.
        language: Code of the speech's language, by which texts are normalised. Default: the prompt's.

    Returns:
        Of both domains `<domain>_wer_before` and, with an adapter, `<source>_wer_off`, `<source>_wer_on`,
        `<target>_wer_off`, `<target>_wer_after` and `gap_closed`, the share of the distance between the domains that
        is gone (where there was one), all of them with `cer` where no spaces part words; `base_wer`, `base_cer`,
        `eval_wer` and `eval_cer` are the target's.
    """
    options = {"dtype": arguments.dtype, "load_in_4bit": arguments.load_in_4bit}
    options |= {"language": arguments.prompt_language}
    model, prompt = load_chat(arguments.model_name_or_path, **options)
    score = {"batch_size": batch_size, "max_new_tokens": arguments.max_new_tokens}
    score["language"] = language or arguments.prompt_language
    score["normalize"] = partial(normalize_text, language=score["language"])
    source, target = datasets

    def run() -> dict[str, dict[str, float]]:
        """Scores both domains."""
        return {name: score_answers(model, prompt, dataset, **score)["overall"] for name, dataset in datasets.items()}

    before = run()
    judge = find_rate(list(before.values()))
    results: dict[str, float] = {f"{name}_{judge}_before": rates[judge] for name, rates in before.items()}
    after = before
    if adapter:
        model, prompt = load_chat(arguments.model_name_or_path, adapter, **options)
        with adapters_off(model):
            off = run()
        after = run()
        results |= {f"{name}_{judge}_off": rates[judge] for name, rates in off.items()}
        results |= {f"{source}_{judge}_on": after[source][judge], f"{target}_{judge}_after": after[target][judge]}
        if gap := before[target][judge] - before[source][judge]:
            results["gap_closed"] = (before[target][judge] - after[target][judge]) / gap
    for rate in ("wer", "cer"):
        results |= {f"base_{rate}": before[target][rate], f"eval_{rate}": after[target][rate]}
    return results


def evaluate_base(
    arguments: DomainArguments,
    datasets: Mapping[str, DomainUtterances],
    folder: str | Path,
    *,
    batch_size: int,
    language: str | None = None,
) -> None:
    """Measures the base alone, for the method none, and writes and prints the results."""
    results = {
        "method": arguments.method,
        **measure_errors(arguments, None, datasets, batch_size=batch_size, language=language),
    }
    write_results(folder, results)
    print_results(results)


def measure_pairs(
    arguments: DomainArguments,
    objective: DomainObjective,
    dataset: PairedUtterances,
    collator: DomainCollator,
    when: str,
    *,
    batch_size: int,
) -> dict[str, float]:
    """
    Returns how alike the target's features and the source's are, for objectives that need pairs.

    Args:
        arguments: Of the recipe.
        objective: With the adapter.
        dataset: The evaluation's pairs.
        collator: Makes batches of them.
        when: `"before"` or `"after"`, part of the results' names.
        batch_size: Pairs of a batch.

    Returns:
        `<target>_feature_cosine_<when>`, the cosine similarity, and `<target>_feature_l2_<when>`, the squared
        difference over the squared norm; nothing where there are no pairs.
    """
    if not arguments.needs_pairs:
        return {}
    distances = evaluate_distances(objective, dataset, collator, batch_size=batch_size)
    name = f"{arguments.target_domain}_feature"
    return {
        f"{name}_cosine_{when}": 1 - distances["cosine_distance"],
        f"{name}_l2_{when}": distances["l2_distance"],
    }


def describe_training(
    arguments: DomainArguments, model: PreTrainedModel, dataset: Dataset, prompt: Prompt, metrics: Mapping[str, float]
) -> dict[str, object]:
    """
    Returns what was trained: `method`, `objective`, parameters of the whole model, in memory or not, and seconds.

    Args:
        arguments: Of the recipe.
        model: With its adapter.
        dataset: What it was trained on.
        prompt: What asks the model.
        metrics: Of the Trainer.
    """
    return {
        "method": arguments.method,
        "objective": arguments.objective,
        "trainable_parameters": model.num_parameters(only_trainable=True),
        "total_parameters": model.num_parameters(),
        "train_seconds": round(sum(dataset.lengths) / prompt.extractor.sampling_rate, 2),
        "train_runtime": metrics["train_runtime"],
    }


def draw_adapter_maps(
    arguments: DomainArguments,
    objective: DomainObjective,
    prompt: Prompt,
    evaluation: Mapping[str, DomainUtterances],
    folder: str | Path,
) -> list[dict[str, str]]:
    """
    Draws what the adapter looks at and lets through in the target domain's first clips, as many as are asked for.

    Returns:
        Rows of [`draw_clip_maps`]; none for a method without such maps.
    """
    dataset, model = evaluation[arguments.target_domain], objective.adapted_model
    device, mask_name = next(objective.parameters()).device, find_family(model.config).mask
    items = {f"{row}: {dataset.find_text(row)}": dataset[row] for row in range(len(dataset))[: arguments.report_clips]}
    batches = {name: prompt.extract([item["samples"]]) for name, item in items.items()}
    counts = iter([item["num_samples"] for item in items.values()])  # of the clips, in the order of the calls

    def run(features: torch.Tensor) -> None:
        """Runs the tower and the adapter on its output."""
        num_samples = next(counts)
        mask = prompt.mask_frames([num_samples])[mask_name].to(device)
        states = run_tower(model, {"input_features": features.to(device), mask_name: mask})
        for block in find_transformer_blocks(objective).values():
            apply_block(block, states, torch.tensor([prompt.count_frames(num_samples)], device=device))

    objective.eval()
    seconds = {name: item["num_samples"] / prompt.extractor.sampling_rate for name, item in items.items()}
    features = {name: batch["input_features"][0] for name, batch in batches.items()}
    return draw_clip_maps(folder, objective, features, run, seconds=seconds)


def save_domain_outcome(
    folder: str | Path,
    results: dict,
    subject: CardSubject,
    *,
    report: DomainReportCallback,
    trained: nn.Module,
    maps: list,
) -> None:
    """
    Writes results, report, pictures and card beside the adapter in `folder`.

    Args:
        folder: Output folder of the recipe, with the adapter.
        results: Of the run; the adapter's size is added.
        subject: What the card is about.
        report: What was noted while training.
        trained: The model that was trained.
        maps: Rows of [`draw_adapter_maps`].
    """
    results["adapter_bytes"] = (Path(folder) / ADAPTER_WEIGHTS_NAME).stat().st_size
    write_results(folder, results)
    content = {"trainable": list_trainable_names(trained), "history": report.history, "results": results, "maps": maps}
    pictures = write_domain_report(folder, content)
    details = "\n\n".join(f"![{Path(name).stem}]({name})" for name in pictures)
    write_card(folder, replace(subject, details=f"## Report\n\n{details}" if pictures else None))


def describe_domain_run(
    arguments: DomainArguments,
    corpus_args: CorpusArguments,
    card_args: CardArguments,
    hub_target: HubTarget | None,
    model: PreTrainedModel,
) -> CardSubject:
    """Returns what the card is about."""
    heard = ("simulated " if arguments.simulate_domain else "") + format_code(arguments.target_domain)
    return CardSubject(
        base=arguments.model_name_or_path,
        base_revision=hub_target.base_revision if hub_target else None,
        dataset=corpus_args.dataset,
        split=corpus_args.eval_split,
        description=f"Adapter from {escape_markdown(arguments.source_domain)} to {heard} speech: method "
        f"{arguments.method}, objective {arguments.objective}.",
        language=card_args.language,
        dataset_licence=card_args.dataset_licence,
        licence=card_args.licence,
        usage=USAGE.format(model_class=type(model).__name__),
    )
