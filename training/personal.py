"""One speaker's adapter: arguments, data, results and files, for one speaker alone and for many together."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from data.augmentation import Augmentation
from data.corpora import take_seconds
from data.overlap import describe_overlap
from data.speakers import select_speakers, share_speakers
from data.spelling import MAX_CLIP_SECONDS
from data.utterances import UtteranceDataset, decode_clips
from inference.decoding import load_adapter
from inference.scoring import evaluate_dataset
from modeling import SpeechAdapterConfig
from modeling.adapter_files import save_adapter
from modeling.adapter_loading import locate_base
from modeling.adapters import ADAPTER_WEIGHTS_NAME, find_adapter_layers
from modeling.files import write_whole
from publishing.card import CardArguments, CardSubject, write_card
from publishing.hub import HubTarget
from publishing.report import draw_speakers, write_results
from training.corpus_arguments import CorpusArguments, load_split
from training.trainer import RecipeTrainingArguments

# The adapter's name inside the model; a speaker's own name never becomes part of a path.
ADAPTER_NAME = "speaker"
# Sizes for which an adapter stays below 4 % of a recogniser of a few million parameters.
HIDDEN_SIZES = {"mlp": [128, 64], "replacement": [128, 64], "bottleneck": [24]}
# An adapter larger than this share of the model is a mistake in its sizes.
MAX_TRAINABLE_SHARE = 0.2
PICTURE_NAME = "results.png"
# Value of `speaker_id` that means every speaker of the corpus.
ALL_SPEAKERS = "all"


@dataclass
class PersonalArguments:
    """The base, the speaker and the adapter."""

    model_name_or_path: str = field(metadata={"help": "Base recogniser: a folder or a Hub name."})
    speaker_id: list[str] = field(
        metadata={"help": "Speaker to adapt to, a value of column `speaker_id`; several, or `all`, train together."}
    )
    max_train_seconds: float | None = field(
        default=None, metadata={"help": "Most seconds of a speaker's speech to train on."}
    )
    max_clip_seconds: float = field(
        default=MAX_CLIP_SECONDS, metadata={"help": "Longest clip to train on; a few longer ones are left out."}
    )
    speakers_per_stack: int = field(
        default=16, metadata={"help": "Of several speakers, how many train together; bounds the memory."}
    )
    adapter_kind: str = field(
        default="bottleneck", metadata={"help": "Where and how the adapter acts.", "choices": list(HIDDEN_SIZES)}
    )
    adapter_hidden_sizes: list[int] | None = field(
        default=None, metadata={"help": "Widths of the adapter's hidden layers. Default: few, for a small base."}
    )
    adapter_dropout: float = field(default=0.1, metadata={"help": "Dropout inside the adapter."})
    init_adapter: str | None = field(
        default=None, metadata={"help": "Start from this adapter (folder or Hub name), of its kind and sizes."}
    )
    allow_base_mismatch: bool = field(
        default=False, metadata={"help": "Take an adapter that was made for another base; it is recorded."}
    )
    unfreeze_base: bool = field(
        default=False,
        metadata={"help": "Fine-tune the whole model, for comparison; wants a learning_rate of 1e-4 or so."},
    )
    base_eval_speakers: list[str] | None = field(
        default=None, metadata={"help": "Speakers of the base on whom it is evaluated too, before and after."}
    )
    hub_base_model_id: str | None = field(
        default=None, metadata={"help": "Name of the base on the Hub, to push an adapter of a base in a folder."}
    )


@dataclass
class PersonalTrainingArguments(RecipeTrainingArguments):
    """Training arguments with defaults for seconds to a minute of speech."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "wer", "cer")

    num_train_epochs: float = field(default=60, metadata={"help": "Passes over the speech."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Utterances of a step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Utterances evaluated together."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule, as in TrainingArguments."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of the warm-up; below 1, a share of all."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Largest norm of the gradient."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints, as in TrainingArguments."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a lower loss; needs load_best_model_at_end."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError(
                "`early_stopping_patience` needs `load_best_model_at_end` (and `eval_strategy` and `save_strategy` "
                "epoch), got false. The adapter of the last step would not be the best one."
            )


def add_personal_adapter(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    arguments: PersonalArguments,
    adapter_name: str = ADAPTER_NAME,
    *,
    seed: int = 0,
) -> None:
    """Adds a fresh adapter to `model`, drawn by `seed`, or another user's to start from; or unfreezes the base."""
    torch.manual_seed(seed)
    if arguments.unfreeze_base:
        model.unfreeze_base_model()
    elif arguments.init_adapter:
        options = {"allow_base_mismatch": arguments.allow_base_mismatch, "processor": processor}
        load_adapter(model, arguments.init_adapter, adapter_name, is_trainable=True, **options)
        model.freeze_base_model()
    else:
        config = SpeechAdapterConfig(
            kind=arguments.adapter_kind,
            hidden_sizes=arguments.adapter_hidden_sizes or HIDDEN_SIZES[arguments.adapter_kind],
            dropout=arguments.adapter_dropout,
        )
        model.add_adapter(config, adapter_name)
    if not arguments.unfreeze_base:
        model.peft_config[adapter_name].base_model_name_or_path = locate_base(arguments.model_name_or_path)


@dataclass(frozen=True)
class SpeakerData:
    """
    A speaker's utterances.

    Args:
        speaker_id: The speaker.
        train: Utterances to train on, within the seconds allowed.
        evaluation: Datasets to score: the speaker's at `""`, the base's speakers' at `"others_"` if they are named.
        caution: What the card says of data that is both trained and evaluated on.
    """

    speaker_id: str
    train: UtteranceDataset
    evaluation: dict[str, UtteranceDataset]
    caution: str | None = None


class SpeakerLoader:
    """
    Reads the corpus once and gives the utterances of one speaker after the other.

    Args:
        arguments: The speakers, the seconds.
        corpus_args: The corpus.
        augmentation: Of the utterances to train on.
        processor: Of the base.
        samples_per_logit: Samples of audio a frame of logits.
        seed: Of everything drawn.

    Raises:
        ValueError: The corpus lacks a column or a split.
    """

    def __init__(
        self,
        arguments: PersonalArguments,
        corpus_args: CorpusArguments,
        augmentation: Augmentation,
        processor: ProcessorMixin,
        *,
        samples_per_logit: int,
        seed: int,
    ):
        columns = ("audio", "text", "speaker_id")
        self.train_corpus, self.eval_corpus = (
            load_split(corpus_args, split, required_columns=columns)
            for split in (corpus_args.train_split, corpus_args.eval_split)
        )
        splits = {"train_split": corpus_args.train_split, "eval_split": corpus_args.eval_split}
        self.caution = describe_overlap(self.train_corpus, self.eval_corpus, **splits)
        self.arguments, self.augmentation, self.seed = arguments, augmentation, seed
        self.decode = {"processor": processor, "samples_per_logit": samples_per_logit}
        self.decode["is_joined"] = corpus_args.concatenate_max > 1
        self.join = {"processor": processor, "concatenate": corpus_args.concatenate, "seed": seed}

    def find_speakers(self) -> list[str]:
        """
        Returns the speakers that the arguments name, or all that have speech to train and to evaluate on.

        Raises:
            ValueError: A named speaker is not in both splits, or no speaker is.
        """
        if self.arguments.speaker_id != [ALL_SPEAKERS]:
            for corpus in (self.train_corpus, self.eval_corpus):
                select_speakers(corpus, self.arguments.speaker_id)
            return list(dict.fromkeys(self.arguments.speaker_id))
        return share_speakers(self.train_corpus, self.eval_corpus)

    def load(self, speaker_id: str) -> SpeakerData:
        """
        Returns the utterances of `speaker_id`.

        Raises:
            ValueError: There is no such speaker, or nothing to train on within the seconds allowed.
        """
        train = select_speakers(self.train_corpus, [speaker_id])
        evaluation = {"": select_speakers(self.eval_corpus, [speaker_id])}
        if self.arguments.base_eval_speakers:
            evaluation["others_"] = select_speakers(self.eval_corpus, self.arguments.base_eval_speakers)
        if self.arguments.max_train_seconds is not None:
            train = take_seconds(train, self.arguments.max_train_seconds, seed=self.seed)
        limits = {"max_speed": self.augmentation.max_speed, "max_clip_seconds": self.arguments.max_clip_seconds}
        train_clips = decode_clips(train, **self.decode, **limits)
        return SpeakerData(
            speaker_id,
            UtteranceDataset(train_clips, augmentation=self.augmentation, **self.join),
            {
                prefix: UtteranceDataset(decode_clips(corpus, **self.decode, is_evaluation=True), **self.join)
                for prefix, corpus in evaluation.items()
            },
            self.caution,
        )


def score_datasets(model, processor, datasets: dict[str, UtteranceDataset], batch_size: int) -> dict[str, dict]:
    """Returns the overall scores of each dataset."""
    return {
        name: evaluate_dataset(model, processor, dataset, batch_size=batch_size)["overall"]
        for name, dataset in datasets.items()
    }


def find_stacked_blocks(model: nn.Module, adapter_name: str) -> nn.ModuleList:
    """Returns the modules of a speech adapter in `model`."""
    blocks = [layer.find_block(adapter_name) for layer in find_adapter_layers(model)]
    return nn.ModuleList(block for block in blocks if block is not None)


def count_sizes(model: PreTrainedModel, adapter_name: str | None = None) -> dict[str, int]:
    """
    Returns the numbers of trainable parameters and of all.

    Args:
        model: The trained model.
        adapter_name: Count this adapter as the only one.
    """
    if adapter_name is None:
        trainable, total = model.count_parameters(trainable_only=True)["total"], model.count_parameters()["total"]
    else:
        trainable = sum(parameter.numel() for parameter in find_stacked_blocks(model, adapter_name).parameters())
        total = model.count_parameters()["base"] + trainable
    return {"trainable_parameters": trainable, "total_parameters": total}


def collect_results(
    data: SpeakerData, before: dict[str, dict], after: dict[str, dict], *, sizes: dict[str, int], runtime: float
) -> dict:
    """
    Returns what `eval_results.json` reports of scores before and after and of what was trained.

    Args:
        data: The speaker's utterances.
        before: Scores without the adapter: of the speaker at `""`, of the base's speakers at `"others_"`.
        after: Scores with it, likewise.
        sizes: From [`count_sizes`].
        runtime: Seconds of training.
    """
    results = {}
    for prefix in before:
        for rate in ("wer", "cer"):
            results |= {f"{prefix}base_{rate}": before[prefix][rate], f"{prefix}eval_{rate}": after[prefix][rate]}
    results |= {"rate": before[""]["rate"], **sizes, "train_runtime": runtime}
    results |= {"caution": data.caution} if data.caution else {}
    return results | {"speaker_id": data.speaker_id, "train_seconds": round(data.train.seconds, 2)}


def describe_personal_run(
    personal_args: PersonalArguments,
    corpus_args: CorpusArguments,
    card_args: CardArguments,
    hub_target: HubTarget | None,
    seconds: float,
) -> CardSubject:
    """Returns what the card is about."""
    what = "Recogniser, all of it fine-tuned" if personal_args.unfreeze_base else "Speech adapter"
    return CardSubject(
        base=personal_args.model_name_or_path,
        base_revision=hub_target.base_revision if hub_target else None,
        dataset=corpus_args.dataset,
        split=corpus_args.eval_split,
        description=f"{what} for one speaker, trained on {seconds:.0f} s of speech.",
        language=card_args.language,
        dataset_licence=card_args.dataset_licence,
        licence=card_args.licence,
        picture=PICTURE_NAME,
    )


def save_personal_outcome(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    personal_args: PersonalArguments,
    subject: CardSubject,
    folder: str | Path,
    results: dict,
    *,
    adapter_name: str = ADAPTER_NAME,
) -> None:
    """
    Writes the adapter (or the fine-tuned model), the processor, the results, their picture and the card into `folder`.

    All of it appears together or not at all.
    """
    if personal_args.base_eval_speakers:
        results["base_eval_speakers"] = personal_args.base_eval_speakers
    with write_whole(folder) as scratch:
        processor.save_pretrained(scratch)
        if personal_args.unfreeze_base:
            model.save_pretrained(scratch)
        else:
            save_adapter(model, scratch, adapter_name, processor=processor)
            results["adapter_bytes"] = (scratch / ADAPTER_WEIGHTS_NAME).stat().st_size
        write_results(scratch, results)
        draw_speakers(scratch / subject.picture, [results])
        write_card(scratch, subject, name=Path(folder).resolve().name)
