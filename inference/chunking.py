"""Long recordings: cut into overlapping chunks that a model hears one at a time, and joined again frame by frame."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.audio import MIX, AudioSource, stream_audio
from inference.beam_search import BeamDecoder

BLOCK_FRAMES = 3000  # a minute at 20 ms: a beam search on longer audio is done in blocks cut at pauses


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
            cut = find_pause(block, blank=self._decoder.blank, delimiter=self._decoder.delimiter)
            self._ids.append(self._decoder.align(block[:cut], is_followed=True))
            self._waiting = [block[cut:]]

    def finish(self) -> np.ndarray:
        """Returns the class of every frame, `(frames,)`."""
        last = np.concatenate([*self._waiting, self._stitcher.tail])
        return np.concatenate([*self._ids, self._decoder.align(last) if self._decoder else last])


def find_pause(log_probs: np.ndarray, *, blank: int, delimiter: int) -> int:
    """
    Returns where a block ends: the frame behind the end of a word, in the second half of `log_probs`.

    A pause is a run of frames whose likeliest class is blank or delimiter. The longest one with a delimiter ends
    behind its last delimiter; without one, the longest of blanks ends in its middle; without a pause, the block ends
    behind the frame that is likeliest to be one.

    Args:
        log_probs: `(frames, classes)`.
        blank: Class of the blank, which stands within words too.
        delimiter: Class that stands between words.
    """
    half = len(log_probs) // 2
    best = log_probs[half:].argmax(-1)
    edges = np.flatnonzero(np.diff(np.isin(best, [blank, delimiter]), prepend=False, append=False))
    pauses = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    between_words = [(start, end) for start, end in pauses if delimiter in best[start:end]]
    if between_words:
        start, end = max(between_words, key=lambda pause: pause[1] - pause[0])
        return half + start + int(np.flatnonzero(best[start:end] == delimiter)[-1]) + 1
    if pauses:
        start, end = max(pauses, key=lambda pause: pause[1] - pause[0])
        return half + (start + end + 1) // 2
    quiet = log_probs[half:, [blank, delimiter]].max(-1)
    return len(log_probs) - int(quiet[::-1].argmax())


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
        cls, samples_per_frame: int, sampling_rate: int, *, chunk_seconds: float, overlap_seconds: float
    ) -> "Chunking":
        """
        Returns the nearest chunks of whole frames.

        Raises:
            ValueError: The overlap is negative or not shorter than the chunk.
        """
        seconds_per_frame = samples_per_frame / sampling_rate
        overlap_frames = round(overlap_seconds / seconds_per_frame)
        step_frames = round(chunk_seconds / seconds_per_frame) - overlap_frames
        if step_frames < 1 or overlap_frames < 0:
            raise ValueError(
                f"`overlap_seconds` must be at least 0 and less than `chunk_seconds` ({chunk_seconds}), got "
                f"{overlap_seconds}. Shorten the overlap or lengthen the chunks."
            )
        return cls(step_frames, overlap_frames, seconds_per_frame, sampling_rate)

    def stream(self, source: AudioSource, channel: str | int = MIX) -> Iterator[np.ndarray]:
        """Yields the chunks `(samples,)` of a recording's channel, as [`stream_audio`]."""
        return stream_audio(
            source,
            chunk_seconds=(self.step_frames + self.overlap_frames) * self.seconds_per_frame,
            overlap_seconds=self.overlap_frames * self.seconds_per_frame,
            sampling_rate=self.sampling_rate,
            channel=channel,
        )

    def count_seconds(self, chunk_samples: Sequence[int]) -> float:
        """Returns the duration of a recording whose chunks have so many samples."""
        overlap_samples = round(self.overlap_frames * self.seconds_per_frame * self.sampling_rate)
        return (sum(chunk_samples) - (len(chunk_samples) - 1) * overlap_samples) / self.sampling_rate
