"""Trains the adapters of many speakers together on one frozen base, each as if it were alone.

In every step what remains of the base runs once on the rows of all speakers, and each adapter acts on its own rows.
A speaker's loss is the mean over the speaker's own rows, so its adapter gets the gradient that it would get alone;
order, dropout, schedule, clipping, early stopping and best state are each speaker's own too.
"""

import copy
import logging
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean, mean

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    MODEL_FOR_CTC_MAPPING,
    AutoConfig,
    AutoModelForCTC,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy

from data.augmentation import Augmentation
from data.collators import CTCCollator
from data.text import set_language
from inference.recognizers import CTCRecognizer
from inference.scoring import evaluate_dataset
from modeling.adapters import ADAPTER_WEIGHTS_NAME, adapters_off
from modeling.files import find_whole
from modeling.whole_models import load_whole
from publishing.card import CARD_NAME, RUN_KEY, CardArguments, read_results
from publishing.report import RESULTS_NAME, draw_speakers, find_rate, format_table, write_results
from training.adapter_dropout import seed_dropout
from training.corpus_arguments import CorpusArguments
from training.frozen_part import CacheArguments, cache_frozen_part
from training.honoured_arguments import HONOURED_BY_STACK, check_honoured, follows_metric
from training.objectives.recognition import CTCObjective
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
    find_stacked_blocks,
    save_personal_outcome,
    score_datasets,
)
from training.speaker_folders import name_folders
from training.trainer import (
    AdapterTrainer,
    RecipeTrainingArguments,
    SeededSampler,
    check_trainable,
    find_dropout_seed,
    set_frozen_modules_to_eval,
)

logger = logging.getLogger(__name__)

# What a speaker's folder holds once the speaker is finished.
OUTCOME = (ADAPTER_WEIGHTS_NAME, ADAPTER_CONFIG_NAME, RESULTS_NAME, PICTURE_NAME, CARD_NAME)
# Pairs of bars that fit a picture.
MAX_DRAWN = 24


def check_stackable(arguments: RecipeTrainingArguments) -> None:
    """
    Makes sure that a stack can do what the training arguments ask for.

    Raises:
        ValueError: They ask for what [`train_stack`] does not honour, for checkpoints, or for mixed precision, which
            the launcher can ask for too.
    """
    check_honoured(arguments.changed, HONOURED_BY_STACK, loop="the training of several speakers")
    if "save_strategy" in arguments.changed and not arguments.load_best_model_at_end:
        raise ValueError(
            f"`save_strategy` must be no for several speakers, got {arguments.save_strategy.value}. No checkpoints "
            "are written; `resume_from_checkpoint` keeps the speakers that are finished."
        )
    if arguments.mixed_precision != "no":
        raise ValueError(
            "Mixed precision (`bf16`, or `mixed_precision` of the launcher) must be off for several speakers, got "
            f"{arguments.mixed_precision}. Launch with accelerate_configs/cpu.yaml or `--mixed_precision no`; "
            "`cache_dtype` bfloat16 saves more."
        )


