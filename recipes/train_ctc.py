"""Trains a recogniser with CTC, DeepSpeech2 or a streaming Emformer, from scratch or from a checkpoint.

accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_ctc.py \\
    --config recipes/configs/train_ctc_synthetic.yaml --output_dir outputs/base
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    Wav2Vec2CTCTokenizer,
    set_seed,
)

from data.augmentation import Augmentation, RecipeAugmentation
from data.collators import CTCCollator
from data.overlap import describe_overlap
from data.speakers import select_speakers
from data.spelling import MAX_CLIP_SECONDS
from data.streaming import EndlessUtterances, stream_utterances
from data.text import TEXT_UNITS, TRANSCRIPTS, build_vocabulary, describe_transcripts, normalize_text, set_language
from data.utterances import UtteranceDataset, decode_clips
from inference.decoding import find_samples_per_logit
from inference.recognizers import CTCRecognizer, find_recognizer_type, load_processor
from inference.scoring import evaluate_dataset
from modeling import (
    DeepSpeech2Config,
    DeepSpeech2FeatureExtractor,
    DeepSpeech2ForCTC,
    DeepSpeech2Processor,
    EchoStreamFeatureExtractor,
    EmformerConfig,
    EmformerForCTC,
    JamoCTCTokenizer,
)
from modeling.whole_models import load_whole
from publishing.card import CardArguments, CardSubject, write_card
from publishing.hub import push_folder, take_hub_target
from publishing.report import print_results, write_results
from training.arguments import parse_arguments
from training.corpus_arguments import CorpusArguments, load_split
from training.endings import run_main
from training.objectives.recognition import CTCObjective, average_loss
from training.output_folder import check_output_dir, claim_output_dir
from training.trainer import AdapterTrainer, RecipeTrainingArguments


@dataclass
class ModelArguments:
    """The recogniser; the sizes are for a training from scratch."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to go on from."})
    architecture: str = field(
        default="deepspeech2",
        metadata={"help": "Emformer writes while one speaks.", "choices": ["deepspeech2", "emformer"]},
    )
    num_mel_bins: int = field(default=80, metadata={"help": "Mel bins of the features."})
    hidden_size: int | None = field(
        default=None,
        metadata={"help": "Units of a recurrent layer a direction, or width of Emformer. Default: 512, 256."},
    )
    num_hidden_layers: int = field(default=5, metadata={"help": "Layers."})
    hidden_dropout: float = field(default=0.1, metadata={"help": "Dropout between recurrent layers, or in Emformer."})
    segment_length: int = field(
        default=8, metadata={"help": "Emformer: frames of 40 ms that are encoded at once, which it waits for."}
    )
    left_context_length: int = field(default=32, metadata={"help": "Emformer: frames before a segment that it sees."})
    right_context_length: int = field(
        default=2, metadata={"help": "Emformer: frames behind a segment that it sees and waits for."}
    )
    normalization: str = field(
        default="utterance",
        metadata={
            "help": "DeepSpeech2: features have mean 0 and deviation 1 over the utterance or bin; Emformer's over "
            "the corpus.",
            "choices": ["utterance", "bin", "speech"],
        },
    )
    text_unit: str = field(
        default="character", metadata={"help": "What a class writes; jamo for Korean.", "choices": list(TEXT_UNITS)}
    )


