"""Checkpoints of speech translation under this project's names: StreamSpeech's, the original EchoStream's, our own.

A file is read without fairseq, and nothing that it names is run. Its weights are named as
[`EchoStreamForSpeechToSpeechTranslation`] names them:

    StreamSpeech                       here
    encoder.subsample.conv_layers.     encoder.subsampler.convolutions.
    encoder.linear.                    encoder.subsampler.projection.
    source_unigram_decoder.proj.       asr_ctc_decoder.
    ctc_target_unigram_decoder.proj.   st_ctc_decoder.
    target_unigram_decoder.            mt_decoder.
    synthesizer_encoder.               t2u_encoder.
    decoder.                           unit_decoder.

Source: https://github.com/ictnlp/StreamSpeech, whose layers are fairseq's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from converters.pickles import STAND_IN_PACKAGES, find_state_dict, read_legacy_pickle
from modeling import EchoStreamConfig
from modeling.files import find_whole

# Objects of a training of fairseq's that are no weights: they are read as inert stand-ins.
STAND_INS = (*STAND_IN_PACKAGES, "argparse", "fairseq", "numpy", "omegaconf")
STREAMSPEECH_NAMES = {
    "encoder.subsample.conv_layers.": "encoder.subsampler.convolutions.",
    "encoder.linear.": "encoder.subsampler.projection.",
    "source_unigram_decoder.proj.": "asr_ctc_decoder.",
    "ctc_target_unigram_decoder.proj.": "st_ctc_decoder.",
    "target_unigram_decoder.": "mt_decoder.",
    "synthesizer_encoder.": "t2u_encoder.",
    "decoder.": "unit_decoder.",
}
# The original EchoStream's, which has torchaudio's layers and wraps its CTC maps.
ORIGINAL_NAMES = {
    "encoder.emformer.emformer_layers.": "encoder.layers.",
    "encoder.emformer_layers.": "encoder.layers.",
    "asr_ctc_decoder.proj.": "asr_ctc_decoder.",
    "st_ctc_decoder.proj.": "st_ctc_decoder.",
}
CONFORMER_PREFIX = "encoder.conformer_layers."
EMFORMER_PREFIX = "encoder.layers."
# What the heads are; everything else is the encoder.
DECODER_PREFIXES = ("asr_ctc_decoder.", "st_ctc_decoder.", "mt_decoder.", "t2u_encoder.", "unit_decoder.", "vocoder.")
# Output projections that fairseq ties to embeddings and stores under both names; here each has one.
MT_PROJECTION, MT_EMBEDDINGS = "mt_decoder.output_projection.weight", "mt_decoder.embed_tokens.weight"
UNIT_PROJECTION, UNIT_EMBEDDINGS = "unit_decoder.output_projection.weight", "unit_decoder.embed_tokens.weight"
# Entries of a training's file that say how far it went.
FACTS = ("epoch", "loss", "step", "global_step", "num_updates")
KINDS = {
    "folder": "a folder of this project",
    "streamspeech": "a StreamSpeech checkpoint",
    "original": "a checkpoint of the original EchoStream",
    "weights": "weights by name",
}


@dataclass
class TranslationCheckpoint:
    """
    What a checkpoint holds.

    Args:
        path: Where it was read.
        kind: One of `KINDS`.
        state: Weights by this project's names.
        names: The checkpoint's own name of each.
        encoder_kind: `"emformer"`, `"conformer"` or None.
        config: Of a folder.
        facts: Numbers beside the weights, such as the epoch.
    """

    path: Path
    kind: str
    state: dict[str, torch.Tensor]
    names: dict[str, str]
    encoder_kind: str | None
    config: EchoStreamConfig | None = None
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def has_training_state(self) -> bool:
        """Whether the optimizer and the schedule of a training stand beside the weights."""
        return self.path.is_dir() and (self.path / TRAINER_STATE_NAME).is_file()

    @property
    def is_whole(self) -> bool:
        """Whether a model can be made of it alone: it has a configuration."""
        return self.config is not None


def read_checkpoint(path: str | Path) -> TranslationCheckpoint:
    """
    Returns the weights of a checkpoint by this project's names.

    Args:
        path: A folder with `config.json` and `model.safetensors`, a `.safetensors` file, or a file of `torch.save`:
            fairseq's, the original's `{"epoch", "model", "optimizer", "loss"}`, or weights by name.

    Raises:
        ValueError: There is nothing at `path`, the folder holds no EchoStream, or the file is damaged, names a global
            that no checkpoint needs, or has no weight of such a model.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"`checkpoint` must be a folder or a file, got {path}, which does not exist.")
    config, facts = None, {}
    if path.is_dir():
        config, raw = _read_folder(path)
    elif path.suffix == ".safetensors":
        raw = load_file(path)
    else:
        content = read_legacy_pickle(path, stand_ins=STAND_INS)
        raw = find_state_dict(content)
        if isinstance(content, Mapping):
            facts = {name: content[name] for name in FACTS if isinstance(content.get(name), int | float)}
    kind = "folder" if config is not None else find_kind(raw, has_facts=bool(facts))
    renamed = rename_weights(raw)
    state = {ours: raw[theirs] for ours, theirs in renamed.items()}
    if not any(name.startswith((*DECODER_PREFIXES, EMFORMER_PREFIX)) for name in state):
        raise ValueError(
            f"`checkpoint` must have weights of an EchoStream or a StreamSpeech, got {path} with "
            f"{', '.join(sorted(raw)[:3])}. Name another file."
        )
    return TranslationCheckpoint(path, kind, state, renamed, find_encoder_kind(raw), config, facts)


