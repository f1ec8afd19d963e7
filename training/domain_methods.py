"""What a domain adaptation trains, and on which clips: its flags, the methods, the corpus in two domains."""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel

from data.domain_clips import decode_domain, list_cuts, match_pairs, select_domain, split_long
from data.domain_utterances import DomainCollator, DomainUtterances, PairedUtterances
from data.ldv import LDVChannel, simulate_clips
from data.overlap import describe_overlap
from data.prompts import Prompt
from inference.answering import check_language
from inference.audio_models import Family, find_family, load_model
from modeling import SpeechAdapterConfig
from modeling.adapter_config import PRESETS
from modeling.adapter_loading import locate_base
from training.audio_tower import add_adapter, find_tower_block, load_tower_alone
from training.checkpoint_digest import note_checkpoint
from training.corpus_arguments import CorpusArguments, load_split
from training.domain_training import cache_tower
from training.objectives.domain import OBJECTIVES, DomainObjective

logger = logging.getLogger(__name__)

# The adapter's name inside the model; a domain's own name never becomes part of a path.
ADAPTER_NAME = "domain"
# Methods that change the tower's output, which is all that pairs of clips can teach.
TOWER_METHODS = ("domain_adapter", "bottleneck")
METHODS = (*TOWER_METHODS, "projector", "lora_projector", "lora_llm", "none")
# LoRA's update is scaled by this; rank and factor then change apart.
LORA_SCALE = 2
# An adapter larger than this share of the model is a mistake in its sizes, or the model is very small.
MAX_TRAINABLE_SHARE = 0.8
# The evaluation's channels are the same whatever the training's seed is, and no training's.
EVAL_SEED = 1_000_000


