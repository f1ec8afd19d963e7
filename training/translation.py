"""Speech translation set-up: which speech, which model and adapters, and what a run leaves behind."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import TrainingArguments

from converters.streamspeech import read_checkpoint
from data.annotations import STYLES
from data.augmentation import Augmentation
from data.spelling import MAX_CLIP_SECONDS
from data.text import normalize_text
from data.translation_utterances import LabelSpace, TranslationUtterances, read_translations
from modeling import (
    EchoStreamConfig,
    EchoStreamFeatureExtractor,
    EchoStreamForSpeechToSpeechTranslation,
    EchoStreamProcessor,
    SpeechAdapterConfig,
)
from modeling.adapter_files import save_adapter
from modeling.adapter_loading import locate_base
from modeling.files import write_whole
from publishing.card import CardArguments, CardSubject, write_card
from publishing.report import format_table, write_results
from training.checkpoints import list_checkpoints
from training.corpus_arguments import load_split
from training.health import HealthArguments
from training.objectives.s2st import S2STObjective
from training.s2st_training import S2STTrainingArguments
from training.start import (
    StartArguments,
    StartReport,
    choose_tokenizers,
    find_num_units,
    load_weights,
    make_translation_config,
    read_report,
)
from training.trainer import check_trainable

logger = logging.getLogger(__name__)

ADAPTER_NAME = "translation"
ADAPTER_KINDS = ("none", "bottleneck", "lora")
# Maps that LoRA changes, of the encoder and of both decoders; a bottleneck follows each of their layers by default.
LORA_TARGETS = (
    r"encoder\.layers\.\d+\.attention\.(emb_to_query|emb_to_key_value|out_proj)"
    r"|(mt_decoder|unit_decoder)\.layers\.\d+\.(self_attn|encoder_attn)\.(q_proj|v_proj)"
)
# An adapter larger than this share of the model is a mistake in its size.
MAX_TRAINABLE_SHARE = 0.3
NUM_MEASURED_CLIPS = 2000  # over which the features' statistics are taken
USAGE = """\
```python
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

model = AutoModelForSpeechSeq2Seq.from_pretrained("{repository}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{repository}", trust_remote_code=True)

speech = torch.randn(16_000).numpy()  # a second of sound at 16 kHz; put a recording here
inputs = processor(speech, sampling_rate=16_000, return_tensors="pt")
output = model.generate(**inputs, return_units=True)
print(processor.batch_decode(output.sequences), output.units)
```
"""
ADAPTER_USAGE = """\
```python
from transformers import AutoModelForSpeechSeq2Seq

model = AutoModelForSpeechSeq2Seq.from_pretrained("{base}", {revision}trust_remote_code=True)
model.load_adapter("{repository}", "{name}")
```
"""


@dataclass
class TranslationCorpusArguments:
    """Which speech is used, with its translations."""

    dataset: str = field(
        metadata={
            "help": "`synthetic_s2st/es` or `/ko`, a folder or a manifest (.tsv as StreamSpeech's) with columns for "
            "text and target_text, and units for speech, or a Hub name."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the transcripts. Default: text."})
    transcript_style: str = field(
        default="plain", metadata={"help": "What in a transcript is no speech.", "choices": list(STYLES)}
    )
    channel: str = field(default="mix", metadata={"help": "Of every recording: mix, left, right or a number from 1."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    max_clip_seconds: float = field(
        default=MAX_CLIP_SECONDS, metadata={"help": "Longest clip to train on; a few longer ones are left out."}
    )

    @property
    def splits(self) -> tuple[str, str]:
        """The split to train on and the one to evaluate on."""
        return self.train_split, self.eval_split


@dataclass
class TranslationArguments:
    """How the parts of the model train."""

    encoder_lr: float | None = field(
        default=None, metadata={"help": "Highest learning rate of the encoder. Default: learning_rate."}
    )
    decoder_lr: float | None = field(
        default=None, metadata={"help": "Highest learning rate of everything else. Default: learning_rate."}
    )
    segment_lengths: list[int] | None = field(
        default=None,
        metadata={
            "help": "Frames of the encoder's segment, 40 ms each, of which a step draws one, such as 8 16 24 32 0; 0 "
            "is the whole utterance. Default: the configuration's alone."
        },
    )
    encoder_steps: float = field(
        default=0.3, metadata={"help": "Transfer: steps in which the encoder alone trains; below 1, a share of all."}
    )
    adapter_kind: str = field(
        default="none",
        metadata={
            "help": "Train an adapter on a frozen checkpoint, with `--start transfer`.",
            "choices": list(ADAPTER_KINDS),
        },
    )
    adapter_size: int = field(default=16, metadata={"help": "Width of a bottleneck, rank of LoRA."})
    hub_base_model_id: str | None = field(
        default=None, metadata={"help": "Name of the base on the Hub, to push an adapter of a base in a folder."}
    )

    def __post_init__(self):
        if self.encoder_steps < 0:
            raise ValueError(f"`encoder_steps` must be at least 0, got {self.encoder_steps}.")
        for name in ("encoder_lr", "decoder_lr"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(
                    f"`{name}` must be above 0, got {getattr(self, name)}. Leave it out for learning_rate."
                )

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter trains and the model does not."""
        return self.adapter_kind != "none"