class StackMember:
    """
    One speaker of a stack: the adapter's blocks with an optimizer, a schedule and a best state of their own.

    Args:
        adapter_name: Name of the adapter in the model.
        blocks: The adapter's modules in the model.
        train_dataset: The speaker's utterances.
        eval_dataset: Utterances for early stopping and the best state, if the arguments ask for them.
        trainer: Makes optimizer and schedule; its arguments hold for every speaker.
        speaker_id: The speaker, for the logs.
        score: Returns the error rates of the evaluation data, if the arguments compare models by one of them.

    Attributes:
        log_history (`list[dict]`): What was logged, as in the Trainer's state.
    """

    def __init__(
        self,
        adapter_name: str,
        blocks: nn.ModuleList,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        *,
        trainer: AdapterTrainer,
        speaker_id: str = "",
        score: Callable[[], Mapping[str, float]] | None = None,
    ):
        self.adapter_name, self.blocks, self.speaker_id, self.score = adapter_name, blocks, speaker_id, score
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.arguments: RecipeTrainingArguments = trainer.args
        self.steps_per_epoch = math.ceil(len(train_dataset) / self.arguments.train_batch_size)
        num_steps = math.ceil(self.arguments.num_train_epochs * self.steps_per_epoch)
        self.num_steps = self.arguments.max_steps if self.arguments.max_steps > 0 else num_steps
        trainer.optimizer = trainer.lr_scheduler = None
        self.optimizer = trainer.create_optimizer(blocks)
        self.scheduler = trainer.create_scheduler(self.num_steps, self.optimizer)
        self.step = 0
        self.best_rate, self.best_state, self.num_worse = None, None, 0
        self.batches = self._draw_batches()
        self.log_history: list[dict] = []
        self._losses: list[float] = []

    @property
    def is_done(self) -> bool:
        """Whether the training is over, by steps or by early stopping."""
        patience = self.arguments.early_stopping_patience
        return self.step >= self.num_steps or (patience is not None and self.num_worse >= patience)

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the arguments ask for an evaluation after the last step."""
        strategy, delay = self.arguments.eval_strategy, self.arguments.eval_delay
        if self.eval_dataset is None:
            return False
        if strategy == IntervalStrategy.STEPS:
            return delay <= self.step and (self._is_step_of(self.arguments.eval_steps) or self.step == self.num_steps)
        return strategy == IntervalStrategy.EPOCH and delay <= self._epoch and self._is_epoch_over

    @property
    def _is_log_due(self) -> bool:
        strategy = self.arguments.logging_strategy
        if self.step == 1 and self.arguments.logging_first_step:
            return True
        if strategy == IntervalStrategy.STEPS:
            return self._is_step_of(self.arguments.logging_steps)
        return strategy == IntervalStrategy.EPOCH and self._is_epoch_over

    def _is_step_of(self, every: float) -> bool:
        """Whether the last step is one of every so many; below 1, `every` is a share of all steps."""
        return self.step % (math.ceil(every * self.num_steps) if every < 1 else int(every)) == 0

    @property
    def _epoch(self) -> float:
        return self.step / self.steps_per_epoch

    @property
    def _is_epoch_over(self) -> bool:
        return self.step % self.steps_per_epoch == 0 or self.step == self.num_steps

    def _draw_batches(self) -> Iterator[list[dict]]:
        """Yields the rows of each step in the order in which a `Trainer` of this speaker alone would see them."""
        epoch = 0
        seed = self.arguments.seed if self.arguments.data_seed is None else self.arguments.data_seed
        while True:
            self.train_dataset.set_epoch(epoch)
            order = list(SeededSampler(self.train_dataset, seed=seed, find_epoch=lambda epoch=epoch: epoch))
            size = self.arguments.train_batch_size
            for start in range(0, len(order), size):
                yield [self._name(self.train_dataset[index]) for index in order[start : start + size]]
            epoch += 1

    def evaluation_batches(self) -> Iterator[list[dict]]:
        """Yields the rows of the evaluation data."""
        for start in range(0, len(self.eval_dataset), self.arguments.eval_batch_size):
            stop = min(start + self.arguments.eval_batch_size, len(self.eval_dataset))
            yield [self._name(self.eval_dataset[index]) for index in range(start, stop)]

    def _name(self, row: dict) -> dict:
        return {**row, "adapter_name": self.adapter_name}

    def update(self, loss: float) -> None:
        """Takes an optimizer step with the gradients that are there, of `loss`, and logs it when that is due."""
        # Without a limit nothing is changed, and the norm is known.
        norm = nn.utils.clip_grad_norm_(self.blocks.parameters(), self.arguments.max_grad_norm or math.inf)
        self.optimizer.step()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if not follows_metric(self.arguments):
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._losses.append(loss)
        if self._is_log_due:
            self._log(loss=fmean(self._losses), grad_norm=norm.item(), learning_rate=learning_rate)
            self._losses = []

    def note_evaluation(self, loss: float) -> None:
        """Keeps the adapter's weights if they are the best so far, by `loss` or by the error rate asked for."""
        metric = self.arguments.best_metric
        is_better = operator.gt if self.arguments.greater_is_better else operator.lt
        rates = {"loss": loss, **(self.score() if metric != "loss" and self.score else {})}
        rates = {name: rates[name] for name in self.arguments.metrics if name in rates}
        self._log(**{f"eval_{name}": rate for name, rate in rates.items()})
        if follows_metric(self.arguments):
            self.scheduler.step(rates[metric])
        if self.best_rate is None or is_better(rates[metric], self.best_rate):
            self.best_rate, self.num_worse = rates[metric], 0
            self.best_state = {name: value.detach().clone() for name, value in self.blocks.state_dict().items()}
        else:
            self.num_worse += 1

    def _log(self, **values: float) -> None:
        self.log_history.append({**values, "epoch": self._epoch, "step": self.step})
        shown = {name: f"{value:.4g}" for name, value in (values | {"epoch": self._epoch}).items()}
        tqdm.write(str({"speaker": self.speaker_id or self.adapter_name, **shown}))

    def finish(self) -> None:
        """Gives the adapter its best weights back, if the arguments ask for them."""
        if self.arguments.load_best_model_at_end and self.best_state is not None:
            self.blocks.load_state_dict(self.best_state)


