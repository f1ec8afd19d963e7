"""From a CTC model's frames to text: batches, long recordings in overlapping chunks, words with their times."""

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
from data.asr import UtteranceDataset
from data.audio import AudioError, AudioSource, audio_seconds, stream_audio
from data.collators import CTCCollator
from data.metrics import score_by_speaker
from modeling.adapters import adapter_rows, load_speech_adapter
from recipes.beam_search import BeamDecoder, clean_text

BLOCK_FRAMES = 3000  # a minute at 20 ms: a beam search on longer audio is done in blocks cut at pauses
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
        model = AutoModelForCTC.from_pretrained(model_name_or_path)
        processor = AutoProcessor.from_pretrained(model_name_or_path)
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
    as_log_probs: bool = False,
) -> list[np.ndarray]:
    """
    Returns what the model says of every frame of every row, without padding.

    Args:
        model: CTC model in evaluation mode.
        batch: `input_features` `(batch, frames, mel)` and `attention_mask` `(batch, frames)`.
        adapter_names: Adapter of each row, `"__base__"` for none. Default: the active one on all.
        as_log_probs: Log-probabilities `(frames, classes)` for a beam search, not the likeliest classes `(frames,)`.
    """
    inputs = {name: batch[name].to(model.device) for name in ("input_features", "attention_mask")}
    with adapter_rows(model, adapter_names):
        output = model(**inputs, output_base_logits=False)
    frames = output.logits.float().log_softmax(-1) if as_log_probs else output.logits.argmax(-1)
    lengths = output.logits_lengths.tolist()
    return [row[:length] for row, length in zip(frames.cpu().numpy(), lengths, strict=True)]


