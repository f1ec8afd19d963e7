"""What a training of an audio language model consists of: its flags, its stages, its data, and what is cached."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial

import torch
from accelerate import PartialState
from peft import LoraConfig
from transformers import AutoProcessor, PreTrainedModel

from data.code_digest import digest_code
from data.conversation_batches import ClipWindows, ConversationDataset, TranscriptDataset
from data.instructions import JSON, TEXT, Conversation, load_conversations
from data.state_cache import build_cache, resolve_cache_folder
from data.timed_transcripts import load_timed_transcripts
from modeling import AudioLMForConditionalGeneration, AudioLMProcessor
from modeling.audio_lm_modes import PROJECTOR_MODES, find_side, set_modes
from modeling.audio_lm_sides import ENCODER, LANGUAGE_MODEL, MODES, make_lora_config
from modeling.configuration_audio_lm import MIX, PROJECTOR_TYPES
from modeling.fingerprint import digest_tensors

logger = logging.getLogger(__name__)

# Highest learning rates by mode, where none is given; SLAM-LLM, Qwen2-Audio and PEFT use such.
PROJECTOR_LR = 1e-3
SIDE_LR = {
    ENCODER: {"full": 1e-5, "lora": 1e-4, "qlora": 1e-4},
    LANGUAGE_MODEL: {"full": 5e-5, "lora": 3e-4, "qlora": 3e-4},
}
OBJECTIVES = ("answer", "align")
MODE_FLAGS = ("encoder_mode", "llm_mode", "projector_mode", "llm_last_layers")


@dataclass
class AudioLMArguments:
    """The parts of the model, what of each trains, and in which stages."""

    encoder: str | None = field(
        default=None, metadata={"help": "Whisper, HuBERT, Wav2Vec2, WavLM or the like: a folder or a Hub name."}
    )
    language_model: str | None = field(default=None, metadata={"help": "Causal language model, likewise."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Bundle to train on from, in place of encoder and language_model."}
    )
    encoder_mode: str = field(
        default="frozen", metadata={"help": "What of the encoder trains.", "choices": list(MODES)}
    )
    llm_mode: str = field(
        default="frozen", metadata={"help": "What of the language model trains.", "choices": list(MODES)}
    )
    projector_mode: str = field(
        default="trainable", metadata={"help": "Whether the projector trains.", "choices": list(PROJECTOR_MODES)}
    )
    llm_last_layers: int = field(
        default=0, metadata={"help": "Last layers of the language model that train whole, with its head."}
    )
    stages: list[str] | None = field(
        default=None,
        metadata={
            "help": "Stages, each a JSON object (in YAML a mapping) of objective, num_train_epochs and the "
            "flags of modes and learning rates, which default to the flags. Default: one stage."
        },
    )
    projector_lr: float = field(default=PROJECTOR_LR, metadata={"help": "Highest learning rate of the projector."})
    encoder_lr: float | None = field(
        default=None, metadata={"help": "Of the encoder. Default: 1e-5 for mode full, 1e-4 for LoRA."}
    )
    llm_lr: float | None = field(
        default=None, metadata={"help": "Of the language model. Default: 5e-5 for mode full, 3e-4 for LoRA."}
    )
    encoder_lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA in the encoder."})
    llm_lora_rank: int = field(default=16, metadata={"help": "Rank of LoRA in the language model."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the inputs of LoRA."})
    projector_type: str = field(
        default="mlp", metadata={"help": "Kind of projector.", "choices": list(PROJECTOR_TYPES)}
    )
    window_frames: int = field(default=8, metadata={"help": "Frames of the encoder that become window_tokens tokens."})
    window_tokens: int = field(default=1, metadata={"help": "Tokens of a window; above 1 for a qformer."})
    encoder_layer: str = field(
        default="last", metadata={"help": "States of the encoder to read: last, mix (learned), or a layer's number."}
    )
    max_answer_tokens: int = field(default=256, metadata={"help": "Longest answer to learn and to give, in tokens."})
    dtype: str = field(default="float32", metadata={"help": "Precision of both sides: float32 or bfloat16."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the caches. Default: below the Hugging Face cache."}
    )
    cache_dtype: str = field(
        default="float32",
        metadata={"help": "Precision of a frozen encoder's cached states.", "choices": ["float32", "bfloat16"]},
    )
    save_full: bool = field(default=False, metadata={"help": "Save every weight, adapters merged, and not a bundle."})

    def __post_init__(self):
        has_parts = self.encoder is not None and self.language_model is not None
        if has_parts == (self.model_name_or_path is not None) or (self.encoder is None) != (
            self.language_model is None
        ):
            raise ValueError(
                "`encoder` and `language_model` must both be given, or `model_name_or_path` alone, got "
                f"{self.encoder}, {self.language_model} and {self.model_name_or_path}."
            )


@dataclass
class InstructionArguments:
    """Which recordings, what is asked about them, and what the answers are."""

    dataset: str = field(
        metadata={"help": "Folder, manifest, Hub name, or .jsonl file of `messages` (docs/audio_lm_training.md)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the transcripts."})
    response_column: str | None = field(
        default=None, metadata={"help": "Column of the answers. Default: response, else the transcripts."}
    )
    response_format: str = field(
        default=TEXT, metadata={"help": "json gives the answers one spelling.", "choices": [TEXT, JSON]}
    )
    instruction: str | None = field(
        default=None, metadata={"help": "What is asked where no column says it. Default: to transcribe."}
    )
    system: str | None = field(default=None, metadata={"help": "What a system's turn says before the conversation."})
    channel: str = field(default="mix", metadata={"help": "Of every recording: mix, left, right or a number from 1."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default="test", metadata={"help": "Split to evaluate on; empty for none."})
    transcripts: str | None = field(
        default=None,
        metadata={"help": "JSON lines of recordings and when their words are said, for stages of objective `align`."},
    )


@dataclass(frozen=True)
class Stage:
    """
    One part of a training.

    Args:
        objective: `"answer"`, or `"align"` for the projector alone.
        num_train_epochs: Passes over it.
        encoder_mode, llm_mode, projector_mode, llm_last_layers: What trains.
        projector_lr, encoder_lr, llm_lr: Highest learning rates; None for the mode's.
    """

    objective: str
    num_train_epochs: float
    encoder_mode: str
    llm_mode: str
    projector_mode: str
    llm_last_layers: int
    projector_lr: float
    encoder_lr: float | None
    llm_lr: float | None

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` of a stage must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        trains = (self.encoder_mode, self.llm_mode, self.llm_last_layers) != ("frozen", "frozen", 0)
        if self.objective == "align" and (trains or self.projector_mode == "frozen"):
            raise ValueError("A stage of `align` must train the projector alone, got other modes. Leave them out.")

    @property
    def corpus(self) -> str:
        """What it trains on: words are aligned with transcripts, answers learned from instructions."""
        return "transcripts" if self.objective == "align" else "instructions"

    @property
    def learning_rates(self) -> dict[str, float]:
        """By part, as [`group_parameters`] takes them."""
        rates = {"projector": self.projector_lr}
        for side, mode, given in (
            (ENCODER, self.encoder_mode, self.encoder_lr), (LANGUAGE_MODEL, self.llm_mode, self.llm_lr)
        ):  # fmt: skip
            mode = "full" if side == LANGUAGE_MODEL and self.llm_last_layers and mode == "frozen" else mode
            rates[side] = SIDE_LR[side].get(mode, 0.0) if given is None else given
        return rates


def list_stages(arguments: AudioLMArguments, *, num_train_epochs: float, has_transcripts: bool) -> list[Stage]:
    """
    Returns the stages of a training; what a stage leaves out is as the flags say, for a stage of `align` frozen.

    Args:
        arguments: Of the run.
        num_train_epochs: Of a stage that has none of its own.
        has_transcripts: Whether the run has a corpus of transcripts.

    Raises:
        ValueError: A stage is no JSON object, has an unknown entry or one of another type, or needs transcripts that
            are not there.
    """
    defaults = {name: getattr(arguments, name) for name in (*MODE_FLAGS, "projector_lr", "encoder_lr", "llm_lr")}
    defaults |= {"objective": "answer", "num_train_epochs": num_train_epochs}
    stages = []
    for number, text in enumerate(arguments.stages or ["{}"], start=1):
        given = _read_stage(text, number)
        frozen = {"encoder_mode": "frozen", "llm_mode": "frozen", "llm_last_layers": 0}
        stage = Stage(**(defaults | (frozen if given.get("objective") == "align" else {}) | given))
        if stage.corpus == "transcripts" and not has_transcripts:
            raise ValueError(f"`transcripts` must name a file for stage {number}, got none. Give the flag.")
        stages.append(stage)
    return stages


def _read_stage(text: str, number: int) -> dict[str, object]:
    try:
        given = json.loads(text)
    except json.JSONDecodeError:
        given = None
    if not isinstance(given, dict):
        raise ValueError(
            f"`stages` must be JSON objects, got {text!r:.80} as stage {number}. Write them in a YAML file."
        )
    names = [entry.name for entry in fields(Stage)]
    if unknown := sorted(given.keys() - names):
        raise ValueError(f"`{unknown[0]}` is not an entry of a stage (stage {number}). There are {', '.join(names)}.")
    for name in given.keys() & {"num_train_epochs", "projector_lr", "encoder_lr", "llm_lr", "llm_last_layers"}:
        if not isinstance(given[name], int | float) or isinstance(given[name], bool):
            raise ValueError(f"`{name}` of stage {number} must be a number, got {given[name]!r}.")
    return given


def load_audio_lm(
    arguments: AudioLMArguments, stages: Sequence[Stage]
) -> tuple[AudioLMForConditionalGeneration, AudioLMProcessor]:
    """
    Returns the model, on this process's device with nothing but its projector trainable, and its processor.

    Args:
        arguments: Of the run.
        stages: Of the run: a side that is qlora in one of them loads in 4 bits.

    Raises:
        ValueError: As `from_encoder_and_lm` and `from_pretrained`.
    """
    device = PartialState().device
    if arguments.model_name_or_path is not None:
        model = AudioLMForConditionalGeneration.from_pretrained(arguments.model_name_or_path)
        return model.to(device), AutoProcessor.from_pretrained(arguments.model_name_or_path, trust_remote_code=False)
    layer = arguments.encoder_layer
    projector = {
        "projector_type": arguments.projector_type,
        "window_frames": arguments.window_frames,
        "window_tokens": arguments.window_tokens,
        "encoder_layer": int(layer) if layer.lstrip("-").isdecimal() else layer,
    }
    modes = {
        name: "qlora" if any(getattr(stage, name) == "qlora" for stage in stages) else "frozen"
        for name in ("encoder_mode", "llm_mode")
    }
    model = AudioLMForConditionalGeneration.from_encoder_and_lm(
        arguments.encoder, arguments.language_model, dtype=arguments.dtype, projector=projector, **modes
    )
    return model.to(device), AudioLMProcessor.from_model(model)


def enter_stage(model: PreTrainedModel, stage: Stage, arguments: AudioLMArguments) -> None:
    """
    Sets the modes of a stage.

    In a model in 4 bits a stage may leave out the side's mode: LoRA that is there acts and does not train.
    """
    loras: dict[str, LoraConfig] = {
        f"{'encoder' if side == ENCODER else 'llm'}_lora": make_lora_config(
            find_side(model, side), side, rank=rank, dropout=arguments.lora_dropout
        )
        for side, rank in ((ENCODER, arguments.encoder_lora_rank), (LANGUAGE_MODEL, arguments.llm_lora_rank))
    }
    set_modes(model, **{name: getattr(stage, name) for name in MODE_FLAGS}, **loras)


class StageData:
    """
    The data of a training's stages: conversations and transcripts are read once, states of a frozen encoder cached.

    Args:
        arguments: Of the run.
        data: Likewise.
        processor: Of the model.
        batch_size: Windows that the encoder hears together for the cache.
        seed: Of what is drawn anew in each epoch.
    """

    def __init__(
        self,
        arguments: AudioLMArguments,
        data: InstructionArguments,
        processor: AudioLMProcessor,
        *,
        batch_size: int,
        seed: int = 0,
    ):
        self.arguments, self.data, self.processor = arguments, data, processor
        self.batch_size, self.seed = batch_size, seed
        self._read: dict[str, tuple[list[Conversation], ClipWindows]] = {}

    def load(self, corpus: str, split: str) -> tuple[list[Conversation], ClipWindows]:
        """Returns the conversations of a split and their windows, read once: of instructions or of transcripts."""
        key = f"{corpus} {split}"
        if key not in self._read:
            if corpus == "transcripts":
                read = load_timed_transcripts(self.data.transcripts, split=split)
            else:
                read = load_conversations(split=split, **read_options(self.data))
            self._read[key] = read, ClipWindows(read, self.processor)
        return self._read[key]

    def prepare(self, model: PreTrainedModel, stage: Stage, split: str) -> ConversationDataset | TranscriptDataset:
        """Returns the dataset of a stage; a frozen encoder's states in place of features."""
        conversations, windows = self.load(stage.corpus, split)
        if stage.objective == "align":
            dataset = TranscriptDataset(conversations, windows, self.processor, seed=self.seed)
        else:
            limit = self.arguments.max_answer_tokens
            dataset = ConversationDataset(conversations, windows, self.processor, max_answer_tokens=limit)
        if stage.encoder_mode == "frozen" and len(windows):
            dataset.states = cache_encoder(
                model, windows, self.processor, folder=self.arguments.cache_dir, dtype=self.arguments.cache_dtype,
                batch_size=self.batch_size,
            )  # fmt: skip
        return dataset


