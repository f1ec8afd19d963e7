"""How a training of speech translation starts: from nothing, from where it stopped, or from parts of a checkpoint.

scratch    everything is new
resume     the newest checkpoint of the output folder, or the one named: weights, optimizer, schedule, random state
partial    the decoders of a checkpoint, by prefix; the encoder is new
transfer   all of a checkpoint; the encoder trains alone at first, or adapters on a frozen model
evaluate   all of a checkpoint, which is measured and left as it is

What was loaded and what was not is reported by name, and stored beside the model.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from converters.streamspeech import DECODER_PREFIXES, KINDS, TranslationCheckpoint
from data.sentencepiece_models import MODEL_SUFFIX, read_sentencepiece
from data.subwords import SPECIAL_TOKENS, count_unwritable, train_subwords
from data.text import name_characters
from modeling import (
    EchoStreamConfig,
    EchoStreamForSpeechToSpeechTranslation,
    EchoStreamProcessor,
    EmformerConfig,
)
from modeling.configuration_echostream import ENCODER_FIELDS, SIZES
from modeling.files import find_whole, write_whole

logger = logging.getLogger(__name__)

STARTS = ("scratch", "resume", "partial", "transfer", "evaluate")
NEEDS_CHECKPOINT = ("partial", "transfer", "evaluate")
REPORT_NAME = "start_report.json"
NUM_NAMED = 4
ENCODER_PREFIX = "encoder."
# Above this share of transcripts that a vocabulary cannot write, a new one is made.
MAX_UNWRITABLE = 0.05
# Heads whose rows are subwords of one language.
SOURCE_PREFIXES = ("asr_ctc_decoder.",)
TARGET_PREFIXES = ("st_ctc_decoder.", "mt_decoder.embed_tokens.")


@dataclass
class StartArguments:
    """How the training starts, and the model."""

    start: str = field(
        default="scratch",
        metadata={
            "help": "All new (scratch), where a run stopped (resume), a checkpoint's decoders and a new encoder "
            "(partial), all of a checkpoint, its decoders frozen at first (transfer), or no training (evaluate).",
            "choices": list(STARTS),
        },
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "Folder or file of the weights. `inspect_checkpoint.py` says how to start."}
    )
    size: str = field(default="mini", metadata={"help": "Size of a new model.", "choices": list(SIZES)})
    model_fields: list[str] | None = field(
        default=None,
        metadata={"help": "Fields of a new model's configuration, as name=value, such as segment_length=16."},
    )
    vocab_size: int = field(default=500, metadata={"help": "Subwords of each language, where a vocabulary is new."})
    num_units: int | None = field(
        default=None,
        metadata={"help": "Speech units of a new model. Default: up to the greatest of the training split."},
    )
    source_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer of the speech: a folder, a Hub name or a .model of sentencepiece. Default: see start."
        },
    )
    target_tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer of the translations, likewise; a file of weights alone needs both."}
    )

    def __post_init__(self):
        if self.start in NEEDS_CHECKPOINT and not self.checkpoint:
            raise ValueError(f"`checkpoint` must be given with `--start {self.start}`, got none.")
        if self.start == "scratch" and self.checkpoint:
            raise ValueError(
                f"`checkpoint` must be left out with `--start scratch`, got {self.checkpoint}. Start partial or "
                "transfer."
            )

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.start != "evaluate"

    @property
    def fields(self) -> dict[str, object]:
        """
        The configuration's fields that the user gives.

        Raises:
            ValueError: One is no name=value, or no field.
        """
        return parse_fields(self.model_fields or ())


def parse_fields(tokens: Sequence[str]) -> dict[str, object]:
    """
    Returns fields of an [`EchoStreamConfig`] from `name=value`; `encoder.name` is a field of its encoder.

    Raises:
        ValueError: A token is no name=value, the value no number, or the name no field.

    Example:

    ```python
    >>> from training.start import parse_fields

    >>> parse_fields(["segment_length=16", "dropout=0.2"])
    {'segment_length': 16, 'dropout': 0.2}

    ```
    """
    of_encoder = {f"{ENCODER_PREFIX}{name}" for name in EmformerConfig.__dataclass_fields__}
    known = {*of_encoder, *ENCODER_FIELDS, *EchoStreamConfig.__dataclass_fields__}
    fields = {}
    for token in tokens:
        name, equals, value = token.partition("=")
        if not equals or name not in known:
            raise ValueError(
                f"`model_fields` must be name=value with a field of the configuration, got {token!r}. "
                "`modeling/configuration_echostream.py` lists them."
            )
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`model_fields` must give `{name}` a number, got {value!r}.") from error
    return fields


@dataclass
class StartReport:
    """
    What a start has loaded.

    Args:
        start: How.
        checkpoint: The last part of its path, or None.
        kind: Of the checkpoint.
        loaded: Weights that were taken.
        skipped: Weights of the checkpoint that were not, and why.
        mismatched: Weights whose shape is another one: theirs and the model's.
        fresh: Weights of the model that start random.
        facts: Numbers of the checkpoint, such as its epoch.
    """

    start: str
    checkpoint: str | None = None
    kind: str | None = None
    loaded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)

    def describe(self) -> str:
        """Returns a sentence on each part."""
        if self.checkpoint is None:
            return f"Start {self.start}: all {len(self.fresh)} weights are new."
        lines = [
            f"Start {self.start} from {KINDS[self.kind]}, {self.checkpoint}: {len(self.loaded)} weights loaded, "
            f"{len(self.skipped)} skipped, {len(self.mismatched)} of another shape, {len(self.fresh)} new here."
        ]
        lines += [f"Skipped, {reason}: {_list_first(names)}." for reason, names in _group(self.skipped).items()]
        lines += [
            f"Of another shape: {name} ({shapes})." for name, shapes in list(self.mismatched.items())[:NUM_NAMED]
        ]
        return "\n".join(lines)

    @property
    def has_stages(self) -> bool:
        """Whether the encoder trains alone at first."""
        return self.start == "transfer"

    def write(self, folder: str | Path) -> None:
        """Writes all names into `start_report.json` in `folder`, whole."""
        with write_whole(folder) as scratch:
            (scratch / REPORT_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_report(folder: str | Path) -> StartReport | None:
    """Returns what [`StartReport.write`] has left in `folder`, if it did."""
    path = find_whole(folder, REPORT_NAME)
    return StartReport(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _group(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return groups


def _list_first(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def plan_loading(
    shapes: Mapping[str, torch.Size],
    checkpoint: TranslationCheckpoint,
    start: str,
    *,
    excluded: Mapping[str, str] | None = None,
) -> StartReport:
    """
    Returns what of a checkpoint a start would load into a model, by name; nothing is loaded.

    Args:
        shapes: Of the model's weights by name.
        checkpoint: Where from.
        start: `"partial"` takes decoders only.
        excluded: Prefixes of weights that do not belong to this model's vocabulary, and why.
    """
    report = StartReport(start, checkpoint.path.name, checkpoint.kind, facts=checkpoint.facts)
    for name, tensor in checkpoint.state.items():
        theirs = checkpoint.names[name]
        reason = next((why for prefix, why in (excluded or {}).items() if name.startswith(prefix)), None)
        if start == "partial" and not name.startswith(DECODER_PREFIXES):
            report.skipped[theirs] = "of the encoder, which is new"
        elif name not in shapes:
            report.skipped[theirs] = "unknown to this model"
        elif reason:
            report.skipped[theirs] = reason
        elif tensor.shape != shapes[name]:
            report.mismatched[name] = f"{tuple(tensor.shape)} there, {tuple(shapes[name])} here"
        else:
            report.loaded.append(name)
    taken = set(report.loaded)
    report.fresh = [name for name in shapes if name not in taken]
    return report


def load_weights(
    model: EchoStreamForSpeechToSpeechTranslation,
    checkpoint: TranslationCheckpoint,
    start: str,
    *,
    excluded: Mapping[str, str] | None = None,
) -> StartReport:
    """
    Loads what of a checkpoint fits, and returns what that was.

    Args:
        model: Freshly made.
        checkpoint: Where from.
        start: `"partial"`, `"transfer"` or `"evaluate"`.
        excluded: As for [`plan_loading`].

    Raises:
        ValueError: The encoder is a Conformer and wanted; nothing fits; a weight of another shape where all are
            wanted; or a number is not finite.
    """
    if start != "partial" and checkpoint.encoder_kind == "conformer":
        raise ValueError(
            f"`checkpoint` must have an Emformer's encoder for `--start {start}`, got a Conformer's in "
            f"{checkpoint.path.name}: its layers mean something else. `--start partial` takes its decoders."
        )
    state = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    report = plan_loading(shapes, checkpoint, start, excluded=excluded)
    if start != "partial" and report.mismatched:
        raise ValueError(
            f"`checkpoint` must have the model's sizes for `--start {start}`, got {checkpoint.path.name} with "
            f"{_list_first([f'{name} ({shape})' for name, shape in report.mismatched.items()])}. Give its sizes as "
            "`model_fields`, or start partial."
        )
    if not report.loaded:
        raise ValueError(
            f"`checkpoint` must have weights that fit, got {checkpoint.path.name} with none: "
            f"{len(report.skipped)} are skipped and {len(report.mismatched)} of another shape."
        )
    if broken := [name for name in report.loaded if not checkpoint.state[name].isfinite().all()]:
        raise ValueError(
            f"`checkpoint` must hold finite numbers, got NaN or infinity in {_list_first(broken)} of "
            f"{checkpoint.path.name}. Its training diverged; take an earlier one."
        )
    with torch.no_grad():
        for name in report.loaded:
            state[name].copy_(checkpoint.state[name])
    return report


def make_translation_config(
    arguments: StartArguments,
    checkpoint: TranslationCheckpoint | None,
    *,
    source_vocab_size: int,
    vocab_size: int,
    num_units: int | None,
) -> EchoStreamConfig:
    """
    Returns the configuration of a new model: of a folder's decoders where they are loaded, else of the size.

    Args:
        arguments: Size and fields.
        checkpoint: Where weights come from.
        source_vocab_size, vocab_size: Of the vocabularies.
        num_units: Speech units, None for those of the checkpoint or of the size.
    """
    fields = {"source_vocab_size": source_vocab_size, "vocab_size": vocab_size, **arguments.fields}
    if checkpoint is None or checkpoint.config is None:
        if num_units is not None:
            offset = fields.get("unit_offset", EchoStreamConfig.unit_offset)
            fields.setdefault("unit_vocab_size", offset + num_units + 1)
        return _make_sized(arguments.size, fields)
    values = checkpoint.config.to_dict()
    if arguments.start == "partial":
        values["encoder_config"] = EchoStreamConfig.from_size(arguments.size).encoder_config.to_dict()
    values = {name: value for name, value in values.items() if name not in ("architectures", "auto_map")}
    config = EchoStreamConfig.from_dict(values)
    for name, value in fields.items():
        owner = config.encoder_config if name.startswith(ENCODER_PREFIX) else config
        setattr(owner, name.removeprefix(ENCODER_PREFIX), value)
    config.validate()
    return config


def _make_sized(size: str, fields: Mapping[str, object]) -> EchoStreamConfig:
    """The configuration of a size with other fields, of the encoder where their names begin so."""
    encoder = {name: value for name, value in fields.items() if name.startswith(ENCODER_PREFIX)}
    rest = {name: value for name, value in fields.items() if name not in encoder}
    encoder = {name.removeprefix(ENCODER_PREFIX): value for name, value in encoder.items()}
    return EchoStreamConfig.from_size(size, encoder=encoder, **rest)


def choose_tokenizers(
    arguments: StartArguments,
    checkpoint: TranslationCheckpoint | None,
    texts: Mapping[str, Sequence[str]],
    languages: Sequence[str] | None,
    *,
    keeps_own: bool = False,
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase, dict[str, str]]:
    """
    Returns the tokenizers of both languages, and prefixes of a checkpoint's weights that are of other vocabularies.

    One that is named is taken; a folder's own is kept where it can write the transcripts; otherwise it is made anew.

    Args:
        arguments: The names, the vocabulary's size.
        checkpoint: Where weights come from.
        texts: Normalised transcripts of the training split, `source` and `target`.
        languages: Codes of source and target.
        keeps_own: Whether the checkpoint must stay as it is, as an adapter's base must.

    Raises:
        ValueError: A file of weights alone has vocabularies that nobody names, or a tokenizer other special tokens; or
            a checkpoint that must stay as it is cannot write the transcripts, or is given another tokenizer.
    """
    codes = dict(zip(("source", "target"), [*(languages or ()), None, None], strict=False))
    named = {"source": arguments.source_tokenizer, "target": arguments.target_tokenizer}
    prefixes = {"source": SOURCE_PREFIXES, "target": TARGET_PREFIXES}
    if checkpoint is not None and not checkpoint.is_whole and arguments.target_tokenizer is None:
        raise ValueError(
            f"`target_tokenizer` must be given with {checkpoint.path.name}, which holds weights alone: which subword "
            "a row of its embeddings is, only its vocabulary says."
        )
    chosen, excluded = {}, {}
    for side in ("source", "target"):
        own = _load_own(checkpoint, side)
        if named[side]:
            chosen[side] = load_subwords(named[side], language=codes[side])
        elif own is not None and count_unwritable(own, texts[side]) <= MAX_UNWRITABLE * len(texts[side]):
            chosen[side] = own
        else:
            chosen[side] = train_subwords(texts[side], arguments.vocab_size, language=codes[side])
        check_special_tokens(chosen[side], f"{side}_tokenizer")
        is_same = own is not None and own.get_vocab() == chosen[side].get_vocab()
        is_trusted = checkpoint is not None and not checkpoint.is_whole and named[side]
        if checkpoint is not None and not is_same and not is_trusted:
            excluded |= dict.fromkeys(prefixes[side], f"of another {side} vocabulary")
            if keeps_own:
                raise _vocabulary_error(side, own, texts[side])
    return chosen["source"], chosen["target"], excluded


def _vocabulary_error(side: str, own: PreTrainedTokenizerBase | None, texts: Sequence[str]) -> ValueError:
    column = {"source": "text", "target": "target_text"}[side]
    if own is None or count_unwritable(own, texts) <= MAX_UNWRITABLE * len(texts):
        return ValueError(
            f"`{side}_tokenizer` must be the base's own where an adapter is trained, got another one. Leave it out."
        )
    known = set("".join(own.get_vocab()))
    unknown = sorted(set("".join(texts)) - known - {" "})
    return ValueError(
        f"`{column}` must be written in the base's vocabulary where an adapter is trained, got "
        f"{count_unwritable(own, texts)} of {len(texts)} rows with characters that it lacks "
        f"({name_characters(unknown)}). Write figures as words, or train the whole model."
    )


def load_subwords(name: str, *, language: str | None) -> PreTrainedTokenizerBase:
    """
    Returns a tokenizer by its folder or Hub name, or of a `.model` file of sentencepiece.

    Raises:
        ValueError: As [`read_sentencepiece`].
    """
    if name.endswith(MODEL_SUFFIX):
        return read_sentencepiece(name, language=language)
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _load_own(checkpoint: TranslationCheckpoint | None, side: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of one side that a folder has."""
    if checkpoint is None or not checkpoint.is_whole:
        return None
    processor = EchoStreamProcessor.from_pretrained(checkpoint.path)
    return processor.tokenizer if side == "source" else processor.target_tokenizer


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, argument: str) -> None:
    """
    Makes sure that a tokenizer numbers its special tokens as the model does.

    Raises:
        ValueError: It does not.
    """
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    if ids != list(range(len(SPECIAL_TOKENS))):
        raise ValueError(
            f"`{argument}` must have {', '.join(SPECIAL_TOKENS)} as its first ids, got {ids}. The first is the blank "
            "of CTC, the second pads."
        )


