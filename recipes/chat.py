"""Asks an audio language model about recordings, or lets a Whisper write down what is said in them.

python recipes/chat.py --model_name_or_path BASE --adapter outputs/ldv --audio a.wav b.wav "Who speaks louder?"
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoProcessor, PreTrainedModel

from data.audio import read_audio
from data.domain import find_cuts
from data.prompts import Prompt, WhisperPrompt, make_prompt
from modeling.adapters import load_speech_adapter
from recipes.arguments import parse_arguments
from recipes.audio_tower import load_model

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".au")
ADAPTER_NAME = "adapter"


@dataclass
class ChatArguments:
    """What is asked, of what, about what."""

    model_name_or_path: str = field(metadata={"help": "Whisper or Qwen2-Audio: a folder or a Hub name."})
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


def read_clips(files: Sequence[str], prompt: Prompt) -> list[list[np.ndarray]]:
    """
    Returns the clips `(samples,)` of each file: one, or several where it is longer than the model hears; says so.

    Raises:
        AudioError: A file cannot be used.
    """
    rate, clips = prompt.extractor.sampling_rate, []
    for file in files:
        samples = read_audio(file, sampling_rate=rate)
        cuts = find_cuts(samples, prompt.max_samples)
        if len(cuts) > 2:
            logger.warning(
                "%s has %.1f s and the model hears %g s at once: it is split into %d clips at quiet moments.",
                file,
                len(samples) / rate,
                prompt.max_samples / rate,
                len(cuts) - 1,
            )
        clips.append([samples[start:end] for start, end in zip(cuts, cuts[1:], strict=False)])
    return clips


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    prompt: Prompt,
    chats: Sequence[tuple[str | None, Sequence[np.ndarray]]],
    *,
    max_new_tokens: int,
) -> list[str]:
    """
    Returns what the model says in each chat, by greedy search.

    Args:
        model: Whisper or Qwen2-Audio in evaluation mode, with adapters or without.
        prompt: What asks it, from [`make_prompt`].
        chats: Instruction (`None` for the default one) and clips `(samples,)` of each.
        max_new_tokens: Most tokens of an answer; a Whisper gives no more than it has positions for.

    Raises:
        ValueError: A clip is too long, or a Whisper is asked something or about several clips.
    """
    prompts = [prompt.ask(words, [prompt.count_frames(len(clip)) for clip in clips]) for words, clips in chats]
    asked = prompt.pad_asking(prompts)
    inputs = asked | prompt.extract([clip for _, clips in chats for clip in clips])
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    inputs["input_features"] = inputs["input_features"].to(model.dtype)
    num_asked = next(iter(asked.values())).shape[1]
    # A length and not a number of new tokens: the model's own settings have a length, and two limits make a warning.
    # Whisper adds its prompt to the length, and takes no more than it has positions for.
    longest = max_new_tokens + (0 if isinstance(prompt, WhisperPrompt) else num_asked)
    tokens = model.generate(**inputs, max_length=longest, do_sample=False)
    return prompt.read(tokens, num_asked)


def check_language(model: PreTrainedModel, prompt: Prompt) -> None:
    """
    Makes sure that a Whisper of several languages is told which one it hears.

    Raises:
        ValueError: It is not.
    """
    is_multilingual = getattr(model.generation_config, "is_multilingual", False)
    if is_multilingual and isinstance(prompt, WhisperPrompt) and prompt.tokenizer.language is None:
        raise ValueError("`language` must be given for a Whisper of several languages, got none. Give a code as en.")


def load_chat(
    model_name_or_path: str,
    adapter: str | None = None,
    *,
    language: str | None = None,
    allow_base_mismatch: bool = False,
    **options: object,
) -> tuple[PreTrainedModel, Prompt]:
    """
    Returns a model, in evaluation mode on this process's device, and what asks it.

    Args:
        model_name_or_path: Folder or Hub name of a Whisper or a Qwen2-Audio.
        adapter: Folder or Hub name of an adapter for it.
        language: Of the speech, for a multilingual Whisper.
        allow_base_mismatch: Take an adapter that was made for another base.
        options: `dtype` and `load_in_4bit`, as in [`load_model`].

    Raises:
        ValueError: The model is of another kind or not told its language, or the adapter is of another base.
    """
    prompt = make_prompt(AutoProcessor.from_pretrained(model_name_or_path, trust_remote_code=False), language=language)
    model = load_model(model_name_or_path, device_map={"": PartialState().device}, **options).eval()
    check_language(model, prompt)
    if adapter:
        load_speech_adapter(
            model, adapter, ADAPTER_NAME, processor=prompt.processor, allow_base_mismatch=allow_base_mismatch
        )
    return model.eval(), prompt


def main(argv: list[str] | None = None) -> None:
    """Answers one question, or transcribes."""
    # Arguments
    tokens = flag_question(sys.argv[1:] if argv is None else argv)
    (arguments,) = parse_arguments(ChatArguments, argv=tokens)

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
    main()
