"""What has come of training an audio language model: scores of its answers, its memory, and what its card says."""

import json
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from data.collators import IGNORED_LABEL
from data.conversation_batches import ClipWindows
from data.instructions import JSON, Conversation
from inference.audio_answers import add_examples, answer_conversations, check_hallucination, grade_answers, read_prompt
from modeling import AudioLMConfig, AudioLMForConditionalGeneration
from modeling.audio_encoders import find_frame_formula
from modeling.audio_lm_modes import set_modes, set_training_mode
from modeling.configuration_audio_lm import MIX
from publishing.card import CardArguments, CardSubject, public_name
from publishing.report import format_code
from training.audio_lm_setup import AudioLMArguments, InstructionArguments, Stage, StageData, cache_encoder
from training.objectives.audio_lm import AnswerObjective
from training.planning import quantize_shapes

EXAMPLES = 20  # answers that results keep, to be read
# For plans, where no processor is loaded: of Whisper and of encoders of waves, of English, of a short instruction.
FRAME_SECONDS, CHARACTERS_A_TOKEN, PROMPT_TOKENS = 0.02, 3.0, 20

USAGE = """\
```python
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("{repository}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{repository}", trust_remote_code=True)

question = [{{"type": "audio", "path": "clip.wav"}}, {{"type": "text", "text": {instruction}}}]
chat = [{{"role": "user", "content": question}}]
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
with torch.inference_mode():
    tokens = model.generate(**inputs, max_new_tokens=100)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```
"""


