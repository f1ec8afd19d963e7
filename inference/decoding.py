"""From a CTC model's frames to text: batches, recordings of any duration, words with their times."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoModelForCTC, AutoProcessor, PreTrainedModel, ProcessorMixin

import modeling  # noqa: F401  (registers the models and the adapter)
from data.audio import MIX, AudioError, AudioSource
from inference.adapter_store import AdapterStore
from inference.beam_search import BeamDecoder, clean_text
from inference.chunking import Chunking, ChunkStitcher, RecordingPath
from modeling.adapters import BASE, adapter_rows, load_speech_adapter
from modeling.whole_models import load_whole

BUFFERED_BATCHES = 4  # chunks of so many batches wait to be sorted by duration


@dataclass(frozen=True)
class Word:
    """A recognised word with its first and last moment in seconds."""

    word: str
    start: float
    end: float


@dataclass(frozen=True)
class Transcript:
    """What was recognised in a recording of `seconds` seconds."""

    text: str
    words: list[Word]
    seconds: float


def locate_words(processor: ProcessorMixin, ids: np.ndarray, *, seconds_per_frame: float) -> list[Word]:
    """
    Returns the words of a path `(frames,)`, each from its first letter's first frame to its last letter's last.

    Args:
        processor: The model's processor.
        ids: Class of every frame.
        seconds_per_frame: Duration of a frame.
    """
    offsets = processor.decode(ids.tolist(), output_word_offsets=True).word_offsets
    return [
        Word(
            # Jamo are letters of their own here; in a word they are syllables.
            unicodedata.normalize("NFC", offset["word"]),
            round(float(offset["start_offset"] * seconds_per_frame), 3),
            round(float(offset["end_offset"] * seconds_per_frame), 3),
        )
        for offset in offsets
    ]


def load_recognizer(
    model_name_or_path: str, adapters: Mapping[str, str] | None = None, *, allow_base_mismatch: bool = False
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    Returns a CTC model with adapters, in evaluation mode on this process's device, and its processor.

    Args:
        model_name_or_path: Folder or Hub name of the base.
        adapters: Name to folder or Hub name; the last one is active.
        allow_base_mismatch: Take adapters that were made for another base.

    Raises:
        ValueError: The base or an adapter does not exist or does not load, an adapter's name is not allowed, or an
            adapter was made for another base and that is not allowed.
    """
    try:
        model = load_whole(AutoModelForCTC, model_name_or_path)
        processor = AutoProcessor.from_pretrained(model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model_name_or_path` must be a CTC model with its processor, got {model_name_or_path!r} ({error})."
        ) from error
    for name, path in (adapters or {}).items():
        load_adapter(model, str(path), name, allow_base_mismatch=allow_base_mismatch, processor=processor)
    return model.eval().to(PartialState().device), processor


def load_adapter(
    model: PreTrainedModel,
    path: str,
    name: str,
    *,
    is_trainable: bool = False,
    allow_base_mismatch: bool = False,
    processor: ProcessorMixin | None = None,
) -> None:
    """
    Adds a saved adapter to `model` under `name` and activates it, checked as by [`load_speech_adapter`].

    Args:
        model: The adapter's base.
        path: Folder or Hub name of the adapter.
        name: Its name in the model.
        is_trainable: Leave its parameters trainable.
        allow_base_mismatch: Take an adapter that was made for another base.
        processor: Of the model; its vocabulary and feature settings are compared too.

    Raises:
        ValueError: `path` is no adapter, is damaged, was made for another base, or has no effect.
    """
    options = {"is_trainable": is_trainable, "allow_base_mismatch": allow_base_mismatch, "processor": processor}
    load_speech_adapter(model, path, name, **options)


@torch.inference_mode()
def recognize_batch(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    *,
    adapter_names: Sequence[str] | None = None,
    store: AdapterStore | None = None,
    as_log_probs: bool = False,
) -> list[np.ndarray]:
    """
    Returns what the model says of every frame of every row, without padding.

    Args:
        model: CTC model in evaluation mode.
        batch: `input_features` `(batch, frames, mel)` and `attention_mask` `(batch, frames)`.
        adapter_names: Adapter of each row, `"__base__"` for none. Default: the active one on all.
        store: Has the adapters. Default: the model has them.
        as_log_probs: Log-probabilities `(frames, classes)` for a beam search, not the likeliest classes `(frames,)`.
    """
    inputs = {name: batch[name].to(model.device) for name in ("input_features", "attention_mask")}
    with store.rows(adapter_names) if store else adapter_rows(model, adapter_names):
        output = model(**inputs, output_base_logits=False)
    frames = output.logits.float().log_softmax(-1) if as_log_probs else output.logits.argmax(-1)
    lengths = output.logits_lengths.tolist()
    return [row[:length] for row, length in zip(frames.cpu().numpy(), lengths, strict=True)]


def transcribe_recordings(*arguments, **options) -> list[Transcript | AudioError]:
    """Returns all that [`iterate_transcripts`] yields."""
    return list(iterate_transcripts(*arguments, **options))


def iterate_transcripts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    sources: Sequence[AudioSource],
    *,
    channels: Sequence[str | int] | None = None,
    adapter_names: Sequence[str] | None = None,
    store: AdapterStore | None = None,
    chunk_seconds: float = 20.0,
    overlap_seconds: float = 2.0,
    batch_size: int = 16,
    decoder: BeamDecoder | None = None,
) -> Iterator[Transcript | AudioError]:
    """
    Recognises recordings of any duration; memory is bounded by some batches of chunks.

    Chunks of all recordings share batches, sorted by duration and each with its own adapter.

    Args:
        model: CTC model in evaluation mode.
        processor: Its processor.
        sources: Recordings, as in `read_audio`.
        channels: Channel of each recording, as in `read_audio`. Default: all of them mixed.
        adapter_names: Adapter of each recording, `"__base__"` for none. Default: the active one on all.
        store: Has the adapters, which must then be named. Default: the model has them.
        chunk_seconds: Duration that the model hears at once.
        overlap_seconds: Duration that two chunks share, so that either hears around the joint.
        batch_size: Chunks that the model hears together.
        decoder: Beam search; greedy by default.

    Yields:
        A transcript for each recording, or what is wrong with the recording, in their order and as soon as it is done.

    Raises:
        ValueError: `batch_size` is below 1, or the chunk or the overlap is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    chunking = Chunking.fit(model, processor, chunk_seconds=chunk_seconds, overlap_seconds=overlap_seconds)
    results: dict[int, Transcript | AudioError] = {}
    paths: dict[int, RecordingPath] = {}
    lengths: dict[int, list[int]] = {}
    chunks = _stream_all(sources, channels or [MIX] * len(sources), chunking, results)
    next_index, is_over = 0, False
    while not is_over:
        buffer = list(islice(chunks, BUFFERED_BATCHES * batch_size))
        is_over = len(buffer) < BUFFERED_BATCHES * batch_size
        names = None if adapter_names is None else [adapter_names[index] for index, _ in buffer]
        batches = split_batches([len(chunk) for _, chunk in buffer], names, batch_size, store and store.capacity)
        frames = _recognize_chunks(model, processor, buffer, batches, names, store, decoder is not None)
        for (index, samples), chunk in zip(buffer, frames, strict=True):
            stitcher = ChunkStitcher(chunking.step_frames, chunking.overlap_frames)
            paths.setdefault(index, RecordingPath(stitcher, decoder)).add(chunk)
            lengths.setdefault(index, []).append(len(samples))
        # Recordings come one after the other: all before the buffer's last one have ended.
        num_done = len(sources) if is_over else buffer[-1][0]
        for index in [index for index in paths if index < num_done]:
            path, seconds = paths.pop(index), chunking.count_seconds(lengths.pop(index))
            results.setdefault(index, _describe(path, processor, seconds, chunking))
        while next_index < num_done:
            yield results.pop(next_index)
            next_index += 1


def _stream_all(
    sources: Sequence[AudioSource],
    channels: Sequence[str | int],
    chunking: Chunking,
    errors: dict[int, Transcript | AudioError],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each chunk with its recording's index; an unusable recording ends early and goes into `errors`."""
    for index, source in enumerate(tqdm(sources, desc="transcribing", unit="file", disable=None)):
        try:
            for chunk in chunking.stream(source, channels[index]):
                yield index, chunk
        except AudioError as error:
            errors[index] = error


def split_batches(
    lengths: Sequence[int], adapter_names: Sequence[str] | None, batch_size: int, max_adapters: int | None
) -> Iterator[list[int]]:
    """
    Yields the rows of each batch, from the shortest row to the longest.

    Args:
        lengths: Of each row.
        adapter_names: Adapter of each row, if each has its own.
        batch_size: Rows that a batch may have.
        max_adapters: Different adapters that a batch may have.

    Example:
        >>> list(split_batches([5, 1, 4, 2], ["ann", "ben", "cho", "ann"], 3, 2))
        [[1, 3], [2, 0]]
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        num_adapters = len({adapter_names[other] for other in (*batch, row)} - {BASE}) if max_adapters else 0
        if len(batch) == batch_size or num_adapters > (max_adapters or 0):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _recognize_chunks(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    chunks: Sequence[tuple[int, np.ndarray]],
    batches: Iterator[list[int]],
    adapter_names: Sequence[str] | None,
    store: AdapterStore | None,
    as_log_probs: bool,
) -> list[np.ndarray]:
    """Returns the frames of each chunk, in the order of `chunks`."""
    frames: list[np.ndarray] = [np.empty(0)] * len(chunks)
    for rows in batches:
        samples = [chunks[row][1] for row in rows]
        batch = processor(samples, sampling_rate=processor.feature_extractor.sampling_rate, return_tensors="pt")
        names = None if adapter_names is None else [adapter_names[row] for row in rows]
        outputs = recognize_batch(model, batch, adapter_names=names, store=store, as_log_probs=as_log_probs)
        for row, output in zip(rows, outputs, strict=True):
            frames[row] = output
    return frames


def _describe(path: RecordingPath, processor: ProcessorMixin, seconds: float, chunking: Chunking) -> Transcript:
    ids = path.finish()
    words = locate_words(processor, ids, seconds_per_frame=chunking.seconds_per_frame)
    text = clean_text(processor.batch_decode(ids[np.newaxis])[0])
    return Transcript(text, words, round(seconds, 3))