@dataclass
class DomainArguments:
    """The base, the domains, the method and the objective."""

    model_name_or_path: str = field(metadata={"help": "Whisper or Qwen2-Audio: a folder or a Hub name."})
    source_domain: str = field(
        default="microphone", metadata={"help": "Domain that the base knows: a value of column `domain`."}
    )
    target_domain: str = field(default="ldv", metadata={"help": "Domain to adapt to, likewise."})
    simulate_domain: Literal["ldv"] | None = field(
        default=None, metadata={"help": "Make the target domain's clips from the source domain's, with --ldv_* flags."}
    )
    method: str = field(
        default="domain_adapter",
        metadata={
            "help": "What trains: an adapter on the audio tower's output (domain_adapter, bottleneck), the projector "
            "or LoRA on it (Whisper: keys and values of the cross-attention), LoRA on the text's attention, nothing.",
            "choices": list(METHODS),
        },
    )
    objective: str = field(
        default="task",
        metadata={
            "help": "task: transcripts or answers; distill: pairs of clips, with the audio tower alone in memory.",
            "choices": list(OBJECTIVES),
        },
    )
    distill_weight: float = field(default=1.0, metadata={"help": "Factor of the distance, with both objectives."})
    tower_only: bool = field(
        default=False, metadata={"help": "With distill: load the tower only, after the training too; no error rates."}
    )
    preset: Literal["lightweight", "standard", "heavy"] | None = field(
        default=None, metadata={"help": f"Sizes of a domain adapter: {', '.join(PRESETS)}. Default: standard."}
    )
    num_layers: int | None = field(default=None, metadata={"help": "Domain adapter: layers."})
    num_heads: int | None = field(default=None, metadata={"help": "Domain adapter: heads of its attention."})
    ffn_size: int | None = field(default=None, metadata={"help": "Domain adapter: width of its feed-forward parts."})
    use_gate: bool | None = field(default=None, metadata={"help": "Domain adapter: gates a channel of its change."})
    use_positions: bool | None = field(default=None, metadata={"help": "Domain adapter: adds positions to its input."})
    scale_init: float | None = field(default=None, metadata={"help": "Domain adapter: its scale before training."})
    adapter_dropout: float | None = field(default=None, metadata={"help": "Dropout of the adapter. Default: its own."})
    bottleneck_size: int = field(default=256, metadata={"help": "Width inside the method bottleneck."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the LoRA methods."})
    prompt_language: str | None = field(
        default=None, metadata={"help": "Language code of the speech, such as en, for a multilingual Whisper."}
    )
    dtype: str = field(default="auto", metadata={"help": "Precision of the base: auto, float32 or bfloat16."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base to 4 bits while loading."})
    cache_features: bool = field(
        default=True, metadata={"help": "Keep the tower's output on the disk, so that later epochs skip the tower."}
    )
    cache_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the cached output; bfloat16 halves the file."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Default: below the Hugging Face cache."})
    num_channels: int = field(
        default=1, metadata={"help": "Channels simulated for every clip; epoch e trains on the e-th, then anew."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of an answer in evaluations."})
    report_clips: int = field(
        default=0, metadata={"help": "Clips of the target domain to draw the adapter's maps of."}
    )
    hub_base_model_id: str | None = field(
        default=None, metadata={"help": "Name of the base on the Hub, to push an adapter of a base in a folder."}
    )

    def __post_init__(self):
        if self.objective != "task" and self.method not in TOWER_METHODS:
            raise ValueError(
                f"`objective` {self.objective} trains what changes the tower's output, the methods "
                f"{' and '.join(TOWER_METHODS)}, got {self.method}. Use `--objective task`."
            )
        if self.tower_only and self.objective != "distill":
            raise ValueError(f"`tower_only` needs `--objective distill`, got {self.objective}.")
        if self.num_channels > 1 and not self.cache_features:
            raise ValueError(f"`num_channels` above 1 needs `--cache_features true`, got {self.num_channels}.")
        if self.source_domain == self.target_domain:
            raise ValueError(f"`target_domain` must not be the source domain, got {self.target_domain!r} for both.")
        if self.num_channels < 1 or (self.num_channels > 1 and not self.simulate_domain):
            raise ValueError(
                f"`num_channels` must be at least 1, and 1 for recordings, got {self.num_channels}. Only a simulated "
                "domain has several."
            )

    @property
    def needs_pairs(self) -> bool:
        """Whether the same moment must have been heard in both domains."""
        return self.objective != "task"


def make_method_config(arguments: DomainArguments, family: Family) -> PeftConfig:
    """Returns the configuration of the method's adapter."""
    dropout = arguments.adapter_dropout
    if arguments.method == "domain_adapter":
        sizes = ("preset", "num_layers", "num_heads", "ffn_size", "use_gate", "use_positions", "scale_init")
        sizes = {name: getattr(arguments, name) for name in sizes}
        return SpeechAdapterConfig(kind="transformer", dropout=dropout, **sizes)
    if arguments.method == "bottleneck":
        return SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[arguments.bottleneck_size], dropout=dropout)
    if arguments.method == "projector":
        # A linear map beside a linear map trains as the map itself, and the base stays as it is.
        return SpeechAdapterConfig(kind="mlp", hidden_sizes=[], target_modules=family.projector)
    targets = family.projector if arguments.method == "lora_projector" else family.text_attention
    rank = arguments.lora_rank
    return LoraConfig(target_modules=targets, r=rank, lora_alpha=LORA_SCALE * rank, lora_dropout=dropout or 0.0)


def load_base(arguments: DomainArguments, prompt: Prompt) -> PreTrainedModel:
    """
    Returns the frozen base: whole, or for distillation its tower alone.

    Raises:
        ValueError: It is no Whisper or Qwen2-Audio, or `prompt` does not say which of its languages it hears.
    """
    if arguments.objective == "distill":
        model = load_tower_alone(arguments.model_name_or_path, dtype=arguments.dtype)
        note_checkpoint(model)
        return model
    options = {"dtype": arguments.dtype, "load_in_4bit": arguments.load_in_4bit}
    model = load_model(arguments.model_name_or_path, device_map={"": PartialState().device}, **options)
    check_language(model, prompt)
    return model


def add_method(model: PreTrainedModel, arguments: DomainArguments) -> DomainObjective:
    """Adds the method's fresh adapter to `model`; returns it with what is minimised."""
    add_adapter(model, make_method_config(arguments, find_family(model.config)), ADAPTER_NAME)
    model.peft_config[ADAPTER_NAME].base_model_name_or_path = locate_base(arguments.model_name_or_path)
    block = find_tower_block(model, ADAPTER_NAME) if arguments.needs_pairs else None
    weight = arguments.distill_weight
    objective = DomainObjective(model, arguments.objective, speech_adapter_block=block, distill_weight=weight)
    return objective.to(PartialState().device)


def make_collator(arguments: DomainArguments, model: PreTrainedModel, prompt: Prompt) -> DomainCollator:
    """Returns what makes batches for the objective."""
    audio_token_id = getattr(model.config, "audio_token_id", None)
    return DomainCollator(prompt, has_answers=arguments.objective != "distill", audio_token_id=audio_token_id)


def prepare_training(
    arguments: DomainArguments,
    model: PreTrainedModel,
    variants: list[DomainUtterances | PairedUtterances],
    collator: DomainCollator,
    *,
    batch_size: int,
) -> Dataset:
    """Returns the training utterances with the tower's output cached, or as they are; says which."""
    if not arguments.cache_features:
        logger.warning("The tower's output is not cached (`cache_features`): the tower runs in every epoch.")
        return variants[0]
    options = {"folder": arguments.cache_dir, "dtype": arguments.cache_dtype, "batch_size": batch_size}
    with PartialState().local_main_process_first():
        dataset = cache_tower(model, collator.prompt.processor, variants, collator, **options)
    logger.warning("The tower's output is cached (%d channels): later epochs skip the tower.", len(variants))
    return dataset


class DomainLoader:
    """
    Loads the utterances of both domains.

    Args:
        arguments: Domains and objective.
        corpus_args: Corpus and splits.
        channel: Of a simulated domain.
        prompt: What asks the model, which says how much it hears at once.
        seed: Of the channels that are trained on and of which clips come together.
    """

    def __init__(
        self,
        arguments: DomainArguments,
        corpus_args: CorpusArguments,
        channel: LDVChannel,
        prompt: Prompt,
        *,
        seed: int,
    ):
        self.arguments, self.corpus_args, self.channel, self.prompt = arguments, corpus_args, channel, prompt
        self.seed = seed
        self._loaded: dict[tuple, list[tuple[Dataset, Dataset]]] = {}
        self._corpora: dict[str, Dataset] = {}
        self.rate = prompt.extractor.sampling_rate
        self._join = partial(DomainUtterances, max_samples=prompt.max_samples, concatenate=corpus_args.concatenate)

    def load_training(self) -> list[DomainUtterances | PairedUtterances]:
        """
        Returns what is trained on, once a simulated channel.

        Raises:
            ValueError: A domain has no data, or pairs are needed and do not fit; as [`match_pairs`].
        """
        seeds = [self.seed + number for number in range(self.arguments.num_channels)]
        clips = self._load(self.corpus_args.train_split, seeds)
        variants = [self._pair(*domains, seed=seed) for domains, seed in zip(clips, seeds, strict=True)]
        if num_left_out := getattr(variants[0], "target", variants[0]).num_left_out:
            logger.warning("%d split clips are left out of training: a transcript cannot be split.", num_left_out)
        return variants

    def load_validation(self) -> DomainUtterances | PairedUtterances:
        """Returns the evaluation split in the form that is trained on, for losses and distances."""
        (domains,) = self._load(self.corpus_args.eval_split, [EVAL_SEED])
        return self._pair(*domains, seed=EVAL_SEED)

    def load_evaluation(self) -> dict[str, DomainUtterances]:
        """Returns the evaluation split's utterances by domain, the source first."""
        ((source, target),) = self._load(self.corpus_args.eval_split, [EVAL_SEED])
        return {
            self.arguments.source_domain: self._join(source, seed=EVAL_SEED),
            self.arguments.target_domain: self._join(target, seed=EVAL_SEED),
        }

    def describe_overlap(self) -> str | None:
        """Returns what the card says of data that is both trained and evaluated on; both must be loaded."""
        splits = {"train_split": self.corpus_args.train_split, "eval_split": self.corpus_args.eval_split}
        return describe_overlap(*(self._corpora[split] for split in splits.values()), **splits)

    def _pair(self, source: Dataset, target: Dataset, *, seed: int) -> DomainUtterances | PairedUtterances:
        # Parts of long clips have no transcript of their own; a distance needs none.
        join = partial(self._join, seed=seed, is_whole=self.arguments.objective != "distill")
        return PairedUtterances(join(source), join(target)) if self.arguments.needs_pairs else join(target)

    def _load(self, split: str, seeds: list[int]) -> list[tuple[Dataset, Dataset]]:
        """Source and target of a split, cut to what the model hears, once a seed of the simulated channel."""
        key = (split, *seeds)
        if key not in self._loaded:
            self._loaded[key] = self._load_anew(split, seeds)
        return self._loaded[key]

    def _load_anew(self, split: str, seeds: list[int]) -> list[tuple[Dataset, Dataset]]:
        arguments, corpus = self.arguments, load_split(self.corpus_args, split)
        self._corpora[split] = corpus
        decode = partial(decode_domain, sampling_rate=self.rate, needs_text=not arguments.tower_only)
        list_places = partial(list_cuts, max_samples=self.prompt.max_samples, sampling_rate=self.rate)
        if arguments.simulate_domain:
            # A corpus that does not name its domains is all of the source's.
            is_named = "domain" in corpus.column_names
            source = decode(
                select_domain(corpus, arguments.source_domain, flag="source_domain") if is_named else corpus
            )
            cuts = list_places(source)
            targets = [simulate_clips(source, self.rate, channel=self.channel, seed=seed) for seed in seeds]
            source = split_long(source, cuts)
            return [(source, split_long(target, cuts)) for target in targets]
        domains = {"source_domain": arguments.source_domain, "target_domain": arguments.target_domain}
        source, target = (decode(select_domain(corpus, name, flag=flag)) for flag, name in domains.items())
        if not arguments.needs_pairs:
            return [(split_long(source, list_places(source)), split_long(target, list_places(target)))]
        source, target = match_pairs(source, target)
        cuts = list_places(source)
        return [(split_long(source, cuts), split_long(target, cuts))]