def evaluate_dataset(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: UtteranceDataset,
    *,
    batch_size: int = 16,
    decoder: BeamDecoder | None = None,
) -> dict[str, dict]:
    """
    Recognises every utterance with the active adapter, if any, and scores the texts.

    Args:
        model: CTC model; it is left in evaluation or training mode as it was.
        processor: Its processor.
        dataset: The utterances, without augmentation.
        batch_size: Utterances recognised together, sorted by duration.
        decoder: Beam search; greedy by default.

    Returns:
        As [`score_by_speaker`].

    Raises:
        ValueError: `batch_size` is below 1, or the references of a speaker are empty.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    lengths, collate = dataset.lengths, CTCCollator(processor)
    order = sorted(range(len(dataset)), key=lengths.__getitem__)
    hypotheses = [""] * len(dataset)
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc="evaluating", unit="batch", disable=None):
        rows = order[start : start + batch_size]
        frames = recognize_batch(model, collate([dataset[row] for row in rows]), as_log_probs=decoder is not None)
        texts = [decoder.decode(row) for row in frames] if decoder else processor.batch_decode(frames)
        for row, text in zip(rows, texts, strict=True):
            hypotheses[row] = clean_text(text)
    model.train(was_training)
    return score_by_speaker(hypotheses, dataset.references, dataset.speakers)


def stitch_chunks(chunks: Sequence[np.ndarray], *, step_frames: int, overlap_frames: int) -> np.ndarray:
    """
    Joins the frames of overlapping chunks; at each joint either chunk gives the half of the overlap nearer to it.

        chunk 0   [0 .......... step ..|.. step + overlap]
        chunk 1                 [0 ....|............ step ..|.. step + overlap]      | is overlap // 2

    Args:
        chunks: Classes `(frames,)` or log-probabilities `(frames, classes)` of each.
        step_frames: Frames from a chunk's start to the next one's.
        overlap_frames: Frames that two chunks share.
    """
    stitcher = ChunkStitcher(step_frames, overlap_frames)
    return np.concatenate([*(stitcher.add(chunk) for chunk in chunks), stitcher.tail])


class ChunkStitcher:
    """[`stitch_chunks`] a chunk at a time: `add` returns the frames that are settled, `tail` the rest."""

    def __init__(self, step_frames: int, overlap_frames: int):
        self._half, self._cut = overlap_frames // 2, step_frames + overlap_frames // 2
        self.tail: np.ndarray | None = None

    def add(self, chunk: np.ndarray) -> np.ndarray:
        """Returns the frames of `chunk` up to the joint with the next one, if there will be one."""
        start = 0 if self.tail is None else self._half
        self.tail = chunk[self._cut :]
        return chunk[start : self._cut]


class RecordingPath:
    """
    Best path of one recording: chunks of frames go in, in order; settled frames stay as classes alone.

    Args:
        stitcher: Joins the chunks.
        decoder: Beam search, run on a block whenever one has gathered; None if the chunks are classes already.
    """

    def __init__(self, stitcher: ChunkStitcher, decoder: BeamDecoder | None):
        self._stitcher, self._decoder = stitcher, decoder
        self._ids: list[np.ndarray] = []
        self._waiting: list[np.ndarray] = []

    def add(self, chunk: np.ndarray) -> None:
        """Takes the next chunk, classes `(frames,)` or, with a decoder, log-probabilities `(frames, classes)`."""
        settled = self._stitcher.add(chunk)
        if self._decoder is None:
            self._ids.append(settled)
            return
        self._waiting.append(settled)
        if sum(map(len, self._waiting)) > BLOCK_FRAMES:
            block = np.concatenate(self._waiting)
            cut = find_pause(block, [self._decoder.blank, self._decoder.delimiter])
            self._ids.append(self._decoder.align(block[:cut]))
            self._waiting = [block[cut:]]

    def finish(self) -> np.ndarray:
        """Returns the class of every frame, `(frames,)`."""
        last = np.concatenate([*self._waiting, self._stitcher.tail])
        return np.concatenate([*self._ids, self._decoder.align(last) if self._decoder else last])


def find_pause(log_probs: np.ndarray, quiet_classes: Sequence[int]) -> int:
    """
    Returns the middle of the longest pause in the second half of `log_probs` `(frames, classes)`, as a frame.

    A pause is a run of frames whose likeliest class is one of `quiet_classes`. Without one it is the end.
    """
    half = len(log_probs) // 2
    is_quiet = np.isin(log_probs[half:].argmax(-1), quiet_classes)
    edges = np.flatnonzero(np.diff(is_quiet, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return len(log_probs)
    longest = (ends - starts).argmax()
    return half + int(starts[longest] + ends[longest]) // 2


@dataclass(frozen=True)
class Chunking:
    """
    How a long recording is cut; in whole frames of logits, so that a chunk's frames continue the last one's.

    Args:
        step_frames: Frames from a chunk's start to the next one's.
        overlap_frames: Frames that two chunks share.
        seconds_per_frame: Duration of a frame.
        sampling_rate: Rate of the chunks in Hz.
    """

    step_frames: int
    overlap_frames: int
    seconds_per_frame: float
    sampling_rate: int

    @classmethod
    def fit(
        cls, model: PreTrainedModel, processor: ProcessorMixin, *, chunk_seconds: float, overlap_seconds: float
    ) -> "Chunking":
        """
        Returns the nearest chunks of whole frames.

        Raises:
            ValueError: The overlap is negative or not shorter than the chunk.
        """
        sampling_rate = processor.feature_extractor.sampling_rate
        seconds_per_frame = model.config.inputs_to_logits_ratio / sampling_rate
        overlap_frames = round(overlap_seconds / seconds_per_frame)
        step_frames = round(chunk_seconds / seconds_per_frame) - overlap_frames
        if step_frames < 1 or overlap_frames < 0:
            raise ValueError(
                f"`overlap_seconds` must be at least 0 and less than `chunk_seconds` ({chunk_seconds}), got "
                f"{overlap_seconds}. Shorten the overlap or lengthen the chunks."
            )
        return cls(step_frames, overlap_frames, seconds_per_frame, sampling_rate)

    def stream(self, source: AudioSource) -> Iterator[np.ndarray]:
        """Yields the chunks `(samples,)` of a recording, as [`stream_audio`]."""
        return stream_audio(
            source,
            chunk_seconds=(self.step_frames + self.overlap_frames) * self.seconds_per_frame,
            overlap_seconds=self.overlap_frames * self.seconds_per_frame,
            sampling_rate=self.sampling_rate,
        )


def transcribe_recordings(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    sources: Sequence[AudioSource],
    *,
    adapter_names: Sequence[str] | None = None,
    chunk_seconds: float = 20.0,
    overlap_seconds: float = 2.0,
    batch_size: int = 16,
    decoder: BeamDecoder | None = None,
) -> list[Transcript | AudioError]:
    """
    Recognises recordings of any duration; memory is bounded by some batches of chunks.

    Chunks of all recordings share batches, sorted by duration and each with its own adapter.

    Args:
        model: CTC model in evaluation mode.
        processor: Its processor.
        sources: Recordings, as in `read_audio`.
        adapter_names: Adapter of each recording, `"__base__"` for none. Default: the active one on all.
        chunk_seconds: Duration that the model hears at once.
        overlap_seconds: Duration that two chunks share, so that either hears around the joint.
        batch_size: Chunks that the model hears together.
        decoder: Beam search; greedy by default.

    Returns:
        A transcript for each recording, or what is wrong with the recording.

    Raises:
        ValueError: `batch_size` is below 1, or the chunk or the overlap is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    chunking = Chunking.fit(model, processor, chunk_seconds=chunk_seconds, overlap_seconds=overlap_seconds)
    errors: dict[int, AudioError] = {}
    transcripts: dict[int, Transcript] = {}
    paths: dict[int, RecordingPath] = {}
    chunks = _stream_all(sources, chunking, errors)
    while buffer := list(islice(chunks, BUFFERED_BATCHES * batch_size)):
        frames = _recognize_chunks(model, processor, buffer, adapter_names, batch_size, decoder is not None)
        for (index, _), chunk in zip(buffer, frames, strict=True):
            stitcher = ChunkStitcher(chunking.step_frames, chunking.overlap_frames)
            paths.setdefault(index, RecordingPath(stitcher, decoder)).add(chunk)
        # Recordings come one after the other: all before the buffer's last one have ended.
        for index in [index for index in paths if index < buffer[-1][0]]:
            transcripts[index] = _describe(paths.pop(index), processor, sources[index], chunking)
    for index in paths.keys() - errors.keys():
        transcripts[index] = _describe(paths[index], processor, sources[index], chunking)
    return [errors.get(index) or transcripts[index] for index in range(len(sources))]


