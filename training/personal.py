"""One speaker's adapter: arguments, data, results and files, for one speaker alone and for many together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedModel, ProcessorMixin

from data.augmentation import Augmentation
from data.corpora import take_seconds
from data.overlap import describe_overlap
from data.speakers import select_speakers, share_speakers
from data.spelling import MAX_CLIP_SECONDS
from data.utterances import UtteranceDataset, decode_clips
from inference.decoding import load_adapter
from inference.recognizers import Recognizer
from modeling import SpeechAdapterConfig
from modeling.adapter_files import save_adapter
from modeling.adapter_loading import locate_base
from modeling.adapters import ADAPTER_WEIGHTS_NAME, find_adapter_layers, is_adapter_parameter
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
# Wider ones stay below 2 % of models of the Hub; of Whispers they were tried on the digits of people in training.
LARGE_HIDDEN_SIZES = {"whisper": {"mlp": [384], "bottleneck": [384]}}
OTHER_HIDDEN_SIZES = {"mlp": [256], "bottleneck": [32]}
# A transformer of one layer, the least that there is.
SMALL_TRANSFORMER = {"num_layers": 1, "num_heads": 4, "ffn_size": 64, "use_gate": False}
OWN_MODELS = ("deepspeech2", "emformer")
# Whose output LoRA changes, by type of model; of all others queries and values everywhere. Whisper's encoder stays as
# it is, so that it runs once.
LORA_TARGETS = {
    "whisper": r"model\.decoder\.layers\.\d+\.(self_attn|encoder_attn)\.(q|k|v|out)_proj",
    "wav2vec2-bert": r".*\.self_attn\.linear_[qv]",
    # Its attention reads the weights of its linear maps and never calls them: LoRA on these does nothing.
    "wavlm": r".*\.feed_forward\.(intermediate|output)_dense",
    "emformer": r".*\.attention\.emb_to_(query|key_value)",
    "deepspeech2": r"classifier\.1",
}
QUERIES_AND_VALUES = r".*\.(q|v)_proj"
LORA, TRANSFORMER = "lora", "transformer"
ADAPTER_KINDS = (*HIDDEN_SIZES, TRANSFORMER, LORA)
# LoRA's update is scaled by this; rank and factor then change apart.
LORA_SCALE = 2
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
        default="bottleneck", metadata={"help": "Where and how the adapter acts.", "choices": list(ADAPTER_KINDS)}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the kind lora."})
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
        model.requires_grad_(True)
    elif arguments.init_adapter:
        options = {"allow_base_mismatch": arguments.allow_base_mismatch, "processor": processor}
        load_adapter(model, arguments.init_adapter, adapter_name, is_trainable=True, **options)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_adapter_parameter(name) and parameter.requires_grad)
    else:
        model.add_adapter(make_personal_config(arguments, model.config.model_type), adapter_name)
    if not arguments.unfreeze_base:
        model.peft_config[adapter_name].base_model_name_or_path = locate_base(arguments.model_name_or_path)


def make_personal_config(arguments: PersonalArguments, model_type: str) -> PeftConfig:
    """Returns the configuration of a fresh adapter, in the places of its kind in this type of model."""
    kind, dropout = arguments.adapter_kind, arguments.adapter_dropout
    if kind == LORA:
        targets = LORA_TARGETS.get(model_type, QUERIES_AND_VALUES)
        alpha = LORA_SCALE * arguments.lora_rank
        return LoraConfig(target_modules=targets, r=arguments.lora_rank, lora_alpha=alpha, lora_dropout=dropout)
    if kind == TRANSFORMER:
        return SpeechAdapterConfig(kind=kind, dropout=dropout, **SMALL_TRANSFORMER)
    sizes = HIDDEN_SIZES if model_type in OWN_MODELS else LARGE_HIDDEN_SIZES.get(model_type, OTHER_HIDDEN_SIZES)
    sizes = arguments.adapter_hidden_sizes or sizes.get(kind, HIDDEN_SIZES[kind])
    return SpeechAdapterConfig(kind=kind, hidden_sizes=sizes, dropout=dropout)


@dataclass(frozen=True)
class SpeakerData:
    """
    A speaker's utterances.

    Args:
        speaker_id: The speaker.
        train: Utterances to train on, within the seconds allowed.
        train_seconds: Of speech in one epoch of them.
        evaluation: Datasets to score: the speaker's at `""`, the base's speakers' at `"others_"` if they are named.
        caution: What the card says of data that is both trained and evaluated on.
    """

    speaker_id: str
    train: UtteranceDataset
    train_seconds: float
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
        dataset = self.load_training(train)
        datasets = {prefix: self.load_evaluation(corpus) for prefix, corpus in evaluation.items()}
        return SpeakerData(speaker_id, dataset, self.count_seconds(dataset), datasets, self.caution)

    def load_training(self, corpus: Dataset) -> UtteranceDataset:
        """Returns a speaker's utterances to train on."""
        limits = {"max_speed": self.augmentation.max_speed, "max_clip_seconds": self.arguments.max_clip_seconds}
        clips = decode_clips(corpus, **self.decode, **limits)
        return UtteranceDataset(clips, augmentation=self.augmentation, **self.join)

    def load_evaluation(self, corpus: Dataset) -> UtteranceDataset:
        """Returns utterances to score."""
        return UtteranceDataset(decode_clips(corpus, **self.decode, is_evaluation=True), **self.join)

    def count_seconds(self, dataset: UtteranceDataset) -> float:
        """Returns the seconds of speech in one epoch."""
        return dataset.seconds


def score_datasets(
    recognizer: Recognizer, datasets: Mapping[str, TorchDataset], *, batch_size: int
) -> dict[str, dict]:
    """Returns the overall scores of each dataset."""
    return {name: recognizer.score(dataset, batch_size=batch_size)["overall"] for name, dataset in datasets.items()}


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
        trainable = model.num_parameters(only_trainable=True)
        return {"trainable_parameters": trainable, "total_parameters": model.num_parameters()}
    trainable = sum(parameter.numel() for parameter in find_stacked_blocks(model, adapter_name).parameters())
    base = sum(value.numel() for name, value in model.named_parameters() if not is_adapter_parameter(name))
    return {"trainable_parameters": trainable, "total_parameters": base + trainable}


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
    return results | {"speaker_id": data.speaker_id, "train_seconds": round(data.train_seconds, 2)}


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
