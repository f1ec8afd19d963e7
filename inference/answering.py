"""Asks an audio language model about recordings, or lets a Whisper write down what is said in them."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoProcessor, PreTrainedModel

from data.audio import read_audio
from data.domain_clips import find_cuts
from data.prompts import Prompt, WhisperPrompt, make_prompt
from inference.audio_models import load_model
from modeling.adapters import load_speech_adapter

logger = logging.getLogger(__name__)

CHAT_ADAPTER_NAME = "adapter"


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
            model, adapter, CHAT_ADAPTER_NAME, processor=prompt.processor, allow_base_mismatch=allow_base_mismatch
        )
    return model.eval(), prompt
