"""Recognition while one speaks: samples go in as they come, and the text so far comes out."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from data.audio import MIX, AudioError, AudioSource, stream_audio
from inference.adapter_store import AdapterStore
from inference.beam_search import clean_text
from inference.decoding import Transcript, locate_words
from modeling import EmformerCache
from modeling.adapters import adapter_rows

# Recording, seconds heard, and what has been said in them; a later call may lengthen the last word.
PartialResult = Callable[[int, float, str], None]


class LiveRecognizer:
    """
    One stream of audio: takes samples of any number at a time and knows what has been said so far.

    A frame of logits is final when it comes: text is appended to, and only the last word may still grow.

        samples        |--- piece ---|-- piece --|------- piece -------|
        windows         [....] [....] [....]  those that are whole; the rest of the samples wait
        segments        each as soon as its right context is there

    Args:
        model: A recogniser that streams, in evaluation mode.
        processor: Its processor.

    Raises:
        ValueError: The model hears whole recordings only.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        check_streams(model, processor)
        self.model, self.processor, self.extractor = model, processor, processor.feature_extractor
        self.past_key_values, self.padding_cache = EmformerCache(model.config), None
        self.num_samples = 0
        self._samples = np.zeros(0, dtype=np.float32)  # that no window has begun with
        self._ids: list[np.ndarray] = []

    @property
    def ids(self) -> np.ndarray:
        """Class of every frame so far `(frames,)`."""
        return np.concatenate(self._ids) if self._ids else np.zeros(0, dtype=np.int64)

    @property
    def text(self) -> str:
        """What has been said so far."""
        return clean_text(self.processor.batch_decode(self.ids[np.newaxis])[0]) if len(self.ids) else ""

    @property
    def seconds(self) -> float:
        """Seconds that have been heard."""
        return self.num_samples / self.extractor.sampling_rate

    def add(self, samples: np.ndarray, *, is_last: bool = False) -> str:
        """
        Hears the next `samples` `(samples,)` and returns the text so far.

        Args:
            samples: At the extractor's rate.
            is_last: Whether the stream ends with them.

        Raises:
            ValueError: The stream was over already; as [`EmformerModel`].
        """
        self.num_samples += len(samples)
        self._samples = np.concatenate([self._samples, samples])
        num_frames = self.extractor.get_num_frames(len(self._samples))
        features = torch.zeros(0, self.extractor.feature_size)
        if num_frames:
            features = self.extractor.normalize(self.extractor.log_mel(self._samples))
            self._samples = self._samples[num_frames * self.extractor.hop_length :]
        if num_frames or is_last:
            self._encode(features, is_last)
        return self.text

    @torch.inference_mode()
    def _encode(self, features: torch.Tensor, is_last: bool) -> None:
        output = self.model(
            features[None].to(self.model.device),
            past_key_values=self.past_key_values,
            padding_cache=self.padding_cache,
            use_cache=True,
            is_last=is_last,
        )
        self.padding_cache = output.padding_cache
        self._ids.append(output.logits[0, : int(output.logits_lengths)].argmax(-1).cpu().numpy())

    def finish(self) -> Transcript:
        """Ends the stream and returns its transcript."""
        self.add(np.zeros(0, dtype=np.float32), is_last=True)
        seconds_per_frame = self.model.config.inputs_to_logits_ratio / self.extractor.sampling_rate
        words = locate_words(self.processor, self.ids, seconds_per_frame=seconds_per_frame) if len(self.ids) else []
        return Transcript(self.text, words, round(self.seconds, 3))


def check_streams(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """
    Makes sure that a recogniser can hear audio as it comes.

    Raises:
        ValueError: It, or its features, need whole recordings.
    """
    is_whole = getattr(processor.feature_extractor, "has_whole_windows", False)
    if model.config.model_type != "emformer" or not is_whole:
        raise ValueError(
            f"`streaming` must be false for this model, got true: {type(model).__name__} with "
            f"{type(processor.feature_extractor).__name__} hears whole recordings. Train an Emformer with "
            "`recipes/train_ctc.py --architecture emformer`."
        )


def stream_transcripts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    sources: Sequence[AudioSource],
    *,
    on_partial: PartialResult,
    channels: Sequence[str | int] | None = None,
    adapter_names: Sequence[str] | None = None,
    store: AdapterStore | None = None,
) -> Iterator[Transcript | AudioError]:
    """
    Recognises recordings one after the other as if each were spoken now, a segment at a time.

    Args:
        model: A recogniser that streams, in evaluation mode.
        processor: Its processor.
        sources: Recordings, as in `read_audio`.
        on_partial: Called whenever the text has grown.
        channels: Channel of each recording, as in `read_audio`. Default: all of them mixed.
        adapter_names: Adapter of each recording, `"__base__"` for none. Default: the active one on all.
        store: Has the adapters, which must then be named. Default: the model has them.

    Yields:
        A transcript for each recording, or what is wrong with the recording.

    Raises:
        ValueError: The model hears whole recordings only.
    """
    check_streams(model, processor)
    rate = processor.feature_extractor.sampling_rate
    pieces = {"chunk_seconds": model.config.segment_length * model.config.inputs_to_logits_ratio / rate}
    pieces |= {"overlap_seconds": 0.0, "sampling_rate": rate}
    for index, source in enumerate(sources):
        names = None if adapter_names is None else [adapter_names[index]]
        recognizer, before = LiveRecognizer(model, processor), ""
        try:
            with store.rows(names) if store else adapter_rows(model, names):
                for piece in stream_audio(source, channel=channels[index] if channels else MIX, **pieces):
                    if (text := recognizer.add(piece)) != before:
                        on_partial(index, recognizer.seconds, text)
                        before = text
                result = recognizer.finish()
        except AudioError as error:
            result = error
        yield result
