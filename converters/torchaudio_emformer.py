"""torchaudio's Emformer and the transcriber of its RNN-T, read without torchaudio."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from converters.pickles import check_legacy_tensors, load_legacy_checkpoint
from modeling import EmformerConfig, EmformerModel

# What no shape tells.
UNSEEN_SETTINGS = (
    "num_attention_heads",
    "segment_length",
    "left_context_length",
    "right_context_length",
    "max_memory_size",
    "hidden_act",
    "memory_activation",
)
# `emformer_rnnt_base`: the sizes that show it, and the settings that follow. Contexts count frames after the stacking.
RNNT_BASE_SIZES = {"num_mel_bins": 80, "hidden_size": 512, "num_hidden_layers": 20, "intermediate_size": 2048}
RNNT_BASE_SETTINGS = {
    "num_attention_heads": 8,
    "segment_length": 4,
    "left_context_length": 30,
    "right_context_length": 1,
    "max_memory_size": 0,
    "hidden_act": "gelu",
    "memory_activation": "tanh",
    "dropout": 0.1,
}
TRANSCRIBER = "transcriber."
# The rest of an RNN-T, which is no encoder.
OTHER_PARTS = ("predictor.", "joiner.")
# Start of our names -> of an RNN-T's transcriber.
RNNT_NAMES = {
    "layers.": "transformer.emformer_layers.",
    "subsampler.projection.": "input_linear.",
    "projection.0.": "output_linear.",
    "projection.1.": "layer_norm.",
}
EMFORMER_NAMES = {"layers.": "emformer_layers."}


def to_torchaudio_name(name: str, *, is_rnnt: bool) -> str:
    """
    Returns torchaudio's name of a weight of [`EmformerModel`].

    Example:
        >>> to_torchaudio_name("layers.0.pos_ff.1.weight", is_rnnt=True)
        'transformer.emformer_layers.0.pos_ff.1.weight'
        >>> to_torchaudio_name("layers.0.attention.out_proj.bias", is_rnnt=False)
        'emformer_layers.0.attention.out_proj.bias'
    """
    names = RNNT_NAMES if is_rnnt else EMFORMER_NAMES
    ours = next(ours for ours in names if name.startswith(ours))
    return names[ours] + name.removeprefix(ours)


def infer_emformer_config(state: Mapping[str, torch.Tensor], *, path: str | Path, **settings) -> EmformerConfig:
    """
    Returns the configuration that the shapes of an encoder's weights and `settings` tell.

    Args:
        state: torchaudio's tensors by name, those of an RNN-T without the prefix of its transcriber.
        path: Where they come from, for messages.
        settings: What no shape tells, see `UNSEEN_SETTINGS`. Those of `emformer_rnnt_base` are known.

    Raises:
        ValueError: A weight that tells a size is missing, or a setting that no shape tells.
    """
    is_rnnt = "input_linear.weight" in state
    start = "transformer.emformer_layers." if is_rnnt else "emformer_layers."
    first = f"{start}0.pos_ff.1.weight"
    if first not in state or state[first].dim() != 2:
        raise ValueError(
            f"`checkpoint` must be torchaudio's Emformer or RNN-T, got {path} without {first}. It was made for "
            "another architecture."
        )
    intermediate_size, hidden_size = state[first].shape
    layers = {match[1] for name in state if (match := re.match(rf"{re.escape(start)}(\d+)\.", name))}
    sizes = {"num_mel_bins": hidden_size, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
    sizes |= {"num_hidden_layers": len(layers), "subsampling": "none", "subsampling_factor": 1}
    if is_rnnt:
        width, num_mel_bins = state["input_linear.weight"].shape
        sizes |= {"num_mel_bins": num_mel_bins, "subsampling": "stack", "subsampling_factor": hidden_size // width}
        sizes |= {"output_size": len(state["output_linear.weight"]) if "output_linear.weight" in state else None}
    if is_rnnt and all(sizes[name] == value for name, value in RNNT_BASE_SIZES.items()):
        settings = RNNT_BASE_SETTINGS | settings
    missing = [name for name in UNSEEN_SETTINGS if name not in settings]
    if missing:
        raise ValueError(
            f"`{missing[0]}` must be given: no shape in {path} tells it. Of {', '.join(missing)}, take what the model "
            "was made with, contexts in frames after the time reduction."
        )
    return EmformerConfig(**sizes, **settings)


def convert_emformer_checkpoint(path: str | Path, **settings) -> EmformerModel:
    """
    Returns torchaudio's encoder as ours, in evaluation mode.

    Of an RNN-T, this is the transcriber: the predictor and the joiner have no place in an encoder.

    Args:
        path: A whole model or its `state_dict`, saved by torch.
        settings: What no shape tells, as in [`infer_emformer_config`].

    Raises:
        ValueError: The file is missing, damaged or unsafe, its weights are another architecture's, or a setting is
            missing; all are named.
    """
    state = load_legacy_checkpoint(path)
    if any(name.startswith(TRANSCRIBER) for name in state):
        state = {name: value for name, value in state.items() if not name.startswith(OTHER_PARTS)}
        state = {name.removeprefix(TRANSCRIBER): value for name, value in state.items()}
    config = infer_emformer_config(state, path=path, **settings)
    model = EmformerModel(config)
    is_rnnt = config.subsampling == "stack"
    names = {name: to_torchaudio_name(name, is_rnnt=is_rnnt) for name in model.state_dict()}
    shapes = {names[name]: tensor.shape for name, tensor in model.state_dict().items()}
    state = {name: tensor.float() for name, tensor in state.items()}
    check_legacy_tensors("checkpoint", path, tensors=state, shapes=shapes, layout="torchaudio's")
    model.load_state_dict({name: state[theirs] for name, theirs in names.items()})
    return model.eval()
