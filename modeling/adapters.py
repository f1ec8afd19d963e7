"""Speech adapters as a PEFT method, for this project's models and for stock ones.

A speech adapter is injected by module name and used through the library's verbs (`model.add_adapter`,
`load_adapter`, `set_adapter`, `disable_adapters`, `enable_adapters`, `delete_adapter`) or through `PeftModel`:

    kind         output of the wrapped module                 start
    mlp          base(x) + MLP(x)                             MLP's last layer is zero: the base
    bottleneck   y + up(relu(down(norm(y)))), y = base(x)     up is zero: the base
    replacement  MLP(x)                                       random, or an imported head
"""

import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import nn
from transformers import ProcessorMixin

from .active_adapters import (
    BASE,
    adapter_rows,
    adapters_off,
    check_adapter_name,
    find_active_adapters,
    find_adapter_layers,
    is_adapter_parameter,
)
from .adapter_files import ADAPTER_WEIGHTS_NAME, name_on_disk, save_adapter
from .adapter_loading import load_speech_adapter

__all__ = [
    "ADAPTER_WEIGHTS_NAME",
    "BASE",
    "KINDS",
    "SPEECH_ADAPTER",
    "SpeechAdapterConfig",
    "SpeechAdapterLayer",
    "SpeechAdapterMixin",
    "SpeechAdapterModel",
    "adapter_rows",
    "adapters_off",
    "check_adapter_name",
    "find_active_adapters",
    "find_adapter_layers",
    "is_adapter_parameter",
    "load_speech_adapter",
    "name_on_disk",
    "save_adapter",
]

KINDS = ("mlp", "bottleneck", "replacement")
DEFAULT_HIDDEN_SIZES = {"mlp": [512, 256], "replacement": [512, 256], "bottleneck": [64]}
# Modules that a kind wraps in this project's models, as regular expressions over whole module names.
DEFAULT_TARGETS = {
    "deepspeech2": {
        "mlp": "classifier",
        "replacement": "classifier",
        "bottleneck": r"encoder\.(conv|rnn_layers\.\d+)",
    },
}


