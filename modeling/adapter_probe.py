"""Whether a loaded adapter acts: one small batch with it and without it."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .active_adapters import find_adapter_layers
from .base_weights import find_device

logger = logging.getLogger(__name__)

PROBE_FRAMES = 50  # half a second of features at 10 ms
PROBE_CLIP_FRAMES = 100  # a second, of which an audio language model's tower leaves a quarter
PROBE_SAMPLES = 8_000  # half a second at 16 kHz
PROBE_TOKENS = 8
NOISE_FACTOR = 10  # an effect is so many times larger than the difference of two runs without it
RESOLUTION = 16 * torch.finfo(torch.float32).eps  # and than this share of the largest output


def check_effect(
    model: PreTrainedModel, adapter_name: str, probe_inputs: Mapping[str, torch.Tensor] | None = None
) -> None:
    """
    Makes sure that the adapter acts: with it, one batch comes out clearly more different than twice without it.

    An adapter whose last layers are zero, as at the start of training, may leave everything as it is.

    Args:
        model: With the adapter loaded and active.
        adapter_name: The adapter.
        probe_inputs: Arguments of `forward`. Default: made from the configuration, or no check where none can be.

    Raises:
        ValueError: The outputs are the same and the last layers are not zero; or one of them is NaN.
    """
    last = _last_parameters(model, adapter_name)
    inputs = make_probe_inputs(model) if probe_inputs is None else dict(probe_inputs)
    if inputs is None or not any(parameter.any() for parameter in last):
        logger.debug("Adapter %s is not probed: no inputs can be made, or it is still zero.", adapter_name)
        return
    with _evaluating(model):
        try:
            with _without_adapter(model, adapter_name):
                off, again = _run(model, inputs), _run(model, inputs)
        except Exception as error:
            if probe_inputs is not None:
                raise
            logger.debug("Adapter %s is not probed: the base does not take the inputs (%s).", adapter_name, error)
            return
        if off.isnan().any():
            raise ValueError(
                f"`model` must say numbers, got NaN from the base without {adapter_name!r}. Its weights or its "
                "precision are wrong; no adapter can be tried on it."
            )
        on = _run(model, inputs)
        if on.isnan().any():
            raise ValueError(
                f"`adapter` must let the model say numbers, got NaN with {adapter_name!r}. Train it again."
            )
        if _differs(on, off, again):
            return
        with _made_loud(last):  # rounding may hide what has hardly been trained
            if _differs(_run(model, inputs), off, again):
                return
    raise ValueError(
        f"`adapter` must act on the model, got {adapter_name!r}, with and without which it says the same although its "
        "weights are not zero. Check `target_modules`, and that adapters are not switched off (`enable_adapters`)."
    )


def _run(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs)[0].float()


def _differs(on: torch.Tensor, off: torch.Tensor, again: torch.Tensor) -> bool:
    """Whether an output differs clearly more than two of the base do from each other, and than rounding makes it."""
    if on.shape != off.shape:
        return True
    is_finite = off.isfinite() & again.isfinite() & on.isfinite()
    if not torch.equal(is_finite, off.isfinite()):
        return True
    change, noise, scale = (
        values[is_finite].abs().max().item() if is_finite.any() else 0.0 for values in (on - off, again - off, off)
    )
    return change > NOISE_FACTOR * noise + RESOLUTION * scale


def make_probe_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Returns a random batch of one for `forward`, always the same, or `None` if the model's inputs are not known."""
    config, generator, device = model.config, torch.Generator().manual_seed(0), find_device(model)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, model.dtype)

    num_mel_bins = getattr(config, "num_mel_bins", None)
    if config.model_type == "whisper":
        features = normal(1, num_mel_bins, 2 * config.max_source_positions)  # the encoder halves the frames
        start = torch.tensor([[config.decoder_start_token_id]], device=device)
        return {"input_features": features, "decoder_input_ids": start}
    if config.model_type == "qwen2_audio":
        audio = config.audio_config
        features = normal(1, audio.num_mel_bins, 2 * audio.max_source_positions)
        return {"input_features": features, **_make_audio_prompt(model, features.shape[-1])}
    if config.sub_configs:  # several parts: a batch for one of them tells nothing about an adapter in another
        return None
    if model.main_input_name == "input_features" and num_mel_bins:
        return {"input_features": normal(1, PROBE_FRAMES, num_mel_bins)}
    if model.main_input_name == "input_values":
        return {"input_values": normal(1, PROBE_SAMPLES)}
    if model.main_input_name == "input_ids" and getattr(config, "vocab_size", None):
        return {"input_ids": torch.arange(PROBE_TOKENS, device=device).unsqueeze(0) % config.vocab_size}
    return None


def _make_audio_prompt(model: PreTrainedModel, num_frames: int) -> dict[str, torch.Tensor]:
    """A clip of a second and a placeholder for each of its frames in the text, as Qwen2-Audio's processor has them."""
    mask = (torch.arange(num_frames) < PROBE_CLIP_FRAMES).long().unsqueeze(0).to(find_device(model))
    counter = next(part for part in model.modules() if hasattr(part, "_get_feat_extract_output_lengths"))
    _, num_placeholders = counter._get_feat_extract_output_lengths(mask.sum(-1))
    tokens = torch.full((1, int(num_placeholders) + 1), model.config.audio_token_id, device=mask.device)
    tokens[0, -1] = 0  # any word
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "feature_attention_mask": mask}


def _last_parameters(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """Of every block of the adapter, the parameters of the layer that is zero at the start."""
    modules: list[nn.Module] = []
    for layer in find_adapter_layers(model):
        blocks = getattr(layer, "speech_adapter_blocks", {})
        modules += [blocks[adapter_name].last_layer] if adapter_name in blocks else []
        for kind in ("lora_B", "lora_embedding_B"):
            parts = getattr(layer, kind, {})
            modules += [parts[adapter_name]] if adapter_name in parts else []
    tensors = [list(module.parameters()) if isinstance(module, nn.Module) else [module] for module in modules]
    return [parameter for parameters in tensors for parameter in parameters]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was_training:
            module.training = training


@contextmanager
def _without_adapter(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Runs the model with its other active adapters inside."""
    layers = find_adapter_layers(model)
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        if isinstance(layer, BaseTunerLayer):
            layer._active_adapter = [name for name in layer.active_adapters if name != adapter_name]
        else:  # a module kept beside the base's own needs an active adapter
            layer._disable_adapters |= adapter_name in layer.active_adapters
    try:
        yield
    finally:
        for layer, (active, is_off) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, is_off


@contextmanager
def _made_loud(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.mul_(1 / parameter.abs().max().clamp(min=1e-30))
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
