"""From a CTC model's frames to text: batches, recordings of any duration, words with their times."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

# A caption ends at a longer pause, and before it has more characters: two lines of television's 42.
CAPTION_PAUSE_SECONDS, CAPTION_CHARACTERS = 0.8, 84
# Models whose states change with the padding behind a clip.
HEAR_PADDING = ("wav2vec2-bert",)
# What stands for the space before a word in tokens that are parts of words: of SentencePiece, of byte-level BPE.
SPACE_MARKS = ("\u2581", "\u0120")
BUFFERED_BATCHES = 4  # chunks of so many batches wait to be sorted by duration


@dataclass(frozen=True)
class Word:
    """A recognised word with its first and last moment in seconds."""

    word: str
    start: float
    end: float


@dataclass(frozen=True)
class Segment:
    """Something said without a break, with its first and last moment in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Transcript:
    """
    What was recognised in a recording.

    Args:
        text: All of it.
        words: Its words with their times; none where the model knows the times of segments alone.
        seconds: Duration of the recording.
        segments: What is said without a break, where the model knows times of that alone.
    """

    text: str
    words: list[Word]
    seconds: float
    segments: list[Segment] = field(default_factory=list)

    @property
    def captions(self) -> list[Segment]:
        """The segments or, of a model that knows the times of words, lines of words."""
        return self.segments or group_words(self.words)


def group_words(words: Sequence[Word]) -> list[Segment]:
    """
    Returns words as captions: a new one after a pause or where a line is full.

    Example:

    ```python
    >>> from inference.decoding import Word, group_words

    >>> words = [Word("turn", 0.2, 0.5), Word("left", 0.6, 0.9), Word("now", 2.5, 2.8)]
    >>> [(segment.text, segment.start, segment.end) for segment in group_words(words)]
    [('turn left', 0.2, 0.9), ('now', 2.5, 2.8)]

    ```
    """
    groups: list[list[Word]] = []
    for word in words:
        last = groups[-1] if groups else []
        num_characters = sum(len(other.word) + 1 for other in last) + len(word.word)
        if not last or word.start - last[-1].end > CAPTION_PAUSE_SECONDS or num_characters > CAPTION_CHARACTERS:
            groups.append([])
        groups[-1].append(word)
    return [Segment(" ".join(word.word for word in group), group[0].start, group[-1].end) for group in groups]


def locate_words(processor: ProcessorMixin, ids: np.ndarray, *, seconds_per_frame: float) -> list[Word]:
    """
    Returns the words of a path `(frames,)`, each from its first letter's first frame to its last letter's last.

    Args:
        processor: The model's processor.
        ids: Class of every frame.
        seconds_per_frame: Duration of a frame.
    """
    if not hasattr(processor.tokenizer, "word_delimiter_token"):
        return _locate_subwords(processor.tokenizer, ids, seconds_per_frame)
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


