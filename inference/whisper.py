"""Whisper as a recogniser: recordings of any duration with the times of what is said, each with its own adapter."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from transformers import PreTrainedModel

from data.audio import MIX, AudioError, AudioSource, read_audio
from data.prompts import WhisperPrompt
from inference.adapter_store import AdapterStore
from inference.decoding import Segment, Transcript, split_batches
from modeling.adapters import adapter_rows


def iterate_whisper(
    model: PreTrainedModel,
    prompt: WhisperPrompt,
    sources: Sequence[AudioSource],
    *,
    channels: Sequence[str | int] | None = None,
    adapter_names: Sequence[str] | None = None,
    store: AdapterStore | None = None,
    batch_size: int = 8,
    needs_times: bool = True,
    num_beams: int = 1,
) -> Iterator[Transcript | AudioError]:
    """
    Recognises recordings of any duration: what is longer than 30 s by Whisper's own rule, window after window.

    Args:
        model: In evaluation mode.
        prompt: What asks it, with language and task.
        sources: Recordings, as in `read_audio`.
        channels: Channel of each recording, as in `read_audio`. Default: all of them mixed.
        adapter_names: Adapter of each recording, `"__base__"` for none. Default: the active one on all.
        store: Has the adapters, which must then be named. Default: the model has them.
        batch_size: Recordings heard together, of similar duration.
        needs_times: Give the times of segments, where the model knows them; else of recordings over 30 s alone.
        num_beams: Beams of the search; greedy by default.

    Yields:
        A transcript for each recording, or what is wrong with the recording, in their order.

    Raises:
        ValueError: `batch_size` is below 1, or a recording is longer than 30 s and the model has no timestamps.

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (arXiv 2212.04356), 4.5.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    numbered = enumerate(zip(sources, channels or [MIX] * len(sources), strict=True))
    while batch := list(islice(numbered, 4 * batch_size)):  # some batches, to be sorted by duration
        results: dict[int, Transcript | AudioError] = {}
        clips: dict[int, np.ndarray] = {}
        for index, (source, channel) in batch:
            try:
                clips[index] = read_audio(source, sampling_rate=prompt.extractor.sampling_rate, channel=channel)
            except AudioError as error:
                results[index] = error
        indices = list(clips)
        names = None if adapter_names is None else [adapter_names[index] for index in indices]
        lengths = [len(clips[index]) for index in indices]
        for rows in split_batches(lengths, names, batch_size, store and store.capacity):
            own = None if names is None else [names[row] for row in rows]
            heard = [clips[indices[row]] for row in rows]
            with store.rows(own) if store else adapter_rows(model, own):
                said = transcribe_clips(model, prompt, heard, needs_times=needs_times, num_beams=num_beams)
            results |= {indices[row]: transcript for row, transcript in zip(rows, said, strict=True)}
        for index, _ in batch:
            yield results.pop(index)


@torch.inference_mode()
def transcribe_clips(
    model: PreTrainedModel,
    prompt: WhisperPrompt,
    clips: Sequence[np.ndarray],
    *,
    needs_times: bool = True,
    num_beams: int = 1,
) -> list[Transcript]:
    """
    Returns what is said in each clip `(samples,)`; arguments as in [`iterate_whisper`].

    Raises:
        ValueError: A clip is longer than the model hears at once, and the model has no timestamps.
    """
    rate, longest = prompt.extractor.sampling_rate, max(map(len, clips))
    options = choose_generation(model, prompt)
    is_long = longest > prompt.max_samples
    knows_times = getattr(model.generation_config, "no_timestamps_token_id", None) is not None
    has_times = knows_times and (needs_times or is_long)
    if is_long and not knows_times:
        raise ValueError(
            f"A recording must be at most {prompt.max_samples / rate:g} s long for a Whisper without timestamps, got "
            f"{longest / rate:.1f} s. Cut it, or choose a model whose generation_config has `no_timestamps_token_id`."
        )
    features = prompt.extractor(
        list(clips),
        sampling_rate=rate,
        return_tensors="pt",
        return_attention_mask=True,
        truncation=False,
        padding="max_length",
        max_length=max(longest, prompt.max_samples),
    )
    output = model.generate(
        features.input_features.to(model.device, model.dtype),
        attention_mask=features.attention_mask.to(model.device),
        return_timestamps=has_times,
        return_segments=has_times,
        num_beams=num_beams,
        do_sample=False,
        **options,
    )
    seconds = [len(clip) / rate for clip in clips]
    if not has_times:
        texts = prompt.read(output, 0)
        return [Transcript(text, [], round(length, 3)) for text, length in zip(texts, seconds, strict=True)]
    read = [_read_segments(prompt, rows, length) for rows, length in zip(output["segments"], seconds, strict=True)]
    return [
        Transcript(" ".join(segment.text for segment in segments), [], round(length, 3), segments)
        for segments, length in zip(read, seconds, strict=True)
    ]


def _read_segments(prompt: WhisperPrompt, rows: Sequence[dict], seconds: float) -> list[Segment]:
    """What is said when, without empty segments; no time lies behind the recording's end."""
    segments = []
    for row in rows:
        text = prompt.tokenizer.decode(row["tokens"], skip_special_tokens=True).strip()
        start, end = (round(min(float(row[side]), seconds), 3) for side in ("start", "end"))
        segments += [Segment(text, start, end)] if text else []
    return segments


def choose_generation(model: PreTrainedModel, prompt: WhisperPrompt) -> dict[str, str]:
    """Returns the arguments of `generate` that tell a multilingual Whisper its language and task; none for others."""
    if not getattr(model.generation_config, "is_multilingual", False):
        return {}
    return {"language": prompt.tokenizer.language, "task": prompt.tokenizer.task or "transcribe"}
