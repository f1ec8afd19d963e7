"""What an audio language model keeps in memory while it trains, by mode: weights, gradients, the optimizer's states.

    python -m benchmarks.audio_lm_memory --pairs base large

Counted from configurations, nothing is loaded: `base` is Whisper-base on SmolLM2-135M, `large` Whisper-large-v3 on
Llama-3.1-8B. Activations come on top, and depend on the batch; `recipes/plan.py` measures them.
"""

import argparse
from collections.abc import Mapping, Sequence

import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, WhisperConfig

from benchmarks.results_file import store_result
from modeling import AudioLMConfig
from modeling.audio_lm_modes import list_trainable
from publishing.report import format_table
from training.audio_lm_results import set_planned_modes
from training.planning import bytes_of, count_optimizer_bytes

PAIRS: dict[str, tuple[str, PreTrainedConfig, PreTrainedConfig]] = {
    "base": (
        "Whisper-base, SmolLM2-135M",
        WhisperConfig(d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048, num_mel_bins=80),
        LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        ),
    ),
    "large": (
        "Whisper-large-v3, Llama-3.1-8B",
        WhisperConfig(
            d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128
        ),
        LlamaConfig(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip
MODES = {
    "projector alone": {},
    "+ LLM LoRA": {"llm_mode": "lora"},
    "+ encoder LoRA": {"llm_mode": "lora", "encoder_mode": "lora"},
    "QLoRA of the LLM": {"llm_mode": "qlora"},
    "QLoRA of both": {"llm_mode": "qlora", "encoder_mode": "qlora"},
    "full LLM": {"llm_mode": "full"},
    "all of it": {"llm_mode": "full", "encoder_mode": "full"},
}
DTYPES = {"base": torch.float32, "large": torch.bfloat16}
OPTIMIZER = "adamw_torch"


def make_model(pair: str, modes: dict[str, str]) -> PreTrainedModel:
    """Returns a model without memory in the modes given, both sides in the pair's precision."""
    _, audio_config, text_config = PAIRS[pair]
    config = AudioLMConfig(audio_config=audio_config, text_config=text_config, audio_token_id=0, window_frames=8)
    with torch.device("meta"):
        return set_planned_modes(config, DTYPES[pair], **modes)


def measure(pair: str, name: str) -> dict[str, object]:
    """Returns a row: sizes in bytes."""
    model = make_model(pair, MODES[name])
    parameters = list(model.parameters())
    row = {
        "pair": PAIRS[pair][0],
        "precision": str(DTYPES[pair]).removeprefix("torch."),
        "row": name,
        "trainable": sum(list_trainable(model).values()),
        "weights": sum(map(bytes_of, parameters)),
        "gradients": sum(bytes_of(value) for value in parameters if value.requires_grad),
        "optimizer": count_optimizer_bytes(model, OPTIMIZER),
    }
    return row | {"sum": row["weights"] + row["gradients"] + row["optimizer"]}


def summarize(rows: Sequence[Mapping]) -> str:
    """Returns the table of the documentation."""
    return format_table(
        [
            {
                "encoder, language model": f"{row['pair']} ({row['precision']})",
                "trains": row["row"],
                "trainable": f"{row['trainable']:,}",
                **{part: f"{row[part] / 2**30:.2f} GiB" for part in ("weights", "gradients", "optimizer", "sum")},
            }
            for row in rows
        ]
    )


def main() -> None:
    """Runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS), help="Models to count.")
    arguments = parser.parse_args()
    rows = [measure(pair, name) for pair in arguments.pairs for name in MODES]
    table = summarize(rows)
    print(table)
    store_result("audio_lm_memory", rows, table, source=__file__)


if __name__ == "__main__":
    main()
