"""Adapts a frozen Whisper or Qwen2-Audio to speech of another domain, such as a laser vibrometer's.

accelerate launch --config_file accelerate_configs/cpu.yaml recipes/adapt_domain.py \\
    --config recipes/configs/adapt_domain_fsdd.yaml \\
    --model_name_or_path outputs/domain/base --dataset fsdd --objective distill --output_dir outputs/ldv
"""

from functools import partial

import torch
from torch import nn
from transformers import AutoConfig, AutoProcessor, set_seed

from data.ldv import LDVChannel
from data.prompts import make_prompt
from inference.audio_models import find_family, find_tower
from modeling.adapter_files import save_adapter
from modeling.files import write_whole
from publishing.card import CardArguments
from publishing.domain_report import DomainReportCallback
from publishing.hub import push_folder, take_hub_target
from publishing.report import print_results
from training.arguments import parse_arguments
from training.audio_tower import add_adapter, find_tower_block
from training.corpus_arguments import CorpusArguments
from training.domain_methods import (
    ADAPTER_NAME,
    MAX_TRAINABLE_SHARE,
    DomainArguments,
    DomainLoader,
    add_method,
    load_base,
    make_collator,
    make_method_config,
    prepare_training,
)
from training.domain_results import (
    describe_domain_run,
    describe_training,
    draw_adapter_maps,
    evaluate_base,
    measure_errors,
    measure_pairs,
    save_domain_outcome,
)
from training.domain_training import DomainTrainer, DomainTrainingArguments
from training.endings import run_main
from training.output_folder import check_output_dir, claim_output_dir
from training.planning import quantize_shapes
from training.trainer import check_trainable

ARGUMENTS = (DomainArguments, CorpusArguments, LDVChannel, CardArguments, DomainTrainingArguments)


def plan_model(arguments: tuple) -> nn.Module:
    """Returns the model that such a run trains, made of its configuration: for distillation, the tower alone."""
    domain_args = arguments[0]
    config = AutoConfig.from_pretrained(domain_args.model_name_or_path, trust_remote_code=False)
    family = find_family(config)
    dtype = config.dtype if domain_args.dtype == "auto" else getattr(torch, domain_args.dtype)
    model = family.model_class(config).to(dtype or torch.float32).requires_grad_(False)
    if domain_args.load_in_4bit:
        quantize_shapes(model)
    if domain_args.method != "none":
        add_adapter(model, make_method_config(domain_args, family), ADAPTER_NAME)
    if domain_args.objective != "distill":
        return model
    return nn.ModuleDict({"tower": find_tower(model), "speech_adapter_block": find_tower_block(model, ADAPTER_NAME)})


def main() -> None:
    """Runs the recipe."""
    arguments = parse_arguments(*ARGUMENTS)
    with claim_output_dir(arguments[-1]):
        adapt(*arguments)


def adapt(
    domain_args: DomainArguments,
    corpus_args: CorpusArguments,
    channel: LDVChannel,
    card_args: CardArguments,
    training_args: DomainTrainingArguments,
) -> None:
    """Trains the adapter of a domain and writes what has come of it."""
    output_dir, batch_size = training_args.output_dir, training_args.per_device_eval_batch_size
    check_output_dir(output_dir, is_resumed=bool(training_args.resume_from_checkpoint))
    base = domain_args.model_name_or_path
    hub_target = take_hub_target(training_args, base=base, base_model_id=domain_args.hub_base_model_id)
    set_seed(training_args.seed)
    score = {"batch_size": batch_size, "language": card_args.language[0] if card_args.language else None}
    prompt = make_prompt(
        AutoProcessor.from_pretrained(base, trust_remote_code=False), language=domain_args.prompt_language
    )
    loader = DomainLoader(domain_args, corpus_args, channel, prompt, seed=training_args.seed)
    if domain_args.method == "none":
        evaluate_base(domain_args, loader.load_evaluation(), output_dir, **score)
        return

    # Model and adapter
    model = load_base(domain_args, prompt)
    objective = add_method(model, domain_args)
    check_trainable(model, max_share=MAX_TRAINABLE_SHARE)

    # Data
    variants, validation, evaluation = loader.load_training(), loader.load_validation(), loader.load_evaluation()
    collator = make_collator(domain_args, model, prompt)
    train_dataset = prepare_training(domain_args, model, variants, collator, batch_size=batch_size)
    measure = partial(measure_pairs, domain_args, objective, validation, collator, batch_size=batch_size)
    results = measure("before")
    caution = loader.describe_overlap()
    results |= {"caution": caution} if caution else {}

    # Trainer
    report = DomainReportCallback()
    trainer = DomainTrainer(
        model=objective,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=validation,
        data_collator=collator,
        processing_class=prompt.processor,
        callbacks=[report],
    )

    # Train and save
    train_output = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    results |= measure("after")
    results |= describe_training(domain_args, model, train_dataset, prompt, train_output.metrics)
    if not trainer.is_world_process_zero():
        return
    prompt.extractor.return_attention_mask = True  # without it, Whisper's adapter takes padding for speech
    with write_whole(output_dir) as scratch:
        save_adapter(model, scratch, ADAPTER_NAME, processor=prompt.processor)
        prompt.processor.save_pretrained(scratch)
    maps = draw_adapter_maps(domain_args, objective, prompt, evaluation, output_dir)
    objective.forget_weights()  # their memory is for the model that is loaded now

    # Evaluate what was saved, as others will load it
    if not domain_args.tower_only:
        results |= measure_errors(domain_args, output_dir, evaluation, **score)
    subject = describe_domain_run(domain_args, corpus_args, card_args, hub_target, model)
    save_domain_outcome(output_dir, results, subject, report=report, trained=model, maps=maps)
    print_results(results)

    # Push
    if hub_target:
        print(push_folder(output_dir, hub_target))


if __name__ == "__main__":
    run_main(main)
