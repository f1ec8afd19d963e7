"""KoSpeech's DeepSpeech2 checkpoints, vocabularies and adapter files, read without KoSpeech."""

import csv
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCTC, Wav2Vec2CTCTokenizer

from converters.pickles import (
    check_legacy_tensors,
    find_state_dict,
    get_adapter_shapes,
    list_names,
    load_legacy_checkpoint,
    read_legacy_pickle,
    to_kospeech_name,
)
from modeling import (
    DeepSpeech2Config,
    DeepSpeech2FeatureExtractor,
    DeepSpeech2ForCTC,
    DeepSpeech2Processor,
    SpeechAdapterConfig,
    save_adapter,
)
from modeling.adapters import ADAPTER_WEIGHTS_NAME
from modeling.files import write_whole
from modeling.whole_models import load_whole

# Widths of KoSpeech's features that tell themselves apart: four widths of input give one width after the convolutions.
STANDARD_MEL_BINS = (40, 64, 80, 120, 128, 161, 256)
BLANK, UNKNOWN, WORD_DELIMITER = "<blank>", "<pad>", "|"
VOCABULARY_ENCODINGS = ("utf-8-sig", "cp949")
# An adapter's name inside a model, while it is converted.
ADAPTER_NAME = "speaker"


def infer_num_mel_bins(num_halved: int, num_mel_bins: int | None = None) -> int:
    """
    Returns the feature bins of a model whose convolutions leave `num_halved` of them.

    Two strides of 2 round up, so 4 numbers of bins leave the same: 77, 78, 79 and 80 leave 20.

    Args:
        num_halved: Bins after the convolutions.
        num_mel_bins: The user's choice. Default: the one number among KoSpeech's usual ones.

    Raises:
        ValueError: The choice does not fit, or none is made and no usual number fits.

    Example:
        >>> infer_num_mel_bins(20), infer_num_mel_bins(41), infer_num_mel_bins(20, 79)
        (80, 161, 79)
    """
    possible = range(4 * num_halved - 3, 4 * num_halved + 1)
    choices = [num_mel_bins] if num_mel_bins else [bins for bins in STANDARD_MEL_BINS if bins in possible]
    if len(choices) != 1 or choices[0] not in possible:
        raise ValueError(
            f"`num_mel_bins` must be one of {', '.join(map(str, possible))} for this checkpoint, got {num_mel_bins}. "
            "Take the number of features that it was trained on."
        )
    return choices[0]


def infer_config(
    state: Mapping[str, torch.Tensor], *, num_mel_bins: int | None = None, file: str | Path
) -> DeepSpeech2Config:
    """
    Returns the configuration that the shapes of a checkpoint's weights tell; its blank is the last class.

    Args:
        state: KoSpeech's tensors by name.
        num_mel_bins: As in [`infer_num_mel_bins`].
        file: Where they come from, for messages.

    Raises:
        ValueError: A weight that tells a size is missing or has another number of dimensions.
    """
    telling = {
        "conv.conv.sequential.0.weight": 4,
        "rnn_layers.0.rnn.weight_ih_l0": 2,
        "rnn_layers.0.rnn.weight_hh_l0": 2,
        "fc.1.linear.weight": 2,
    }
    missing = [name for name in telling if name not in state]
    if missing:
        raise ValueError(f"`checkpoint` must be KoSpeech's DeepSpeech2, got {file} without {list_names(missing)}.")
    conv, weight_ih, weight_hh, classifier = (state[name] for name in telling)
    for name, num_dims in telling.items():
        if state[name].dim() != num_dims or not state[name].numel():
            raise ValueError(f"`checkpoint` must have {num_dims} dimensions in {name}, got {list(state[name].shape)}.")
    if weight_hh.shape[0] != 3 * weight_hh.shape[1]:
        raise ValueError(
            "`checkpoint` must have GRUs, whose rnn_layers.0.rnn.weight_hh_l0 has 3 rows a unit, got shape "
            f"{tuple(weight_hh.shape)} in {file}. An LSTM has 4 and a plain recurrent network 1."
        )
    num_halved, rest = divmod(weight_ih.shape[1], conv.shape[0])
    if rest or not num_halved:
        raise ValueError(
            f"`checkpoint` must have an input of rnn_layers.0.rnn that is a multiple of its {conv.shape[0]} channels, "
            f"got {weight_ih.shape[1]}. It was made for another architecture."
        )
    layers = {match[1] for name in state if (match := re.match(r"rnn_layers\.(\d+)\.", name))}
    return DeepSpeech2Config(
        num_mel_bins=infer_num_mel_bins(num_halved, num_mel_bins),
        conv_channels=conv.shape[0],
        hidden_size=weight_hh.shape[1],
        num_hidden_layers=len(layers),
        vocab_size=classifier.shape[0],
        pad_token_id=classifier.shape[0] - 1,
    )


