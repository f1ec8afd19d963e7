"""Speech adapters as a PEFT method, for this project's models and for stock ones.

A speech adapter is injected by module name and used through the library's verbs (`model.add_adapter`,
`load_adapter`, `set_adapter`, `disable_adapters`, `enable_adapters`, `delete_adapter`) or through `PeftModel`:

    kind         output of the wrapped module                 start
    mlp          base(x) + MLP(x)                             MLP's last layer is zero: the base
    bottleneck   y + up(relu(down(norm(y)))), y = base(x)     up is zero: the base
    transformer  y + scale * gate(y) * norm(layers(y))        norm is zero: the base
    replacement  MLP(x)                                       random, or an imported head

At position "before", a bottleneck or transformer changes x and not y: base(x + ...). Of them and the mlp, Whisper
(after the encoder) and Qwen2-Audio (before the projector) have defaults.
"""

import ast
import hashlib
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn
from transformers.dynamic_module_utils import get_relative_import_files

from .adapter_config import (
    BEFORE_DEFAULT_TARGETS,
    DEFAULT_TARGETS,
    RESIDUAL_KINDS,
    SPEECH_ADAPTER,
    SpeechAdapterConfig,
    bounded_patterns,
)
from .adapter_layer import (
    BASE,
    FrameLengths,
    SpeechAdapterLayer,
    adapter_rows,
    adapters_off,
    check_adapter_name,
    find_active_adapters,
    find_adapter_layers,
    is_adapter_parameter,
    remove_empty_layers,
)
from .adapter_loading import ADAPTER_WEIGHTS_NAME, load_speech_adapter, locate_base, name_on_disk
from .fingerprint import WRAPPER_NAMES, check_fingerprints, find_version, fingerprint_base

__all__ = [
    "ADAPTER_WEIGHTS_NAME",
    "BASE",
    "SPEECH_ADAPTER",
    "SpeechAdapterConfig",
    "SpeechAdapterLayer",
    "SpeechAdapterMixin",
    "SpeechAdapterModel",
    "adapter_rows",
    "adapters_off",
    "check_adapter_name",
    "find_active_adapters",
    "find_adapter_code",
    "find_adapter_layers",
    "is_adapter_parameter",
    "load_speech_adapter",
    "name_on_disk",
]