def extend_peft_types(name: str) -> PeftType:
    """Adds a member to PEFT's enumeration of methods: `register_peft_method` takes no others (peft 0.21)."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_, member._sort_order_, member.__objclass__ = name, name, len(PeftType), PeftType
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


SPEECH_ADAPTER = extend_peft_types("SPEECH_ADAPTER")


@dataclass
class SpeechAdapterConfig(PeftConfig):
    """
    Configuration of a speech adapter.

    Args:
        kind: `"mlp"`, `"bottleneck"` or `"replacement"`, see the top of this file.
        target_modules: Names of the modules to wrap, or one regular expression over whole names. Default: what the
            kind wraps in this project's models.
        exclude_modules: Names not to wrap, likewise.
        hidden_sizes: Widths of the hidden layers; a bottleneck has one. Default: `[512, 256]`, bottleneck `[64]`.
        dropout: Dropout after every hidden layer while training.
        base_fingerprint: What the base is, filled in when the adapter is saved; see `fingerprint.py`.
        base_mismatch_allowed: Whether the adapter has been put on another base on purpose.

    Raises:
        ValueError: An unknown kind, widths that are no positive integers, a dropout outside [0, 1), modules that are
            neither names nor a regular expression, or a value of another type.

    Example:

    ```python
    >>> from modeling import DeepSpeech2Config, DeepSpeech2ForCTC, SpeechAdapterConfig

    >>> model = DeepSpeech2ForCTC(DeepSpeech2Config(vocab_size=2000))
    >>> model.add_adapter(SpeechAdapterConfig(kind="mlp"), "alice")
    >>> model.count_parameters()["adapter"]
    1170128

    ```
    """

    kind: str = field(default="mlp", metadata={"help": "mlp, bottleneck or replacement"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to wrap"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules not to wrap"})
    hidden_sizes: list[int] | None = field(default=None, metadata={"help": "widths of the hidden layers"})
    dropout: float = field(default=0.1, metadata={"help": "dropout after every hidden layer"})
    base_fingerprint: dict | None = field(default=None, metadata={"help": "what the base is"})
    base_mismatch_allowed: bool = field(default=False, metadata={"help": "was put on another base on purpose"})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = SPEECH_ADAPTER
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.hidden_sizes is None:
            self.hidden_sizes = list(DEFAULT_HIDDEN_SIZES[self.kind])
        is_integer = isinstance(self.hidden_sizes, list) and all(type(size) is int for size in self.hidden_sizes)
        if not is_integer or not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"`hidden_sizes` must be a list of positive integers, got {self.hidden_sizes!r}.")
        if self.kind == "bottleneck" and len(self.hidden_sizes) != 1:
            raise ValueError(f"`hidden_sizes` of a bottleneck must be one width, got {self.hidden_sizes}.")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be from 0 to below 1, got {self.dropout!r}.")
        if not isinstance(self.base_fingerprint, (dict, type(None))) or type(self.base_mismatch_allowed) is not bool:
            raise ValueError(
                "`base_fingerprint` must be a dict and `base_mismatch_allowed` true or false, got "
                f"{self.base_fingerprint!r} and {self.base_mismatch_allowed!r}."
            )
        check_module_names("target_modules", self.target_modules)
        check_module_names("exclude_modules", self.exclude_modules)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


def check_module_names(argument: str, names: object) -> None:
    r"""
    Makes sure that `names` is `None`, a regular expression, or a list, set or tuple of names.

    Raises:
        ValueError: It is not.

    Example:

    ```python
    >>> from modeling.adapters import check_module_names

    >>> check_module_names("target_modules", r"encoder\.(conv|rnn_layers\.\d+)")

    ```
    """
    try:
        is_legal = names is None or (isinstance(names, str) and re.compile(names))
    except re.error as error:
        raise ValueError(f"`{argument}` must be names or a regular expression, got {names!r} ({error}).") from error
    is_list = isinstance(names, (list, set, tuple)) and all(isinstance(name, str) for name in names)
    if not is_legal and not is_list:
        raise ValueError(f"`{argument}` must be names or a regular expression, got {names!r}.")


class MLPBlock(nn.Sequential):
    """Linear, ReLU, dropout for each hidden width, then Linear: `(batch, frames, in)` to `(batch, frames, out)`."""

    def __init__(self, in_features: int, out_features: int, config: SpeechAdapterConfig):
        layers: list[nn.Module] = []
        for size in config.hidden_sizes:
            layers += [nn.Linear(in_features, size), nn.ReLU(), nn.Dropout(config.dropout)]
            in_features = size
        super().__init__(*layers, nn.Linear(in_features, out_features))
        if config.kind == "mlp":
            nn.init.zeros_(self[-1].weight)
            nn.init.zeros_(self[-1].bias)


class BottleneckBlock(nn.Sequential):
    """Residual branch of Houlsby et al. (arXiv 1902.00751): norm, down, ReLU, dropout, up; `up` starts at zero."""

    def __init__(self, out_features: int, config: SpeechAdapterConfig):
        size = config.hidden_sizes[0]
        super().__init__(
            nn.LayerNorm(out_features),
            nn.Linear(out_features, size),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(size, out_features),
        )
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)


class SpeechAdapterLayer(nn.Module, BaseTunerLayer):
    """
    Wraps a module that has `in_features` and `out_features` with named adapters, at most one of them active.

    The base module runs once on all rows; adapters act on its input and output, a group of rows at a time when
    [`adapter_rows`] asks for it.
    """

    adapter_layer_names = ("speech_adapter_blocks",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SpeechAdapterConfig):
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.kinds: dict[str, str] = {}
        self.speech_adapter_blocks = nn.ModuleDict()
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SpeechAdapterConfig) -> None:
        """Adds the adapter `adapter_name`, on the base's device."""
        check_adapter_name(adapter_name)
        base = self.get_base_layer()
        if not hasattr(base, "out_features"):
            raise ValueError(
                f"`target_modules` must name modules with `in_features` and `out_features`, got a "
                f"{type(base).__name__}. Name the linear map or the block before it."
            )
        if config.kind == "bottleneck":
            block = BottleneckBlock(base.out_features, config)
        else:
            block = MLPBlock(base.in_features, base.out_features, config)
        self.speech_adapter_blocks[adapter_name] = block
        self.kinds[adapter_name] = config.kind
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        # A wrapped block has no `weight` of its own, and adapters stay in fp32 over a base in half precision.
        parameter = next(base_layer.parameters(), None)
        return (None if parameter is None else parameter.device), None

    def delete_adapter(self, adapter_name: str) -> None:
        self.kinds.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def merge(self, *_args, **_kwargs) -> None:
        raise ValueError("Speech adapters are not linear and cannot be merged into the base. Keep them beside it.")

    def unmerge(self) -> None:
        """There is nothing to take back: speech adapters are never merged."""

    def forward(self, hidden_states: torch.Tensor, *args, adapter_names: Sequence[str] | None = None, **kwargs):
        output = self.base_layer(hidden_states, *args, **kwargs)
        if self.disable_adapters:
            return output
        if adapter_names is None:
            return self._adapt(self._single_active_adapter(), hidden_states, output)
        if len(set(adapter_names)) == 1:
            return self._adapt(adapter_names[0], hidden_states, output)
        adapted = torch.empty_like(output)
        for name in dict.fromkeys(adapter_names):
            rows = torch.tensor(
                [row for row, other in enumerate(adapter_names) if other == name], device=output.device
            )
            adapted.index_copy_(0, rows, self._adapt(name, hidden_states[rows], output[rows]))
        return adapted

    def _single_active_adapter(self) -> str | None:
        names = [name for name in self.active_adapters if name in self.speech_adapter_blocks]
        if len(names) > 1:
            raise ValueError(f"A module can have one active speech adapter, got {names}. Activate one of them.")
        return names[0] if names else None

    def _adapt(self, name: str | None, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if name not in self.speech_adapter_blocks:
            return output
        block, kind = self.speech_adapter_blocks[name], self.kinds[name]
        source = output if kind == "bottleneck" else hidden_states
        delta = block(source.to(block[-1].weight.dtype)).to(output.dtype)
        return delta if kind == "replacement" else output + delta


class SpeechAdapterModel(BaseTuner):
    """The tuner that PEFT calls to inject [`SpeechAdapterLayer`]s."""

    prefix = "speech_adapter_"
    tuner_layer_cls = SpeechAdapterLayer
    target_module_mapping = DEFAULT_TARGETS

    def _prepare_adapter_config(self, peft_config: SpeechAdapterConfig, model_config: dict) -> SpeechAdapterConfig:
        if peft_config.target_modules is None:
            targets = DEFAULT_TARGETS.get(model_config["model_type"], {})
            if peft_config.kind not in targets:
                raise ValueError(
                    f"`target_modules` must be given for a {peft_config.kind} adapter in a model of type "
                    f"{model_config['model_type']!r}. Name the modules to wrap."
                )
            peft_config.target_modules = targets[peft_config.kind]
        return peft_config

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, **_kwargs) -> None:
        if isinstance(target, SpeechAdapterLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = SpeechAdapterLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f"speech_adapter_blocks.{adapter_name}.", "speech_adapter_blocks.", 1)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args, **kwargs):
        # `PeftModel.forward` and `.generate` hand `adapter_names` over here.
        with adapter_rows(self.model, kwargs.pop("adapter_names", None)):
            yield


