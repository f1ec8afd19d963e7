"""What a training will take, counted on a model that has shapes and no memory, and on the headers of its corpus."""

import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import dropwhile

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from data.audio import MIX, audio_seconds
from data.corpora import load_corpus
from data.domain_clips import select_domain
from data.instructions import find_chats
from data.speakers import select_speakers
from modeling.adapters import SpeechAdapterLayer, is_adapter_parameter
from training.frozen_part import FrozenPrefix
from training.personal import ALL_SPEAKERS

# Tensors of a parameter's shape that an optimizer keeps: torch's of its dtype, with a step counter of 4 bytes.
TORCH_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1}
# bitsandbytes' of 32 bits, or of 8 with a scale of 32 bits for each 256 values; small tensors are always of 32.
BITSANDBYTES_STATES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "paged_adamw_32bit": 2}
BITSANDBYTES_STATES |= {"lion_8bit": 1, "lion_32bit": 1, "paged_lion_8bit": 1, "paged_lion_32bit": 1}
MIN_8BIT_VALUES, OPTIMIZER_BLOCK = 4096, 256
OPTIMIZERS = (*TORCH_STATES, "sgd", "adafactor", *BITSANDBYTES_STATES)
# Values of the code of a 4-bit type, and of the 8-bit code of scales that are quantised themselves.
CODE_4BIT, CODE_8BIT, SCALES_BLOCK = 16, 256, 256
# Clips whose headers are read, evenly from the corpus; the rest is taken to be like them.
MAX_MEASURED = 1000
# Of an utterance where the corpus is a stream.
DEFAULT_SECONDS, DEFAULT_CHARACTERS = 10.0, 150.0


def bytes_of(parameter: torch.Tensor) -> int:
    """
    Returns the bytes that `parameter` takes on the device that computes, whether or not it has memory now.

    A 4-bit weight of bitsandbytes takes half a byte a value and the scales of its blocks, which are of 32 bits or, if
    quantised themselves, of 8; an 8-bit one a byte a value and a scale of 32 bits a row.

    Source: "QLoRA" (arXiv 2305.14314), section 3; `bitsandbytes.functional.QuantState`.

    Example:

    ```python
    >>> import torch
    >>> from training.planning import bytes_of

    >>> bytes_of(torch.empty(2000, 128, device="meta")), bytes_of(torch.empty(8, dtype=torch.bfloat16))
    (1024000, 16)

    ```
    """
    kind = type(parameter).__name__  # by name: bitsandbytes takes seconds to import
    if kind == "Params4bit":
        return _bytes_of_4bit(parameter)
    if kind == "Int8Params":
        return parameter.numel() + 4 * parameter.shape[0]
    return parameter.numel() * parameter.element_size()


def _bytes_of_4bit(parameter: torch.Tensor) -> int:
    state = parameter.quant_state
    num_values = parameter.numel() if state is None else math.prod(state.shape)
    num_scales = math.ceil(num_values / parameter.blocksize)
    code = 4 * CODE_4BIT
    if not parameter.compress_statistics:
        return math.ceil(num_values / 2) + 4 * num_scales + code
    # A byte a scale, their mean, the scales' own scales, and the code of those bytes.
    scales = num_scales + 4 + 4 * math.ceil(num_scales / SCALES_BLOCK) + 4 * CODE_8BIT
    return math.ceil(num_values / 2) + scales + code