def train_stack(objective: CTCObjective, members: Sequence[StackMember], collate: CTCCollator) -> dict[str, float]:
    """
    Trains all members to their ends.

    Args:
        objective: Of the base with the adapters of all members; nothing else is trainable.
        members: The speakers.
        collate: Turns rows with `adapter_name` into a batch.

    Returns:
        The last training loss of each adapter, by name.

    Raises:
        ValueError: A speaker's loss is not finite.
    """
    _set_training(objective)
    losses: dict[str, float] = {}
    is_quiet = members[0].arguments.disable_tqdm or None
    num_steps = sum(member.num_steps for member in members)
    progress = tqdm(total=num_steps, desc="training", unit="step", disable=is_quiet)
    while active := [member for member in members if not member.is_done]:
        losses |= _take_step(objective, active, collate)
        progress.update(len(active))
        if due := [member for member in active if member.is_evaluation_due]:
            _evaluate(objective, due, collate)
    progress.close()
    for member in members:
        member.finish()
    return losses


def _set_training(objective: CTCObjective) -> None:
    objective.train()
    set_frozen_modules_to_eval(objective)


def _take_step(objective: CTCObjective, members: Sequence[StackMember], collate: CTCCollator) -> dict[str, float]:
    """Takes a step with each member and returns their losses by adapter."""
    rows = []
    for member in members:
        seed_dropout(member.blocks, find_dropout_seed(member.arguments.seed, member.step))
        rows += next(member.batches)
    batch = send_to_device(collate(rows), objective.model.device)
    if "frozen_states" not in batch:
        batch = objective.run_frozen(batch)
    values = objective.measure_adapters(batch)
    values.sum().backward()
    losses = dict(zip(dict.fromkeys(batch["adapter_names"]), values.tolist(), strict=True))
    for member in members:
        loss = losses[member.adapter_name]
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss of {member.adapter_name!r} must be finite, got {loss} at step {member.step}. "
                "Lower `learning_rate`."
            )
        member.update(loss)
    return losses


def _evaluate(objective: CTCObjective, members: Sequence[StackMember], collate: CTCCollator) -> None:
    objective.eval()
    for member in members:
        total = 0.0
        with torch.no_grad():
            for rows in member.evaluation_batches():
                batch = send_to_device(collate(rows), objective.model.device)
                total += len(rows) * objective(**batch)["loss"].item()
        member.note_evaluation(total / len(member.eval_dataset))
    _set_training(objective)


def can_stack(model_name_or_path: str) -> bool:
    """Whether adapters of many speakers can train in one pass: the frozen part of such a recogniser runs apart."""
    config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    return hasattr(MODEL_FOR_CTC_MAPPING.get(type(config), None), "stages")


