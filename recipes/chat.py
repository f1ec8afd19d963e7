"""Asks an audio language model about recordings, or lets a Whisper write down what is said in them.

python recipes/chat.py --model_name_or_path BASE --adapter outputs/ldv --audio a.wav b.wav "Who speaks louder?"
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.audio import read_audio
from data.prompts import WhisperPrompt
from inference.answering import answer, load_chat, read_clips
from inference.audio_answers import answer_conversations, is_audio_lm, load_audio_chat, read_prompt
from training.arguments import parse_arguments
from training.endings import run_main

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".au")


@dataclass
class ChatArguments:
    """What is asked, of what, about what."""

    model_name_or_path: str = field(
        metadata={"help": "Whisper, Qwen2-Audio, or a bundle of train_audio_lm.py: a folder or a Hub name."}
    )
    audio: list[str] = field(
        metadata={"help": "Recordings: wav, flac, ogg or mp3; a last value that is none is asked."}
    )
    question: str | None = field(
        default=None, metadata={"help": "What to ask; the flag may be left out. Default: to transcribe."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Adapter to use: a folder or a Hub name."})
    allow_base_mismatch: bool = field(
        default=False, metadata={"help": "Take an adapter that was made for another base."}
    )
    language: str | None = field(
        default=None, metadata={"help": "Language code of the speech, such as en, for a multilingual Whisper."}
    )
    system: str | None = field(
        default=None, metadata={"help": "What a bundle's system turn says; as in its training, where it had one."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of an answer."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the weights: auto, float32 or bfloat16."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the weights to 4 bits while loading."})


def flag_question(tokens: Sequence[str]) -> list[str]:
    """
    Returns the command line with the question, a value that is no recording and follows no flag of its own, flagged.

    Raises:
        ValueError: There are several.

    Example:

    ```python
    >>> from recipes.chat import flag_question

    >>> flag_question(["--audio", "a.wav", "b.mp3", "Who speaks?"])
    ['--audio', 'a.wav', 'b.mp3', '--question', 'Who speaks?']

    ```
    """
    rest, questions, flag, num_values = [], [], "", 0
    for token in tokens:
        if token.startswith("--"):
            flag, num_values = token.partition("=")[0], int("=" in token)
            rest.append(token)
            continue
        is_audio = token.lower().endswith(AUDIO_SUFFIXES) or Path(token).is_file()
        is_value = is_audio if flag == "--audio" else bool(flag) and not num_values
        (rest if is_value else questions).append(token)
        num_values += 1
    if len(questions) > 1:
        raise ValueError(f"`question` must be one value, got {questions}. Put it in quotation marks.")
    return [*rest, *(token for question in questions for token in ("--question", question))]


def ask_audio_lm(arguments: ChatArguments) -> None:
    """
    Answers one question about all recordings with a bundle, or a whole audio language model, and prints it.

    Raises:
        ValueError: A flag is given that is for other models.
    """
    changed = {"adapter": arguments.adapter, "language": arguments.language, "load_in_4bit": arguments.load_in_4bit}
    if unfit := [name for name, value in changed.items() if value]:
        raise ValueError(f"`{unfit[0]}` must be left out for a bundle, got {changed[unfit[0]]}. A bundle has its own.")
    model, processor = load_audio_chat(arguments.model_name_or_path)
    question = arguments.question or processor.transcription_prompt
    prompt = read_prompt(question, num_clips=len(arguments.audio), system=arguments.system)
    rate = processor.feature_extractor.sampling_rate
    clips = [read_audio(file, sampling_rate=rate) for file in arguments.audio]
    limits = {"batch_size": 1, "max_new_tokens": arguments.max_new_tokens}
    print(*answer_conversations(model, processor, [prompt], [clips], **limits))


def main(argv: list[str] | None = None) -> None:
    """Answers one question, or transcribes."""
    # Arguments
    tokens = flag_question(sys.argv[1:] if argv is None else argv)
    (arguments,) = parse_arguments(ChatArguments, argv=tokens)

    if is_audio_lm(arguments.model_name_or_path):
        ask_audio_lm(arguments)
        return

    # Model and adapter
    options = {"dtype": arguments.dtype, "load_in_4bit": arguments.load_in_4bit}
    options |= {"language": arguments.language, "allow_base_mismatch": arguments.allow_base_mismatch}
    model, prompt = load_chat(arguments.model_name_or_path, arguments.adapter, **options)

    # Answer
    clips, limit = read_clips(arguments.audio, prompt), {"max_new_tokens": arguments.max_new_tokens}
    if isinstance(prompt, WhisperPrompt):
        for file, parts in zip(arguments.audio, clips, strict=True):
            said = " ".join(answer(model, prompt, [(arguments.question, [part]) for part in parts], **limit))
            print(f"{file}\t{said}" if len(clips) > 1 else said)
    else:
        chat = (arguments.question, [part for parts in clips for part in parts])
        print(*answer(model, prompt, [chat], **limit))


if __name__ == "__main__":
    run_main(main)
