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
from recipes.card import CardArguments, CardSubject, public_name, write_card
from recipes.decoding import evaluate_dataset, load_adapter
from recipes.hub import HubTarget, push_folder, take_hub_target
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

    num_train_epochs: float = field(default=60, metadata={"help": "Passes over the speech."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Utterances of a step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Utterances evaluated together."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule, as in TrainingArguments."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of the warm-up; below 1, a share of all."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Largest norm of the gradient."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints, as in TrainingArguments."})


ARGUMENTS = (PersonalArguments, CorpusArguments, Augmentation, CardArguments, PersonalTrainingArguments)


def check_output_dir(output_dir: str, *, is_resumed: bool) -> None:
    """
    Makes sure that no adapter is overwritten.

    Raises:
        ValueError: `output_dir` holds an adapter or a model, and the training is not resumed.
    """
    if (Path(output_dir) / CONFIG_NAME).exists():
        raise ValueError(
            f"`output_dir` must not hold a model, got {output_dir}. Choose a folder for the adapter alone."
        )
    if not is_resumed and (Path(output_dir) / ADAPTER_WEIGHTS_NAME).exists():
        raise ValueError(
            f"`output_dir` must not hold another adapter, got {output_dir}. Choose another folder or remove that one."
        )


def add_personal_adapter(model, processor, arguments: PersonalArguments) -> None:
    """Adds a fresh adapter to `model`, or another user's to start from; or unfreezes the base."""
    if arguments.unfreeze_base:
        model.unfreeze_base_model()
    elif arguments.init_adapter:
        options = {"allow_base_mismatch": arguments.allow_base_mismatch, "processor": processor}
        load_adapter(model, arguments.init_adapter, ADAPTER_NAME, is_trainable=True, **options)
        model.freeze_base_model()
    else:
        config = SpeechAdapterConfig(
            kind=arguments.adapter_kind,
            hidden_sizes=arguments.adapter_hidden_sizes or HIDDEN_SIZES[arguments.adapter_kind],
            dropout=arguments.adapter_dropout,
        )
        model.add_adapter(config, ADAPTER_NAME)
    if not arguments.unfreeze_base:
        # The file travels: it names the base, not where this machine keeps it.
        model.peft_config[ADAPTER_NAME].base_model_name_or_path = public_name(arguments.model_name_or_path)


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


def load_base_speakers(arguments: PersonalArguments, corpus_args: CorpusArguments) -> Dataset | None:
    """Returns the evaluation rows of the base's speakers, if any are named."""
    if not arguments.base_eval_speakers:
        return None
    columns = ("audio", "text", "speaker_id")
    corpus = load_corpus(corpus_args.dataset, split=corpus_args.eval_split, required_columns=columns)
    return select_speakers(corpus, arguments.base_eval_speakers)


def score_datasets(model, processor, datasets: dict[str, UtteranceDataset], batch_size: int) -> dict[str, dict]:
    """Returns the overall scores of each dataset."""
    return {
        name: evaluate_dataset(model, processor, dataset, batch_size=batch_size)["overall"]
        for name, dataset in datasets.items()
    }


def collect_results(model, before: dict[str, dict], after: dict[str, dict], train_metrics: dict) -> dict:
    """
    Returns what `eval_results.json` reports of scores before and after and of what was trained.

    Args:
        model: The trained model.
        before: Scores without the adapter: of the speaker at `""`, of the base's speakers at `"others_"`.
        after: Scores with it, likewise.
        train_metrics: Of the Trainer.
    """
    results = {}
    for prefix in before:
        for rate in ("wer", "cer"):
            results |= {f"{prefix}base_{rate}": before[prefix][rate], f"{prefix}eval_{rate}": after[prefix][rate]}
    return results | {
        "trainable_parameters": model.count_parameters(trainable_only=True)["total"],
        "total_parameters": model.count_parameters()["total"],
        "train_runtime": train_metrics["train_runtime"],
    }


def describe_run(
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
        picture="results.png",
    )


def save_outcome(model, processor, personal_args: PersonalArguments, subject: CardSubject, folder: str, results: dict):
    """Writes the adapter (or the fine-tuned model), the results, their picture and the card into `folder`."""
    if personal_args.unfreeze_base:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    else:
        save_adapter(model, folder, ADAPTER_NAME, processor=processor)
        results["adapter_bytes"] = (Path(folder) / ADAPTER_WEIGHTS_NAME).stat().st_size
    if personal_args.base_eval_speakers:
        results["base_eval_speakers"] = personal_args.base_eval_speakers
    write_results(folder, results)
    before_after = {"before": [results["base_wer"]], "after": [results["eval_wer"]]}
    draw_before_after(Path(folder) / subject.picture, names=[personal_args.speaker_id], **before_after)
    write_card(folder, subject)


def main() -> None:
    """Runs the recipe."""
    personal_args, corpus_args, augmentation, card_args, training_args = parse_arguments(*ARGUMENTS)
    check_output_dir(training_args.output_dir, is_resumed=bool(training_args.resume_from_checkpoint))
    base = None if personal_args.unfreeze_base else personal_args.model_name_or_path
    hub_target = take_hub_target(training_args, base=base, base_model_id=personal_args.hub_base_model_id)
    set_seed(training_args.seed)

    # Model and adapter
    model = AutoModelForCTC.from_pretrained(personal_args.model_name_or_path)
    processor = AutoProcessor.from_pretrained(personal_args.model_name_or_path)
    add_personal_adapter(model, processor, personal_args)
    check_trainable(model, max_share=1.0 if personal_args.unfreeze_base else MAX_TRAINABLE_SHARE)

    # Data
    train_corpus, eval_corpus = load_speaker(personal_args, corpus_args, seed=training_args.seed)
    decode = {"processor": processor, "samples_per_logit": model.config.inputs_to_logits_ratio}
    decode["is_joined"] = corpus_args.concatenate_max > 1
    join = {"processor": processor, "concatenate": corpus_args.concatenate, "seed": training_args.seed}
    train_clips = decode_clips(train_corpus, **decode, max_speed=augmentation.max_speed)
    train_dataset = UtteranceDataset(train_clips, augmentation=augmentation, **join)
    eval_dataset = UtteranceDataset(decode_clips(eval_corpus, **decode), **join)
    eval_datasets = {"": eval_dataset}
    if others := load_base_speakers(personal_args, corpus_args):
        eval_datasets["others_"] = UtteranceDataset(decode_clips(others, **decode), **join)
    score = partial(score_datasets, model, processor, eval_datasets, training_args.per_device_eval_batch_size)
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
    results = collect_results(model, base_scores, score(), train_output.metrics)
    results |= {"speaker_id": personal_args.speaker_id, "train_seconds": round(train_dataset.seconds, 2)}
    if not trainer.is_world_process_zero():
        return
    subject = describe_run(personal_args, corpus_args, card_args, hub_target, train_dataset.seconds)
    save_outcome(model, processor, personal_args, subject, training_args.output_dir, results)
    print_results(results)

    # Push
    if hub_target:
        print(push_folder(training_args.output_dir, hub_target))


if __name__ == "__main__":
    main()