def read_peak_bytes() -> int:
    """Returns the most memory that this process has had so far: of the GPU where it trains on one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summarize_stages(stages: Sequence[Mapping], model: PreTrainedModel, seconds: float) -> dict[str, object]:
    """
    Returns the facts of a training: parameters, those that trained in any stage, speech, time and memory.

    Args:
        stages: Of each stage what the recipe notes: `trainable` by part, `train_runtime` in seconds.
        model: That was trained.
        seconds: Of audio.
    """
    parts = {part: max(stage["trainable"][part] for stage in stages) for part in stages[0]["trainable"]}
    return {
        "total_parameters": sum(value.numel() for value in model.parameters()),
        "trainable_parameters": sum(parts.values()),
        "trainable_by_part": parts,
        "train_seconds": seconds,
        "train_runtime": sum(stage["train_runtime"] for stage in stages),
        "peak_bytes": read_peak_bytes(),
    }


def answer_split(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    windows: ClipWindows,
    *,
    batch_size: int,
    max_new_tokens: int,
    cache: Mapping[str, object] | None = None,
    examples: tuple[Sequence[Conversation], ClipWindows, Sequence[int]] | None = None,
) -> list[tuple[Conversation, str]]:
    """
    Returns conversations whose clips can be heard, each with the answer of a model, in evaluation mode.

    Args:
        model: An audio language model.
        processor: Of the model.
        conversations: What is asked; their own answers are not shown.
        windows: Of their clips.
        batch_size: Conversations answered together.
        max_new_tokens: Most tokens of an answer.
        cache: Settings of [`cache_encoder`], to hear each recording once for several models of one frozen encoder.
        examples: Solved conversations that each prompt begins with: all of them, their windows, and which are shown.
    """
    sources = {"asked": windows}
    states = {"asked": cache_encoder(model, windows, processor, **cache)} if cache is not None else {}
    shown: list[Conversation] = []
    if examples is not None:
        sources["shown"] = examples[1]
        shown = [examples[0][number] for number in examples[2]]
        if cache is not None:
            states["shown"] = cache_encoder(model, examples[1], processor, **cache)

    def hear(source: str, number: int) -> list:
        """Returns each clip of a conversation: its samples, or the states of its windows."""
        own = sources[source].windows[number]
        if cache is not None:
            return [[states[source][window]["states"] for window in clip] for clip in own]
        return [torch.cat([torch.from_numpy(sources[source].read(window)) for window in clip]).numpy() for clip in own]

    before = [clip for number in (examples[2] if examples else ()) for clip in hear("shown", number)]
    kept = [number for number in range(len(conversations)) if number not in windows.faulty]
    heard = [before + hear("asked", number) for number in kept]
    answers = answer_conversations(
        model,
        processor,
        [add_examples(conversations[number].prompt, shown) for number in kept],
        heard,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        states=None if cache is None else heard,
    )
    return [(conversations[number], answer) for number, answer in zip(kept, answers, strict=True)]


def evaluate_run(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    data: StageData,
    data_args: InstructionArguments,
    lm_args: AudioLMArguments,
    *,
    batch_size: int,
) -> dict[str, object]:
    """Returns the scores of a trained model, in inference mode, on the evaluation split and on silence."""
    conversations, windows = data.load("instructions", data_args.eval_split)
    limit, is_json = lm_args.max_answer_tokens, data_args.response_format == JSON
    cache = {"folder": lm_args.cache_dir, "dtype": lm_args.cache_dtype, "batch_size": batch_size}
    options = {"batch_size": batch_size, "max_new_tokens": limit, "cache": cache if len(windows) else None}
    answered = answer_split(model, processor, conversations, windows, **options)
    scores = grade_answers(
        [answer for _, answer in answered], [conversation.answer for conversation, _ in answered], is_json=is_json
    )
    has_clip = len(answered[0][0].clips) == 1
    silence = (
        probe_silence(model, processor, answered[0][0], is_json=is_json, max_new_tokens=limit) if has_clip else {}
    )
    results = {f"eval_{name}": value for name, value in scores.items()} | silence
    return results | {"eval_answers_read": list_answers(answered[:EXAMPLES])}


def list_answers(answered: Sequence[tuple[Conversation, str]]) -> list[dict[str, str]]:
    """Returns answers beside their references, to be read."""
    return [
        {"name": Path(conversation.name).name, "answer": answer, "reference": conversation.answer}
        for conversation, answer in answered
    ]


def probe_silence(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversation: Conversation,
    *,
    is_json: bool,
    max_new_tokens: int,
) -> dict[str, object]:
    """Returns what [`check_hallucination`] finds with the prompt of a conversation of one clip."""
    system = next((turn["content"][0]["text"] for turn in conversation.messages if turn["role"] == "system"), None)
    last = conversation.prompt[-1]["content"]
    instruction = "".join(part["text"] for part in last if part["type"] == "text")
    prompt = read_prompt(instruction, num_clips=1, system=system)

    def listen(clips: list) -> list[str]:
        """Answers the same question about each clip."""
        return answer_conversations(
            model, processor, [prompt] * len(clips), [[clip] for clip in clips],
            batch_size=len(clips), max_new_tokens=max_new_tokens,
        )  # fmt: skip

    rate = processor.feature_extractor.sampling_rate
    return check_hallucination(listen, sampling_rate=rate, is_json=is_json)


def describe_run(
    lm_args: AudioLMArguments,
    data_args: InstructionArguments,
    card_args: CardArguments,
    stages: Sequence[Stage],
) -> CardSubject:
    """Returns what the card says beside the results."""
    last = stages[-1]
    parts = f"encoder {last.encoder_mode}, language model {last.llm_mode}, projector {last.projector_mode}"
    names = (lm_args.encoder, lm_args.language_model) if lm_args.encoder else (lm_args.model_name_or_path,)
    sides = " and ".join(map(format_code, map(public_name, names)))
    instruction = json.dumps(data_args.instruction or "Transcribe the speech.")
    return CardSubject(
        dataset=data_args.dataset,
        split=data_args.eval_split or data_args.train_split,
        description=f"An audio language model: {sides}, joined by a projector. Trained: {parts}.",
        base=lm_args.language_model,
        language=card_args.language,
        dataset_licence=card_args.dataset_licence,
        licence=card_args.licence,
        usage=USAGE.replace("{instruction}", instruction.replace("{", "{{").replace("}", "}}")),
    )


def make_planned_model(lm_args: AudioLMArguments, stage: Stage) -> PreTrainedModel:
    """Returns the model of a stage made of its configurations alone, 4-bit sides in the shapes that they load in."""
    if lm_args.model_name_or_path is not None:
        config = AudioLMConfig.from_pretrained(lm_args.model_name_or_path)
    else:
        layer = lm_args.encoder_layer
        config = AudioLMConfig(
            audio_config=AutoConfig.from_pretrained(lm_args.encoder, trust_remote_code=False),
            text_config=AutoConfig.from_pretrained(lm_args.language_model, trust_remote_code=False),
            audio_token_id=0,
            projector_type=lm_args.projector_type,
            window_frames=lm_args.window_frames,
            window_tokens=lm_args.window_tokens,
            encoder_layer=int(layer) if layer.lstrip("-").isdecimal() else layer,
        )
    return set_planned_modes(
        config,
        getattr(torch, lm_args.dtype),
        **{name: getattr(stage, name) for name in ("encoder_mode", "llm_mode", "projector_mode", "llm_last_layers")},
    )


def set_planned_modes(
    config: AudioLMConfig,
    dtype: torch.dtype,
    *,
    encoder_mode: str = "frozen",
    llm_mode: str = "frozen",
    **modes: object,
) -> PreTrainedModel:
    """
    Returns a model of random weights, or on the meta device of none, in the modes given.

    Args:
        config: Of the model.
        dtype: Of both sides; what qlora leaves as it is in a side of 4 bits.
        encoder_mode, llm_mode, modes: As for [`set_modes`].
    """
    model = AudioLMForConditionalGeneration(config)
    for side in (model.model.audio_tower, model.model.language_model, model.lm_head):
        side.to(dtype)
    if encoder_mode == "qlora":
        quantize_shapes(model.model.audio_tower)
    if llm_mode == "qlora":
        quantize_shapes(model.model.language_model)
    set_modes(model, encoder_mode=encoder_mode, llm_mode=llm_mode, **modes)
    return model


def draw_answers(
    model: PreTrainedModel,
    *,
    is_cached: bool,
    num_rows: int,
    seconds: Sequence[float],
    characters_per_second: float,
) -> tuple[AnswerObjective, list[dict[str, torch.Tensor]]]:
    """
    Returns the objective of answers and batches of noise for it, for a trial.

    Args:
        model: With memory, its modes set.
        is_cached: Whether batches have states of the encoder, or what it hears.
        num_rows: Conversations of a batch.
        seconds: Of audio a conversation, in each batch.
        characters_per_second: Of the answers.
    """
    config, batches = model.config, []
    set_training_mode(model)
    for long in seconds:
        num_frames = max(1, round(long / FRAME_SECONDS))
        num_audio = int(config.count_tokens(num_frames))
        num_answer = max(1, round(characters_per_second * long / CHARACTERS_A_TOKEN))
        ids = torch.ones(num_rows, num_audio + PROMPT_TOKENS + num_answer, dtype=torch.long)
        ids[:, :num_audio] = config.audio_token_id
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - num_answer, IGNORED_LABEL)
        batch = {"labels": labels, "input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
        if is_cached:
            layers = config.num_encoder_states if config.encoder_layer == MIX else 1
            width = layers * config.audio_config.hidden_size
            batch["states"] = torch.randn(num_rows, num_frames, width)
            batch["num_frames"] = torch.full((num_rows,), num_frames)
        else:
            batch |= _draw_features(model, num_rows, num_frames)
        batches.append(batch)
    return AnswerObjective(model), batches


def _draw_features(model: PreTrainedModel, num_rows: int, num_frames: int) -> dict[str, torch.Tensor]:
    """Returns noise of which the encoder makes so many frames."""
    offset, stride = find_frame_formula(model.model.audio_tower)
    num_inputs = num_frames * stride - offset
    mel = getattr(model.config.audio_config, "num_mel_bins", None)
    shape = (num_rows, num_inputs) if mel is None else (num_rows, mel, num_inputs)
    return {"input_features": torch.randn(shape), "input_features_mask": torch.ones(num_rows, num_inputs).long()}


__all__ = [
    "draw_answers",
    "answer_split",
    "describe_run",
    "evaluate_run",
    "list_answers",
    "make_planned_model",
    "probe_silence",
    "read_peak_bytes",
    "set_planned_modes",
    "summarize_stages",
]
