"""Scores an audio language model with the prompts of its training: WER, or exact match and slot F1 of answers in JSON.

python recipes/evaluate_audio_lm.py --model_name_or_path outputs/barista --dataset barista \\
    --response_column slots --response_format json --instruction "Order as JSON."

With --shots 4: behind four spoken examples with their answers, the baseline that costs no training.
"""

import json
import random
from dataclasses import dataclass, field

from accelerate import PartialState

from data.conversation_batches import ClipWindows
from data.instructions import JSON, load_conversations
from inference.audio_answers import grade_answers, load_audio_chat
from modeling.files import write_text
from publishing.report import print_results
from training.arguments import parse_arguments
from training.audio_lm_results import answer_split, list_answers, probe_silence
from training.audio_lm_setup import InstructionArguments, read_options
from training.endings import run_main


@dataclass
class EvaluateAudioLMArguments:
    """What is evaluated, and how."""

    model_name_or_path: str = field(metadata={"help": "Bundle or whole checkpoint: a folder or a Hub name."})
    shots: int = field(default=0, metadata={"help": "Solved examples of the training split in front of each prompt."})
    check_silence: bool = field(default=True, metadata={"help": "Also say what is answered to silence and noise."})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of an answer."})
    batch_size: int = field(default=16, metadata={"help": "Conversations answered together."})
    seed: int = field(default=0, metadata={"help": "Draws the examples of --shots."})
    output_file: str | None = field(
        default=None, metadata={"help": "JSON file for scores and answers; it is replaced."}
    )

    def __post_init__(self):
        if self.shots < 0:
            raise ValueError(f"`shots` must be at least 0, got {self.shots}.")


ARGUMENTS = (EvaluateAudioLMArguments, InstructionArguments)


def draw_examples(arguments: EvaluateAudioLMArguments, data_args: InstructionArguments, processor):
    """Returns the conversations of the training split, their windows, and which are shown; None without any."""
    if not arguments.shots:
        return None
    conversations = load_conversations(split=data_args.train_split, **read_options(data_args))
    drawn = random.Random(arguments.seed).sample(range(len(conversations)), min(arguments.shots, len(conversations)))
    shown = [conversations[number] for number in drawn]
    windows = ClipWindows(shown, processor)  # of these alone: the others are not read
    return shown, windows, [number for number in range(len(shown)) if number not in windows.faulty]


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    # Arguments
    arguments, data_args = parse_arguments(*ARGUMENTS, argv=argv)

    # Model and processor
    model, processor = load_audio_chat(arguments.model_name_or_path)

    # Data
    conversations = load_conversations(split=data_args.eval_split, **read_options(data_args))
    windows = ClipWindows(conversations, processor)
    examples = draw_examples(arguments, data_args, processor)

    # Evaluate
    limits = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}
    answered = answer_split(model, processor, conversations, windows, examples=examples, **limits)
    answers, references = [answer for _, answer in answered], [conversation.answer for conversation, _ in answered]
    is_json = data_args.response_format == JSON
    results = grade_answers(answers, references, is_json=is_json)
    if arguments.check_silence and len(answered[0][0].clips) == 1:
        limit = {"max_new_tokens": arguments.max_new_tokens}
        results |= probe_silence(model, processor, answered[0][0], is_json=is_json, **limit)

    # Write
    if PartialState().is_main_process:
        print_results(results)
        if arguments.output_file:
            content = {**results, "shots": arguments.shots, "rows": list_answers(answered)}
            write_text(arguments.output_file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_main(main)
