"""The two sides of an audio language model, each of which also stands alone: loaded, its mode set, its LoRA saved.

mode     weights           trains
frozen   as they are       nothing
full     as they are       all of them, but what its class itself holds still (Whisper's positions)
lora     as they are       LoRA in the linear layers of its blocks
qlora    NF4, quantised    the same
         twice
"""

import logging
import re
from collections.abc import Sequence

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .adapter_layer import is_adapter_parameter
from .adapters import check_adapter_name
from .audio_encoders import load_encoder, quiet_load_report, read_config

logger = logging.getLogger(__name__)

MODES = ("frozen", "full", "lora", "qlora")
ENCODER, LANGUAGE_MODEL = "encoder", "language_model"  # the sides, and the names of their adapters
AUDIO_TOKEN = "<|audio|>"
LORA_RANK = {ENCODER: 8, LANGUAGE_MODEL: 16}
# The layers that LoRA goes into, by `model_type`: each pattern begins at the stack of blocks of its own side.
BLOCK = r"(?:.*\.)?layers\.\d+\."
WAVE_ATTENTION, WAVE_FEED_FORWARD = r"attention\.(?:k|v|q|out)_proj", r"feed_forward\.(?:intermediate|output)_dense"
LLAMA = r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
LORA_TARGETS = {
    "whisper": BLOCK + r"(?:self_attn\.(?:q|k|v|out)_proj|fc1|fc2)",
    "hubert": BLOCK + f"(?:{WAVE_ATTENTION}|{WAVE_FEED_FORWARD})",
    "wav2vec2": BLOCK + f"(?:{WAVE_ATTENTION}|{WAVE_FEED_FORWARD})",
    # WavLM's attention hands the bare weights of its layers to a function (transformers 5.23): LoRA there would do
    # nothing, and 4-bit weights are no matrices.
    "wavlm": BLOCK + WAVE_FEED_FORWARD,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), BLOCK + LLAMA),
}
NOT_QUANTIZED = {"wavlm": ["q_proj", "k_proj", "v_proj", "out_proj"]}


def check_mode(mode: str, flag: str) -> str:
    """
    Returns `mode`.

    Raises:
        ValueError: There is no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"`{flag}` must be one of {', '.join(MODES)}, got {mode!r}.")
    return mode


def is_quantized(side: nn.Module) -> bool:
    """Whether a side's weights are in 4 bits."""
    return any(hasattr(module, "support_avx512bf16_for_cpu") for module in side.modules())


def load_audio_encoder(
    model_name_or_path: str,
    mode: str = "frozen",
    *,
    dtype: str | torch.dtype = "float32",
    load_in_4bit: bool = False,
    **kwargs,
) -> PreTrainedModel:
    """
    Returns a pretrained encoder alone, its mode set: run it with [`run_encoder`], which gives all layers' states.

    Args:
        model_name_or_path: Folder or Hub name of a Whisper, HuBERT, Wav2Vec2, WavLM or other encoder.
        mode: frozen, full, lora or qlora.
        dtype: Of its weights; of those that 4 bits leave as they are.
        load_in_4bit: Quantise to NF4 in mode frozen too.
        kwargs: As in `from_pretrained`.

    Raises:
        ValueError: As [`load_encoder`] and [`set_side_mode`].
    """
    is_in_4bit = check_mode(mode, "encoder_mode") == "qlora" or load_in_4bit
    quantization = {"quantization_config": make_nf4_config(model_name_or_path, **kwargs)} if is_in_4bit else {}
    encoder = load_encoder(model_name_or_path, dtype=dtype, **quantization, **kwargs)
    set_side_mode(keep_4bit_trainable(encoder), mode, ENCODER)
    return encoder


def load_language_model(
    model_name_or_path: str,
    mode: str = "frozen",
    *,
    dtype: str | torch.dtype = "float32",
    load_in_4bit: bool = False,
    **kwargs,
) -> PreTrainedModel:
    """
    Returns a pretrained causal language model alone, its mode set; [`load_tokenizer`] gives its tokenizer.

    Args:
        model_name_or_path: Folder or Hub name.
        mode: frozen, full, lora or qlora.
        dtype: Of its weights; of those that 4 bits leave as they are.
        load_in_4bit: Quantise to NF4 in mode frozen too.
        kwargs: As in `from_pretrained`.

    Raises:
        ValueError: As [`set_side_mode`].
    """
    is_in_4bit = check_mode(mode, "llm_mode") == "qlora" or load_in_4bit
    quantization = {"quantization_config": make_nf4_config(model_name_or_path, **kwargs)} if is_in_4bit else {}
    with quiet_load_report():
        model = AutoModelForCausalLM.from_pretrained(
            model_name_or_path, dtype=dtype, **quantization, **({"trust_remote_code": False} | kwargs)
        )
    set_side_mode(keep_4bit_trainable(model), mode, LANGUAGE_MODEL)
    return model