TRANSLATION_ARGUMENTS = (
    StartArguments,
    TranslationArguments,
    TranslationCorpusArguments,
    Augmentation,
    HealthArguments,
    CardArguments,
    S2STTrainingArguments,
)


def check_adapter_start(start_args: StartArguments, translation_args: TranslationArguments) -> None:
    """
    Makes sure that an adapter has a whole model under it.

    Raises:
        ValueError: It starts from nothing, or from parts.
    """
    if translation_args.has_adapter and start_args.start not in ("transfer", "resume"):
        raise ValueError(
            f"`adapter_kind` {translation_args.adapter_kind} needs `--start transfer` (or resume), got "
            f"{start_args.start}. An adapter belongs to a whole model."
        )
    if translation_args.has_adapter and not start_args.checkpoint:
        raise ValueError("`checkpoint` must name the adapter's base with `--adapter_kind`, got none.")


def load_translations(arguments: TranslationCorpusArguments, split: str) -> Dataset:
    """Returns the rows of a split with both texts, and with units where the corpus has them."""
    return load_split(arguments, split, required_columns=("audio", "text", "target_text"))


def build_translation_model(
    start_args: StartArguments, corpus: Dataset, languages: Sequence[str] | None, *, is_base: bool = False
) -> tuple[EchoStreamForSpeechToSpeechTranslation, EchoStreamProcessor, StartReport]:
    """
    Returns the model and the processor of a start, and what was loaded.

    Args:
        start_args: How to start.
        corpus: Rows of the training split, of which new vocabularies are made.
        languages: Codes of source and target, whose rules normalise the texts.
        is_base: Whether an adapter is trained on the checkpoint, which must then stay as it is.

    Raises:
        ValueError: As [`read_checkpoint`], [`choose_tokenizers`] and [`load_weights`].
    """
    checkpoint = read_checkpoint(start_args.checkpoint) if start_args.checkpoint else None
    source, target = [*(languages or ()), None, None][:2]
    texts = {
        side: list(map(partial(normalize_text, language=code), corpus[column]))
        for side, code, column in (("source", source, "text"), ("target", target, "target_text"))
    }
    source_tokenizer, target_tokenizer, excluded = choose_tokenizers(
        start_args, checkpoint, texts, languages, keeps_own=is_base
    )
    units = find_num_units(corpus["units"]) if "units" in corpus.column_names else None
    config = make_translation_config(
        start_args,
        checkpoint,
        source_vocab_size=len(source_tokenizer),
        vocab_size=len(target_tokenizer),
        num_units=start_args.num_units or units,
    )
    model = EchoStreamForSpeechToSpeechTranslation(config)
    extractor = EchoStreamFeatureExtractor(config.num_mel_bins)
    report = StartReport(start_args.start, fresh=list(model.state_dict()))
    if checkpoint is not None:
        report = load_weights(model, checkpoint, start_args.start, excluded=excluded)
        if checkpoint.is_whole and start_args.start != "partial":
            extractor = EchoStreamProcessor.from_pretrained(checkpoint.path).feature_extractor
    return model, EchoStreamProcessor(extractor, source_tokenizer, target_tokenizer), report


