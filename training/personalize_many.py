"""Adapters of many speakers in one run: stacks of them train together, processes share the speakers."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from torch.utils.data import Dataset
from transformers import AutoModelForCTC, AutoProcessor, PreTrainedModel, ProcessorMixin, set_seed
from transformers.trainer_utils import IntervalStrategy

from data.augmentation import Augmentation
from data.text import set_language
from inference.scoring import evaluate_dataset
from modeling.adapters import ADAPTER_WEIGHTS_NAME, adapters_off
from modeling.files import find_whole
from modeling.whole_models import load_whole
from publishing.card import CARD_NAME, RUN_KEY, CardArguments, read_results
from publishing.report import RESULTS_NAME, draw_speakers, find_rate, format_table, write_results
from training.corpus_arguments import CorpusArguments
from training.frozen_part import CacheArguments, FrozenPart
from training.output_folder import check_output_dir
from training.personal import (
    ALL_SPEAKERS,
    MAX_TRAINABLE_SHARE,
    PICTURE_NAME,
    PersonalArguments,
    PersonalTrainingArguments,
    SpeakerData,
    SpeakerLoader,
    add_personal_adapter,
    collect_results,
    count_sizes,
    describe_personal_run,
    save_personal_outcome,
    score_datasets,
)
from training.speaker_folders import name_folders
from training.stacks import StackMember, check_stackable, find_stacked_blocks, train_stack
from training.trainer import AdapterTrainer, check_trainable

logger = logging.getLogger(__name__)

# What a speaker's folder holds once the speaker is finished.
OUTCOME = (ADAPTER_WEIGHTS_NAME, ADAPTER_CONFIG_NAME, RESULTS_NAME, PICTURE_NAME, CARD_NAME)
# Pairs of bars that fit a picture.
MAX_DRAWN = 24


def check_many(personal_args: PersonalArguments, training_args: PersonalTrainingArguments) -> None:
    """
    Makes sure that the arguments make sense for several speakers.

    Raises:
        ValueError: They ask for one model or one repository, or for what a stack cannot do.
    """
    if personal_args.unfreeze_base:
        raise ValueError("`unfreeze_base` makes one model a speaker: give one `speaker_id`, got several.")
    if training_args.push_to_hub:
        raise ValueError(
            "`push_to_hub` takes one speaker, got several. Push the folders with `python recipes/push.py FOLDER`."
        )
    if personal_args.speakers_per_stack < 1:
        raise ValueError(f"`speakers_per_stack` must be at least 1, got {personal_args.speakers_per_stack}.")
    check_stackable(training_args)


def list_unfinished(folders: Mapping[str, str], output_dir: str, *, is_resumed: bool) -> list[str]:
    """
    Returns the speakers without an adapter in `output_dir`, or without its results, picture or card.

    The first process looks, for all: another one that is late would find what has been made since.

    Args:
        folders: The name of each speaker's folder there.
        output_dir: The run's folder.
        is_resumed: Whether there may be adapters already.

    Raises:
        ValueError: A speaker has an adapter there and the run is not resumed.
    """
    unfinished = [[]]
    if PartialState().is_main_process:
        for speaker, name in folders.items():
            folder = Path(output_dir) / name
            check_output_dir(folder, is_resumed=is_resumed)
            if not all(find_whole(folder, part).is_file() for part in OUTCOME):
                unfinished[0].append(speaker)
    broadcast_object_list(unfinished)
    return unfinished[0]


def read_finished(folders: Mapping[str, str], output_dir: str) -> list[dict]:
    """Returns the results of speakers of earlier runs, as [`StackRunner`] gives them."""
    rows = [read_results(Path(output_dir) / name) | {"folder": name} for name in folders.values()]
    return [{key: value for key, value in row.items() if key != RUN_KEY} for row in rows]


def split_stacks(speakers: Sequence[str], size: int) -> Iterator[list[str]]:
    """
    Yields lists of at most `size` speakers, in order.

    Example:

    ```python
    >>> from training.personalize_many import split_stacks

    >>> list(split_stacks(["ann", "ben", "cem"], 2))
    [['ann', 'ben'], ['cem']]

    ```
    """
    remaining = iter(speakers)
    while stack := list(islice(remaining, size)):
        yield stack


class StackRunner:
    """
    Trains, scores and saves one stack of speakers after the other on one base.

    Args:
        model: The base.
        processor: Of the base.
        loader: Gives the speakers' utterances.
        folders: The name of each speaker's folder.
        arguments: Of the recipe, by type.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        loader: SpeakerLoader,
        folders: Mapping[str, str],
        arguments: dict,
    ):
        self.model, self.processor, self.loader, self.arguments = model, processor, loader, arguments
        self.folders = folders
        self.training_args: PersonalTrainingArguments = arguments[PersonalTrainingArguments]
        self.score = partial(
            score_datasets, model, processor, batch_size=self.training_args.per_device_eval_batch_size
        )

    def run(self, speakers: Sequence[str]) -> list[dict]:
        """
        Returns the results of each speaker, in order; their adapters are on disk then and no more in memory.

        Of all speakers of a corpus, those whose data cannot be used are left out, with a warning.
        """
        start = time.perf_counter()
        datas = self._load(speakers)
        if not datas:
            return []
        speakers = [data.speaker_id for data in datas]
        with adapters_off(self.model):
            before = [self.score(data.evaluation) for data in datas]
        names = [f"speaker_{number}" for number in range(len(speakers))]
        train_start = time.perf_counter()
        self._train(names, datas)
        runtime = round((time.perf_counter() - train_start) / len(speakers), 3)
        results = []
        for name, data, scores in zip(names, datas, before, strict=True):
            results.append(self._save(name, data, scores, runtime))
        for name in names:
            self.model.delete_adapter(name)
        print(f"{len(speakers)} adapters in {time.perf_counter() - start:.0f} s: {', '.join(speakers)}", flush=True)
        return results

    def _load(self, speakers: Sequence[str]) -> list[SpeakerData]:
        datas = []
        for speaker in speakers:
            try:
                datas.append(self.loader.load(speaker))
            except ValueError as error:
                if self.arguments[PersonalArguments].speaker_id != [ALL_SPEAKERS]:
                    raise
                logger.warning("Speaker %r is left out: %s", speaker, error)
        return datas

    def _train(self, names: Sequence[str], datas: Sequence[SpeakerData]) -> None:
        personal_args = self.arguments[PersonalArguments]
        for name in names:
            add_personal_adapter(self.model, self.processor, personal_args, name, seed=self.training_args.seed)
        blocks = {name: find_stacked_blocks(self.model, name).requires_grad_(True) for name in names}
        check_trainable(self.model, max_share=MAX_TRAINABLE_SHARE * len(names))
        batch_size = self.training_args.per_device_eval_batch_size
        frozen = FrozenPart(self.model, self.processor, self.arguments[CacheArguments], batch_size=batch_size)
        # Makes optimizers and schedules; it insists on data if the arguments ask for evaluations.
        trainer = AdapterTrainer(model=self.model, args=self.training_args, eval_dataset=datas[0].evaluation[""])
        members = []
        for name, data in zip(names, datas, strict=True):
            evaluation = self._evaluation(frozen, data)
            options = {"adapter_name": name, "batch_size": batch_size}
            score = partial(evaluate_dataset, self.model, self.processor, data.evaluation[""], **options)
            members.append(
                StackMember(
                    name,
                    blocks[name],
                    frozen.prepare(data.train),
                    evaluation,
                    trainer=trainer,
                    speaker_id=data.speaker_id,
                    score=lambda score=score: score()["overall"],
                )
            )
        train_stack(self.model, members, frozen.collate)
        self.model.eval()

    def _evaluation(self, frozen: FrozenPart, data: SpeakerData) -> Dataset | None:
        is_needed = self.training_args.eval_strategy != IntervalStrategy.NO
        return frozen.prepare(data.evaluation[""]) if is_needed else None

    def _save(self, name: str, data: SpeakerData, before: dict[str, dict], runtime: float) -> dict:
        self.model.set_adapter(name)
        sizes = count_sizes(self.model, name)
        results = collect_results(data, before, self.score(data.evaluation), sizes=sizes, runtime=runtime)
        subject = describe_personal_run(
            self.arguments[PersonalArguments],
            self.arguments[CorpusArguments],
            self.arguments[CardArguments],
            None,
            data.train.seconds,
        )
        results["folder"] = self.folders[data.speaker_id]
        folder = Path(self.training_args.output_dir) / results["folder"]
        save_personal_outcome(
            self.model, self.processor, self.arguments[PersonalArguments], subject, folder, results, adapter_name=name
        )
        return results


