"""What the benchmark of personal training runs: its speech, the peers' loops and ours."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback

from data.collators import IGNORED_LABEL, CTCCollator, pack_states
from data.state_cache import CachedUtterances
from modeling import DeepSpeech2Config, DeepSpeech2FeatureExtractor, DeepSpeech2ForCTC, SpeechAdapterConfig
from training.frozen_part import FrozenPrefix, find_frozen_prefix
from training.objectives.recognition import CTCObjective
from training.trainer import AdapterTrainer, RecipeTrainingArguments, SeededSampler, set_frozen_modules_to_eval

FRAMES_A_SECOND = 100  # of features
LABELS_A_SECOND = 12  # letters of brisk speech
SHORTEST_SECONDS, MEDIAN_SECONDS, LONGEST_SECONDS = 2.0, 4.0, 8.0
DEVIATION = 0.4  # of the logarithm of the seconds
DROPOUT, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 1e-4, 1.0
NUM_OFFSETS = 997  # stretches of noise that utterances are cut from


@dataclass(frozen=True)
class Sizes:
    """
    How large the base, the adapter and the data are.

    Args:
        base: Fields of [`DeepSpeech2Config`] but `vocab_size`.
        hidden_sizes: Widths of the adapter's hidden layers.
        num_utterances: Utterances of the speaker.
        batch_size: Utterances of a step.
    """

    base: dict[str, int]
    hidden_sizes: tuple[int, ...]
    num_utterances: int
    batch_size: int


FULL_SIZES = Sizes({"num_mel_bins": 80, "hidden_size": 512, "num_hidden_layers": 5}, (512, 256), 128, 32)
QUICK_SIZES = Sizes({"num_mel_bins": 16, "hidden_size": 8, "num_hidden_layers": 1, "conv_channels": 2}, (8, 4), 6, 3)


class RandomUtterances(Dataset):
    """
    Features and labels of noise with the durations of speech; what [`UtteranceDataset`] gives, without audio.

    Seconds are log-normal from 2 to 8, labels come 12 a second. Nothing grows with the number of utterances but their
    labels: features are cut from one stretch of noise.

    Args:
        num_utterances: Their number.
        num_mel_bins: Width of the features.
        vocab_size: Labels are from 1 to below it; 0 is the blank.
    """

    augmentation, is_random, epoch, seed = None, False, 0, 0

    def __init__(self, num_utterances: int, *, num_mel_bins: int, vocab_size: int):
        generator = torch.Generator().manual_seed(0)
        seconds = torch.randn(num_utterances, generator=generator).mul(DEVIATION).exp().mul(MEDIAN_SECONDS)
        seconds = seconds.clamp(SHORTEST_SECONDS, LONGEST_SECONDS)
        self.lengths = (FRAMES_A_SECOND * seconds).round().long().tolist()
        self.labels = [
            torch.randint(1, vocab_size, (round(LABELS_A_SECOND * frames / FRAMES_A_SECOND),), generator=generator)
            for frames in self.lengths
        ]
        num_noise = NUM_OFFSETS + round(LONGEST_SECONDS * FRAMES_A_SECOND)
        self.noise = torch.randn(num_noise, num_mel_bins, generator=generator)
        self.groups, self.references = [], []
        self.samples_digest = f"noise {num_utterances} {num_mel_bins} {vocab_size}"

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: all epochs are the same."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict:
        start = index % NUM_OFFSETS
        return {"input_features": self.noise[start : start + self.lengths[index]], "labels": self.labels[index]}


def make_collator(num_mel_bins: int) -> CTCCollator:
    """Returns what pads a batch of [`RandomUtterances`]."""
    return CTCCollator(SimpleNamespace(feature_extractor=DeepSpeech2FeatureExtractor(num_mel_bins)))


def make_base(sizes: Sizes, vocab_size: int) -> DeepSpeech2ForCTC:
    """Returns a frozen base with random weights, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DeepSpeech2ForCTC(DeepSpeech2Config(**sizes.base, vocab_size=vocab_size)).requires_grad_(False).eval()


def add_adapter(base: DeepSpeech2ForCTC, sizes: Sizes, kind: str) -> None:
    """Adds a fresh adapter of `kind` at the classifier of `base`."""
    config = SpeechAdapterConfig(kind=kind, hidden_sizes=list(sizes.hidden_sizes), dropout=DROPOUT)
    base.add_adapter(config, "speaker")


