"""Audio encoders of audio language models: made, loaded alone, run to a clip's end, their frames counted exactly.

    family                 class                               input_features         a frame
    Whisper                WhisperEncoder, no decoder          (batch, mel, frames)   20 ms
    HuBERT, Wav2Vec2,      the library's own                   (batch, samples)       20 ms
    WavLM
    any other `AutoModel`  that keeps the contract below       as it takes them       as it says

The contract: `main_input_name` is the argument that takes `(batch, frames, ...)` or `(batch, samples)`, beside
`attention_mask` `(batch, frames)`; `_get_feat_extract_output_lengths(lengths)` says how many frames come out, and
`last_hidden_state` (and `hidden_states` on request) has them; `config.hidden_size` is their width.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

# What stands in a Whisper checkpoint before the names of its encoder.
WHISPER_KEYS = {r"^(model\.)?encoder\.": ""}
# Lengths at which a formula of an encoder's frames is checked: all up to here, and a few beyond.
CHECKED_LENGTHS = 4_000


def make_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Returns an encoder with random weights, or on the meta device with none."""
    return WhisperEncoder(config) if config.model_type == "whisper" else AutoModel.from_config(config)


def read_config(model_name_or_path: str, **kwargs) -> PreTrainedConfig:
    """Returns the configuration of a model; of `kwargs` it takes those that say where it is. It runs no code."""
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
    options = {"trust_remote_code": False} | {name: kwargs[name] for name in names if name in kwargs}
    return AutoConfig.from_pretrained(model_name_or_path, **options)


def load_encoder(model_name_or_path: str, **kwargs) -> PreTrainedModel:
    """
    Returns a pretrained encoder alone; of a Whisper checkpoint the decoder is not read.

    Args:
        model_name_or_path: Folder or Hub name.
        kwargs: As in `from_pretrained`.

    Raises:
        ValueError: The checkpoint lacks weights of the encoder, or the encoder does not say how long its output is.
    """
    config = read_config(model_name_or_path, **kwargs)
    if config.model_type == "whisper":
        with quiet_load_report():
            encoder, report = WhisperEncoder.from_pretrained(
                model_name_or_path, config=config, key_mapping=WHISPER_KEYS, output_loading_info=True, **kwargs
            )
    else:
        with quiet_load_report():
            encoder, report = AutoModel.from_pretrained(
                model_name_or_path, output_loading_info=True, **({"trust_remote_code": False} | kwargs)
            )
    # A checkpoint for recognition has no vector for masked frames; nothing reads it in evaluation.
    missing = sorted(name for name in report["missing_keys"] if "masked_spec_embed" not in name)
    if missing:
        raise ValueError(
            f"`encoder` must name a checkpoint with all weights of its encoder, got {model_name_or_path} without "
            f"{missing[:3]}."
        )
    count_frames(encoder, torch.tensor([CHECKED_LENGTHS]))
    return encoder


@contextmanager
def quiet_load_report() -> Iterator[None]:
    """transformers warns of every tensor that is left on the disk; that is what is wanted here."""
    report = logging.getLogger("transformers")
    level = report.level
    report.setLevel(logging.ERROR)
    try:
        yield
    finally:
        report.setLevel(level)


def count_frames(encoder: PreTrainedModel, input_lengths: torch.Tensor) -> torch.Tensor:
    """
    Returns how many frames the encoder makes of inputs of these lengths `(batch,)`; 0 of those that are too short.

    Args:
        encoder: Any encoder that keeps the contract.
        input_lengths: Samples, or frames of features.

    Raises:
        ValueError: The encoder does not say how long its output is.
    """
    count = getattr(encoder, "_get_feat_extract_output_lengths", None)
    if count is None:
        raise ValueError(
            "`encoder` must say how many frames it makes (`_get_feat_extract_output_lengths`), got a "
            f"{type(encoder).__name__}, which does not. Choose a Whisper, HuBERT, Wav2Vec2 or WavLM, or add it."
        )
    lengths = count(input_lengths)
    lengths = lengths[-1] if isinstance(lengths, tuple) else lengths  # some say it of their convolutions as well
    return torch.as_tensor(lengths, device=input_lengths.device).long().clamp(min=0)