def _stream_all(
    sources: Sequence[AudioSource], chunking: Chunking, errors: dict[int, AudioError]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each chunk with its recording's index; an unusable recording ends early and goes into `errors`."""
    for index, source in enumerate(tqdm(sources, desc="transcribing", unit="file", disable=None)):
        try:
            for chunk in chunking.stream(source):
                yield index, chunk
        except AudioError as error:
            errors[index] = error


def _recognize_chunks(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    chunks: Sequence[tuple[int, np.ndarray]],
    adapter_names: Sequence[str] | None,
    batch_size: int,
    as_log_probs: bool,
) -> list[np.ndarray]:
    """Returns the frames of each chunk, in the order of `chunks`."""
    order = sorted(range(len(chunks)), key=lambda row: len(chunks[row][1]))
    frames: list[np.ndarray] = [np.empty(0)] * len(chunks)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        samples = [chunks[row][1] for row in rows]
        batch = processor(samples, sampling_rate=processor.feature_extractor.sampling_rate, return_tensors="pt")
        names = None if adapter_names is None else [adapter_names[chunks[row][0]] for row in rows]
        outputs = recognize_batch(model, batch, adapter_names=names, as_log_probs=as_log_probs)
        for row, output in zip(rows, outputs, strict=True):
            frames[row] = output
    return frames


def _describe(path: RecordingPath, processor: ProcessorMixin, source: AudioSource, chunking: Chunking) -> Transcript:
    ids = path.finish()
    words = locate_words(processor, ids, seconds_per_frame=chunking.seconds_per_frame)
    text = clean_text(processor.batch_decode(ids[np.newaxis])[0])
    return Transcript(text, words, round(audio_seconds(source), 3))
