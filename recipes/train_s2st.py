"""Trains an EchoStream: speech of one language in, text and speech units of another out.

accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_s2st.py \\
    --config recipes/configs/train_s2st_synthetic.yaml --dataset synthetic_s2st/es --language es en \\
    --start scratch --output_dir outputs/s2st
"""

from functools import partial

from transformers import set_seed

from data.augmentation import Augmentation
from data.overlap import describe_overlap
from data.translation_utterances import TranslationCollator
from inference.translation_scoring import evaluate_translations
from modeling import EchoStreamForSpeechToSpeechTranslation
from publishing.card import CardArguments
from publishing.hub import push_folder, take_hub_target
from publishing.report import print_results
from training.arguments import parse_arguments
from training.endings import run_main
from training.health import HealthArguments, HealthCallback
from training.output_folder import check_output_dir, claim_output_dir
from training.s2st_training import S2STTrainer, S2STTrainingArguments
from training.start import StartArguments
from training.translation import (
    TRANSLATION_ARGUMENTS,
    TranslationArguments,
    TranslationCorpusArguments,
    build_translation_data,
    check_adapter_start,
    collect_translation_results,
    describe_translation_run,
    load_translations,
    make_translation_objective,
    plan_translation_model,
    save_translation_outcome,
    start_model,
)

ARGUMENTS = TRANSLATION_ARGUMENTS


def plan_model(arguments: tuple) -> EchoStreamForSpeechToSpeechTranslation:
    """Returns the model that such a run trains, made of configurations, without weights of a file."""
    return plan_translation_model(*arguments[:2])


def main() -> None:
    """Runs the recipe."""
    arguments = parse_arguments(*ARGUMENTS)
    with claim_output_dir(arguments[-1]):
        train(*arguments)


def train(
    start_args: StartArguments,
    translation_args: TranslationArguments,
    corpus_args: TranslationCorpusArguments,
    augmentation: Augmentation,
    health_args: HealthArguments,
    card_args: CardArguments,
    training_args: S2STTrainingArguments,
) -> None:
    """Trains a model or an adapter, or measures a checkpoint, and writes what has come of it."""
    check_adapter_start(start_args, translation_args)
    check_output_dir(training_args.output_dir, is_resumed=True, is_model=not translation_args.has_adapter)
    base = start_args.checkpoint if translation_args.has_adapter else None
    hub_target = take_hub_target(training_args, base=base, base_model_id=translation_args.hub_base_model_id)
    set_seed(training_args.seed)

    # Corpus
    train_corpus, eval_corpus = (load_translations(corpus_args, split) for split in corpus_args.splits)
    splits = {"train_split": corpus_args.train_split, "eval_split": corpus_args.eval_split}
    caution = describe_overlap(train_corpus, eval_corpus, **splits)

    # Model and adapter
    model, processor, report = start_model(
        start_args, translation_args, train_corpus, card_args.language, training_args
    )
    print(report.describe())

    # Data
    build = partial(build_translation_data, corpus_args, model, processor, seed=training_args.seed)
    train_dataset = build(train_corpus, augmentation) if start_args.trains else None
    eval_dataset = build(eval_corpus, None)

    # Trainer
    batch_size = training_args.per_device_eval_batch_size
    trainer = S2STTrainer(
        model=make_translation_objective(
            model, translation_args, train_dataset or eval_dataset, seed=training_args.seed
        ),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=TranslationCollator(processor),
        processing_class=processor,
        callbacks=[HealthCallback(**health_args.options)],
        score=partial(evaluate_translations, model, processor, eval_dataset, batch_size=batch_size),
        encoder_lr=translation_args.encoder_lr,
        decoder_lr=translation_args.decoder_lr,
        encoder_steps=translation_args.encoder_steps if report.has_stages else 0,
    )

    # Train
    runtime = None
    if start_args.trains:
        report.write(training_args.output_dir)  # a run that is resumed learns how it began
        output = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        runtime = output.metrics["train_runtime"]

    # Evaluate and save
    results = collect_translation_results(model, trainer.evaluate(), train_dataset, runtime, caution)
    if not trainer.is_world_process_zero():
        return
    subject = describe_translation_run(start_args, translation_args, corpus_args, card_args, results)
    save_translation_outcome(model, processor, report, subject, training_args.output_dir, results)
    print_results(results)

    # Push
    if hub_target:
        print(push_folder(training_args.output_dir, hub_target))


if __name__ == "__main__":
    run_main(main)
