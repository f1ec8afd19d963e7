"""Trains an audio language model: any encoder on any causal language model, each side frozen, full, LoRA or QLoRA.

accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_audio_lm.py \\
    --config recipes/configs/train_audio_lm_barista.yaml --encoder openai/whisper-base \\
    --language_model HuggingFaceTB/SmolLM2-135M-Instruct --dataset barista --output_dir outputs/barista
"""

from torch import nn
from transformers import set_seed

from data.conversation_batches import ConversationCollator, TranscriptCollator
from modeling.audio_lm_modes import list_trainable, set_inference_mode
from modeling.files import write_whole
from publishing.card import CardArguments, write_card
from publishing.hub import push_folder, take_hub_target
from publishing.report import print_results, write_results
from training.arguments import parse_arguments
from training.audio_lm_results import describe_run, draw_answers, evaluate_run, make_planned_model, summarize_stages
from training.audio_lm_setup import (
    AudioLMArguments,
    InstructionArguments,
    Stage,
    StageData,
    describe_stage,
    enter_stage,
    list_stages,
    load_audio_lm,
)
from training.audio_lm_trainer import AudioLMTrainingArguments, train_stage
from training.endings import run_main
from training.output_folder import check_output_dir, claim_output_dir

ARGUMENTS = (AudioLMArguments, InstructionArguments, CardArguments, AudioLMTrainingArguments)


def find_planned_stage(arguments: tuple) -> Stage:
    """Returns the stage that `recipes/plan.py` plans: the last one, in which the most trains."""
    lm_args, data_args, _, training_args = arguments
    has_transcripts = data_args.transcripts is not None
    return list_stages(lm_args, num_train_epochs=training_args.num_train_epochs, has_transcripts=has_transcripts)[-1]


def plan_model(arguments: tuple) -> nn.Module:
    """Returns the model that such a run trains in its last stage, made of its configurations alone."""
    return make_planned_model(arguments[0], find_planned_stage(arguments))


def count_planned_epochs(arguments: tuple) -> float:
    """Returns the passes over the corpus of the last stage."""
    return find_planned_stage(arguments).num_train_epochs


def draw_trial(arguments: tuple, model: nn.Module, **sizes: object) -> tuple[nn.Module, list[dict]]:
    """Returns the objective of the last stage and batches of noise for it."""
    return draw_answers(model, is_cached=find_planned_stage(arguments).encoder_mode == "frozen", **sizes)


def main() -> None:
    """Runs the recipe."""
    arguments = parse_arguments(*ARGUMENTS)
    with claim_output_dir(arguments[-1]):
        train_stages(*arguments)


def train_stages(
    lm_args: AudioLMArguments,
    data_args: InstructionArguments,
    card_args: CardArguments,
    training_args: AudioLMTrainingArguments,
) -> None:
    """Trains stage after stage, saves the bundle and evaluates it."""
    output_dir = training_args.output_dir
    check_output_dir(output_dir, is_resumed=bool(training_args.resume_from_checkpoint), is_model=True)
    hub_target = take_hub_target(training_args)
    set_seed(training_args.seed)
    stages = list_stages(
        lm_args,
        num_train_epochs=training_args.num_train_epochs,
        has_transcripts=data_args.transcripts is not None,
    )

    # Model and processor
    model, processor = load_audio_lm(lm_args, stages)
    batch_size = training_args.per_device_eval_batch_size
    data = StageData(lm_args, data_args, processor, batch_size=batch_size, seed=training_args.seed)

    # Data, trainer and training of each stage
    notes = [train_numbered(number, stage, model, data, training_args) for number, stage in enumerate(stages, start=1)]
    results: dict[str, object] = {"stages": notes}

    # Save
    results |= summarize_stages(
        results["stages"], model, data.load(stages[-1].corpus, data_args.train_split)[1].seconds
    )
    if training_args.process_index:
        return
    set_inference_mode(model)
    model.save_pretrained(output_dir, save_full=lm_args.save_full)
    with write_whole(output_dir) as scratch:
        processor.save_pretrained(scratch)

    # Evaluate
    if data_args.eval_split:
        results |= evaluate_run(model, processor, data, data_args, lm_args, batch_size=batch_size)
    write_results(output_dir, results)
    write_card(output_dir, describe_run(lm_args, data_args, card_args, stages))
    print_results({name: value for name, value in results.items() if name not in ("stages", "eval_answers_read")})

    # Push
    if hub_target:
        print(push_folder(output_dir, hub_target))


def train_numbered(
    number: int, stage: Stage, model: nn.Module, data: StageData, training_args: AudioLMTrainingArguments
) -> dict[str, object]:
    """Trains one stage, and returns what results hold of it."""
    enter_stage(model, stage, data.arguments)
    trained = list_trainable(model)
    is_align = stage.objective == "align"
    collator = (TranscriptCollator if is_align else ConversationCollator)(data.processor)
    has_evaluation = training_args.eval_strategy != "no" and not is_align
    metrics = train_stage(
        model,
        stage,
        number=number,
        train_dataset=data.prepare(model, stage, data.data.train_split),
        eval_dataset=data.prepare(model, stage, data.data.eval_split) if has_evaluation else None,
        collator=collator,
        arguments=training_args,
        processor=data.processor,
    )
    was_trained = not is_align and collator.num_cells  # and not taken from an earlier run
    padding = {"padding": collator.padding} if was_trained else {}
    return {**describe_stage(stage), "trainable": trained, **padding, **metrics}


if __name__ == "__main__":
    run_main(main)
