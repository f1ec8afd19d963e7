"""Which of the Trainer's many arguments each training loop honours; the others are refused by name."""

from collections.abc import Iterable
from dataclasses import MISSING, fields

from transformers import TrainingArguments

_OPTIMIZATION = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    seed data_seed use_cpu ddp_backend ddp_timeout resume_from_checkpoint tri_stage initial_lr final_lr hold_steps
"""
_EVALUATION = """
    per_device_eval_batch_size eval_strategy eval_steps eval_delay load_best_model_at_end metric_for_best_model
    greater_is_better save_strategy save_steps early_stopping_patience
"""
_LOGGING = "logging_strategy logging_steps logging_first_step log_level disable_tqdm"
# Of a stack of speakers (`train_stack`), which writes no checkpoints and loads its data itself.
HONOURED_BY_STACK = frozenset(f"{_OPTIMIZATION} {_EVALUATION} {_LOGGING}".split())
# Of `AdapterTrainer`, where the stock Trainer or accelerate does the rest.
HONOURED_BY_TRAINER = HONOURED_BY_STACK | frozenset(
    """
    save_total_limit gradient_accumulation_steps train_sampling_strategy scale_lr full_determinism
    bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_empty_cache_steps
    logging_nan_inf_filter log_level_replica log_on_each_node report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id debug eval_on_start
    save_only_model resume_without_state save_on_each_node ignore_data_skip restore_callback_states_from_checkpoint
    push_to_hub hub_model_id hub_token hub_private_repo hub_revision
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    fsdp fsdp_config deepspeed local_rank
    """.split()
)
# An argument, the flags without which it does nothing, and whether they are there.
_NEEDED = (
    ("eval_steps", "--eval_strategy steps", lambda args: args.eval_strategy == "steps"),
    ("eval_delay", "--eval_strategy steps or epoch", lambda args: args.eval_strategy != "no"),
    ("save_steps", "--save_strategy steps", lambda args: args.save_strategy == "steps"),
    *(
        (
            name,
            "--load_best_model_at_end, --save_strategy best or --lr_scheduler_type reduce_lr_on_plateau",
            lambda args: args.load_best_model_at_end or args.save_strategy == "best" or follows_metric(args),
        )
        for name in ("metric_for_best_model", "greater_is_better")
    ),
    *((name, "--tri_stage", lambda args: args.tri_stage) for name in ("initial_lr", "final_lr", "hold_steps")),
    *(
        (name, "--tri_stage false", lambda args: not args.tri_stage)
        for name in ("lr_scheduler_type", "lr_scheduler_kwargs")
    ),
    *(
        (name, "--push_to_hub", lambda args: args.push_to_hub)
        for name in ("hub_model_id", "hub_token", "hub_private_repo", "hub_revision")
    ),
    ("dataloader_persistent_workers", "--dataloader_num_workers", lambda args: args.dataloader_num_workers > 0),
)


def follows_metric(arguments: TrainingArguments) -> bool:
    """Whether the learning rate follows the evaluations, as with `reduce_lr_on_plateau`."""
    return arguments.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")


def list_changed(arguments: TrainingArguments) -> tuple[str, ...]:
    """Returns the names of the arguments that are not at their defaults; ask before anything has filled them in."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(arguments)
    }
    return tuple(name for name, default in defaults.items() if _tidy(getattr(arguments, name)) != _tidy(default))


def _tidy(value: object) -> object:
    """Returns None for each way in which a dataclass or its parser says that nothing is asked for."""
    return None if value is False or value in ("", "no", []) else value


def check_honoured(changed: Iterable[str], honoured: frozenset[str], *, loop: str) -> None:
    """
    Makes sure that nothing is asked for that would not happen.

    Args:
        changed: Names of the arguments that were changed from their defaults, from [`list_changed`].
        honoured: Names of those that the loop honours.
        loop: What trains, for the message.

    Raises:
        ValueError: An argument was changed that the loop does not honour.
    """
    if ignored := [name for name in changed if name not in honoured]:
        names = ", ".join(f"`{name}`" for name in ignored)
        raise ValueError(f"{names} must be left at the default: {loop} does not honour it. Leave it out.")


def check_needed(arguments: TrainingArguments, changed: Iterable[str]) -> None:
    """
    Makes sure that no argument was changed that does nothing without another.

    Raises:
        ValueError: One was.
    """
    for name, needed, is_there in _NEEDED:
        if name in changed and not is_there(arguments):
            raise ValueError(
                f"`{name}` needs `{needed}`, got {getattr(arguments, name)!r} without. Alone it does nothing."
            )