def find_num_units(units: Iterable[Sequence[int] | None]) -> int | None:
    """Returns one more than the greatest unit, None if there is none."""
    return max((max(row) + 1 for row in units if row), default=None)


def recommend_start(checkpoint: TranslationCheckpoint, shapes: Mapping[str, torch.Size]) -> tuple[str, str]:
    """
    Returns which way to start a model from a checkpoint, and why.

    Args:
        checkpoint: What there is.
        shapes: Of the model's weights by name.
    """
    whole, parts = (plan_loading(shapes, checkpoint, start) for start in ("transfer", "partial"))
    num_decoders = sum(name.startswith(DECODER_PREFIXES) for name in shapes)
    if checkpoint.has_training_state and not whole.mismatched and not whole.fresh:
        return "resume", "it is a checkpoint of a training, with optimizer and schedule, and all weights fit"
    if checkpoint.encoder_kind == "conformer":
        if parts.loaded:
            return "partial", (
                f"its encoder is a Conformer, which an Emformer cannot take; {len(parts.loaded)} of the "
                f"{num_decoders} weights of the decoders fit"
            )
        return "scratch", "its encoder is a Conformer, and none of its decoders fits"
    if not whole.mismatched and not whole.fresh:
        return "transfer", "all weights fit; for the same languages `evaluate` says first what it can"
    if parts.loaded:
        return "partial", (
            f"{len(whole.mismatched)} weights have another shape and {len(whole.fresh)} are not there, but "
            f"{len(parts.loaded)} of the {num_decoders} weights of the decoders fit"
        )
    return "scratch", "nothing of it fits this model"
