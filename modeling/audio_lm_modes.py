"""What trains in an audio language model: a mode for each side and for the projector, and one learning rate a part."""

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .adapter_layer import is_adapter_parameter
from .audio_lm_sides import ENCODER, LANGUAGE_MODEL, find_blocks, is_quantized, set_side_mode
from .fingerprint import fingerprint_base

PROJECTOR = "projector"
PARTS = (PROJECTOR, ENCODER, LANGUAGE_MODEL)
PROJECTOR_MODES = ("trainable", "frozen")
# Where each part is in the model; the head is the language model's.
PREFIXES = {
    PROJECTOR: ("model.multi_modal_projector.",),
    ENCODER: ("model.audio_tower.",),
    LANGUAGE_MODEL: ("model.language_model.", "lm_head."),
}


def find_side(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """
    Returns a side of an audio language model as a model of its own, of the very same weights and adapters.

    Args:
        model: An audio language model.
        name: `"encoder"`, or `"language_model"` for a causal language model with its head.
    """
    if name == ENCODER:
        return model.model.audio_tower
    return view_language_model(model)


def view_language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the causal language model of an audio language model: another module around the same parts."""
    body = model.model.language_model
    with torch.device("meta"):
        view = AutoModelForCausalLM.from_config(body.config)
    setattr(view, view.base_model_prefix, body)
    view.set_output_embeddings(model.lm_head)
    for entry in ("peft_config", "_hf_peft_config_loaded", "name_or_path"):
        if hasattr(body, entry):
            setattr(view, entry, getattr(body, entry))
    view.is_loaded_in_4bit = is_quantized(body)  # PEFT asks
    view.generation_config = model.generation_config
    return view.train(body.training)


def name_part(parameter_name: str) -> str:
    """Returns the part that a parameter of an audio language model belongs to."""
    return next(part for part, prefixes in PREFIXES.items() if parameter_name.startswith(prefixes))


def set_modes(
    model: PreTrainedModel,
    *,
    encoder_mode: str = "frozen",
    llm_mode: str = "frozen",
    projector_mode: str = "trainable",
    encoder_lora: LoraConfig | None = None,
    llm_lora: LoraConfig | None = None,
    llm_last_layers: int = 0,
) -> None:
    """
    Makes exactly what the modes say trainable; a model may go through several, stage by stage.

    Args:
        model: An audio language model.
        encoder_mode: frozen, full, lora or qlora; qlora if and only if the encoder is loaded in 4 bits.
        llm_mode: Likewise for the language model.
        projector_mode: trainable or frozen.
        encoder_lora: Settings of a LoRA that is to be added to the encoder. Default: those of its family.
        llm_lora: Likewise for the language model.
        llm_last_layers: How many of the language model's last layers train whole beside that, with what follows them:
            the last norm and the head (and, where they are tied, the embeddings).

    Raises:
        ValueError: There is no such mode, it does not fit the precision of the weights, or there are not so many
            layers.
    """
    if projector_mode not in PROJECTOR_MODES:
        raise ValueError(f"`projector_mode` must be one of {', '.join(PROJECTOR_MODES)}, got {projector_mode!r}.")
    changed = [ENCODER] if encoder_mode == "full" else []
    changed += [LANGUAGE_MODEL] if llm_mode == "full" or llm_last_layers else []
    _remember_bases(model, changed)
    set_side_mode(find_side(model, ENCODER), encoder_mode, ENCODER, lora=encoder_lora)
    language_model = find_side(model, LANGUAGE_MODEL)
    set_side_mode(language_model, llm_mode, LANGUAGE_MODEL, lora=llm_lora)
    share_adapters(model, LANGUAGE_MODEL, language_model)
    if llm_last_layers:
        _train_last_layers(model, llm_last_layers)
    model.model.multi_modal_projector.requires_grad_(projector_mode == "trainable")
    model.trained_names = getattr(model, "trained_names", set()) | {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_adapter_parameter(name)
    }
    model.train(model.training)


def share_adapters(model: PreTrainedModel, name: str, side: PreTrainedModel) -> None:
    """Lets the body of the language model know of the adapters that were added through its causal language model."""
    if name == LANGUAGE_MODEL:
        for entry in ("peft_config", "_hf_peft_config_loaded"):
            if hasattr(side, entry):
                setattr(model.model.language_model, entry, getattr(side, entry))


def _remember_bases(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Notes what the bases of sides are, while they still are."""
    for name in names:
        base = getattr(model, "base_sides", {}).get(name)
        if base is not None and base.fingerprint is None:
            base.fingerprint = fingerprint_base(find_side(model, name))


def _train_last_layers(model: PreTrainedModel, num_layers: int) -> None:
    body = model.model.language_model
    blocks = find_blocks(body)
    if not 1 <= num_layers <= len(blocks):
        raise ValueError(f"`llm_last_layers` must be 1 to {len(blocks)}, got {num_layers}.")
    if is_quantized(body):
        raise ValueError(
            "`llm_last_layers` must be 0 with weights in 4 bits, which do not train. Choose lora or full."
        )
    stack = next(name for name, module in body.named_modules() if module is blocks)
    last = tuple(f"{stack}.{index}." for index in range(len(blocks) - num_layers, len(blocks)))
    for key, parameter in body.named_parameters():
        is_last_norm = "norm" in key and not key.startswith(f"{stack}.")
        if (key.startswith(last) or is_last_norm) and not is_adapter_parameter(key):
            parameter.requires_grad_(True)
    model.lm_head.requires_grad_(True)


def list_trainable(model: nn.Module) -> dict[str, int]:
    """Returns how many numbers train in each part of an audio language model."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[name_part(name)] += parameter.numel()
    return counts


def group_parameters(
    model: nn.Module, learning_rates: Mapping[str, float], *, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """
    Returns an optimizer's groups of what trains: a part's matrices, and its biases and norms without decay.

    Args:
        model: An audio language model.
        learning_rates: By part: `projector`, `encoder`, `language_model`.
        weight_decay: Of matrices.

    Raises:
        ValueError: A part that trains has no learning rate, or nothing trains.

    Example:

    ```python
    rates = {"projector": 1e-3, "encoder": 1e-5, "language_model": 1e-4}
    optimizer = torch.optim.AdamW(group_parameters(model, rates))
    ```
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name_part(name), parameter.dim() > 1), []).append(parameter)
    if not groups:
        raise ValueError("The modes must let something train, got none. Choose another mode for a part.")
    if missing := sorted({part for part, _ in groups} - learning_rates.keys()):
        raise ValueError(f"`learning_rates` must have one for each part that trains, got none for {missing}.")
    return [
        {"name": part, "params": parameters, "lr": learning_rates[part], "weight_decay": weight_decay * is_matrix}
        for (part, is_matrix), parameters in groups.items()
    ]


def set_training_mode(model: PreTrainedModel, *, gradient_checkpointing: bool = False) -> None:
    """
    Prepares a model for training: frozen sides stay still, 4-bit weights keep their gradients' way.

    Args:
        model: An audio language model whose modes are set.
        gradient_checkpointing: Compute activations again in the backward pass, to save their memory.
    """
    if gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
    model.train()


def set_inference_mode(model: PreTrainedModel) -> None:
    """Prepares a model for answers: no dropout anywhere, no checkpoints, keys and values cached."""
    model.activation_checkpointing_disable()
    model.eval()