class SpeechAdapterModel(BaseTuner):
    """The tuner that PEFT calls to inject [`SpeechAdapterLayer`]s."""

    prefix = "speech_adapter_"
    tuner_layer_cls = SpeechAdapterLayer
    target_module_mapping = DEFAULT_TARGETS

    def _prepare_adapter_config(self, peft_config: SpeechAdapterConfig, model_config: dict) -> SpeechAdapterConfig:
        model_type, is_default = model_config["model_type"], peft_config.target_modules is None
        if is_default:
            targets = DEFAULT_TARGETS.get(model_type, {})
            if peft_config.kind not in targets:
                raise ValueError(
                    f"`target_modules` must be given for a {peft_config.kind} adapter in a model of type "
                    f"{model_type!r}. Name the modules to wrap."
                )
            names = targets[peft_config.kind]
            peft_config.target_modules = set(names) if isinstance(names, list) else names
        if peft_config.position is None and peft_config.kind in RESIDUAL_KINDS:
            peft_config.position = "before" if is_default and model_type in BEFORE_DEFAULT_TARGETS else "after"
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """
        As PEFT's, on the base that the adapter was made for only: every way to load one comes by here.

        Adapters that must know what is padding begin to follow the model's calls.

        Raises:
            ValueError: The configuration says that the adapter was made for another base.
        """
        config = self.peft_config[adapter_name]
        if config.base_fingerprint is not None:
            ours = fingerprint_base(model, find_version(config.base_fingerprint))
            with self._forgotten_on_error(adapter_name):
                check_fingerprints(config.base_fingerprint, ours, repr(adapter_name))
        config.base_model_name_or_path = locate_base(config.base_model_name_or_path)
        with self._forgotten_on_error(adapter_name), bounded_patterns(config, model):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        for name, layer in model.named_modules():
            if isinstance(layer, SpeechAdapterLayer) and layer.needs_frame_lengths and layer.frame_lengths is None:
                layer.frame_lengths = FrameLengths()
                layer.frame_lengths.follow(model, name)

    @contextmanager
    def _forgotten_on_error(self, adapter_name: str):
        """A model that has adapters has noted the configuration already."""
        try:
            yield
        except Exception:
            del self.peft_config[adapter_name]
            raise

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, **_kwargs) -> None:
        if isinstance(target, SpeechAdapterLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = SpeechAdapterLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        if any(parameter.is_meta for parameter in layer.speech_adapter_blocks[adapter_name].parameters()):
            layer.update_layer(adapter_name, peft_config)  # PEFT has sent it where an offloaded base is: nowhere

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        if isinstance(new_module, SpeechAdapterLayer):
            super()._replace_module(parent, child_name, new_module, child)
            new_module.place = (parent, child_name)
        else:  # in `unload`; PEFT's asks every module for a `weight` (0.21)
            child.release_frame_lengths()
            setattr(parent, child_name, new_module)

    def add_weighted_adapter(self, *_args, **_kwargs) -> None:
        """Refuses: as with merging, what adapters say together is not what a sum of their weights says."""
        raise ValueError(
            "Speech adapters are not linear and have no weighted sum. `python recipes/manage_adapters.py merge` "
            "writes an adapter of mean weights, to be tried on speech like any other."
        )

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

    def adapter_rows(self, adapter_names: Sequence[str] | None):
        """As [`adapter_rows`]."""
        return adapter_rows(self, adapter_names)

    def add_adapter(self, adapter_config: PeftConfig, adapter_name: str = "default") -> None:
        """As transformers', which would note a refused adapter as added, and warns of every second one."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            super().add_adapter(adapter_config, check_adapter_name(adapter_name))
        adapter_config.base_model_name_or_path = locate_base(adapter_config.base_model_name_or_path)

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """As transformers', which leaves layers of LoRA without adapters in the model, and their names in files."""
        super().delete_adapter(adapter_names)
        remove_empty_layers(self)

    def save_pretrained(self, save_directory: str | Path, *args, state_dict: dict | None = None, **kwargs) -> None:
        """As transformers'; a base inside a `PeftModel` is saved under its own names and without adapters."""
        if state_dict is None and not self._hf_peft_config_loaded and find_adapter_layers(self):
            state_dict = {
                ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES): value
                for name, value in self.state_dict().items()
                if not is_adapter_parameter(name)
            }
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

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

    def freeze_base_model(self) -> None:
        """Leaves only the adapters' parameters trainable."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_adapter_parameter(name))

    def unfreeze_base_model(self) -> None:
        """Makes every parameter trainable, the base's and the adapters'."""
        self.requires_grad_(True)

    def count_parameters(self, trainable_only: bool = False) -> dict[str, int]:
        """
        Returns the numbers of parameters as `{"total", "base", "adapter"}`.

        Args:
            trainable_only: Count only parameters that require a gradient.
        """
        counts = {"base": 0, "adapter": 0}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad or not trainable_only:
                counts["adapter" if is_adapter_parameter(name) else "base"] += parameter.numel()
        return {"total": sum(counts.values()), **counts}


def find_adapter_code(folder: str | Path = Path(__file__).parent) -> list[Path]:
    """Returns the files in `folder` that travel with an adapter. Default: of this code, wherever it runs from."""
    entry = Path(folder) / "adapters.py"
    return [entry, *map(Path, sorted(get_relative_import_files(entry)))]


def find_code_version(folder: str | Path) -> str:
    """Returns 16 hexadecimal digits over what the adapters' code in `folder` does; comments and docstrings aside."""
    digest = hashlib.blake2b(digest_size=8)
    for path in find_adapter_code(folder):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                del node.body[0]
        digest.update(f"{path.name}\0{ast.dump(tree)}\0".encode())
    return digest.hexdigest()


def check_same_code(first: str) -> None:
    """
    Makes sure that this code is that of the file `first`, which has registered the adapters in this process.

    Raises:
        ImportError: It does something else: adapters of one would run on the other.
    """
    folders = [Path(first).parent, Path(__file__).parent]
    versions = [find_code_version(folder) for folder in dict.fromkeys(folders)]
    if len(set(versions)) > 1:
        raise ImportError(
            f"The code of adapters must be of one version in a process, got {versions[1]} in {folders[1]} after "
            f"{versions[0]} in {folders[0]}. Use a process for each, or push both repositories with one version."
        )


# This file may be imported twice, from the repository and as code from the Hub: the classes of the first import win,
# which must have the same code.
if SPEECH_ADAPTER not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="speech_adapter", config_cls=SpeechAdapterConfig, model_cls=SpeechAdapterModel)
else:
    check_same_code(sys.modules[PEFT_TYPE_TO_TUNER_MAPPING[SPEECH_ADAPTER].__module__].__file__)
    SpeechAdapterConfig = PEFT_TYPE_TO_CONFIG_MAPPING[SPEECH_ADAPTER]
    SpeechAdapterModel = PEFT_TYPE_TO_TUNER_MAPPING[SPEECH_ADAPTER]
    SpeechAdapterLayer = SpeechAdapterModel.tuner_layer_cls
