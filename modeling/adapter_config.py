"""What a speech adapter is: its kind, its sizes, and the modules that it wraps, found in bounded time."""

import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import regex
from peft import PeftConfig
from peft.utils import PeftType
from torch import nn

KINDS = ("mlp", "bottleneck", "replacement", "transformer")
DEFAULT_HIDDEN_SIZES = {"mlp": [512, 256], "replacement": [512, 256], "bottleneck": [64]}
# Modules that a kind wraps, by type of model: a regular expression over whole names, or the ends of names.
DEFAULT_TARGETS = {
    "deepspeech2": {
        "mlp": "classifier",
        "replacement": "classifier",
        "bottleneck": r"encoder\.(conv|rnn_layers\.\d+)",
    },
    # A bottleneck changes what each layer's feed-forward network adds; an mlp corrects the scores.
    **dict.fromkeys(
        ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "unispeech", "unispeech-sat", "sew", "wav2vec2-conformer"),
        {
            "mlp": "lm_head",
            "replacement": "lm_head",
            "bottleneck": r".*encoder\.layers\.\d+\.feed_forward\.output_dense",
        },
    ),
    "wav2vec2-bert": {
        "mlp": "lm_head",
        "replacement": "lm_head",
        "bottleneck": r".*encoder\.layers\.\d+\.ffn2\.output_dense",
    },
    "parakeet_ctc": {"bottleneck": r".*encoder\.layers\.\d+\.feed_forward2\.linear2"},
    "echostream": {"bottleneck": r"(encoder|mt_decoder|unit_decoder)\.layers\.\d+"},
    "emformer": {
        "mlp": "classifier",
        "replacement": "classifier",
        "bottleneck": r"encoder\.layers\.\d+",
    },
    "whisper": dict.fromkeys(("mlp", "bottleneck", "transformer"), ["encoder.layer_norm"]),
    "qwen2_audio": dict.fromkeys(("mlp", "bottleneck", "transformer"), ["multi_modal_projector"]),
}
# A residual adapter changes the input of the module that it wraps ("before") or its output ("after").
POSITIONS = ("before", "after")
RESIDUAL_KINDS = ("bottleneck", "transformer")
# Types of models whose default targets are changed before and not after.
BEFORE_DEFAULT_TARGETS = ("qwen2_audio",)
# Sizes of a transformer, for under 5,000 clips, 5,000 to 20,000, and more.
PRESETS = {
    "lightweight": {"num_layers": 1, "num_heads": 4, "ffn_size": 1024, "dropout": 0.1, "use_gate": False},
    "standard": {"num_layers": 2, "num_heads": 8, "ffn_size": 2048, "dropout": 0.1, "use_gate": True},
    "heavy": {"num_layers": 4, "num_heads": 16, "ffn_size": 4096, "dropout": 0.15, "use_gate": True},
}
# What a transformer has without a preset, and whatever a preset says nothing about.
TRANSFORMER_DEFAULTS = {**PRESETS["standard"], "use_positions": True, "scale_init": 1.0}
TRANSFORMER_FIELDS = ("preset", *(name for name in TRANSFORMER_DEFAULTS if name != "dropout"))
MAX_LAYERS = 64
MAX_SHOWN = 300  # characters of a value in a message
DEFAULT_DROPOUT = 0.1

