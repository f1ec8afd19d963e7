"""Any recogniser behind one contract: CTC models of this project and of transformers, and Whisper.

    processor          feature extractor and tokenizer
    sampling_rate      of what it hears, in Hz; recordings of other rates are resampled
    transcribe         recordings -> transcripts, each with its own adapter
    load_utterances    rows of a corpus -> what `score` takes
    score              utterances -> word and character error rates, overall and by speaker

A CTC model gives a class for each frame: beam search and words have their times, and long recordings are heard in
chunks; a Whisper writes text with the times of segments, and has its own way through long recordings.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from accelerate import PartialState
from transformers import MODEL_FOR_CTC_MAPPING, AutoConfig, AutoProcessor, PreTrainedModel, ProcessorMixin

import modeling  # noqa: F401  (registers the models and the adapter)
from data.audio import AudioError, AudioSource
from data.prompts import WhisperPrompt
from data.score_text import find_score_normalizer
from data.text import set_language
from inference.audio_models import load_model
from inference.beam_search import BeamDecoder, DecodingArguments, build_decoder
from inference.decoding import Transcript, find_samples_per_logit, iterate_transcripts, load_adapter, load_recognizer
from inference.live_recognition import stream_transcripts
from inference.whisper import iterate_whisper

if TYPE_CHECKING:  # recordings are transcribed where no package of a training is installed: what scores imports late
    from datasets import Dataset

    from data.domain_utterances import DomainUtterances
    from data.utterances import UtteranceDataset

WHISPER = "whisper"
MAX_NEW_TOKENS = 224  # of a Whisper's answer: half of its positions, as in its long recordings


@dataclass
class CTCRecognizer:
    """A CTC model as a recogniser."""

    model: PreTrainedModel
    processor: ProcessorMixin
    decoder: BeamDecoder | None = None
    chunk_seconds: float = 20.0
    overlap_seconds: float = 2.0

    @property
    def sampling_rate(self) -> int:
        """Hz."""
        return self.processor.feature_extractor.sampling_rate

    def set_search(self, decoding: DecodingArguments, chunk_seconds: float = 20.0, overlap_seconds: float = 2.0):
        """Chooses the search over words, if any, and the chunks of long recordings."""
        self.decoder = build_decoder(decoding, self.processor.tokenizer)
        self.chunk_seconds, self.overlap_seconds = chunk_seconds, overlap_seconds

    def transcribe(
        self, sources: Sequence[AudioSource], *, needs_times: bool = True, **options
    ) -> Iterator[Transcript | AudioError]:
        """As [`iterate_transcripts`]; times cost nothing here."""
        del needs_times
        chunks = {"chunk_seconds": self.chunk_seconds, "overlap_seconds": self.overlap_seconds}
        return iterate_transcripts(self.model, self.processor, sources, decoder=self.decoder, **chunks, **options)

    def stream(self, sources: Sequence[AudioSource], **options) -> Iterator[Transcript | AudioError]:
        """
        As [`stream_transcripts`].

        Raises:
            ValueError: The model hears whole recordings only, or a search over words is chosen.
        """
        if self.decoder is not None:
            raise ValueError("`word_list` and `ngram` must be left out with `streaming`: a search needs what follows.")
        return stream_transcripts(self.model, self.processor, sources, **options)

    def load_utterances(self, corpus: "Dataset", *, concatenate: tuple[int, int] = (1, 1), seed: int = 0):
        """Returns the utterances of rows with transcripts, to be scored."""
        from data.utterances import UtteranceDataset, decode_clips

        samples_per_logit = find_samples_per_logit(self.model, self.processor)
        options = {"is_joined": concatenate[1] > 1, "is_evaluation": True}
        clips = decode_clips(corpus, self.processor, samples_per_logit=samples_per_logit, **options)
        return UtteranceDataset(clips, self.processor, concatenate=concatenate, seed=seed)

    def score(self, dataset: "UtteranceDataset", *, batch_size: int) -> dict[str, dict]:
        """As [`evaluate_dataset`]."""
        from inference.scoring import evaluate_dataset

        return evaluate_dataset(self.model, self.processor, dataset, batch_size=batch_size, decoder=self.decoder)


@dataclass
class WhisperRecognizer:
    """A Whisper as a recogniser."""

    model: PreTrainedModel
    prompt: WhisperPrompt
    language: str | None = field(default=None)

    @property
    def processor(self) -> ProcessorMixin:
        """Feature extractor and tokenizer."""
        return self.prompt.processor

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of a transcript of one window."""
        return min(MAX_NEW_TOKENS, self.model.config.max_target_positions - len(self.prompt.tokenizer.prefix_tokens))

    @property
    def sampling_rate(self) -> int:
        """Hz."""
        return self.prompt.extractor.sampling_rate

    def set_search(self, decoding: DecodingArguments, *_chunks: float):
        """
        Refuses a search over words: Whisper writes tokens. Its chunks are its own 30 s.

        Raises:
            ValueError: `decoding` has a word list or an n-gram.
        """
        given = [name for name in ("word_list", "ngram") if getattr(decoding, name)]
        if given:
            raise ValueError(f"`{given[0]}` must be left out for a Whisper, got one. It is for CTC models.")

    def stream(self, *_sources, **_options):
        """
        Refuses: a Whisper hears 30 s at once.

        Raises:
            ValueError: Always.
        """
        raise ValueError("`streaming` must be false for a Whisper, got true. It hears 30 s at once.")

    def transcribe(self, sources: Sequence[AudioSource], **options) -> Iterator[Transcript | AudioError]:
        """As [`iterate_whisper`]."""
        return iterate_whisper(self.model, self.prompt, sources, **options)

    def load_utterances(self, corpus: "Dataset", *, concatenate: tuple[int, int] = (1, 1), seed: int = 0):
        """Returns the utterances of rows with transcripts, cut to what the model hears at once, to be scored."""
        from data.domain_clips import decode_domain, list_cuts, split_long
        from data.domain_utterances import DomainUtterances

        clips = decode_domain(corpus, sampling_rate=self.sampling_rate)
        cuts = list_cuts(clips, max_samples=self.prompt.max_samples, sampling_rate=self.sampling_rate)
        options = {"max_samples": self.prompt.max_samples, "concatenate": concatenate, "seed": seed}
        return DomainUtterances(split_long(clips, cuts), **options)

    def score(self, dataset: "DomainUtterances", *, batch_size: int) -> dict[str, dict]:
        """As [`score_answers`], figures and words of numbers the same."""
        from inference.scoring import score_answers

        normalize = find_score_normalizer(self.prompt.tokenizer, self.language)
        options = {"batch_size": batch_size, "max_new_tokens": self.max_new_tokens}
        return score_answers(self.model, self.prompt, dataset, normalize=normalize, language=self.language, **options)


