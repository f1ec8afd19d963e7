"""Every training argument is honoured, or refused by its name before anything is read."""

from dataclasses import fields

import pytest

from recipes.train_ctc import CTCTrainingArguments
from training.arguments import parse_arguments
from training.domain_training import DomainTrainingArguments
from training.honoured_arguments import HONOURED_BY_STACK, HONOURED_BY_TRAINER
from training.personal import PersonalTrainingArguments
from training.trainer import RecipeTrainingArguments


def parse(*flags: object, argument_type: type = RecipeTrainingArguments) -> RecipeTrainingArguments:
    (arguments,) = parse_arguments(argument_type, argv=["--output_dir", "unused", "--use_cpu", *map(str, flags)])
    return arguments


def test_the_loops_state_arguments_that_exist():
    types = (CTCTrainingArguments, PersonalTrainingArguments, DomainTrainingArguments)
    known = {field.name for argument_type in types for field in fields(argument_type)}
    assert sorted(HONOURED_BY_TRAINER - known) == []
    assert HONOURED_BY_STACK < HONOURED_BY_TRAINER


@pytest.mark.parametrize(
    "argument_type",
    [RecipeTrainingArguments, CTCTrainingArguments, PersonalTrainingArguments, DomainTrainingArguments],
)
def test_nothing_has_changed_where_nothing_is_asked_for(argument_type):
    assert parse(argument_type=argument_type).changed == ("output_dir", "use_cpu")


@pytest.mark.parametrize(
    "flags",
    [
        ("--label_smoothing_factor", 0.1),
        ("--neftune_noise_alpha", 5),
        ("--torch_compile",),
        ("--torch_compile_mode", "default"),
        ("--include_for_metrics", "loss"),
        ("--bf16_full_eval",),
        ("--fp16_full_eval",),
        ("--length_column_name", "seconds"),
        ("--remove_unused_columns",),
        ("--auto_find_batch_size",),
        ("--average_tokens_across_devices", "false"),
        ("--do_eval",),
        ("--label_names", "text"),
        ("--use_liger_kernel",),
        ("--hub_always_push",),
        ("--accelerator_config", '{"split_batches": true}'),
    ],
)
def test_an_argument_that_nothing_honours_is_refused_by_name(flags):
    name = flags[0].removeprefix("--")
    with pytest.raises(ValueError, match=f"`{name}` must be left at the default: the training does not honour it"):
        parse(*flags)


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (("--eval_steps", 5), "--eval_strategy steps"),
        (("--eval_steps", 5, "--eval_strategy", "epoch"), "--eval_strategy steps"),
        (("--eval_delay", 5), "--eval_strategy steps or epoch"),
        (("--save_steps", 5, "--save_strategy", "epoch"), "--save_strategy steps"),
        (("--metric_for_best_model", "loss"), "--load_best_model_at_end"),
        (("--greater_is_better", "true"), "--load_best_model_at_end"),
        (("--initial_lr", 1e-6), "--tri_stage"),
        (("--lr_scheduler_type", "cosine", "--tri_stage"), "--tri_stage false"),
        (("--hub_model_id", "me/x"), "--push_to_hub"),
        (("--dataloader_persistent_workers",), "--dataloader_num_workers"),
    ],
)
def test_an_argument_that_does_nothing_alone_is_refused(flags, needed):
    with pytest.raises(ValueError, match=f"`{flags[0].removeprefix('--')}` needs `{needed}.*`, got"):
        parse(*flags)


def test_a_best_model_that_might_not_be_saved_is_refused():
    flags = ("--eval_strategy", "steps", "--eval_steps", 5, "--save_strategy", "steps", "--load_best_model_at_end")
    with pytest.raises(ValueError, match="`save_steps` must be `eval_steps` with `load_best_model_at_end`, got 500"):
        parse(*flags)


def test_models_are_compared_by_what_a_recipe_measures():
    best = ("--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end")
    with pytest.raises(ValueError, match="`metric_for_best_model` must be loss, got 'wer'"):
        parse(*best, "--metric_for_best_model", "wer", argument_type=DomainTrainingArguments)
    arguments = parse(*best, "--metric_for_best_model", "eval_wer", argument_type=PersonalTrainingArguments)
    assert (arguments.best_metric, arguments.greater_is_better) == ("wer", False)


def test_fp16_is_refused_where_it_does_nothing(monkeypatch):
    message = "`fp16` must be off on a CPU, where it does nothing, got on"
    with pytest.raises(ValueError, match=message):
        parse("--fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=message):
        parse()
