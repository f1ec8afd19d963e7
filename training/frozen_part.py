"""The frozen part of a model, before its first trainable parameter: it runs once, and its states are cached."""

import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from data.code_digest import digest_code
from data.collators import CTCCollator
from data.state_cache import CachedUtterances, resolve_cache_folder
from data.utterances import UtteranceDataset
from modeling.adapter_layer import SHARED, Call, is_adapter_parameter
from modeling.adapters import SpeechAdapterLayer
from modeling.fingerprint import WRAPPER_NAMES, digest_tensors, fingerprint_processor

logger = logging.getLogger(__name__)

# What a kind of adapter looks at, of the module that it wraps; other kinds look at its input and run it themselves.
STATES_OF_KIND = {
    "mlp": ("hidden_states", "base_output"),
    "replacement": ("hidden_states",),
    "bottleneck": ("base_output",),
}


@dataclass
class CacheArguments:
    """What is kept of the frozen part of the model, so that it runs once."""

    cache_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the cached states; bfloat16 halves the file."}
    )
    cache_variants: int = field(
        default=0,
        metadata={"help": "Augmented versions of every utterance that are cached; 0: new ones in every epoch."},
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the caches. Default: below the Hugging Face cache."}
    )

    def __post_init__(self):
        if self.cache_variants < 0:
            raise ValueError(f"`cache_variants` must be at least 0, got {self.cache_variants}.")


class FrozenPrefix:
    """
    The part of a model that stands before its first trainable parameter.

    Where a speech adapter is the first that trains, the part ends inside the module that the adapter wraps.

    Args:
        model: With `stages`, its modules in the order in which they run.
        name: Stage in which the first trainable parameter is.
        states: What is handed on: `hidden_states` (the stage's input), `base_output` (of the module that an adapter
            wraps there), or both.
    """

    def __init__(self, model: PreTrainedModel, name: str, states: tuple[str, ...]):
        self.model, self.name, self.states = model, name, states

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits over everything that the states depend on but the features."""
        tensors: dict[str, torch.Tensor] = {}
        adapters: set[str] = set()
        for name, stage in self.model.stages().items():
            if name != self.name:
                _collect_tensors(name, stage, tensors, adapters)
                continue
            if "base_output" in self.states:
                _collect_tensors(name, stage.get_base_layer(), tensors, adapters)
            break
        settings = {name: self.model.peft_config[name].to_dict() for name in adapters}
        what = [type(self.model).__name__, self.name, self.states, settings, digest_tensors(tensors)]
        content = json.dumps(what, sort_keys=True, default=_describe)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """
        Returns what the rest of the model takes over, computed in evaluation mode and inference mode.

        Args:
            batch: `input_features` `(batch, frames, mel)` and `attention_mask` `(batch, frames)`; the rest is ignored.

        Returns:
            The states by name, each `(batch, frames, width)`, and how many frames of each row are real `(batch,)`.
        """
        inputs = {
            name: batch[name].to(self.model.device) for name in ("input_features", "attention_mask") if name in batch
        }
        caught: dict[str, torch.Tensor] = {}
        with _evaluating(self.model), torch.inference_mode(), self._catching(caught):
            try:
                self.model(**inputs)
            except _EndOfPrefix:
                pass
        lengths = self.model.get_logits_lengths(inputs["input_features"], inputs.get("attention_mask"))
        return {name: caught[name] for name in self.states}, lengths

    @contextmanager
    def _catching(self, caught: dict[str, torch.Tensor]) -> Iterator[None]:
        thread = threading.get_ident()  # others may run the model meanwhile

        def catch_input(_module: nn.Module, args: tuple) -> None:
            if threading.get_ident() != thread:
                return
            caught["hidden_states"] = args[0]
            if "base_output" not in self.states:
                raise _EndOfPrefix

        def catch_output(_module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
            if threading.get_ident() == thread:
                caught["base_output"] = output
                raise _EndOfPrefix

        stage = self.model.stages()[self.name]
        with ExitStack() as stack:
            stack.callback(stage.register_forward_pre_hook(catch_input).remove)
            if "base_output" in self.states:
                stack.callback(stage.get_base_layer().register_forward_hook(catch_output).remove)
                # The base runs first, however many adapters are there.
                stack.enter_context(SHARED.opened({stage: Call(names=None)}))
            yield


class _EndOfPrefix(Exception):
    """Leaves a forward pass from within a hook."""


def find_frozen_prefix(model: nn.Module) -> FrozenPrefix | None:
    """
    Returns the part of `model` that stands before its first trainable parameter, if there is one.

    Args:
        model: With `stages` and `get_logits_lengths`, as [`DeepSpeech2ForCTC`]; or a `PeftModel` of such a one.

    Raises:
        ValueError: Nothing is trainable.

    Example:

    ```python
    >>> import torch
    >>> from modeling import DeepSpeech2Config, DeepSpeech2ForCTC, SpeechAdapterConfig
    >>> from training.frozen_part import find_frozen_prefix

    >>> model = DeepSpeech2ForCTC(DeepSpeech2Config(hidden_size=16, num_hidden_layers=1))
    >>> model.add_adapter(SpeechAdapterConfig(kind="replacement"), "alice")
    >>> prefix = find_frozen_prefix(model)
    >>> states, lengths = prefix({"input_features": torch.zeros(2, 101, 80)})
    >>> prefix.name, states["hidden_states"].shape, lengths.tolist()
    ('classifier', torch.Size([2, 51, 32]), [51, 51])

    ```
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    for index, (name, stage) in enumerate(model.stages().items()):
        if _is_trainable(stage):
            states = find_states(stage)
            return None if index == 0 and "hidden_states" in states else FrozenPrefix(model, name, states)
    raise ValueError("The model must have a trainable parameter, got none. Add an adapter or unfreeze the base.")


