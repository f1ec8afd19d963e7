"""A training step of an audio language model from cached states, against the language model's own on the same tokens.

    python -m benchmarks.audio_lm_speed --encoder openai/whisper-base \\
        --language_model HuggingFaceTB/SmolLM2-135M-Instruct

Only configurations are read; weights are random. Ours is what `recipes/train_audio_lm.py` runs: projector, language
model, logits of the answer's tokens, backward pass. The language model's own is its embeddings, itself, its loss over
all logits, backward pass, with the same parameters trainable. Times are of this process's one thread, because others
may use the machine.
"""

import argparse
import time
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from benchmarks.results_file import store_result
from benchmarks.timing import alternate
from data.collators import IGNORED_LABEL
from modeling.audio_lm_modes import LANGUAGE_MODEL, find_side, list_trainable
from publishing.report import format_table
from training.audio_lm_results import draw_answers, make_planned_model
from training.audio_lm_setup import AudioLMArguments, list_stages

MODES = {
    "projector alone": {"llm_mode": "frozen"},
    "+ LLM LoRA": {"llm_mode": "lora"},
    "full LLM": {"llm_mode": "full"},
}
GOAL = 1.1


def measure(arguments: argparse.Namespace, name: str) -> dict[str, object]:
    """Returns the row of a mode."""
    flags = {"encoder": arguments.encoder, "language_model": arguments.language_model, **MODES[name]}
    lm_args = AudioLMArguments(**flags)
    (stage,) = list_stages(lm_args, num_train_epochs=1, has_transcripts=False)
    model = make_planned_model(lm_args, stage)
    objective, (batch,) = draw_answers(
        model, is_cached=True, num_rows=arguments.num_rows, seconds=[arguments.seconds],
        characters_per_second=arguments.characters_per_second,
    )  # fmt: skip

    def step() -> None:
        """One of ours."""
        model.zero_grad(set_to_none=True)
        objective(**batch)["loss"].backward()

    alone = find_side(model, LANGUAGE_MODEL)
    tokens = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.audio_token_id, 1)
    labels = tokens.masked_fill(batch["labels"] == IGNORED_LABEL, IGNORED_LABEL)

    def step_alone() -> None:
        """One of the language model's."""
        model.zero_grad(set_to_none=True)
        run_alone(alone, tokens, labels, batch["position_ids"])

    options = {"repeats": arguments.repeats, "clock": time.process_time, "max_other_share": float("inf")}
    timings = alternate({"ours": step, "alone": step_alone}, **options)
    ours, theirs = timings["ours"], timings["alone"]
    return {
        "row": name,
        "tokens": tokens.numel(),
        "trainable": sum(list_trainable(model).values()),
        "step_s": ours.median_s,
        "language_model_s": theirs.median_s,
        "ratio": ours.median_s / theirs.median_s,
    }


def run_alone(
    alone: PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Runs the language model forward and backward; gradients reach its input, as they do where a projector trains."""
    embeddings = alone.get_input_embeddings()(tokens).detach().requires_grad_()
    loss = alone(inputs_embeds=embeddings, position_ids=position_ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss


def summarize(rows: Sequence[Mapping]) -> str:
    """Returns the table of the documentation."""
    return format_table(
        [
            {
                "trains": row["row"],
                "tokens": str(row["tokens"]),
                "our step": f"{row['step_s']:.2f} s",
                "language model's own": f"{row['language_model_s']:.2f} s",
                f"ratio (goal {GOAL})": f"{row['ratio']:.2f}",
            }
            for row in rows
        ]
    )


def main() -> None:
    """Runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="Folder or Hub name; its configuration is read.")
    parser.add_argument("--language_model", required=True, help="Likewise.")
    parser.add_argument("--num_rows", type=int, default=4, help="Conversations of a step.")
    parser.add_argument("--seconds", type=float, default=8.6, help="Of audio a conversation.")
    parser.add_argument("--characters_per_second", type=float, default=12.0, help="Of the answers, for each of audio.")
    parser.add_argument("--repeats", type=int, default=5, help="Samples of each.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [measure(arguments, name) for name in MODES]
    table = summarize(rows)
    print(table)
    store_result("audio_lm_speed", rows, table, source=__file__)


if __name__ == "__main__":
    main()