def convert_checkpoint(path: str | Path, *, num_mel_bins: int | None = None) -> DeepSpeech2ForCTC:
    """
    Returns KoSpeech's recogniser as ours, in evaluation mode.

    Args:
        path: A whole model or its `state_dict`, saved by torch, from one device or several.
        num_mel_bins: As in [`infer_num_mel_bins`].

    Raises:
        ValueError: The file is missing, damaged or unsafe, or its weights are another architecture's; they are named.
    """
    state = load_legacy_checkpoint(path)
    config = infer_config(state, num_mel_bins=num_mel_bins, file=path)
    with torch.device("meta"):  # shapes only, however large the file says they are
        model = DeepSpeech2ForCTC(config)
    names = {name: to_kospeech_name(name) for name in model.state_dict()}
    shapes = {names[name]: tensor.shape for name, tensor in model.state_dict().items()}
    # In the precision that the model has: a number may be too large for it.
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    check_legacy_tensors("checkpoint", path, tensors=state, shapes=shapes)
    tensors = {name: state[old] for name, old in names.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"`vocabulary` must be a CSV file, got {path}, which does not exist.")
    data = path.read_bytes()
    for encoding in VOCABULARY_ENCODINGS:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError(f"`vocabulary` must be a CSV file in UTF-8 or CP949, got {path}, which is neither.")


def read_vocabulary(path: str | Path) -> dict[str, int]:
    """
    Returns KoSpeech's vocabulary as token to id, in the layout of `Wav2Vec2CTCTokenizer`: "|" stands for the space.

    The blank is appended as the last id, as KoSpeech's CTC models do.

    Args:
        path: CSV file with the columns id and char (others are passed over), in UTF-8 or CP949.

    Raises:
        ValueError: The file is missing, no such CSV file, or its ids are not 0, 1, 2 ... or its characters repeat.
    """
    path = Path(path)
    rows = list(csv.DictReader(_read_text(path).splitlines()))
    if not rows or not all(row.get("id") and row.get("char") for row in rows):
        raise ValueError(f"`vocabulary` must be a CSV file with columns id and char in every row, got {path}.")
    tokens = [WORD_DELIMITER if row["char"] == " " else row["char"] for row in rows]
    if [row["id"].strip() for row in rows] != [str(index) for index in range(len(rows))]:
        raise ValueError(f"`vocabulary` must number its rows 0, 1, 2 ..., got other ids in {path}.")
    repeated = sorted({token for token in tokens if tokens.count(token) > 1} | ({BLANK} & set(tokens)))
    if repeated:
        raise ValueError(f"`vocabulary` must have every character once, got {list_names(repeated)} again in {path}.")
    return {token: index for index, token in enumerate([*tokens, BLANK])}