def quantize_shapes(model: PreTrainedModel) -> None:
    """Gives a model without memory the linear maps that loading it in 4 bits would: NF4, with quantised scales."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoHfQuantizer.from_config(config).preprocess_model(model=model, device_map=None)


def count_optimizer_bytes(model: nn.Module, optim: str, optim_args: str | None = None) -> int:
    """
    Returns the bytes that the optimizer's states of the trainable parameters take.

    Args:
        model: The model, with or without memory.
        optim: As in `TrainingArguments`.
        optim_args: As in `TrainingArguments`.

    Raises:
        ValueError: `optim` is one whose states are not known here.
    """
    if optim not in OPTIMIZERS:
        raise ValueError(
            f"`optim` must be one of {', '.join(OPTIMIZERS)}, got {optim!r}, whose states are not known here. "
            "Plan with adamw_torch, which keeps as much as most."
        )
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_8bit = optim.endswith("8bit") and id(parameter) not in embeddings
            total += _bytes_of_state(parameter, optim, is_8bit=is_8bit, has_momentum="momentum" in (optim_args or ""))
    if optim in BITSANDBYTES_STATES and optim.endswith("8bit") and total:
        total += 4 * CODE_8BIT * BITSANDBYTES_STATES[optim]  # the codes, which all parameters share
    return total


def _bytes_of_state(parameter: torch.Tensor, optim: str, *, is_8bit: bool, has_momentum: bool) -> int:
    values, shape = parameter.numel(), parameter.shape
    if optim == "adafactor":  # factored into rows and columns, and the mean square, in fp32
        factors = math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1] if len(shape) > 1 else values
        return 4 * (factors + 1)
    if optim in BITSANDBYTES_STATES:
        is_8bit = is_8bit and values >= MIN_8BIT_VALUES
        of_state = values + 4 * math.ceil(values / OPTIMIZER_BLOCK) if is_8bit else 4 * values
        return BITSANDBYTES_STATES[optim] * of_state
    if optim == "sgd":
        return bytes_of(parameter) if has_momentum else 0
    return (TORCH_STATES[optim] + (optim == "rmsprop" and has_momentum)) * bytes_of(parameter) + 4


def count_groups(model: nn.Module) -> dict[str, dict[str, int]]:
    """
    Returns the parameters of each part of the model, the adapters last: `{"parameters", "trainable", "bytes"}`.

    Parts are the model's stages if it has such, or else its children, one level below a common `model`.
    """
    stages = model.stages() if hasattr(model, "stages") else {}
    groups: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        group = groups.setdefault(_find_group(name, stages), {"parameters": 0, "trainable": 0, "bytes": 0})
        state = getattr(parameter, "quant_state", None)
        values = parameter.numel() if state is None else math.prod(state.shape)
        group["parameters"] += values
        group["trainable"] += values if parameter.requires_grad else 0
        group["bytes"] += bytes_of(parameter)
    return dict(sorted(groups.items(), key=lambda item: item[0] == "adapters"))


def _find_group(name: str, stages: Mapping[str, nn.Module]) -> str:
    if is_adapter_parameter(name):
        return "adapters"
    for stage in stages:
        if name.startswith(f"{stage}."):
            return stage
    parts = [part for part in name.split(".") if part != "base_model"]
    while parts[0] == "model" and len(parts) > 2 and parts[1] == "model":
        parts = parts[1:]
    return ".".join(parts[: 2 if parts[0] == "model" else 1])


@dataclass(frozen=True)
class CorpusSize:
    """
    How much is trained on.

    Args:
        num_utterances: Utterances of an epoch.
        seconds: Seconds of speech of an epoch.
        longest_seconds: Seconds of the longest utterance.
        characters_per_second: Of the transcripts.
        num_speakers: Speakers who train one after the other or together, each on an adapter; else 1.
    """

    num_utterances: int
    seconds: float
    longest_seconds: float
    characters_per_second: float
    num_speakers: int = 1

    @property
    def typical_seconds(self) -> float:
        """Seconds of the mean utterance."""
        return self.seconds / self.num_utterances


def find_text_column(flags: Mapping[str, object]) -> str | None:
    """Returns the column of what a recipe's model writes; None of chats, whose recordings are not counted here."""
    if "response_column" not in flags:
        return "text"
    return None if find_chats(flags["dataset"]) else flags["response_column"] or "text"


def measure_corpus(flags: Mapping[str, object]) -> CorpusSize | None:
    """
    Returns the size of the corpus that a recipe's flags name, from headers; `None` for a stream and for chats.

    Args:
        flags: Name -> value, of all of the recipe's arguments.

    Raises:
        ValueError: The corpus, split, column or speaker does not exist.
    """
    if flags.get("streaming") or not flags.get("dataset"):
        return None
    source = {name: flags.get(name) for name in ("dataset_config", "text_column")}
    source["channel"] = flags.get("channel", MIX)
    text = find_text_column(flags)
    if text is None:
        return None
    corpus = load_corpus(flags["dataset"], split=flags["train_split"], required_columns=("audio", text), **source)
    domain = flags.get("source_domain") if flags.get("simulate_domain") else flags.get("target_domain")
    if domain and "domain" in corpus.column_names:
        corpus = select_domain(corpus, domain, flag="target_domain")
    speakers, num_speakers = flags.get("speaker_id"), 1
    if speakers and speakers != [ALL_SPEAKERS]:
        corpus, num_speakers = select_speakers(corpus, speakers), len(speakers)
    elif speakers:
        num_speakers = len(set(corpus["speaker_id"][:]))
    elif flags.get("exclude_speakers"):
        corpus = select_speakers(corpus, flags["exclude_speakers"], exclude=True)
    measured = corpus.select(range(0, len(corpus), math.ceil(len(corpus) / MAX_MEASURED)))
    seconds = [audio_seconds(row["audio"]) for row in measured.select_columns(["audio"])]
    mean = sum(seconds) / len(seconds)
    num_clips = len(corpus)
    if flags.get("max_train_seconds"):
        num_clips = max(1, min(num_clips, round(flags["max_train_seconds"] * num_speakers / mean)))
    joined = (flags.get("concatenate_min", 1) + flags.get("concatenate_max", 1)) / 2
    return CorpusSize(
        num_utterances=math.ceil(num_clips / joined),
        seconds=num_clips * mean,
        longest_seconds=max(seconds) * flags.get("concatenate_max", 1) / min(1.0, flags.get("min_speed", 1.0)),
        characters_per_second=sum(map(len, map(str, measured[text][:]))) / sum(seconds),
        num_speakers=num_speakers,
    )