def start_model(
    start_args: StartArguments,
    translation_args: TranslationArguments,
    corpus: Dataset,
    languages: Sequence[str] | None,
    training_args: TrainingArguments,
) -> tuple[EchoStreamForSpeechToSpeechTranslation, EchoStreamProcessor, StartReport]:
    """
    Returns the model, its adapter added, the processor and what was loaded.

    A resumed run takes model and vocabularies from its checkpoint, `resume_from_checkpoint` is set, and what it began
    with is read where it was stored.

    Raises:
        ValueError: As [`build_translation_model`]; or there is nothing to resume; or what may train is too much or
            nothing.
    """
    is_resumed = start_args.start == "resume"
    if is_resumed:
        newest = next(iter(list_checkpoints(training_args.output_dir)), None)
        wanted = newest if translation_args.has_adapter else start_args.checkpoint or newest
        if wanted is None:
            raise ValueError(
                f"`output_dir` must hold a checkpoint for `--start resume`, got {training_args.output_dir} without. "
                "Save some with `--save_strategy epoch`, or start otherwise."
            )
        training_args.resume_from_checkpoint = str(wanted)
        if not translation_args.has_adapter:
            start_args = replace(start_args, checkpoint=str(wanted), start="evaluate")
    model, processor, report = build_translation_model(
        start_args, corpus, languages, is_base=translation_args.has_adapter
    )
    if is_resumed:
        report = read_report(Path(training_args.resume_from_checkpoint).parent) or report
    if translation_args.has_adapter:
        add_translation_adapter(model, translation_args, start_args.checkpoint)
    check_trainable(model, max_share=MAX_TRAINABLE_SHARE if translation_args.has_adapter else 1.0)
    return model, processor, report


def plan_translation_model(
    start_args: StartArguments, translation_args: TranslationArguments
) -> EchoStreamForSpeechToSpeechTranslation:
    """Returns the model that such a run trains, made of configurations; vocabularies have the size asked for."""
    checkpoint = read_checkpoint(start_args.checkpoint) if start_args.checkpoint else None
    known = checkpoint.config if checkpoint is not None and checkpoint.is_whole else None
    sizes = {name: getattr(known, name, start_args.vocab_size) for name in ("source_vocab_size", "vocab_size")}
    config = make_translation_config(start_args, checkpoint, num_units=start_args.num_units, **sizes)
    model = EchoStreamForSpeechToSpeechTranslation(config)
    if translation_args.has_adapter:
        model.add_adapter(make_adapter_config(translation_args), ADAPTER_NAME)
        model.freeze_base_model()
    return model


def make_label_space(config: EchoStreamConfig) -> LabelSpace:
    """Returns what labels a model has room for."""
    return LabelSpace(
        subsampling_factor=config.encoder_config.subsampling_factor,
        unit_upsampling=config.unit_upsampling,
        unit_offset=config.unit_offset,
        num_units=config.num_units,
    )


def build_translation_data(
    arguments: TranslationCorpusArguments,
    model: EchoStreamForSpeechToSpeechTranslation,
    processor: EchoStreamProcessor,
    corpus: Dataset,
    augmentation: Augmentation | None,
    *,
    seed: int,
) -> TranslationUtterances:
    """
    Returns the utterances of a split; those to train on give a new feature extractor its statistics.

    Args:
        arguments: The longest clip.
        model: Tells what labels have room.
        processor: Its extractor is given statistics if it has none.
        corpus: Rows of the split.
        augmentation: Of utterances to train on; None for those to evaluate on.
        seed: Of what is drawn.
    """
    clips = read_translations(
        corpus,
        processor,
        make_label_space(model.config),
        max_speed=augmentation.max_speed if augmentation else 1.0,
        is_evaluation=augmentation is None,
        max_clip_seconds=arguments.max_clip_seconds,
    )
    if processor.feature_extractor.mean is None:
        step = max(1, len(clips) // NUM_MEASURED_CLIPS)
        samples = clips.with_format("numpy", columns=["samples"])
        measured = (samples[row]["samples"] for row in range(0, len(clips), step))
        statistics = processor.feature_extractor.measure(islice(measured, NUM_MEASURED_CLIPS))
        processor.feature_extractor.set_statistics(*statistics)
    return TranslationUtterances(clips, processor, augmentation=augmentation, seed=seed)


def make_adapter_config(arguments: TranslationArguments) -> PeftConfig:
    """Returns the configuration of the adapter that the arguments name."""
    if arguments.adapter_kind == "lora":
        rank = arguments.adapter_size
        return LoraConfig(target_modules=LORA_TARGETS, r=rank, lora_alpha=2 * rank, lora_dropout=0.0)
    return SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[arguments.adapter_size])