class SpeechAdapterMixin:
    """What transformers' own verbs lack; stands before `PreTrainedModel` in a model's bases."""

    def save_adapter(
        self,
        save_directory: str | Path,
        adapter_name: str | None = None,
        *,
        processor: ProcessorMixin | None = None,
    ) -> None:
        """As [`save_adapter`]."""
        save_adapter(self, save_directory, adapter_name, processor=processor)

    def adapter_rows(self, adapter_names: Sequence[str] | None):
        """As [`adapter_rows`]."""
        return adapter_rows(self, adapter_names)

    def add_adapter(self, adapter_config: PeftConfig, adapter_name: str = "default") -> None:
        """As transformers', which would note a refused adapter as added."""
        super().add_adapter(adapter_config, check_adapter_name(adapter_name))

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs):
        """
        As transformers', with the checks and the arguments of [`load_speech_adapter`].

        A configuration and tensors that the caller gives, and a hot swap, go to transformers unchecked.
        """
        name = "default" if adapter_name is None else check_adapter_name(adapter_name)
        is_swap = kwargs.get("hotswap", "auto") is True or getattr(self, "_hotswap_enabled", False)
        is_given = args or {"peft_config", "adapter_state_dict"} & kwargs.keys()
        if peft_model_id is None or is_given or is_swap:
            return super().load_adapter(peft_model_id, name, *args, **kwargs)
        for without_meaning in ("hotswap", "low_cpu_mem_usage"):
            kwargs.pop(without_meaning, None)
        download_kwargs = getattr(kwargs.get("load_config"), "download_kwargs", None) or {}
        kwargs |= kwargs.pop("adapter_kwargs", None) or {}
        return load_speech_adapter(self, peft_model_id, name, **{**download_kwargs, **kwargs})

    def active_adapters(self) -> list[str]:
        """Names of the active adapters; none where no adapter was ever added."""
        return super().active_adapters() if self._hf_peft_config_loaded else []


# This file may be imported twice, from the repository and as code from the Hub: the classes of the first import win.
if SPEECH_ADAPTER not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="speech_adapter", config_cls=SpeechAdapterConfig, model_cls=SpeechAdapterModel)
else:
    SpeechAdapterConfig = PEFT_TYPE_TO_CONFIG_MAPPING[SPEECH_ADAPTER]
    SpeechAdapterModel = PEFT_TYPE_TO_TUNER_MAPPING[SPEECH_ADAPTER]
    SpeechAdapterLayer = SpeechAdapterModel.tuner_layer_cls