def find_states(stage: nn.Module) -> tuple[str, ...]:
    """Returns the names of what must be known in front of `stage` to run it without its frozen part."""
    if not isinstance(stage, SpeechAdapterLayer) or _is_trainable(stage.base_layer):
        return ("hidden_states",)
    blocks = [
        block
        for name, block in stage.speech_adapter_blocks.items()
        if _is_trainable(block) or name in stage.active_adapters
    ]
    if any(block.kind not in STATES_OF_KIND or getattr(block, "position", None) == "before" for block in blocks):
        return ("hidden_states",)
    needed = {name for block in blocks for name in STATES_OF_KIND[block.kind]}
    return tuple(name for name in STATES_OF_KIND["mlp"] if name in needed)


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _collect_tensors(prefix: str, module: nn.Module, tensors: dict[str, torch.Tensor], adapters: set[str]) -> None:
    """Adds what the output of `module` depends on to `tensors`, and the adapters that act in it to `adapters`."""
    acting, idle = set(), set()
    for part in module.modules():
        if isinstance(part, BaseTunerLayer):
            names = set() if part.disable_adapters else set(part.active_adapters)
            acting |= part._get_available_adapters() & names
            idle |= part._get_available_adapters() - names
    adapters |= acting
    for name, value in module.state_dict(keep_vars=True).items():
        if _find_adapter(name) not in idle - acting:
            parts = [part for part in f"{prefix}.{name}".split(".") if part not in WRAPPER_NAMES]
            tensors[".".join(parts)] = value


def _find_adapter(parameter_name: str) -> str | None:
    """Returns the name of the adapter that a parameter belongs to: it follows that of the method's container."""
    parts = parameter_name.split(".")
    return next((name for container, name in pairwise(parts) if is_adapter_parameter(container)), None)


def _describe(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def cache_frozen_part(
    dataset: UtteranceDataset,
    prefix: FrozenPrefix | None,
    processor: ProcessorMixin,
    arguments: CacheArguments,
    *,
    batch_size: int,
) -> Dataset:
    """
    Returns `dataset` with cached states in place of features, or as it is where nothing can be cached.

    Utterances that differ from epoch to epoch are cached in as many versions as `cache_variants` asks for.

    Args:
        dataset: The utterances.
        prefix: From [`find_frozen_prefix`].
        processor: Of the model.
        arguments: What is cached.
        batch_size: Utterances that the frozen part hears together.
    """
    if prefix is None:
        logger.warning("The frozen part is not cached: the first layer is trainable, or nothing frozen can run apart.")
        return dataset
    if dataset.is_random and not arguments.cache_variants:
        logger.warning(
            "The frozen part is not cached: utterances are augmented or joined anew in every epoch. "
            "`cache_variants` 4 keeps four versions of each."
        )
        return dataset
    key = {"prefix": prefix.name, "weights": prefix.digest}
    key["model_code"] = digest_code(prefix.model, processor.feature_extractor)
    with PartialState().local_main_process_first():
        return CachedUtterances.build(
            dataset,
            prefix,
            collate=CTCCollator(processor),
            key={**key, **fingerprint_processor(processor)},
            folder=resolve_cache_folder(arguments.cache_dir),
            batch_size=batch_size,
            dtype=arguments.cache_dtype,
            num_variants=max(1, arguments.cache_variants),
        )