def find_frame_formula(encoder: PreTrainedModel) -> tuple[int, int]:
    """
    Returns `(offset, stride)` with which `frames = max(0, (inputs + offset) // stride)` for every length of input.

    Convolutions one after the other come to such a formula whatever their kernels, strides and paddings: a processor
    counts with it where there is no encoder. Whisper has (1, 2), Wav2Vec2 (-80, 320).

    Raises:
        ValueError: The encoder does not say how long its output is, or there is no such formula.
    """
    lengths = torch.cat([torch.arange(1, CHECKED_LENGTHS), torch.arange(1, 50) * 16_001])
    frames = count_frames(encoder, lengths)
    first, second = (int(lengths[(frames >= number).nonzero()[0]]) for number in (1, 2))
    offset, stride = second - 2 * first, second - first
    if not torch.equal(frames, ((lengths + offset) // stride).clamp(min=0)):
        raise ValueError(
            "`encoder` must make a frame of every so many inputs, got a "
            f"{type(encoder).__name__} whose output lengths are not `(inputs + offset) // stride`."
        )
    return offset, stride


def find_max_inputs(encoder: PreTrainedModel) -> int | None:
    """Returns how many inputs (frames of features) the encoder's positions last for; None if for any number."""
    positions = getattr(encoder.config, "max_source_positions", None)
    if positions is None:
        return None
    offset, stride = find_frame_formula(encoder)
    return (positions + 1) * stride - 1 - offset


def run_encoder(
    encoder: PreTrainedModel,
    input_features: torch.Tensor,
    input_features_mask: torch.Tensor | None = None,
    *,
    min_inputs: int = 0,
    output_hidden_states: bool = False,
) -> tuple[BaseModelOutput, torch.Tensor]:
    """
    Runs an encoder on clips of any lengths: each comes out as if it had been alone, and is heard to its end.

    Whisper runs on as many frames as there are, up to its positions, and not on 30 s. Encoders with group
    normalisation over time (HuBERT and Wav2Vec2 base) would hear how much their neighbours are padded: clips of one
    length run together there.

    Args:
        encoder: Whisper's, or any that keeps the contract.
        input_features: `(batch, mel, frames)` for Whisper, `(batch, samples)` for waves, else as the encoder takes it.
        input_features_mask: 1 for an input, 0 for padding on the right, `(batch, frames or samples)`.
        min_inputs: Let Whisper hear silence behind a clip up to so many frames of features; its states are left out.
            3000 is what it was trained with: slower, and states as the stock class gives them, but for the two frames
            behind the clip in which its end fades.
        output_hidden_states: Also return all layers' states.

    Returns:
        The encoder's output, `last_hidden_state` `(batch, frames, hidden)` and with `hidden_states` one such tensor a
        layer and one for what goes into the first; and how many of its frames are no padding `(batch,)`.

    Raises:
        ValueError: A clip is longer than the encoder's positions, or too short for one frame.
    """
    time = 2 if isinstance(encoder, WhisperEncoder) else 1
    if input_features_mask is None:
        input_features_mask = input_features.new_ones(len(input_features), input_features.shape[time]).long()
    lengths = input_features_mask.sum(-1).long()
    frames = count_frames(encoder, lengths)
    _check_lengths(encoder, lengths, frames)
    # Padding that all clips have is not computed.
    input_features = input_features.narrow(time, 0, int(lengths.max())).to(encoder.dtype)
    input_features_mask = input_features_mask[:, : int(lengths.max())]
    if isinstance(encoder, WhisperEncoder):
        if min_inputs:
            input_features = add_silence(input_features, lengths, min_inputs)
            lengths = lengths.clamp(min=min_inputs)
            heard = count_frames(encoder, lengths)
            output = _run_whisper(encoder, input_features, lengths, heard, output_hidden_states=output_hidden_states)
            return _cut(output, int(frames.max())), frames
        output = _run_whisper(encoder, input_features, lengths, frames, output_hidden_states=output_hidden_states)
    elif getattr(encoder.config, "feat_extract_norm", None) == "group":
        output = _run_by_length(encoder, input_features, lengths, output_hidden_states=output_hidden_states)
    else:
        inputs = {encoder.main_input_name: input_features, "attention_mask": input_features_mask}
        output = encoder(**inputs, output_hidden_states=output_hidden_states, return_dict=True)
    return output, frames


def _check_lengths(encoder: PreTrainedModel, lengths: torch.Tensor, frames: torch.Tensor) -> None:
    positions = getattr(encoder.config, "max_source_positions", None)
    if positions is not None and int(frames.max()) > positions:
        raise ValueError(
            f"`input_features` must have at most {find_max_inputs(encoder)} frames a clip, got {int(lengths.max())}: "
            "the encoder has no more positions. The processor cuts longer clips into windows."
        )
    if int(frames.min()) < 1:
        raise ValueError(
            f"`input_features` must be long enough for one frame of the encoder, got a clip of {int(lengths.min())}. "
            "Leave such clips out."
        )


def add_silence(input_features: torch.Tensor, lengths: torch.Tensor, min_inputs: int) -> torch.Tensor:
    """
    Returns log-mel features `(batch, mel, frames)` of at least `min_inputs` frames, silence behind each clip.

    Whisper's features of silence lie 8 below the loudest bin of the clip in log10, 2 after its scaling, and not below
    those of no energy at all: (log10(1e-10) + 4) / 4.
    """
    extra = max(0, min_inputs - input_features.shape[-1])
    is_frame = torch.arange(input_features.shape[-1], device=lengths.device) < lengths.unsqueeze(1)
    loudest = input_features.masked_fill(~is_frame.unsqueeze(1), -torch.inf).amax((1, 2), keepdim=True)
    silence = (loudest - 2).clamp(min=-1.5)
    padded = torch.where(is_frame.unsqueeze(1), input_features, silence)
    return torch.cat([padded, silence.expand(-1, padded.shape[1], extra)], dim=-1)


def _cut(output: BaseModelOutput, num_frames: int) -> BaseModelOutput:
    states = None if output.hidden_states is None else tuple(kept[:, :num_frames] for kept in output.hidden_states)
    return BaseModelOutput(last_hidden_state=output.last_hidden_state[:, :num_frames], hidden_states=states)


def _run_whisper(
    encoder: WhisperEncoder,
    input_features: torch.Tensor,
    lengths: torch.Tensor,
    frames: torch.Tensor,
    *,
    output_hidden_states: bool,
) -> BaseModelOutput:
    """As `WhisperEncoder.forward`, which takes nothing but 30 s; beyond a clip's end there is nothing."""
    keep = (torch.arange(input_features.shape[-1], device=lengths.device) < lengths.unsqueeze(1)).unsqueeze(1)
    states = nn.functional.gelu(encoder.conv1(input_features * keep)) * keep  # as the convolutions' own padding
    states = nn.functional.gelu(encoder.conv2(states)).transpose(1, 2)  # (batch, frames, hidden)
    states = states + encoder.embed_positions.weight[: states.shape[1]].to(states.dtype)
    states = nn.functional.dropout(states, p=encoder.dropout, training=encoder.training)
    mask = None
    if int(frames.min()) < states.shape[1]:
        is_frame = torch.arange(states.shape[1], device=frames.device) < frames.unsqueeze(1)
        mask = create_bidirectional_mask(config=encoder.config, inputs_embeds=states, attention_mask=is_frame)
    kept = [states]
    for layer in encoder.layers:
        is_dropped = encoder.training and encoder.layerdrop > 0 and torch.rand([]) < encoder.layerdrop
        states = states if is_dropped else layer(states, mask)
        kept.append(states)
    kept[-1] = encoder.layer_norm(states)
    return BaseModelOutput(last_hidden_state=kept[-1], hidden_states=tuple(kept) if output_hidden_states else None)


def _run_by_length(
    encoder: PreTrainedModel, input_values: torch.Tensor, lengths: torch.Tensor, *, output_hidden_states: bool
) -> BaseModelOutput:
    """Runs clips of one length together and puts their states back in order, zeros beyond a clip's end."""
    rows, parts = [], []
    for length in lengths.unique():
        rows.append((lengths == length).nonzero().flatten())
        inputs = {encoder.main_input_name: input_values[rows[-1], : int(length)]}
        output = encoder(**inputs, output_hidden_states=output_hidden_states, return_dict=True)
        parts.append([output.last_hidden_state, *(output.hidden_states or ())])
    order = torch.cat(rows).argsort()
    longest = max(part[0].shape[1] for part in parts)
    states = [
        torch.cat([nn.functional.pad(piece, (0, 0, 0, longest - piece.shape[1])) for piece in pieces])[order]
        for pieces in zip(*parts, strict=True)
    ]
    return BaseModelOutput(
        last_hidden_state=states[0], hidden_states=tuple(states[1:]) if output_hidden_states else None
    )
