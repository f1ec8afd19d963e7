"""Adapts a frozen recogniser to one speaker; the output is that speaker's adapter alone.

accelerate launch --config_file accelerate_configs/cpu.yaml recipes/personalize.py \\
    --config recipes/configs/personalize_synthetic.yaml \\
    --model_name_or_path outputs/base --speaker_id whisper --output_dir outputs/whisper
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCTC, AutoProcessor, set_seed
from transformers.utils import CONFIG_NAME

from data.asr import Augmentation, UtteranceDataset, decode_clips
from data.collators import CTCCollator
from data.corpora import load_corpus, select_speakers, take_seconds
from modeling import SpeechAdapterConfig
from modeling.adapters import ADAPTER_WEIGHTS_NAME, KINDS, adapters_off, save_adapter
from recipes.arguments import CorpusArguments, parse_arguments
from recipes.decoding import evaluate_dataset, load_adapter
from recipes.hub import ADAPTER_USAGE, CardSubject, write_card
from recipes.report import draw_before_after, print_results, write_results
from recipes.trainer import AdapterTrainer, RecipeTrainingArguments, check_trainable

# The adapter's name inside the model; a speaker's own name never becomes part of a path.
ADAPTER_NAME = "speaker"
# Sizes for which an adapter stays below 4 % of a recogniser of a few million parameters.
HIDDEN_SIZES = {"mlp": [128, 64], "replacement": [128, 64], "bottleneck": [24]}
# An adapter larger than this share of the model is a mistake in its sizes.
MAX_TRAINABLE_SHARE = 0.2


@dataclass
class PersonalArguments:
    """The base, the speaker and the adapter."""

    model_name_or_path: str = field(metadata={"help": "Base recogniser: a folder or a Hub name."})
    speaker_id: str = field(metadata={"help": "Speaker to adapt to: a value of column `speaker_id`."})
    max_train_seconds: float | None = field(default=None, metadata={"help": "Most seconds of speech to train on."})
    adapter_kind: str = field(
        default="bottleneck", metadata={"help": "Where and how the adapter acts.", "choices": list(KINDS)}
    )
    adapter_hidden_sizes: list[int] | None = field(
        default=None, metadata={"help": "Widths of the adapter's hidden layers. Default: under 4 % of a small base."}
    )
    adapter_dropout: float = field(default=0.1, metadata={"help": "Dropout inside the adapter."})
    init_adapter: str | None = field(
        default=None, metadata={"help": "Start from this adapter (folder or Hub name), of its kind and sizes."}
    )
    unfreeze_base: bool = field(
        default=False, metadata={"help": "Fine-tune the whole model without an adapter, for comparison."}
    )


ARGUMENTS = (PersonalArguments, CorpusArguments, Augmentation, RecipeTrainingArguments)


def check_output_dir(output_dir: str, *, is_resumed: bool) -> None:
    """
    Makes sure that no adapter is overwritten.

    Raises:
        ValueError: `output_dir` holds an adapter or a model, and the training is not resumed.
    """
    if (Path(output_dir) / CONFIG_NAME).exists():
        raise ValueError(f"`output_dir` must not hold a model, got {output_dir}. Choose a folder for the adapter alone.")
    if not is_resumed and (Path(output_dir) / ADAPTER_WEIGHTS_NAME).exists():
        raise ValueError(
            f"`output_dir` must not hold another adapter, got {output_dir}. Choose another folder or remove that one."
        )


def add_personal_adapter(model, arguments: PersonalArguments) -> None:
    """Adds a fresh adapter to `model`, or another user's to start from; or unfreezes the base."""
    if arguments.unfreeze_base:
        model.unfreeze_base_model()
    elif arguments.init_adapter:
        load_adapter(model, arguments.init_adapter, ADAPTER_NAME, is_trainable=True)
        model.freeze_base_model()
    else:
        config = SpeechAdapterConfig(
            kind=arguments.adapter_kind,
            hidden_sizes=arguments.adapter_hidden_sizes or HIDDEN_SIZES[arguments.adapter_kind],
            dropout=arguments.adapter_dropout,
            base_model_name_or_path=arguments.model_name_or_path,
        )
        model.add_adapter(config, ADAPTER_NAME)


