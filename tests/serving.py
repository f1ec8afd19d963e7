"""What tests of [`AdapterStore`] share: adapters to serve, and the other route to what they say."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from inference.adapter_store import AdapterStore
from modeling import DeepSpeech2ForCTC, SpeechAdapterConfig, load_speech_adapter, save_adapter
from modeling.adapters import ADAPTER_WEIGHTS_NAME, BASE, is_adapter_parameter

CONFIG_NAME = "adapter_config.json"
BIAS = "base_model.model.classifier.speech_adapter_blocks.3.bias"  # of the last layer of an mlp


def write_adapter(base: str, folder: Path, seed: int, dtype: torch.dtype = torch.float32, **settings) -> None:
    """Saves an adapter that changes the output, with other weights for each seed."""
    model = DeepSpeech2ForCTC.from_pretrained(base)
    model.add_adapter(SpeechAdapterConfig(**({"hidden_sizes": [8]} | settings)), "new")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name):
                parameter.normal_(generator=generator)
    save_adapter(model, folder, "new")
    tensors = {name: value.to(dtype) for name, value in load_file(folder / ADAPTER_WEIGHTS_NAME).items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})


@torch.no_grad()
def logits(model, batch: dict) -> torch.Tensor:
    return model(**batch).logits


def logits_served(store: AdapterStore, names: list[str], batch: dict) -> torch.Tensor:
    with store.rows(names):
        return logits(store.model, batch)


def logits_loaded(base: str, folder: Path, names: list[str], batch: dict) -> torch.Tensor:
    """The other route: every adapter loaded into a model of its own, its rows taken from there."""
    said = {}
    for name in set(names):
        model = DeepSpeech2ForCTC.from_pretrained(base)
        if name != BASE:
            load_speech_adapter(model, str(folder / name), name)
        said[name] = logits(model.eval(), batch)
    return torch.stack([said[name][row] for row, name in enumerate(names)])
