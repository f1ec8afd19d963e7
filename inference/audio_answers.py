"""Answers of audio language models to conversations, with the very prompts that they were trained on."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from data.instructions import Conversation, make_turn
from data.metrics import CharacterErrorRate, WordErrorRate
from data.structured_answers import parse_answer, score_structured
from data.text import normalize_text
from modeling import AudioLMConfig, AudioLMForConditionalGeneration, AudioLMProcessor
from modeling.audio_lm_modes import set_inference_mode

# What a hallucination check listens to: seconds, and loudness as the deviation of samples; 0 is digital silence.
PROBE_SECONDS = (1.0, 5.0)
PROBE_LEVELS = {"silence": 0.0, "noise": 0.01}


def is_audio_lm(model_name_or_path: str) -> bool:
    """Whether a folder or a repository on the Hub is an audio language model of this project, a bundle or whole."""
    config, _ = PreTrainedConfig.get_config_dict(model_name_or_path)
    return config.get("model_type") == AudioLMConfig.model_type


def load_audio_chat(model_name_or_path: str) -> tuple[AudioLMForConditionalGeneration, AudioLMProcessor]:
    """
    Returns an audio language model, in inference mode on this process's device, and its processor.

    Args:
        model_name_or_path: Bundle or whole checkpoint: a folder or a Hub name.
    """
    model = AudioLMForConditionalGeneration.from_pretrained(model_name_or_path).to(PartialState().device)
    set_inference_mode(model)
    return model, AutoProcessor.from_pretrained(model_name_or_path, trust_remote_code=False)


@torch.inference_mode()
def answer_conversations(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[Sequence[Mapping]],
    clips: Sequence[Sequence[np.ndarray]],
    *,
    batch_size: int,
    max_new_tokens: int,
    states: Sequence[Sequence[Sequence[torch.Tensor]]] | None = None,
) -> list[str]:
    """
    Returns what the model answers in each conversation, by greedy search.

    Args:
        model: An audio language model in evaluation mode.
        processor: Of the model.
        prompts: The turns before the answer, each `{"role", "content"}` with blocks `{"type": "audio"}` and no file.
        clips: Samples `(samples,)` of each conversation's clips, in order.
        batch_size: Conversations answered together; the longest come first.
        max_new_tokens: Most tokens of an answer.
        states: In place of hearing, what [`encode_audio`] has made of each window of each clip, `(frames, width)`.
    """
    sizes = clips if states is None else [[window for clip in own for window in clip] for own in states]
    order = sorted(range(len(prompts)), key=lambda index: (sum(map(len, sizes[index])), index), reverse=True)
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        texts = [ask(processor, prompts[index]) for index in indices]
        if states is None:
            audio = [clip for index in indices for clip in clips[index]]
            inputs = processor(text=texts, audio=audio or None, return_tensors="pt")
        else:
            inputs = _embed_states(model, processor, texts, [states[index] for index in indices])
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        num_asked = inputs["input_ids"].shape[1]
        tokens = model.generate(
            **inputs, max_length=num_asked + max_new_tokens, do_sample=False,
            pad_token_id=processor.tokenizer.pad_token_id,
        )  # fmt: skip
        said = processor.batch_decode(tokens[:, num_asked:], skip_special_tokens=True)
        for index, text in zip(indices, said, strict=True):
            answers[index] = text.strip()
    return answers


def ask(processor: ProcessorMixin, prompt: Sequence[Mapping]) -> str:
    """Returns a prompt as text, one placeholder a clip, up to where the model answers."""
    return processor.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)


def _embed_states(
    model, processor, texts: Sequence[str], states: Sequence[Sequence[Sequence[torch.Tensor]]]
) -> dict[str, torch.Tensor]:
    """As the processor, with placeholders counted from states, which the projector turns into rows."""
    windows = [window for own in states for clip in own for window in clip]
    num_frames = torch.tensor([len(window) for window in windows], dtype=torch.long)
    expanded = []
    for text, own in zip(texts, states, strict=True):
        parts = text.split(processor.audio_token)
        counts = [sum(int(model.config.count_tokens(len(window))) for window in clip) for clip in own]
        pairs = zip(counts, parts[1:], strict=True)
        expanded.append(parts[0] + "".join(processor.audio_token * count + part for count, part in pairs))
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    inputs = tokenizer(
        expanded, padding=True, padding_side="left", return_tensors="pt",
        add_special_tokens=not (bos and expanded[0].startswith(bos)),
    )  # fmt: skip
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if windows:
        padded = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True).to(model.device)
        inputs["audio_embeds"] = model.model.project_audio(padded, num_frames.to(model.device))
    return inputs


def add_examples(prompt: Sequence[Mapping], examples: Sequence[Conversation]) -> tuple[Mapping, ...]:
    """
    Returns a prompt behind solved examples, as turns of the same conversation: in-context learning, without training.

    Args:
        prompt: The turns before the answer.
        examples: Spoken examples with their answers, the nearest last; a system's turn of theirs is left out.
    """
    system = tuple(turn for turn in prompt[:1] if turn["role"] == "system")
    shown = tuple(turn for example in examples for turn in example.messages if turn["role"] != "system")
    return system + shown + tuple(prompt[len(system) :])


def grade_answers(answers: Sequence[str], references: Sequence[str], *, is_json: bool) -> dict[str, float | int]:
    """
    Returns `exact_match` and, of answers in JSON, the rates of [`score_structured`]; of texts, `wer`, `cer` and
    `exact_match` after normalisation.
    """
    if is_json:
        return score_structured(answers, references)
    said, wanted = [normalize_text(answer) for answer in answers], [normalize_text(text) for text in references]
    pairs = {"predictions": said, "references": wanted}
    words, characters = WordErrorRate().compute(**pairs), CharacterErrorRate().compute(**pairs)
    return {
        "wer": words["wer"],
        "cer": characters["cer"],
        "exact_match": sum(map(operator.eq, said, wanted)) / len(said),
        "answers": len(said),
    }


def check_hallucination(
    listen: Callable[[list[np.ndarray]], list[str]], *, sampling_rate: int, is_json: bool, seed: int = 0
) -> dict[str, object]:
    """
    Says what a model answers where nobody speaks.

    Args:
        listen: Returns the answer to each clip `(samples,)`, with the prompt of the task.
        sampling_rate: Of the clips in Hz.
        is_json: Whether answers are objects, of which an empty one says nothing.
        seed: Of the noise.

    Returns:
        `hallucinated`, the share of silent and noisy clips that were answered with words or slots, and `heard`, each
        clip's answer by its name.
    """
    generator = np.random.default_rng(seed)
    clips = {
        f"{name}, {seconds:g} s": level * generator.standard_normal(math.ceil(seconds * sampling_rate))
        for name, level in PROBE_LEVELS.items()
        for seconds in PROBE_SECONDS
    }
    answers = listen([clip.astype(np.float32) for clip in clips.values()])
    is_silent = [parse_answer(answer) == {} if is_json else not normalize_text(answer) for answer in answers]
    return {
        "hallucinated": 1 - sum(is_silent) / len(is_silent),
        "heard": dict(zip(clips, answers, strict=True)),
    }


def read_prompt(instruction: str, *, num_clips: int, system: str | None = None) -> tuple[Mapping, ...]:
    """Returns a question about clips as the turns of a prompt."""
    turns = () if system is None else (make_turn("system", system),)
    return (*turns, make_turn("user", instruction, num_clips=num_clips))


__all__ = [
    "add_examples",
    "answer_conversations",
    "ask",
    "check_hallucination",
    "is_audio_lm",
    "load_audio_chat",
    "read_prompt",
    "grade_answers",
]