def load_speaker(arguments: PersonalArguments, corpus_args: CorpusArguments, *, seed: int) -> tuple[Dataset, Dataset]:
    """Returns the speaker's training rows, within the seconds allowed, and all of the speaker's evaluation rows."""
    train_corpus, eval_corpus = (
        select_speakers(
            load_corpus(corpus_args.dataset, split=split, required_columns=("audio", "text", "speaker_id")),
            [arguments.speaker_id],
        )
        for split in (corpus_args.train_split, corpus_args.eval_split)
    )
    if arguments.max_train_seconds is not None:
        train_corpus = take_seconds(train_corpus, arguments.max_train_seconds, seed=seed)
    return train_corpus, eval_corpus


def collect_results(model, base_scores: dict, scores: dict, train_metrics: dict) -> dict:
    """Returns what `eval_results.json` reports of scores before and after and of what was trained."""
    trainable = model.count_parameters(trainable_only=True)["total"]
    return {
        "base_wer": base_scores["wer"],
        "eval_wer": scores["wer"],
        "base_cer": base_scores["cer"],
        "eval_cer": scores["cer"],
        "trainable_parameters": trainable,
        "total_parameters": model.count_parameters()["total"],
        "train_runtime": train_metrics["train_runtime"],
    }


def save_outcome(model, processor, personal_args: PersonalArguments, subject: CardSubject, folder: str, results: dict):
    """Writes the adapter (or the fine-tuned model), the results, their picture and the card into `folder`."""
    if personal_args.unfreeze_base:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    else:
        save_adapter(model, folder, ADAPTER_NAME)
        results["adapter_bytes"] = (Path(folder) / ADAPTER_WEIGHTS_NAME).stat().st_size
    write_results(folder, results)
    before_after = {"before": [results["base_wer"]], "after": [results["eval_wer"]]}
    draw_before_after(Path(folder) / subject.picture, names=[personal_args.speaker_id], **before_after)
    write_card(folder, subject, results)


def main() -> None:
    """Runs the recipe."""
    personal_args, corpus_args, augmentation, training_args = parse_arguments(*ARGUMENTS)
    check_output_dir(training_args.output_dir, is_resumed=bool(training_args.resume_from_checkpoint))
    set_seed(training_args.seed)

    # Model and adapter
    model = AutoModelForCTC.from_pretrained(personal_args.model_name_or_path)
    processor = AutoProcessor.from_pretrained(personal_args.model_name_or_path)
    add_personal_adapter(model, personal_args)
    check_trainable(model, max_share=1.0 if personal_args.unfreeze_base else MAX_TRAINABLE_SHARE)

    # Data
    train_corpus, eval_corpus = load_speaker(personal_args, corpus_args, seed=training_args.seed)
    decode = {"processor": processor, "samples_per_logit": model.config.inputs_to_logits_ratio}
    decode["is_joined"] = corpus_args.concatenate_max > 1
    join = {"processor": processor, "concatenate": corpus_args.concatenate, "seed": training_args.seed}
    train_clips = decode_clips(train_corpus, **decode, max_speed=augmentation.max_speed)
    train_dataset = UtteranceDataset(train_clips, augmentation=augmentation, **join)
    eval_dataset = UtteranceDataset(decode_clips(eval_corpus, **decode), **join)
    score = partial(
        evaluate_dataset, model, processor, eval_dataset, batch_size=training_args.per_device_eval_batch_size
    )
    with adapters_off(model):
        base_scores = score()

    # Trainer
    trainer = AdapterTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=CTCCollator(processor),
        processing_class=processor,
    )

    # Train
    train_output = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    # Evaluate and save
    results = collect_results(model, base_scores["overall"], score()["overall"], train_output.metrics)
    results |= {"speaker_id": personal_args.speaker_id, "train_seconds": round(train_dataset.seconds, 2)}
    subject = CardSubject(
        base=personal_args.model_name_or_path,
        dataset=corpus_args.dataset,
        split=corpus_args.eval_split,
        description=f"Speech adapter for one speaker, trained on {train_dataset.seconds:.0f} s of speech.",
        usage=ADAPTER_USAGE,
        picture="results.png",
    )
    if trainer.is_world_process_zero():
        save_outcome(model, processor, personal_args, subject, training_args.output_dir, results)
        print_results(results)


if __name__ == "__main__":
    main()
