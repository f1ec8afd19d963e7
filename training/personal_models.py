"""What of personalisation depends on the recogniser: data, loss, cache and Trainer of CTC models and of Whisper.

make_loader      the corpus, a speaker at a time
make_objective   what is minimised
cache            utterances with the states of what is frozen in their place, where these can be kept
collator         makes batches of both
"""

import logging
from functools import partial

from datasets import Dataset

from data.augmentation import Augmentation
from data.collators import CTCCollator
from data.domain_clips import decode_domain, list_cuts, split_long
from data.domain_utterances import DomainCollator, DomainUtterances
from data.spelling import drop_long
from data.utterances import UtteranceDataset
from inference.decoding import find_samples_per_logit
from inference.recognizers import CTCRecognizer, Recognizer, WhisperRecognizer
from training.corpus_arguments import CorpusArguments
from training.domain_training import DomainTrainer, cache_tower
from training.frozen_part import CacheArguments, cache_frozen_part
from training.objectives.domain import DomainObjective
from training.objectives.recognition import CTCObjective, average_loss
from training.personal import PersonalArguments, SpeakerLoader
from training.trainer import AdapterTrainer

logger = logging.getLogger(__name__)


class PersonalCTC:
    """
    Personalisation of a CTC model.

    Args:
        recognizer: The model, adapter added.
        cache_args: What is cached of the frozen part.
        batch_size: Utterances that the frozen part hears together.
    """

    trainer_class = AdapterTrainer

    def __init__(self, recognizer: CTCRecognizer, cache_args: CacheArguments, *, batch_size: int):
        self.recognizer, self.cache_args, self.batch_size = recognizer, cache_args, batch_size
        self.collator = CTCCollator(recognizer.processor)

    def make_loader(
        self, arguments: PersonalArguments, corpus_args: CorpusArguments, augmentation: Augmentation, *, seed: int
    ) -> SpeakerLoader:
        """Returns what loads a speaker's utterances."""
        samples_per_logit = find_samples_per_logit(self.recognizer.model, self.recognizer.processor)
        options = {"samples_per_logit": samples_per_logit, "seed": seed}
        return SpeakerLoader(arguments, corpus_args, augmentation, self.recognizer.processor, **options)

    def make_objective(self) -> CTCObjective:
        """Returns what is minimised: the loss, a mean over utterances whatever the checkpoint says."""
        return CTCObjective(average_loss(self.recognizer.model))

    def cache(self, dataset: UtteranceDataset, objective: CTCObjective) -> Dataset:
        """As [`cache_frozen_part`]."""
        return cache_frozen_part(
            dataset, objective.prefix, self.recognizer.processor, self.cache_args, batch_size=self.batch_size
        )


class PersonalWhisper:
    """
    Personalisation of a Whisper; arguments as of [`PersonalCTC`].

    The frozen encoder runs once an utterance: adapters act behind it, on its output or in the decoder.
    """

    trainer_class = partial(DomainTrainer, parameter_lrs={})

    def __init__(self, recognizer: WhisperRecognizer, cache_args: CacheArguments, *, batch_size: int):
        self.recognizer, self.cache_args, self.batch_size = recognizer, cache_args, batch_size
        self.collator = DomainCollator(recognizer.prompt, has_answers=True)

    def make_loader(
        self, arguments: PersonalArguments, corpus_args: CorpusArguments, augmentation: Augmentation, *, seed: int
    ) -> "WhisperSpeakerLoader":
        """Returns what loads a speaker's utterances."""
        if augmentation.changes:
            logger.warning("Recordings are heard as they are: a Whisper knows pauses, rooms and noise already.")
        return WhisperSpeakerLoader(arguments, corpus_args, self.recognizer, seed=seed)

    def make_objective(self) -> DomainObjective:
        """Returns what is minimised: the model's own loss, a mean over tokens."""
        return DomainObjective(self.recognizer.model, "task")

    def cache(self, dataset: DomainUtterances, objective: DomainObjective) -> Dataset:
        """As [`cache_tower`]; nothing is cached where something inside the encoder trains."""
        encoder = objective.adapted_model.get_encoder()
        inside = [name for name, value in encoder.named_parameters() if value.requires_grad]
        if any("layer_norm" not in name.partition("speech_adapter")[0] for name in inside):
            logger.warning("The encoder is not cached: something inside it trains (%s ...).", inside[0])
            return dataset
        options = {"folder": self.cache_args.cache_dir, "dtype": self.cache_args.cache_dtype}
        model, processor = self.recognizer.model, self.recognizer.processor
        return cache_tower(model, processor, [dataset], self.collator, batch_size=self.batch_size, **options)


PersonalModel = PersonalCTC | PersonalWhisper


def make_personal_model(recognizer: Recognizer, cache_args: CacheArguments, *, batch_size: int) -> PersonalModel:
    """Returns what trains an adapter of a recogniser; arguments as of [`PersonalCTC`]."""
    kind = PersonalWhisper if isinstance(recognizer, WhisperRecognizer) else PersonalCTC
    return kind(recognizer, cache_args, batch_size=batch_size)


class WhisperSpeakerLoader(SpeakerLoader):
    """
    As [`SpeakerLoader`], with transcripts as they are written: a Whisper writes them so.

    Args:
        arguments: The speakers, the seconds.
        corpus_args: The corpus.
        recognizer: The Whisper.
        seed: Of everything drawn.
    """

    def __init__(
        self, arguments: PersonalArguments, corpus_args: CorpusArguments, recognizer: WhisperRecognizer, *, seed: int
    ):
        options = {"samples_per_logit": 1, "seed": seed}
        super().__init__(arguments, corpus_args, Augmentation(), recognizer.processor, **options)
        self.recognizer, self.concatenate = recognizer, corpus_args.concatenate

    def load_training(self, corpus: Dataset) -> DomainUtterances:
        """Returns a speaker's utterances to train on: those that the model hears at once."""
        prompt = self.recognizer.prompt
        clips = decode_domain(corpus, sampling_rate=self.recognizer.sampling_rate)
        longest = {"max_seconds": self.arguments.max_clip_seconds, "sampling_rate": self.recognizer.sampling_rate}
        clips = drop_long(clips, **longest)
        cuts = list_cuts(clips, max_samples=prompt.max_samples, sampling_rate=self.recognizer.sampling_rate)
        options = {"max_samples": prompt.max_samples, "concatenate": self.concatenate, "seed": self.seed}
        dataset = DomainUtterances(split_long(clips, cuts), is_whole=True, **options)
        if dataset.num_left_out:
            logger.warning(
                "%d clips of more than %g s are left out of training: their transcripts cannot be cut with them.",
                *(dataset.num_left_out, prompt.max_samples / self.recognizer.sampling_rate),
            )
        return dataset

    def load_evaluation(self, corpus: Dataset) -> DomainUtterances:
        """Returns utterances to score."""
        return self.recognizer.load_utterances(corpus, concatenate=self.concatenate, seed=self.seed)

    def count_seconds(self, dataset: DomainUtterances) -> float:
        """Returns the seconds of speech in one epoch."""
        return sum(dataset.lengths) / self.recognizer.sampling_rate
