"""Adapts a frozen recogniser to one speaker, or to many at once; the output is each speaker's adapter alone.

accelerate launch --config_file accelerate_configs/cpu.yaml recipes/personalize.py \\
    --config recipes/configs/personalize_synthetic.yaml \\
    --model_name_or_path outputs/base --speaker_id whisper --output_dir outputs/whisper
"""

from functools import partial

from transformers import (
    AutoConfig,
    AutoModelForCTC,
    EarlyStoppingCallback,
    PreTrainedModel,
    WhisperForConditionalGeneration,
    set_seed,
)

from data.augmentation import RecipeAugmentation
from inference.recognizers import WhisperRecognizer, find_recognizer_type, open_recognizer
from modeling.adapter_loading import read_adapter
from modeling.adapters import adapters_off, is_adapter_parameter
from publishing.card import CardArguments
from publishing.hub import push_folder, take_hub_target
from publishing.report import print_results
from training.arguments import parse_arguments
from training.corpus_arguments import CorpusArguments, load_split
from training.endings import run_main
from training.frozen_part import CacheArguments
from training.output_folder import check_output_dir, claim_output_dir
from training.personal import (
    ADAPTER_NAME,
    ALL_SPEAKERS,
    MAX_TRAINABLE_SHARE,
    PersonalArguments,
    PersonalTrainingArguments,
    add_personal_adapter,
    collect_results,
    count_sizes,
    describe_personal_run,
    save_personal_outcome,
    score_datasets,
)
from training.personal_models import make_personal_model
from training.stacks import can_stack, personalize_each, personalize_many
from training.trainer import check_trainable

ARGUMENTS = (
    PersonalArguments,
    CorpusArguments,
    RecipeAugmentation,
    CacheArguments,
    CardArguments,
    PersonalTrainingArguments,
)


def plan_model(arguments: tuple) -> PreTrainedModel:
    """Returns the model that such a run trains, made of configurations, with all adapters that train together."""
    personal_args, corpus_args, training_args = arguments[0], arguments[1], arguments[-1]
    config = AutoConfig.from_pretrained(personal_args.model_name_or_path, trust_remote_code=False)
    is_whisper = find_recognizer_type(personal_args.model_name_or_path) is WhisperRecognizer
    model = (WhisperForConditionalGeneration._from_config if is_whisper else AutoModelForCTC.from_config)(config)
    speakers = personal_args.speaker_id
    if speakers == [ALL_SPEAKERS]:
        corpus = load_split(corpus_args, corpus_args.train_split, required_columns=("speaker_id",))
        speakers = corpus.unique("speaker_id")
    for number in range(min(len(speakers), personal_args.speakers_per_stack)):
        name = f"{ADAPTER_NAME}_{number}"
        if personal_args.init_adapter:
            config = read_adapter(personal_args.init_adapter).config
            config.inference_mode = False
            model.add_adapter(config, name)
        else:
            add_personal_adapter(model, None, personal_args, name, seed=training_args.seed)
    for name, parameter in model.named_parameters():
        if is_adapter_parameter(name):
            parameter.requires_grad_(True)  # the library has only the last one train
    return model


def main() -> None:
    """Runs the recipe."""
    arguments = parse_arguments(*ARGUMENTS)
    speakers = arguments[0].speaker_id
    with claim_output_dir(arguments[-1]):
        if len(speakers) == 1 and speakers != [ALL_SPEAKERS]:
            personalize(*arguments)
        elif can_stack(arguments[0].model_name_or_path):
            personalize_many(*arguments)
        else:
            personalize_each(personalize, *arguments)


def personalize(
    personal_args: PersonalArguments,
    corpus_args: CorpusArguments,
    augmentation: RecipeAugmentation,
    cache_args: CacheArguments,
    card_args: CardArguments,
    training_args: PersonalTrainingArguments,
) -> None:
    """Trains one speaker's adapter, or the whole model, and writes what has come of it."""
    is_resumed = bool(training_args.resume_from_checkpoint)
    check_output_dir(training_args.output_dir, is_resumed=is_resumed, is_model=personal_args.unfreeze_base)
    base = None if personal_args.unfreeze_base else personal_args.model_name_or_path
    hub_target = take_hub_target(training_args, base=base, base_model_id=personal_args.hub_base_model_id)
    set_seed(training_args.seed)

    # Model and adapter
    recognizer = open_recognizer(personal_args.model_name_or_path, language=card_args.language)
    model, processor = recognizer.model, recognizer.processor
    add_personal_adapter(model, processor, personal_args, seed=training_args.seed)
    check_trainable(model, max_share=1.0 if personal_args.unfreeze_base else MAX_TRAINABLE_SHARE)

    # Data
    batch_size = training_args.per_device_eval_batch_size
    personal = make_personal_model(recognizer, cache_args, batch_size=batch_size)
    loader = personal.make_loader(personal_args, corpus_args, augmentation, seed=training_args.seed)
    data = loader.load(personal_args.speaker_id[0])
    score = partial(score_datasets, recognizer, batch_size=batch_size)
    with adapters_off(model):
        base_scores = score(data.evaluation)

    # Trainer
    patience = training_args.early_stopping_patience
    objective = personal.make_objective()
    trainer = personal.trainer_class(
        model=objective,
        args=training_args,
        train_dataset=personal.cache(data.train, objective),
        eval_dataset=data.evaluation[""],
        data_collator=personal.collator,
        processing_class=processor,
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
        score=lambda: score({"": data.evaluation[""]})[""],
    )

    # Train
    runtime = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics["train_runtime"]

    # Evaluate and save
    results = collect_results(data, base_scores, score(data.evaluation), sizes=count_sizes(model), runtime=runtime)
    if not trainer.is_world_process_zero():
        return
    subject = describe_personal_run(personal_args, corpus_args, card_args, hub_target, data.train_seconds)
    save_personal_outcome(model, processor, personal_args, subject, training_args.output_dir, results)
    print_results(results)

    # Push
    if hub_target:
        print(push_folder(training_args.output_dir, hub_target))


if __name__ == "__main__":
    run_main(main)