def count_steps(
    corpus: CorpusSize | None, *, batch_size: int, num_epochs: float, max_steps: int, num_together: int = 1
) -> int | None:
    """
    Returns the steps of a training, as `Trainer` counts them; `None` if the corpus is unknown and `max_steps` too.

    Args:
        corpus: What is trained on.
        batch_size: Utterances of a step, of one speaker where each trains an adapter.
        num_epochs: Passes over the corpus.
        max_steps: Steps at most, in place of epochs, if above 0.
        num_together: Speakers whose adapters train in one step.

    Example:

    ```python
    >>> from training.planning import CorpusSize, count_steps

    >>> corpus = CorpusSize(100, seconds=250.0, longest_seconds=5.0, characters_per_second=15.0)
    >>> count_steps(corpus, batch_size=8, num_epochs=3, max_steps=-1)
    39

    ```
    """
    if corpus is None:
        return max_steps if max_steps > 0 else None
    num_utterances = math.ceil(corpus.num_utterances / corpus.num_speakers)
    steps = max_steps if max_steps > 0 else math.ceil(num_epochs * math.ceil(num_utterances / batch_size))
    return steps * math.ceil(corpus.num_speakers / num_together)


def count_frame_bytes(prefix: FrozenPrefix, dtype: torch.dtype) -> int:
    """Returns the bytes of states that the cache keeps of a frame behind `prefix`."""
    stage = prefix.model.stages()[prefix.name]
    base = stage.get_base_layer() if isinstance(stage, SpeechAdapterLayer) else stage
    widths = {"hidden_states": "in_features", "base_output": "out_features"}
    return sum(getattr(base, widths[name]) for name in prefix.states) * dtype.itemsize


def estimate_activations(model: PreTrainedModel, *, num_frames: int, is_packed: bool) -> int:
    """
    Returns about how many bytes a recogniser with stages keeps for the backward pass, without computing any.

    Args:
        model: On any device.
        num_frames: Frames of logits of the batch.
        is_packed: Whether it trains on packed frames, which keep no logits.
    """
    kept, num_stacked = 0.0 if is_packed else float(model.config.vocab_size), 0
    for leaf, in_width, out_width in _skip_frozen(model):
        if isinstance(leaf, nn.GRU):  # ReLU's output, that twice for the directions, and five states of each
            kept += 3 * in_width + 5 * out_width
            num_stacked += sum(weight.numel() for name, weight in leaf.named_parameters() if "weight" in name)
        elif isinstance(leaf, nn.Dropout):
            kept += 1.25 * in_width if leaf.p else 0.0  # what it was given, and a byte a value
        elif not isinstance(leaf, nn.ReLU):  # whose output is what the next leaf keeps as its input
            kept += in_width
    # The weights of both directions are stacked to be multiplied at once.
    return round(kept * num_frames + num_stacked) * model.dtype.itemsize


def estimate_widest(model: PreTrainedModel, *, num_frames: int, is_backward: bool = False) -> int:
    """
    Returns about the bytes of a recogniser with stages at its widest: the input and output of one leaf.

    Args:
        model: On any device.
        num_frames: Frames of logits of the batch.
        is_backward: Count only what a backward pass reaches.
    """
    leaves = _skip_frozen(model) if is_backward else walk_leaves(model)
    widest = max(in_width + out_width for _, in_width, out_width in leaves)
    return widest * num_frames * model.dtype.itemsize


def _skip_frozen(model: PreTrainedModel) -> Iterator[tuple[nn.Module, int, int]]:
    def is_frozen(item: tuple[nn.Module, int, int]) -> bool:
        return not any(parameter.requires_grad for parameter in item[0].parameters())

    return dropwhile(is_frozen, walk_leaves(model))


def walk_leaves(model: PreTrainedModel) -> Iterator[tuple[nn.Module, int, int]]:
    """
    Yields the leaves of a recogniser with stages as they run, with values in and out for each frame of logits.

    Of several adapters one stands for all: each frame goes through one.
    """
    num_mel_bins = model.config.num_mel_bins
    width = 2 * num_mel_bins  # two frames of features give one of logits
    for stage in model.stages().values():
        is_adapted = isinstance(stage, SpeechAdapterLayer)
        width = yield from _walk_part(stage.get_base_layer() if is_adapted else stage, width, num_mel_bins)
        if is_adapted:
            yield from _walk_part(next(iter(stage.speech_adapter_blocks.values())), width, num_mel_bins)


def _walk_part(part: nn.Module, width: int, bins: int) -> Generator[tuple[nn.Module, int, int], None, int]:
    frames = 2
    for leaf in (module for module in part.modules() if not any(True for _ in module.children())):
        if isinstance(leaf, nn.Conv2d):
            bins, frames = -(-bins // leaf.stride[0]), frames // leaf.stride[1]
            out_width = leaf.out_channels * bins * frames
        elif isinstance(leaf, nn.GRU):
            width, out_width = leaf.input_size, 2 * leaf.hidden_size
        elif isinstance(leaf, nn.Linear):
            width, out_width = leaf.in_features, leaf.out_features
        else:
            out_width = width
        yield leaf, width, out_width
        width = out_width
    return width