def check_many(
    personal_args: PersonalArguments, training_args: PersonalTrainingArguments, *, is_stacked: bool = True
) -> None:
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
    if is_stacked:
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
    >>> from training.stacks import split_stacks

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
        batch_size = self.training_args.per_device_eval_batch_size
        self.score = partial(score_datasets, CTCRecognizer(model, processor), batch_size=batch_size)

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
        for name in names:
            arguments = self.arguments[PersonalArguments]
            add_personal_adapter(self.model, self.processor, arguments, name, seed=self.training_args.seed)
        for name in names:
            find_stacked_blocks(self.model, name).requires_grad_(True)  # the library has only the last one train
        check_trainable(self.model, max_share=MAX_TRAINABLE_SHARE * len(names))
        objective = CTCObjective(self.model)
        # Makes optimizers and schedules; it insists on data if the arguments ask for evaluations.
        trainer = AdapterTrainer(model=objective, args=self.training_args, eval_dataset=datas[0].evaluation[""])
        members = [self._make_member(name, data, objective, trainer) for name, data in zip(names, datas, strict=True)]
        train_stack(objective, members, CTCCollator(self.processor))
        self.model.eval()

    def _make_member(
        self, name: str, data: SpeakerData, objective: CTCObjective, trainer: AdapterTrainer
    ) -> StackMember:
        batch_size = self.training_args.per_device_eval_batch_size
        arguments = (objective.prefix, self.processor, self.arguments[CacheArguments])
        is_evaluated = self.training_args.eval_strategy != IntervalStrategy.NO
        options = {"adapter_name": name, "batch_size": batch_size}
        score = partial(evaluate_dataset, self.model, self.processor, data.evaluation[""], **options)
        return StackMember(
            name,
            find_stacked_blocks(self.model, name),
            cache_frozen_part(data.train, *arguments, batch_size=batch_size),
            cache_frozen_part(data.evaluation[""], *arguments, batch_size=batch_size) if is_evaluated else None,
            trainer=trainer,
            speaker_id=data.speaker_id,
            score=lambda: score()["overall"],
        )

    def _save(self, name: str, data: SpeakerData, before: dict[str, dict], runtime: float) -> dict:
        self.model.set_adapter(name)
        sizes = count_sizes(self.model, name)
        results = collect_results(data, before, self.score(data.evaluation), sizes=sizes, runtime=runtime)
        subject = describe_personal_run(
            self.arguments[PersonalArguments],
            self.arguments[CorpusArguments],
            self.arguments[CardArguments],
            None,
            data.train_seconds,
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
    report_many(rows, training_args.output_dir)


def report_many(rows: Sequence[dict], output_dir: str) -> None:
    """Writes and prints the results of all speakers."""
    write_results(output_dir, summarize(rows))
    draw_speakers(Path(output_dir) / PICTURE_NAME, rows[:MAX_DRAWN])
    print(format_rows(rows))


def personalize_each(
    personalize: Callable[..., None],
    personal_args: PersonalArguments,
    corpus_args: CorpusArguments,
    augmentation: Augmentation,
    cache_args: CacheArguments,
    card_args: CardArguments,
    training_args: PersonalTrainingArguments,
) -> None:
    """
    As [`personalize_many`], one speaker after the other: for recognisers whose adapters cannot train in one pass.

    Args:
        personalize: Trains one speaker's adapter; it takes the arguments that follow.

    Raises:
        ValueError: As [`personalize_many`].
    """
    check_many(personal_args, training_args, is_stacked=False)
    logger.warning("The speakers train one after the other: this recogniser's adapters cannot share a pass.")
    loader = SpeakerLoader(
        personal_args, corpus_args, augmentation, None, samples_per_logit=1, seed=training_args.seed
    )
    folders = name_folders(loader.find_speakers())
    is_resumed = bool(training_args.resume_from_checkpoint)
    for speaker in list_unfinished(folders, training_args.output_dir, is_resumed=is_resumed):
        own_args = copy.copy(training_args)
        own_args.output_dir = str(Path(training_args.output_dir) / folders[speaker])
        own_args.resume_from_checkpoint = is_resumed and Path(own_args.output_dir).is_dir() or None
        own = (replace(personal_args, speaker_id=[speaker]), corpus_args, augmentation, cache_args, card_args)
        try:
            personalize(*own, own_args)
        except ValueError as error:
            if personal_args.speaker_id != [ALL_SPEAKERS]:
                raise
            logger.warning("Speaker %r is left out: %s", speaker, error)
    finished = {
        speaker: name
        for speaker, name in folders.items()
        if (Path(training_args.output_dir) / name / RESULTS_NAME).is_file()
    }
    if not finished:
        raise ValueError("`speaker_id` all must find a speaker whose data can be used, got none: see the warnings.")
    if PartialState().is_main_process:
        report_many(read_finished(finished, training_args.output_dir), training_args.output_dir)