def read_options(data: InstructionArguments) -> dict[str, object]:
    """Returns what [`load_conversations`] takes of the flags."""
    names = ("dataset", "dataset_config", "text_column", "response_column", "response_format", "instruction", "system")
    return {name: getattr(data, name) for name in (*names, "channel")}


def _encode(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    batch = {name: value.to(model.device) for name, value in batch.items()}
    output, num_frames = model.model.encode_audio(**batch)
    states = output.pooler_output
    if model.config.encoder_layer == MIX:  # side by side, because a cache keeps frames of one width
        states = states.transpose(1, 2).flatten(2)
    return {"states": states.float()}, num_frames


def describe_extractor(extractor) -> dict[str, object]:
    """Returns the settings of a feature extractor, without what a saved bundle adds: where its code is."""
    settings = json.loads(extractor.to_json_string())
    return {name: value for name, value in settings.items() if name not in ("auto_map", "processor_class")}


def cache_encoder(
    model: PreTrainedModel,
    windows: ClipWindows,
    processor: AudioLMProcessor,
    *,
    folder: str | None,
    dtype: str,
    batch_size: int,
):
    """
    Returns what the projector reads of each window, computed once and kept on the disk.

    Args:
        model: An audio language model; its encoder's weights, LoRA among them, are part of the cache's key.
        windows: What is heard.
        processor: Of the model.
        folder: Of all caches. Default: as [`resolve_cache_folder`].
        dtype: `"float32"` or `"bfloat16"`.
        batch_size: Windows that the encoder hears together.
    """
    tower = model.model.audio_tower
    was_training = tower.training
    tower.eval()
    key = {
        "encoder": digest_tensors(dict(tower.state_dict())),
        "layer": model.config.encoder_layer,
        "model_code": digest_code(model, tower, processor),
        "extractor": describe_extractor(processor.feature_extractor),
        "max_seconds": processor.max_seconds,
    }
    with PartialState().local_main_process_first():
        cache = build_cache(
            windows, partial(_encode, model), collate=processor.pad_features, key=key,
            folder=resolve_cache_folder(folder), batch_size=batch_size, dtype=dtype,
        )  # fmt: skip
    tower.train(was_training)
    return cache


def describe_stage(stage: Stage) -> dict[str, object]:
    """Returns a stage as results hold it: with the learning rates that it has."""
    rates = {f"{part}_lr": rate for part, rate in stage.learning_rates.items()}
    return {name: value for name, value in asdict(stage).items() if not name.endswith("_lr")} | rates


__all__ = [
    "AudioLMArguments",
    "InstructionArguments",
    "Stage",
    "StageData",
    "cache_encoder",
    "describe_extractor",
    "describe_stage",
    "enter_stage",
    "list_stages",
    "load_audio_lm",
    "read_options",
]