@dataclass
class TrainingCorpusArguments(CorpusArguments):
    """The corpus, without speakers kept for later."""

    exclude_speakers: list[str] | None = field(
        default=None, metadata={"help": "Speakers to leave out of training and evaluation."}
    )
    max_clip_seconds: float = field(
        default=MAX_CLIP_SECONDS, metadata={"help": "Longest clip to train on; a few longer ones are left out."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training split while it is used, for what does not fit a disk; needs max_steps."},
    )

    def __post_init__(self):
        if self.streaming and self.concatenate_max > 1:
            raise ValueError(
                f"`concatenate_max` must be 1 with `streaming`, got {self.concatenate_max}. A stream is not joined."
            )


@dataclass
class CTCTrainingArguments(RecipeTrainingArguments):
    """Training arguments with defaults for a recogniser of a few million parameters, from scratch."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "wer", "cer")

    num_train_epochs: float = field(default=24, metadata={"help": "Passes over the speech."})
    per_device_train_batch_size: int = field(default=12, metadata={"help": "Utterances of a step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Utterances evaluated together."})
    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": "How batches are made."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate."})
    tri_stage: bool = field(default=True, metadata={"help": "Warm up, hold, decay exponentially."})
    initial_lr: float = field(default=1e-4, metadata={"help": "Learning rate before the warm-up."})
    final_lr: float = field(default=2e-5, metadata={"help": "Learning rate at the end."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of the warm-up; below 1, a share of all."})
    hold_steps: float = field(default=0.4, metadata={"help": "Steps at learning_rate; below 1, a share of all."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Largest norm of the gradient."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints, as in TrainingArguments."})


ARGUMENTS = (ModelArguments, TrainingCorpusArguments, RecipeAugmentation, CardArguments, CTCTrainingArguments)


def build_model(
    arguments: ModelArguments, texts: Iterable[str], languages: Sequence[str] | None = None
) -> tuple[PreTrainedModel, DeepSpeech2Processor]:
    """
    Returns the checkpoint's model and processor, or fresh ones with a vocabulary of the characters in `texts`.

    Args:
        arguments: The checkpoint, or the sizes.
        texts: Transcripts as they are in the corpus.
        languages: Codes of what they are in; the first one is saved with the processor.
    """
    if arguments.model_name_or_path:
        if find_recognizer_type(arguments.model_name_or_path) is not CTCRecognizer:
            raise ValueError(
                f"`model_name_or_path` must be a CTC model, got a Whisper in {arguments.model_name_or_path}. Adapt it "
                "with `recipes/personalize.py`."
            )
        processor = load_processor(arguments.model_name_or_path)
        set_language(processor.tokenizer, languages)
        return average_loss(load_whole(AutoModelForCTC, arguments.model_name_or_path)), processor
    transcripts = describe_transcripts(languages[0] if languages else None)
    normalize = partial(normalize_text, language=transcripts["language"])
    vocabulary = build_vocabulary(map(normalize, texts), text_unit=arguments.text_unit)
    tokenizer_class = JamoCTCTokenizer if arguments.text_unit == "jamo" else Wav2Vec2CTCTokenizer
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        tokenizer = tokenizer_class(str(path), bos_token=None, eos_token=None, **{TRANSCRIPTS: transcripts})
    return (build_emformer if arguments.architecture == "emformer" else build_deepspeech2)(arguments, tokenizer)


def build_deepspeech2(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[DeepSpeech2ForCTC, DeepSpeech2Processor]:
    """Returns a fresh DeepSpeech2 and its processor."""
    extractor = DeepSpeech2FeatureExtractor(arguments.num_mel_bins, normalization=arguments.normalization)
    config = DeepSpeech2Config(
        num_mel_bins=arguments.num_mel_bins,
        hidden_size=arguments.hidden_size or 512,
        num_hidden_layers=arguments.num_hidden_layers,
        hidden_dropout=arguments.hidden_dropout,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        inputs_to_logits_ratio=2 * extractor.hop_length,
    )
    return DeepSpeech2ForCTC(config), DeepSpeech2Processor(extractor, tokenizer)


def build_emformer(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[EmformerForCTC, DeepSpeech2Processor]:
    """Returns a fresh Emformer and its processor, whose features still lack the corpus's statistics."""
    extractor = EchoStreamFeatureExtractor(arguments.num_mel_bins)
    hidden_size = arguments.hidden_size or 256
    config = EmformerConfig(
        num_mel_bins=arguments.num_mel_bins,
        subsampling_channels=2 * hidden_size,
        hidden_size=hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        intermediate_size=4 * hidden_size,
        dropout=arguments.hidden_dropout,
        segment_length=arguments.segment_length,
        left_context_length=arguments.left_context_length,
        right_context_length=arguments.right_context_length,
        max_memory_size=0,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    return EmformerForCTC(config), DeepSpeech2Processor(extractor, tokenizer)


def measure_features(extractor: SequenceFeatureExtractor, dataset: UtteranceDataset | EndlessUtterances) -> None:
    """
    Gives features that are normalised over the corpus its statistics, where they have none yet.

    Raises:
        ValueError: The corpus is streamed: it cannot be measured before it is read.
    """
    if not isinstance(extractor, EchoStreamFeatureExtractor) or extractor.mean is not None:
        return
    if isinstance(dataset, EndlessUtterances):
        raise ValueError(
            "`streaming` must be false for a fresh Emformer, got true. Its features need the corpus's mean: train it "
            "on a part that fits the disk first, and go on from there with `model_name_or_path`."
        )
    extractor.set_statistics(*extractor.measure(row["samples"] for row in dataset.clips))


def load_corpora(arguments: TrainingCorpusArguments) -> tuple[Dataset | IterableDataset, Dataset]:
    """Returns the training rows, streamed on request, and the evaluation rows, without the excluded speakers."""
    excluded = arguments.exclude_speakers or []
    columns = ("audio", "text", "speaker_id") if excluded else ("audio", "text")
    corpora = []
    for split, streaming in ((arguments.train_split, arguments.streaming), (arguments.eval_split, False)):
        corpus = load_split(arguments, split, required_columns=columns, streaming=streaming)
        if streaming:
            corpus = corpus.filter(lambda row: row.get("speaker_id") not in excluded)
        elif excluded:
            corpus = select_speakers(corpus, excluded, exclude=True)
        corpora.append(corpus)
    return tuple(corpora)


def check_streaming(corpus_args: TrainingCorpusArguments, training_args: CTCTrainingArguments) -> None:
    """
    Makes sure that the arguments make sense for a stream, which has no end and is read in its own order.

    Raises:
        ValueError: The corpus is streamed, and `max_steps` lacks or passes or an order are asked for.
    """
    if not corpus_args.streaming:
        return
    if training_args.max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1 with `streaming`, got {training_args.max_steps}.")
    for name in ("num_train_epochs", "train_sampling_strategy"):
        if name in training_args.changed:
            raise ValueError(f"`{name}` must be left out with `streaming`, got {getattr(training_args, name)}.")
    training_args.train_sampling_strategy = "random"  # as the stream is shuffled, whatever the default


def build_dataset(
    arguments: TrainingCorpusArguments,
    processor: DeepSpeech2Processor,
    samples_per_logit: int,
    seed: int,
    corpus: Dataset | IterableDataset,
    augmentation: Augmentation | None,
) -> UtteranceDataset | EndlessUtterances:
    """Returns the utterances of a corpus: decoded and cached first, or read while they are used if it is streamed."""
    if isinstance(corpus, IterableDataset):
        options = {"samples_per_logit": samples_per_logit, "max_clip_seconds": arguments.max_clip_seconds}
        read = partial(stream_utterances, processor=processor, augmentation=augmentation, **options)
        return EndlessUtterances(corpus, seed=seed, read=read)
    clips = decode_clips(
        corpus,
        processor,
        samples_per_logit=samples_per_logit,
        max_speed=augmentation.max_speed if augmentation else 1.0,
        is_joined=arguments.concatenate_max > 1,
        is_evaluation=augmentation is None,
        max_clip_seconds=arguments.max_clip_seconds,
    )
    return UtteranceDataset(clips, processor, concatenate=arguments.concatenate, augmentation=augmentation, seed=seed)


def describe_ctc_run(
    model: PreTrainedModel,
    model_args: ModelArguments,
    corpus_args: CorpusArguments,
    card_args: CardArguments,
    results: dict,
) -> CardSubject:
    """Returns what the card is about."""
    name = type(model).__name__.removesuffix("ForCTC")
    hours = f" on {results['train_seconds'] / 3600:.2g} hours of speech" if "train_seconds" in results else ""
    return CardSubject(
        base=model_args.model_name_or_path,
        dataset=corpus_args.dataset,
        split=corpus_args.eval_split,
        description=f"{name} recogniser, trained with CTC{hours}.",
        language=card_args.language,
        dataset_licence=card_args.dataset_licence,
        licence=card_args.licence,
    )


def plan_model(arguments: tuple) -> PreTrainedModel:
    """Returns the model that such a run trains, made of configurations and transcripts, without weights of a file."""
    model_args, corpus_args, _, card_args, _ = arguments
    if model_args.model_name_or_path:
        return AutoModelForCTC.from_config(
            AutoConfig.from_pretrained(model_args.model_name_or_path, trust_remote_code=False)
        )
    train_corpus, _ = load_corpora(corpus_args)
    texts = (row["text"] for row in train_corpus.select_columns(["text"]))
    return build_model(model_args, texts, card_args.language)[0]


def main() -> None:
    """Runs the recipe."""
    arguments = parse_arguments(*ARGUMENTS)
    with claim_output_dir(arguments[-1]):
        train_recognizer(*arguments)


def train_recognizer(
    model_args: ModelArguments,
    corpus_args: TrainingCorpusArguments,
    augmentation: RecipeAugmentation,
    card_args: CardArguments,
    training_args: CTCTrainingArguments,
) -> None:
    """Trains a recogniser and writes what has come of it; a model of an earlier run is replaced."""
    check_output_dir(training_args.output_dir, is_resumed=True, is_model=True)
    check_streaming(corpus_args, training_args)
    hub_target = take_hub_target(training_args)
    set_seed(training_args.seed)

    # Corpus
    train_corpus, eval_corpus = load_corpora(corpus_args)
    splits = {"train_split": corpus_args.train_split, "eval_split": corpus_args.eval_split}
    caution = describe_overlap(train_corpus, eval_corpus, **splits)

    # Model
    texts = (row["text"] for row in train_corpus.select_columns(["text"]))
    model, processor = build_model(model_args, texts, card_args.language)

    # Data
    encode = partial(
        build_dataset, corpus_args, processor, find_samples_per_logit(model, processor), training_args.seed
    )
    train_dataset, eval_dataset = encode(train_corpus, augmentation), encode(eval_corpus, None)
    measure_features(processor.feature_extractor, train_dataset)

    # Trainer
    batch_size = training_args.per_device_eval_batch_size
    score = partial(evaluate_dataset, model, processor, eval_dataset, batch_size=batch_size)
    trainer = AdapterTrainer(
        model=CTCObjective(model),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=CTCCollator(processor),
        processing_class=processor,
        score=lambda: score()["overall"],
    )

    # Train and save
    train_output = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()

    # Evaluate
    scores = score()
    results = {
        "eval_wer": scores["overall"]["wer"],
        "eval_cer": scores["overall"]["cer"],
        "rate": scores["overall"]["rate"],
        "train_runtime": train_output.metrics["train_runtime"],
        "total_parameters": model.num_parameters(),
    }
    results |= {"caution": caution} if caution else {}
    if not corpus_args.streaming:
        results |= {"train_seconds": round(train_dataset.seconds, 2), "num_train_clips": len(train_dataset.clips)}
    if not trainer.is_world_process_zero():
        return
    print_results(results)
    write_results(training_args.output_dir, results)
    write_card(training_args.output_dir, describe_ctc_run(model, model_args, corpus_args, card_args, results))

    # Push
    if hub_target:
        print(push_folder(training_args.output_dir, hub_target))


if __name__ == "__main__":
    run_main(main)