def draw_sorted_batches(utterances: Dataset, batch_size: int) -> Iterator[list[int]]:
    """Gives the rows of batches of similar length, the longest first, as the cache is built."""
    order = sorted(range(len(utterances)), key=utterances.lengths.__getitem__, reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def run_prefix(prefix: FrozenPrefix, utterances: Dataset, collate: Callable, batch_size: int) -> None:
    """Makes one frozen forward pass over the data and keeps nothing: the unit of what training costs."""
    for rows in draw_sorted_batches(utterances, batch_size):
        prefix(collate([utterances[row] for row in rows]))


class PaddedHead(nn.Module):
    """
    The original's adapter on padded frames: MLP, log-softmax and torch's CTC, all by autograd.

    Args:
        in_features: Width of the base's last recurrent output.
        hidden_sizes: Widths of the MLP's hidden layers.
        vocab_size: Classes; 0 is the blank.
    """

    def __init__(self, in_features: int, hidden_sizes: Sequence[int], vocab_size: int):
        super().__init__()
        layers: list[nn.Module] = []
        for width, next_width in pairwise([in_features, *hidden_sizes]):
            layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(DROPOUT)]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_sizes[-1], vocab_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        lengths: torch.Tensor,
        labels: torch.Tensor,
        base_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Returns the loss of `labels` `(batch, tokens)`, -100 beyond their end.

        Args:
            hidden_states: `(batch, frames, in_features)`.
            lengths: Real frames `(batch,)`.
            labels: Classes `(batch, tokens)`.
            base_logits: `(batch, frames, vocab_size)`, to which a residual adapter adds.
        """
        logits = self.mlp(hidden_states)
        logits = logits if base_logits is None else logits + base_logits
        log_probs = logits.log_softmax(-1).transpose(0, 1)  # (frames, batch, classes)
        num_labels = (labels != IGNORED_LABEL).sum(1)
        return nn.functional.ctc_loss(log_probs, labels.clamp(min=0), lengths, num_labels, reduction="mean")


def make_head(base: DeepSpeech2ForCTC, sizes: Sizes) -> tuple[PaddedHead, torch.optim.Optimizer]:
    """Returns the original's adapter for `base` and its optimizer."""
    head = PaddedHead(2 * base.config.hidden_size, sizes.hidden_sizes, base.config.vocab_size).train()
    return head, torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE)


def run_original_epoch(
    base: DeepSpeech2ForCTC,
    head: PaddedHead,
    optimizer: torch.optim.Optimizer,
    utterances: Dataset,
    *,
    collate: Callable,
    batch_size: int,
    is_residual: bool,
) -> None:
    """
    Trains one epoch as the original does: the base hears every utterance again, in padded batches in file order.

    As the original's `forward`, the base gives its own logits too.
    """
    for start in range(0, len(utterances), batch_size):
        batch = collate([utterances[row] for row in range(start, min(start + batch_size, len(utterances)))])
        labels = batch.pop("labels")
        with torch.no_grad():
            output = base(**batch, output_hidden_states=True)
        base_logits = output.logits if is_residual else None
        take_step(head, optimizer, head(output.hidden_states[-1], output.logits_lengths, labels, base_logits))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """Changes the trainable parameters of `model` once."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()


def pad_cached(examples: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Returns the arguments of [`PaddedHead`], which is in fp32, for cached utterances of any precision."""
    states = {
        name: pad_sequence([example["states"][name] for example in examples], batch_first=True).float()
        for name in examples[0]["states"]
    }
    return {
        "hidden_states": states["hidden_states"],
        "base_logits": states.get("base_output"),
        "lengths": torch.tensor([len(example["states"]["hidden_states"]) for example in examples]),
        "labels": pad_sequence(
            [example["labels"] for example in examples], batch_first=True, padding_value=IGNORED_LABEL
        ),
    }


def load_in_random_order(cached: CachedUtterances, batch_size: int, collate: Callable) -> DataLoader:
    """Returns batches of the cached utterances in the order in which the Trainer draws them in its first epoch."""
    sampler = SeededSampler(cached, seed=0, find_epoch=lambda: 0)
    return DataLoader(cached, batch_size, sampler=sampler, collate_fn=collate)


def run_padded_epoch(
    head: PaddedHead, optimizer: torch.optim.Optimizer, cached: CachedUtterances, batch_size: int
) -> None:
    """Trains one epoch on the cache, with padding and plain autograd."""
    for batch in load_in_random_order(cached, batch_size, pad_cached):
        take_step(head, optimizer, head(**batch))


def run_bare_epochs(model: DeepSpeech2ForCTC, cached: CachedUtterances, *, batch_size: int, num_epochs: int) -> None:
    """Trains on the cache in a loop written by hand: what is left of the Trainer without its services."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)
    num_steps = num_epochs * math.ceil(len(cached) / batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    objective = CTCObjective(model).train()
    set_frozen_modules_to_eval(objective)
    for _ in range(num_epochs):
        for batch in load_in_random_order(cached, batch_size, pack_states):
            take_step(model, optimizer, objective(**batch)["loss"])
            scheduler.step()


def make_trainer(
    model: DeepSpeech2ForCTC,
    cached: CachedUtterances,
    *,
    batch_size: int,
    folder: Path,
    num_epochs: int = 1,
    max_steps: int = -1,
    is_bf16: bool = False,
) -> AdapterTrainer:
    """Returns this project's Trainer over the cache, saving and reporting nothing."""
    arguments = RecipeTrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=num_epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_GRAD_NORM,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=is_bf16,
        seed=0,
    )
    trainer = AdapterTrainer(CTCObjective(model), args=arguments, train_dataset=cached, data_collator=pack_states)
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_from_scratch(
    model: DeepSpeech2ForCTC,
    utterances: Dataset,
    collate: Callable,
    *,
    batch_size: int,
    folder: Path,
    dtype: str = "float32",
) -> tuple[CachedUtterances, FrozenPrefix]:
    """Returns the utterances with the states of the model's frozen part, computed into a `folder` that is new."""
    prefix = find_frozen_prefix(model)
    cached = CachedUtterances.build(
        utterances,
        prefix,
        collate=collate,
        key={"prefix": prefix.name, "weights": prefix.digest},
        folder=folder,
        batch_size=batch_size,
        dtype=dtype,
    )
    return cached, prefix