def summarize(rows: Sequence[dict]) -> dict:
    """Returns what `eval_results.json` of the whole run reports: means, and each speaker's row."""
    rates = [f"{state}_{rate}" for rate in ("wer", "cer") for state in ("base", "eval")]
    return {
        **{name: mean(row[name] for row in rows) for name in rates},
        "rate": find_rate(rows),
        "num_speakers": len(rows),
        "speakers": list(rows),
    }


def format_rows(rows: Sequence[dict]) -> str:
    """Returns one line a speaker, with the rate that judges them, and folders where they have other names."""
    rate = find_rate(rows)
    has_folders = any(row.get("folder", row["speaker_id"]) != row["speaker_id"] for row in rows)
    return format_table(
        [
            {
                "speaker": row["speaker_id"],
                "speech": f"{row['train_seconds']:.0f} s",
                f"{rate.upper()} before": f"{row[f'base_{rate}']:.1%}",
                "after": f"{row[f'eval_{rate}']:.1%}",
                "training": f"{row['train_runtime']:.1f} s",
                **({"folder": row.get("folder", row["speaker_id"])} if has_folders else {}),
            }
            for row in rows
        ]
    )


def personalize_many(
    personal_args: PersonalArguments,
    corpus_args: CorpusArguments,
    augmentation: Augmentation,
    cache_args: CacheArguments,
    card_args: CardArguments,
    training_args: PersonalTrainingArguments,
) -> None:
    """
    Trains an adapter for each speaker into a folder of its own, and writes their results together.

    The folder has the speaker's name where that may be a folder's; `eval_results.json` names all of them.

    With `resume_from_checkpoint`, speakers that are finished are left as they are, and reported with the others.

    Raises:
        ValueError: A speaker or everybody lacks data, or the arguments make sense for one speaker only.
    """
    check_many(personal_args, training_args)
    set_seed(training_args.seed)
    state = PartialState()

    # Model
    model = load_whole(AutoModelForCTC, personal_args.model_name_or_path).to(state.device)
    processor = AutoProcessor.from_pretrained(personal_args.model_name_or_path, trust_remote_code=False)
    set_language(processor.tokenizer, card_args.language)

    # Data
    options = {"samples_per_logit": model.config.inputs_to_logits_ratio, "seed": training_args.seed}
    with state.local_main_process_first():
        loader = SpeakerLoader(personal_args, corpus_args, augmentation, processor, **options)
    is_resumed = bool(training_args.resume_from_checkpoint)
    folders = name_folders(loader.find_speakers())
    speakers = list_unfinished(folders, training_args.output_dir, is_resumed=is_resumed)

    # Train, evaluate and save
    arguments = (personal_args, corpus_args, cache_args, card_args, training_args)
    runner = StackRunner(model, processor, loader, folders, {type(argument): argument for argument in arguments})
    rows: list[dict] = []
    with state.split_between_processes(speakers) as own:
        for stack in split_stacks(own, personal_args.speakers_per_stack):
            rows += runner.run(stack)
    rows = gather_object(rows)
    finished = {speaker: name for speaker, name in folders.items() if speaker not in speakers}
    if not rows and not finished:
        raise ValueError("`speaker_id` all must find a speaker whose data can be used, got none: see the warnings.")
    if not state.is_main_process:
        return
    rows = sorted(rows + read_finished(finished, training_args.output_dir), key=lambda row: row["speaker_id"])
    write_results(training_args.output_dir, summarize(rows))
    draw_speakers(Path(training_args.output_dir) / PICTURE_NAME, rows[:MAX_DRAWN])
    print(format_rows(rows))
