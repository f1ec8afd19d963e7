"""Rows of a batch in `generate`, which repeats them for beams and, in Whisper, drops those that are done."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import nn
from transformers import GenerationMixin

from .adapter_calls import SHARED, Call
from .clip_owners import read_clip_owners


def follow_generate(model: nn.Module) -> None:
    """Lets `model.generate`, once and for all, tell the adapters of each row how it repeats the rows."""
    if isinstance(model, GenerationMixin) and "generate" not in vars(model):
        model.generate = partial(_generate, model)


def _generate(model: nn.Module, *args, **kwargs) -> object:
    """As the model's own."""
    generate, call = partial(type(model).generate, model), SHARED.find(model)
    if call is None or call.is_off:
        return generate(*args, **kwargs)
    beams, sequences = (
        _read_setting(model, args, kwargs, name) or 1 for name in ("num_beams", "num_return_sequences")
    )
    _check_clips(model, kwargs, num_repeats=max(beams, sequences))
    may_lose_rows = hasattr(model, "generate_with_fallback") and _check_whisper(model, call, args, kwargs)
    changes = {"repeats": frozenset({1, beams, sequences, beams * sequences}), "may_lose_rows": may_lose_rows}
    of_context = SHARED.of_context.get()
    calls = {module: replace(other, **changes) for module, other in of_context.items() if other.names is call.names}
    with SHARED.opened(calls):
        return generate(*args, **kwargs)


def _read_setting(model: nn.Module, args: tuple, kwargs: Mapping[str, object], name: str) -> object:
    """Returns a setting as `generate` finds it: given, in the configuration that is given, or in the model's own."""
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    values = (kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None))
    return next((value for value in values if value is not None), None)


def _check_clips(model: nn.Module, kwargs: Mapping[str, object], *, num_repeats: int) -> None:
    owners = read_clip_owners(model, kwargs)
    if num_repeats == 1 or owners is None or owners.row_of_clip == list(range(owners.num_rows)):
        return
    raise ValueError(
        f"`num_beams` and `num_return_sequences` must be 1 for prompts of several clips, got {num_repeats}: "
        "transformers repeats each clip in its place and mixes up the clips of a prompt. Leave them out."
    )


def _check_whisper(model: nn.Module, call: Call, args: tuple, kwargs: Mapping[str, object]) -> bool:
    """Returns whether rows may be dropped, which is right if all have the same adapter."""
    if len(set(call.names)) == 1:
        return True
    features = kwargs.get("input_features", args[0] if args else None)
    limit = 2 * model.config.max_source_positions  # the encoder halves the frames
    temperature = kwargs.get("temperature")
    reasons = (
        {
            f"{features.shape[-1]} frames, above {limit}": features is not None and features.shape[-1] > limit,
            "timestamps": any(
                _read_setting(model, args, kwargs, f"return_{name}timestamps") for name in ("", "token_")
            ),
            "several temperatures": isinstance(temperature, (list, tuple)) and len(temperature) > 1,
        }
        if features is not None
        else {}
    )
    if reason := next((reason for reason, is_given in reasons.items() if is_given), None):
        raise ValueError(
            f"`adapter_names` must be the same for all rows where Whisper drops rows that are done, got "
            f"{sorted(set(call.names))} with {reason}. Cut recordings into pieces of at most {limit} frames, without "
            "timestamps and with one `temperature`, or call `generate` for each adapter."
        )
    return False