def _read_folder(folder: Path) -> tuple[EchoStreamConfig, dict[str, torch.Tensor]]:
    weights = find_whole(folder, SAFE_WEIGHTS_NAME)
    if not find_whole(folder, CONFIG_NAME).is_file() or not weights.is_file():
        raise ValueError(
            f"`checkpoint` must be a folder with {CONFIG_NAME} and {SAFE_WEIGHTS_NAME}, got {folder} without them. "
            "Give the output folder of a training, or one of its checkpoints."
        )
    values, _ = EchoStreamConfig.get_config_dict(folder)
    if values.get("model_type") != EchoStreamConfig.model_type:
        kind = values.get("model_type")
        raise ValueError(f"`checkpoint` must hold an EchoStream, got a {kind!r} model in {folder}. Name another one.")
    return EchoStreamConfig.from_dict(values), load_file(weights)


def find_kind(state: Iterable[str], *, has_facts: bool = False) -> str:
    """Returns which project's names the weights have: `"streamspeech"`, `"original"` or `"weights"`."""
    theirs = ("source_unigram_decoder.", "ctc_target_unigram_decoder.", "target_unigram_decoder.", CONFORMER_PREFIX)
    names = list(state)
    if any(name.startswith(theirs) for name in names):
        return "streamspeech"
    is_original = has_facts or any(name.startswith(tuple(ORIGINAL_NAMES)) for name in names)
    return "original" if is_original else "weights"


def find_encoder_kind(state: Iterable[str]) -> str | None:
    """Returns `"conformer"`, `"emformer"` or None, by the names of the weights."""
    names = list(state)
    if any(name.startswith(CONFORMER_PREFIX) for name in names):
        return "conformer"
    layers = (EMFORMER_PREFIX, *(name for name, ours in ORIGINAL_NAMES.items() if ours == EMFORMER_PREFIX))
    return "emformer" if any(name.startswith(layers) for name in names) else None


def rename_weights(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """
    Returns the checkpoint's name of each weight by this project's name; tied weights under one name.

    Example:

    ```python
    >>> import torch
    >>> from converters.streamspeech import rename_weights

    >>> rename_weights({"source_unigram_decoder.proj.bias": torch.zeros(1)})
    {'asr_ctc_decoder.bias': 'source_unigram_decoder.proj.bias'}

    ```
    """
    known = STREAMSPEECH_NAMES if find_kind(state) == "streamspeech" else ORIGINAL_NAMES
    renamed = {}
    for name in state:
        prefix = next((theirs for theirs in known if name.startswith(theirs)), "")
        renamed[known.get(prefix, "") + name.removeprefix(prefix)] = name
    _untie(renamed, state, kept=MT_EMBEDDINGS, other=MT_PROJECTION)
    _untie(renamed, state, kept=UNIT_PROJECTION, other=UNIT_EMBEDDINGS)
    return renamed


def _untie(renamed: dict[str, str], state: Mapping[str, torch.Tensor], *, kept: str, other: str) -> None:
    """Leaves one name to a tied weight; two weights that differ keep theirs, and the second is reported as unused."""
    if other not in renamed:
        return
    if kept not in renamed:
        renamed[kept] = renamed.pop(other)
    elif torch.equal(state[renamed[kept]], state[renamed[other]]):
        del renamed[other]