def load_tokenizer(model_name_or_path: str, **kwargs) -> PreTrainedTokenizerBase:
    """
    Returns a language model's tokenizer, with a pad token in any case.

    Where there is none the end token pads too: what is padding is known by its place, never by its number.

    Args:
        model_name_or_path: Folder or Hub name.
        kwargs: As in `from_pretrained`.

    Raises:
        ValueError: It has no end token either.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **({"trust_remote_code": False} | kwargs))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"`language_model` must have a tokenizer with a pad token or an end token, got {model_name_or_path} "
                "with neither. Set one in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("%s has no pad token; its end token %s pads.", model_name_or_path, tokenizer.eos_token)
    return tokenizer


def add_audio_token(tokenizer: PreTrainedTokenizerBase, audio_token: str = AUDIO_TOKEN) -> int:
    """Returns the number of the placeholder, a special token that is added where there is none."""
    if audio_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [audio_token]}, replace_extra_special_tokens=False)
    return tokenizer.convert_tokens_to_ids(audio_token)


def make_nf4_config(model_name_or_path: str, **kwargs) -> BitsAndBytesConfig:
    """Returns the setting with which a side loads in NF4 with double quantisation."""
    config = read_config(model_name_or_path, **kwargs)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=NOT_QUANTIZED.get(config.model_type),
    )


def keep_4bit_trainable(model: PreTrainedModel) -> PreTrainedModel:
    """
    Returns `model`, whose 4-bit layers an evaluation leaves as they are.

    On a CPU with AVX512-BF16 it would repack their weights, and gradients behind them would be zero ever after
    (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if module.bias is not None:
                # The first `forward` would do so, and the base would be another by its fingerprint.
                module.bias.data = module.bias.data.to(module.compute_dtype)
    return model


def set_side_mode(side: PreTrainedModel, mode: str, name: str, *, lora: LoraConfig | None = None) -> None:
    """
    Makes exactly what the mode says trainable in an encoder or a causal language model; adds its LoRA if need be.

    A LoRA that is there stays, and acts, in every mode; it trains in the modes lora and qlora.

    Args:
        side: An encoder, or a causal language model.
        mode: frozen, full, lora or qlora.
        name: Of its LoRA, `"encoder"` or `"language_model"`.
        lora: Settings of a LoRA that is to be added. Default: [`make_lora_config`].

    Raises:
        ValueError: There is no such mode, or it does not fit the precision of the weights.
    """
    flag = "encoder_mode" if name == ENCODER else "llm_mode"
    if (check_mode(mode, flag) in ("lora", "full") and is_quantized(side)) or (
        mode == "qlora" and not is_quantized(side)
    ):
        form = "in 4 bits" if is_quantized(side) else "not in 4 bits"
        raise ValueError(f"`{flag}` must fit the weights, got {mode!r} and weights {form}. Load it in this mode.")
    if mode in ("lora", "qlora") and name not in getattr(side, "peft_config", {}):
        add_lora(side, name, lora)
    held = find_held_parameters(side)
    for key, parameter in side.named_parameters():
        if is_adapter_parameter(key):
            parameter.requires_grad_(mode in ("lora", "qlora") and f".{check_adapter_name(name)}." in key)
        elif parameter.is_floating_point():
            parameter.requires_grad_(mode == "full" and key not in held)


def find_held_parameters(side: nn.Module) -> set[str]:
    """Returns the names of parameters that are constants: Whisper's positions are sinusoids and never train."""
    return {"embed_positions.weight"} if isinstance(side, WhisperEncoder) else set()


def add_lora(side: PreTrainedModel, name: str, config: LoraConfig | None = None) -> None:
    """
    Adds a fresh LoRA, in fp32, to an encoder or a causal language model.

    Raises:
        ValueError: Its patterns match nothing.
    """
    try:
        side.add_adapter(config or make_lora_config(side, name), name)
    except ValueError as error:
        raise ValueError(f"`{name}_lora_targets` must match layers of the {name} ({error}).") from error
    cast_adapter_dtype(side, name)


def make_lora_config(
    side: PreTrainedModel,
    name: str,
    *,
    rank: int | None = None,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] | None = None,
) -> LoraConfig:
    """
    Returns settings of a LoRA that fit a side's family.

    Args:
        side: The encoder or causal language model that it is for.
        name: `"encoder"` or `"language_model"`.
        rank: Default: 8 for an encoder, 16 for a language model.
        alpha: Default: twice the rank.
        dropout: On the input of each LoRA.
        targets: A regular expression over whole names in the side, or suffixes of them. Default: the linear layers of
            its blocks that a LoRA acts in.
    """
    rank = LORA_RANK[name] if rank is None else rank
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=find_lora_targets(side) if targets is None else targets,
    )


def find_lora_targets(side: PreTrainedModel) -> str:
    """Returns a pattern over the linear layers in the blocks of a side; of an unknown family, all that are there."""
    if (known := LORA_TARGETS.get(side.config.model_type)) is not None:
        return known
    stack = find_blocks(side)
    names = sorted(
        {name for block in stack for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    )
    prefix = next(name for name, module in side.named_modules() if module is stack).rpartition(".")[2]
    return rf"(?:.*\.)?{prefix}\.\d+\.(?:{'|'.join(map(re.escape, names))})"


def find_blocks(side: nn.Module) -> nn.ModuleList:
    """
    Returns the stack of blocks of an encoder or language model: its longest list of modules of one class.

    Raises:
        ValueError: It has none.
    """
    stacks = [
        module
        for module in side.modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
        if not isinstance(module[0], (BaseTunerLayer, nn.Linear))
    ]
    if not stacks:
        raise ValueError(
            f"`model` must have a stack of blocks, got a {type(side).__name__} with none. Name the layers."
        )
    return max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()))