Recognizer = CTCRecognizer | WhisperRecognizer


def find_recognizer_type(model_name_or_path: str) -> type[Recognizer]:
    """
    Returns what kind of recogniser a checkpoint is.

    Raises:
        ValueError: It does not exist, or is neither a CTC model nor a Whisper.
    """
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model_name_or_path` must be a recogniser, got {model_name_or_path!r} ({error})."
        ) from error
    if config.model_type == WHISPER:
        return WhisperRecognizer
    if type(config) in MODEL_FOR_CTC_MAPPING:
        return CTCRecognizer
    raise ValueError(
        f"`model_name_or_path` must be a CTC model or a Whisper, got a model of type {config.model_type!r} in "
        f"{model_name_or_path}."
    )


def open_recognizer(
    model_name_or_path: str,
    adapters: Mapping[str, str] | None = None,
    *,
    language: Sequence[str] | None = None,
    allow_base_mismatch: bool = False,
) -> Recognizer:
    """
    Returns a recogniser with adapters, in evaluation mode on this process's device.

    Args:
        model_name_or_path: Folder or Hub name of the base.
        adapters: Name to folder or Hub name; the last one is active.
        language: Codes of the speech; the first one counts. A Whisper of several languages needs it.
        allow_base_mismatch: Take adapters that were made for another base.

    Raises:
        ValueError: As [`find_recognizer_type`]; the base or an adapter does not load; the base has no tokenizer; an
            adapter was made for another base and that is not allowed; or the language is missing or not the model's.
    """
    load = partial(load_adapter, allow_base_mismatch=allow_base_mismatch)
    if find_recognizer_type(model_name_or_path) is CTCRecognizer:
        load_processor(model_name_or_path)
        model, processor = load_recognizer(model_name_or_path, adapters, allow_base_mismatch=allow_base_mismatch)
        set_language(processor.tokenizer, language)
        return CTCRecognizer(model, processor)
    from inference.answering import check_language

    prompt = WhisperPrompt(load_processor(model_name_or_path), language=language[0] if language else None)
    model = load_model(model_name_or_path, device_map={"": PartialState().device}).eval()
    check_language(model, prompt)
    for name, path in (adapters or {}).items():
        load(model, str(path), name, processor=prompt.processor)
    return WhisperRecognizer(model.eval(), prompt, prompt.tokenizer.language)


def load_processor(model_name_or_path: str) -> ProcessorMixin:
    """
    Returns the processor of a recogniser.

    Raises:
        ValueError: There is none, or it has no tokenizer.
    """
    try:
        processor, reason = AutoProcessor.from_pretrained(model_name_or_path, trust_remote_code=False), "no tokenizer"
    except (OSError, TypeError, ValueError) as error:  # a tokenizer without its vocabulary is a TypeError
        processor, reason = None, str(error)
    if getattr(processor, "tokenizer", None) is None:
        raise ValueError(
            "`model_name_or_path` must be a recogniser with a feature extractor and a tokenizer, got "
            f"{model_name_or_path!r} ({reason}). Choose one that was trained to recognise, or train one with "
            "`recipes/train_ctc.py`."
        )
    return processor