def build_processor(vocabulary: Mapping[str, int], *, num_mel_bins: int) -> DeepSpeech2Processor:
    """
    Returns the processor for a converted recogniser: KoSpeech's window, hop and normalisation, and its classes.

    Its `<sos>` and `<eos>` stay plain classes. A character outside the vocabulary is spelled as `<pad>`, which is a
    class too, not the blank.

    Args:
        vocabulary: As [`read_vocabulary`] returns it.
        num_mel_bins: Feature bins of the recogniser.

    Raises:
        ValueError: The vocabulary has no `<pad>`.
    """
    if UNKNOWN not in vocabulary:
        raise ValueError(f"`vocabulary` must have a row for {UNKNOWN}, as KoSpeech's has, got none.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(dict(vocabulary), ensure_ascii=False), encoding="utf-8")
        tokenizer = Wav2Vec2CTCTokenizer(
            str(path),
            bos_token=None,
            eos_token=None,
            # Another token would be added as a class that the model does not have.
            unk_token=UNKNOWN,
            pad_token=BLANK,
            word_delimiter_token=WORD_DELIMITER,
        )
    return DeepSpeech2Processor(DeepSpeech2FeatureExtractor(num_mel_bins, normalization="utterance"), tokenizer)


def convert_recognizer(
    checkpoint: str | Path, *, vocabulary: str | Path, output_dir: str | Path, num_mel_bins: int | None = None
) -> None:
    """
    Writes the model and the processor of a checkpoint and its vocabulary into `output_dir`.

    Raises:
        ValueError: A file is refused, or the model's classes are not the vocabulary's and the blank.
    """
    model = convert_checkpoint(checkpoint, num_mel_bins=num_mel_bins)
    classes = read_vocabulary(vocabulary)
    if len(classes) != model.config.vocab_size:
        raise ValueError(
            f"`vocabulary` must have one row for each of the {model.config.vocab_size} classes but the blank, got "
            f"{len(classes) - 1} rows in {vocabulary}. Take the file that the model was trained with."
        )
    processor = build_processor(classes, num_mel_bins=model.config.num_mel_bins)
    with write_whole(output_dir) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def read_adapter_checkpoint(path: str | Path) -> dict[str, Any]:
    """
    Returns `adapter_state_dict` (names `{layer}.weight` and `{layer}.bias`), `input_dim`, `hidden_dims` and
    `output_dim` of KoSpeech's adapter file.

    Args:
        path: A dictionary that torch saved; the names of its weights may have one prefix.

    Raises:
        ValueError: The file is missing, damaged or unsafe, an entry is missing or of another type, or the weights are
            not those of linear maps with ReLU and dropout between them.
    """
    content = read_legacy_pickle(path)
    kinds = {"adapter_state_dict": Mapping, "input_dim": int, "hidden_dims": (list, tuple), "output_dim": int}
    entries = content if isinstance(content, Mapping) else {}
    wrong = [name for name, kind in kinds.items() if not isinstance(entries.get(name), kind)]
    if wrong:
        raise ValueError(
            f"`adapter_checkpoint` must be KoSpeech's adapter file, got {path} without a usable {', '.join(wrong)}."
        )
    state = find_state_dict(entries["adapter_state_dict"])
    widths = [entries["input_dim"], *entries["hidden_dims"], entries["output_dim"]]
    if not all(type(width) is int and width > 0 for width in widths):
        raise ValueError(f"`adapter_checkpoint` must have positive sizes, got {widths} in {path}.")
    prefixes = {re.sub(r"\d+\.(weight|bias)$", "", name) for name in state}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    state = {name.removeprefix(prefix): value.float() for name, value in state.items()}
    check_legacy_tensors("adapter_checkpoint", path, tensors=state, shapes=get_adapter_shapes(widths))
    return {**{name: entries[name] for name in kinds}, "adapter_state_dict": state}


def convert_adapter(adapter_checkpoint: str | Path, *, model_name_or_path: str, output_dir: str | Path) -> None:
    """
    Writes KoSpeech's adapter file as a `replacement` adapter of its converted base into `output_dir`.

    Raises:
        ValueError: The file is refused, or its sizes are not the base's.
    """
    content = read_adapter_checkpoint(adapter_checkpoint)
    model = load_whole(AutoModelForCTC, model_name_or_path)
    sizes = (model.classifier.in_features, model.classifier.out_features)
    if (content["input_dim"], content["output_dim"]) != sizes:
        raise ValueError(
            f"`adapter_checkpoint` must map {sizes[0]} features to {sizes[1]} classes, got {content['input_dim']} to "
            f"{content['output_dim']}. Give the base that it was trained on as `model_name_or_path`."
        )
    config = SpeechAdapterConfig(
        kind="replacement",
        hidden_sizes=list(content["hidden_dims"]),
        base_model_name_or_path=model_name_or_path,
    )
    model.add_adapter(config, ADAPTER_NAME)
    model.classifier.speech_adapter_blocks[ADAPTER_NAME].load_state_dict(content["adapter_state_dict"])
    save_adapter(model, output_dir, ADAPTER_NAME)


def export_adapter(adapter: str | Path, *, output_file: str | Path) -> None:
    """
    Writes an adapter folder as KoSpeech's adapter file `output_file`; it holds tensors and numbers only.

    Raises:
        ValueError: The folder has no `replacement` adapter.
    """
    folder = Path(adapter)
    if not (folder / ADAPTER_WEIGHTS_NAME).is_file():
        raise ValueError(f"`adapter` must be a folder with {ADAPTER_WEIGHTS_NAME}, got {folder}.")
    config = PeftConfig.from_pretrained(str(folder))
    if getattr(config, "kind", None) != "replacement":
        raise ValueError(
            f"`adapter` must be of kind replacement, got {getattr(config, 'kind', config.peft_type)} in {folder}. "
            "KoSpeech's adapters take the classifier's place, others add to it."
        )
    stored = load_file(folder / ADAPTER_WEIGHTS_NAME)
    tensors = {re.sub(r"^.*speech_adapter_blocks\.", "", name): tensor for name, tensor in stored.items()}
    sizes = {name: tensor.shape for name, tensor in tensors.items() if re.fullmatch(r"\d+\.weight", name)}
    by_layer = [sizes[name] for name in sorted(sizes, key=lambda name: int(name.split(".")[0]))]
    widths = [by_layer[0][-1], *(size[0] for size in by_layer)] if by_layer else []
    shapes = get_adapter_shapes(widths)
    check_legacy_tensors("adapter", folder, tensors=tensors, shapes=shapes)
    path = Path(output_file).resolve()  # a link stays
    with write_whole(path.parent) as scratch:
        content = {
            "adapter_state_dict": {name: tensors[name] for name in shapes},
            "input_dim": widths[0],
            "hidden_dims": widths[1:-1],
            "output_dim": widths[-1],
            "adapter_name": folder.resolve().name,
        }
        torch.save(content, scratch / path.name)
