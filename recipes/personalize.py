"""Adapts a frozen recogniser to one speaker, or to many at once; the output is each speaker's adapter alone.

accelerate launch --config_file accelerate_configs/cpu.yaml recipes/personalize.py \\
    --config recipes/configs/personalize_synthetic.yaml \\
    --model_name_or_path outputs/base --speaker_id whisper --output_dir outputs/whisper
"""

from functools import partial

from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCTC, AutoProcessor, EarlyStoppingCallback, PreTrainedModel, set_seed

from data.augmentation import RecipeAugmentation
from data.collators import CTCCollator
from data.text import set_language
from modeling.adapter_loading import read_adapter
from modeling.adapters import adapters_off, is_adapter_parameter
from modeling.whole_models import load_whole
from publishing.card import CardArguments
from publishing.hub import push_folder, take_hub_target
from publishing.report import print_results
from training.arguments import parse_arguments
from training.corpus_arguments import CorpusArguments, load_split
from training.frozen_part import CacheArguments, cache_frozen_part
from training.objectives.recognition import CTCObjective
from training.output_folder import check_output_dir, claim_output_dir
from training.personal import (
    ADAPTER_NAME,
    ALL_SPEAKERS,
    MAX_TRAINABLE_SHARE,
    PersonalArguments,
    PersonalTrainingArguments,
    SpeakerLoader,
    add_personal_adapter,
    collect_results,
    count_sizes,
    describe_personal_run,
    save_personal_outcome,
    score_datasets,
)
from training.stacks import personalize_many
from training.trainer import AdapterTrainer, check_trainable

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
    model = AutoModelForCTC.from_config(
        AutoConfig.from_pretrained(personal_args.model_name_or_path, trust_remote_code=False)
    )
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
        (personalize_many if len(speakers) > 1 or speakers == [ALL_SPEAKERS] else personalize)(*arguments)


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
    model = load_whole(AutoModelForCTC, personal_args.model_name_or_path).to(PartialState().device)
    processor = AutoProcessor.from_pretrained(personal_args.model_name_or_path, trust_remote_code=False)
    set_language(processor.tokenizer, card_args.language)
    add_personal_adapter(model, processor, personal_args, seed=training_args.seed)
    check_trainable(model, max_share=1.0 if personal_args.unfreeze_base else MAX_TRAINABLE_SHARE)

    # Data
    options = {"samples_per_logit": model.config.inputs_to_logits_ratio, "seed": training_args.seed}
    loader = SpeakerLoader(personal_args, corpus_args, augmentation, processor, **options)
    data = loader.load(personal_args.speaker_id[0])
    batch_size = training_args.per_device_eval_batch_size
    score = partial(score_datasets, model, processor, data.evaluation, batch_size=batch_size)
    with adapters_off(model):
        base_scores = score()

    # Trainer
    patience = training_args.early_stopping_patience
    objective = CTCObjective(model)
    trainer = AdapterTrainer(
        model=objective,
        args=training_args,
        train_dataset=cache_frozen_part(data.train, objective.prefix, processor, cache_args, batch_size=batch_size),
        eval_dataset=data.evaluation[""],
        data_collator=CTCCollator(processor),
        processing_class=processor,
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
        score=lambda: score_datasets(model, processor, {"": data.evaluation[""]}, batch_size)[""],
    )

    # Train
    runtime = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics["train_runtime"]

    # Evaluate and save
    results = collect_results(data, base_scores, score(), sizes=count_sizes(model), runtime=runtime)
    if not trainer.is_world_process_zero():
        return
    subject = describe_personal_run(personal_args, corpus_args, card_args, hub_target, data.train.seconds)
    save_personal_outcome(model, processor, personal_args, subject, training_args.output_dir, results)
    print_results(results)

    # Push
    if hub_target:
        print(push_folder(training_args.output_dir, hub_target))


if __name__ == "__main__":
    main()