def _locate_subwords(tokenizer, ids: np.ndarray, seconds_per_frame: float) -> list[Word]:
    """Words of tokens that are parts of words: a new one begins with the mark of a space."""
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    spans: list[list[int]] = []  # first frame, frame behind the last one, tokens
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        token = int(ids[start])
        if token == tokenizer.pad_token_id:
            continue
        if not spans or tokenizer.convert_ids_to_tokens(token).startswith(SPACE_MARKS):
            spans.append([int(start), int(end)])
        spans[-1][1] = int(end)
        spans[-1].append(token)
    words = [(tokenizer.decode(tokens, group_tokens=False).strip(), start, end) for start, end, *tokens in spans]
    return [
        Word(word, round(start * seconds_per_frame, 3), round(end * seconds_per_frame, 3))
        for word, start, end in words
        if word
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
        batch: The model's inputs, such as `input_features` `(batch, frames, mel)`, and `attention_mask`.
        adapter_names: Adapter of each row, `"__base__"` for none. Default: the active one on all.
        store: Has the adapters. Default: the model has them.
        as_log_probs: Log-probabilities `(frames, classes)` for a beam search, not the likeliest classes `(frames,)`.
    """
    rows: list[np.ndarray] = [np.empty(0)] * len(batch["attention_mask"])
    for indices, inputs in _split_padding(model, batch):
        names = None if adapter_names is None else [adapter_names[index] for index in indices]
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        with store.rows(names) if store else adapter_rows(model, names):
            logits = model(**inputs).logits
        frames = logits.float().log_softmax(-1) if as_log_probs else logits.argmax(-1)
        lengths = count_logits(model, inputs["attention_mask"].sum(-1)).tolist()
        for index, row, length in zip(indices, frames.cpu().numpy(), lengths, strict=True):
            rows[index] = row[:length]
    return rows


def _split_padding(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Iterator[tuple[list[int], dict]]:
    """
    Yields the batch, or rows of one length at a time where padding would change what a row says.

    Models with group normalisation over time (Wav2Vec2 and HuBERT base) take no notice of the mask there, nor do the
    convolutions at the end of Wav2Vec2-BERT.
    """
    name, mask = model.main_input_name, batch["attention_mask"]
    lengths = mask.sum(-1).tolist()
    is_heard = getattr(model.config, "feat_extract_norm", None) == "group" or model.config.model_type in HEAR_PADDING
    if not is_heard or len(set(lengths)) == 1:
        yield list(range(len(lengths))), {name: batch[name], "attention_mask": mask}
        return
    for length in sorted(set(lengths)):
        indices = [index for index, other in enumerate(lengths) if other == length]
        yield indices, {name: batch[name][indices, :length], "attention_mask": mask[indices, :length]}


def count_logits(model: PreTrainedModel, input_lengths: torch.Tensor) -> torch.Tensor:
    """
    Returns how many frames of logits a CTC model makes of inputs (samples or frames of features) of these lengths.

    Raises:
        ValueError: It does not say.
    """
    for module in (model, model.base_model, getattr(model, "encoder", None)):
        for name in ("_get_feat_extract_output_lengths", "_get_subsampling_output_length"):
            if count := getattr(module, name, None):
                return torch.as_tensor(count(input_lengths)).to(torch.long)
    raise ValueError(
        "`model_name_or_path` must be a model that says how many frames it makes "
        f"(`_get_feat_extract_output_lengths`), got a {type(model).__name__}, which does not."
    )


def find_samples_per_logit(model: PreTrainedModel, processor: ProcessorMixin) -> int:
    """
    Returns how many samples of audio a frame of logits stands for.

    From the configuration of our own models, and of others counted: Wav2Vec2-BERT's says another number.
    """
    if hasattr(processor.feature_extractor, "log_mel"):
        return model.config.inputs_to_logits_ratio
    few, many = count_logits(model, torch.tensor([10_000, 1_010_000])).tolist()
    inputs_per_logit = round(1_000_000 / (many - few))
    extractor = processor.feature_extractor
    if model.main_input_name == "input_values":
        return inputs_per_logit
    return inputs_per_logit * _find_hop(extractor)


def _find_hop(extractor) -> int:
    """Samples a frame of features; extractors without a hop make one every 10 ms, some of which stack them."""
    hop = getattr(extractor, "hop_length", None) or extractor.sampling_rate // 100
    return hop * getattr(extractor, "stride", 1)


def extract_inputs(processor: ProcessorMixin, clips: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Returns what a CTC model takes of clips `(samples,)`, padded, with their `attention_mask`."""
    extractor = processor.feature_extractor
    options = {"sampling_rate": extractor.sampling_rate, "return_tensors": "pt", "return_attention_mask": True}
    return dict(extractor(list(clips), padding=True, **options))


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
    samples_per_frame, rate = find_samples_per_logit(model, processor), processor.feature_extractor.sampling_rate
    chunking = Chunking.fit(samples_per_frame, rate, chunk_seconds=chunk_seconds, overlap_seconds=overlap_seconds)
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
        batch = extract_inputs(processor, samples)
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