def add_translation_adapter(
    model: EchoStreamForSpeechToSpeechTranslation, arguments: TranslationArguments, base: str
) -> None:
    """Adds a fresh adapter to a model, all else of which is frozen."""
    model.add_adapter(make_adapter_config(arguments), ADAPTER_NAME)
    model.peft_config[ADAPTER_NAME].base_model_name_or_path = locate_base(base)
    model.freeze_base_model()


def make_translation_objective(
    model: EchoStreamForSpeechToSpeechTranslation,
    arguments: TranslationArguments,
    dataset: TranslationUtterances,
    *,
    seed: int,
) -> S2STObjective:
    """Returns what is minimised; heads whose labels the corpus has not are left out, with a warning."""
    if "unit_labels" not in dataset.labels and model.config.unit_weight:
        logger.warning("The corpus has no column `units`: the units' loss is left out. See `extract_units.py`.")
        model.config.unit_weight = 0.0
        for part in (model.t2u_encoder, model.unit_decoder):
            part.requires_grad_(False)  # several processes wait for the gradient of whatever may train
    lengths = arguments.segment_lengths
    return S2STObjective(model, segment_lengths=lengths, seed=seed, names=dataset.names)


def collect_translation_results(
    model: EchoStreamForSpeechToSpeechTranslation,
    metrics: Mapping[str, float],
    dataset: TranslationUtterances | None,
    runtime: float | None,
    caution: str | None,
) -> dict:
    """
    Returns what `eval_results.json` reports.

    Args:
        model: The trained model.
        metrics: Of the last evaluation.
        dataset: What was trained on, if anything was.
        runtime: Seconds of training; None without one.
        caution: What the card says of data that is both trained and evaluated on.
    """
    is_timing = ("runtime", "per_second", "epoch")
    results = {name: value for name, value in metrics.items() if not name.endswith(is_timing)}
    results |= {"trainable_parameters": model.count_parameters(trainable_only=True)["total"]}
    results |= {"total_parameters": model.count_parameters()["total"], "num_train_clips": len(dataset or ())}
    results |= {"train_seconds": round(dataset.seconds, 2) if dataset else 0.0, "train_runtime": runtime or 0.0}
    return results | ({"caution": caution} if caution else {})


def describe_translation_run(
    start_args: StartArguments,
    translation_args: TranslationArguments,
    corpus_args: TranslationCorpusArguments,
    card_args: CardArguments,
    results: Mapping,
) -> CardSubject:
    """Returns what the card is about."""
    seconds = results["train_seconds"]
    figures = [{"figure": name.removeprefix("eval_"), "value": f"{value:.4f}"} for name, value in results.items()
               if name.startswith("eval_")]  # fmt: skip
    what = (
        "Adapter of an EchoStream" if translation_args.has_adapter else "EchoStream, simultaneous speech translation"
    )
    return CardSubject(
        base=start_args.checkpoint,
        dataset=corpus_args.dataset,
        split=corpus_args.eval_split,
        description=f"{what}, trained on {seconds / 3600:.2g} hours of speech (start: {start_args.start}).",
        language=card_args.language,
        dataset_licence=card_args.dataset_licence,
        licence=card_args.licence,
        usage=ADAPTER_USAGE if translation_args.has_adapter else USAGE,
        details=f"## Evaluation\n\n{format_table(figures)}",
    )


def save_translation_outcome(
    model: EchoStreamForSpeechToSpeechTranslation,
    processor: EchoStreamProcessor,
    report: StartReport,
    subject: CardSubject,
    folder: str | Path,
    results: dict,
) -> None:
    """Writes the model or its adapter alone, the processor, what was loaded, results and card into `folder`."""
    with write_whole(folder) as scratch:
        processor.save_pretrained(scratch)
        if ADAPTER_NAME in getattr(model, "peft_config", {}):
            save_adapter(model, scratch, ADAPTER_NAME, processor=processor)
        else:
            model.save_pretrained(scratch)
        report.write(scratch)
        write_results(scratch, results)
        write_card(scratch, subject, name=Path(folder).resolve().name)