# Entries of configurations that PEFT matches as keys or in a list: there a regular expression may repeat single
# characters only, at most twice, and takes at most quadratic time. Others are matched by `regex`, with a time limit.
KEY_ENTRIES = ("layers_pattern", "rank_pattern", "alpha_pattern")
REPEATING = re.compile(r"[*+?{]")
REPEATED_GROUP = re.compile(r"\)[*+?{]")
MAX_REPEATS = 2
COUNTS = re.compile(r"\{(\d*),?(\d*)\}")
MAX_COUNTS = 1_000
MAX_PATTERN = 10_000  # characters
PATTERN_SECONDS = 5  # for all names together


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

    A field of another kind than the adapter's must be left out.

    Args:
        kind: `"mlp"`, `"bottleneck"`, `"replacement"` or `"transformer"`, see the top of `adapters.py`.
        target_modules: Names of the modules to wrap, or one regular expression over whole names. Default: what the
            kind wraps in this project's models, in Whisper (the encoder's last norm) and in Qwen2-Audio (the
            projector).
        exclude_modules: Names not to wrap, likewise.
        position: Of a bottleneck or transformer: it changes the wrapped module's input (`"before"`) or output
            (`"after"`). Default: after, but before Qwen2-Audio's projector.
        hidden_sizes: Widths of the hidden layers; a bottleneck has one, a transformer none. An mlp with `[]` is a
            linear map: beside a linear module it trains as that module itself would. Default: `[512, 256]`,
            bottleneck `[64]`.
        dropout: Dropout after every hidden layer while training; of a transformer also on its attention. Default: .1,
            or the preset's.
        preset: Sizes of a transformer, `"lightweight"`, `"standard"` or `"heavy"`; fields that are given win. Default:
            those of `"standard"`. The table in `adapter_blocks.py` has them and the numbers of parameters.
        num_layers: Layers of a transformer.
        num_heads: Heads of its attention; they divide the width of the wrapped module.
        ffn_size: Width inside its feed-forward parts.
        use_gate: Whether each channel of its change has a gate between 0 and 1 for each frame.
        use_positions: Whether it adds positions to its input. Default: yes.
        scale_init: Factor of its change before training, which learns it; not 0. Default: 1.
        base_fingerprint: What the base is, filled in when the adapter is saved; see `fingerprint.py`.
        base_mismatch_allowed: Whether the adapter has been put on another base on purpose.

    Raises:
        ValueError: An unknown kind, preset or position, a field that is another kind's, sizes that are no positive
            integers, a dropout outside [0, 1), a scale that is 0 or not finite, modules that are neither names nor a
            regular expression, or a value of another type.

    Example:

    ```python
    >>> from modeling import DeepSpeech2Config, DeepSpeech2ForCTC, SpeechAdapterConfig

    >>> model = DeepSpeech2ForCTC(DeepSpeech2Config(vocab_size=2000))
    >>> model.add_adapter(SpeechAdapterConfig(kind="mlp"), "alice")
    >>> model.count_parameters()["adapter"]
    1170128
    >>> config = SpeechAdapterConfig(kind="transformer", preset="heavy", num_layers=2)
    >>> config.num_layers, config.num_heads, config.dropout
    (2, 16, 0.15)

    ```
    """

    kind: str = field(default="mlp", metadata={"help": "mlp, bottleneck, replacement or transformer"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to wrap"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules not to wrap"})
    position: str | None = field(default=None, metadata={"help": "before or after the wrapped module"})
    hidden_sizes: list[int] | None = field(default=None, metadata={"help": "widths of the hidden layers"})
    dropout: float | None = field(default=None, metadata={"help": "dropout after every hidden layer"})
    preset: str | None = field(default=None, metadata={"help": "lightweight, standard or heavy"})
    num_layers: int | None = field(default=None, metadata={"help": "layers of a transformer"})
    num_heads: int | None = field(default=None, metadata={"help": "heads of its attention"})
    ffn_size: int | None = field(default=None, metadata={"help": "width inside its feed-forward parts"})
    use_gate: bool | None = field(default=None, metadata={"help": "whether its change has gates"})
    use_positions: bool | None = field(default=None, metadata={"help": "whether it adds positions to its input"})
    scale_init: float | None = field(default=None, metadata={"help": "factor of its change before training"})
    base_fingerprint: dict | None = field(default=None, metadata={"help": "what the base is"})
    base_mismatch_allowed: bool = field(default=False, metadata={"help": "was put on another base on purpose"})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = SPEECH_ADAPTER
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.kind == "transformer":
            self._fill_transformer()
            self._check_transformer()
        else:
            self._fill_and_check_widths()
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be from 0 to below 1, got {self.dropout!r}.")
        self._check_position()
        if not isinstance(self.base_fingerprint, (dict, type(None))) or type(self.base_mismatch_allowed) is not bool:
            raise ValueError(
                "`base_fingerprint` must be a dict and `base_mismatch_allowed` true or false, got "
                f"{self.base_fingerprint!r} and {self.base_mismatch_allowed!r}."
            )
        check_module_names("target_modules", self.target_modules)
        check_module_names("exclude_modules", self.exclude_modules)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)

    def _fill_transformer(self) -> None:
        if self.hidden_sizes is not None:
            raise ValueError(
                f"`hidden_sizes` must be left out of a transformer, got {self.hidden_sizes}. Give a `preset`, or its "
                "sizes one by one."
            )
        if self.preset not in (None, *PRESETS):
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {self.preset!r}.")
        for name, default in (TRANSFORMER_DEFAULTS | PRESETS.get(self.preset, {})).items():
            if getattr(self, name) is None:
                setattr(self, name, default)

    def _check_transformer(self) -> None:
        for name in ("num_layers", "num_heads", "ffn_size"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if self.num_layers > MAX_LAYERS:  # a configuration of unknown origin must not build modules for hours
            raise ValueError(f"`num_layers` must be at most {MAX_LAYERS}, got {self.num_layers}.")
        for name in ("use_gate", "use_positions"):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"`{name}` must be true or false, got {value!r}.")
        is_number = type(self.scale_init) in (int, float) and math.isfinite(self.scale_init)
        if not is_number or not self.scale_init:
            raise ValueError(f"`scale_init` must be a number other than 0, got {self.scale_init!r}.")

    def _fill_and_check_widths(self) -> None:
        if given := [name for name in TRANSFORMER_FIELDS if getattr(self, name) is not None]:
            raise ValueError(f"`{given[0]}` must be left out of a {self.kind} adapter: only a transformer has it.")
        if self.dropout is None:
            self.dropout = DEFAULT_DROPOUT
        if self.hidden_sizes is None:
            self.hidden_sizes = list(DEFAULT_HIDDEN_SIZES[self.kind])
        is_integer = isinstance(self.hidden_sizes, list) and all(type(size) is int for size in self.hidden_sizes)
        is_linear = self.kind == "mlp" and self.hidden_sizes == []
        if not is_linear and (not is_integer or not self.hidden_sizes or min(self.hidden_sizes) < 1):
            raise ValueError(f"`hidden_sizes` must be a list of positive integers, got {self.hidden_sizes!r}.")
        if self.kind == "bottleneck" and len(self.hidden_sizes) != 1:
            raise ValueError(f"`hidden_sizes` of a bottleneck must be one width, got {self.hidden_sizes}.")

    def _check_position(self) -> None:
        if self.position is not None and self.kind not in RESIDUAL_KINDS:
            raise ValueError(f"`position` must be left out of a {self.kind} adapter: it stands beside its module.")
        if self.position not in (None, *POSITIONS):
            raise ValueError(f"`position` must be one of {', '.join(POSITIONS)}, got {self.position!r}.")


def check_module_names(argument: str, names: object) -> None:
    r"""
    Makes sure that `names` is `None`, a regular expression, or a list, set or tuple of names.

    Raises:
        ValueError: It is not.

    Example:

    ```python
    >>> from modeling.adapter_config import check_module_names

    >>> check_module_names("target_modules", r"encoder\.(conv|rnn_layers\.\d+)")

    ```
    """
    if isinstance(names, str):
        _check_valid(argument, names)
    elif names is not None and not (
        isinstance(names, (list, set, tuple)) and all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"`{argument}` must be names or a regular expression, got {repr(names)[:MAX_SHOWN]}.")


def _check_valid(entry: str, pattern: str) -> None:
    try:
        if len(pattern) > MAX_PATTERN:
            raise OverflowError(f"{len(pattern)} characters")
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _invalid(entry, pattern, error) from error


def _invalid(entry: str, pattern: str, error: Exception) -> ValueError:
    return ValueError(f"`{entry}` must be names or a regular expression, got {pattern!r:.{MAX_SHOWN}} ({error}).")


@contextmanager
def bounded_patterns(config: PeftConfig, model: nn.Module) -> Iterator[None]:
    """
    Inside, the patterns of `config` take PEFT no longer than their length says, and match what they matched before.

    Python's `re`, with which PEFT matches, can take for ever and has no time limit; `regex` has one. It finds the
    names that a pattern means, and PEFT gets these names in its place.

    Raises:
        ValueError: A pattern is invalid, takes too long, is not simple where only a simple one may be, or
            `target_modules` matches nothing.
    """
    for entry in KEY_ENTRIES:
        value = getattr(config, entry, None)
        for pattern in [value] if isinstance(value, str) else map(str, value or ()):
            _check_valid(entry, pattern)
            if not _is_simple(pattern):
                raise ValueError(
                    f"`{entry}` must repeat single characters only, at most {MAX_REPEATS} times, got "
                    f"{pattern!r:.{MAX_SHOWN}}. Name the modules."
                )
    before, names = {}, [name for name, _ in model.named_modules() if name]
    try:
        for entry in ("target_modules", "exclude_modules"):
            if not isinstance(pattern := getattr(config, entry, None), str):
                continue
            _check_valid(entry, pattern)
            if not _is_simple(pattern):
                matched, before[entry] = match_names(entry, pattern, names), pattern
                setattr(config, entry, "|".join(map(re.escape, matched)) or None)
                if entry == "target_modules" and not matched:
                    raise ValueError(f"`{entry}` must match a module of the model, got {pattern!r:.{MAX_SHOWN}}.")
        yield
    finally:
        for entry, pattern in before.items():
            setattr(config, entry, pattern)


def _is_simple(pattern: str) -> bool:
    """Whether a valid regular expression cannot take more than quadratic time."""
    return len(REPEATING.findall(pattern)) <= MAX_REPEATS and not REPEATED_GROUP.search(pattern)


def match_names(entry: str, pattern: str, names: Sequence[str]) -> list[str]:
    """
    Returns the names that a regular expression matches as a whole.

    Args:
        entry: What it is in a configuration, for messages.
        pattern: The regular expression.
        names: Names of modules.

    Raises:
        ValueError: It is invalid, takes longer than `PATTERN_SECONDS`, or counts too far.
    """
    _check_valid(entry, pattern)
    counts = [max(1, *(int(count or 0) for count in pair)) for pair in COUNTS.findall(pattern)]
    if math.prod(counts) > MAX_COUNTS:  # one in the other, they are written out before the time begins to count
        raise ValueError(f"`{entry}` must not count to more than {MAX_COUNTS} in braces, got {pattern!r:.200}.")
    end = time.monotonic() + PATTERN_SECONDS
    try:
        compiled = regex.compile(pattern)
        return [name for name in names if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 1e-3))]
    except TimeoutError as error:
        raise ValueError(
            f"`{entry}` must be matched in {PATTERN_SECONDS} seconds, got {pattern!r:.200}. Name the modules, or "
            "repeat single characters only."
        ) from error
    except (regex.error, RecursionError, OverflowError) as error:  # there are expressions that `re` alone takes
        raise _invalid(entry, pattern, error) from error
