"""What a speech adapter is: its kind, its sizes, the modules that it wraps."""

import re
from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils import PeftType

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
    >>> from modeling.adapter_config import check_module_names

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
