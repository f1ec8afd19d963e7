"""A small Whisper of spoken digits from scratch: the base that `benchmarks.domain_adapters` adapts.

    python -m benchmarks.domain_base --dataset fsdd --output_dir outputs/domain/base

Microphone speech only: the recordings, one to three of a speaker joined, and the same kind of phrases in espeak-ng's
ordinary voices. The output is an ordinary folder of `WhisperForConditionalGeneration` and `WhisperProcessor`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    set_seed,
)

from data.audio import SAMPLING_RATE
from data.augmentation import Augmentation
from data.collators import IGNORED_LABEL
from data.corpora import load_corpus
from data.metrics import score_by_speaker
from data.prepare_fsdd import DIGITS
from data.synthesis import ORDINARY_VOICES, synthesize
from data.utterances import UtteranceDataset, read_concatenated
from publishing.report import print_results, write_results
from training.trainer import AdapterTrainer, RecipeTrainingArguments

CHUNK_SECONDS = 2  # nearly always enough for three digits; a published Whisper takes 30
END, START = "<|endoftext|>", "<|startoftranscript|>"
PROMPT_TOKENS = [START, "<|en|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>"]
NO_TIMESTAMPS = "<|notimestamps|>"
MAX_DIGITS = 3  # in an utterance
NUM_EPOCHS = 30
PHRASES_PER_VOICE = 40
RATE_JITTER = 0.15
SNR_DB = (20.0, 35.0)
HELD_OUT_RECORDINGS = 4  # of the 40 that a speaker has of a digit; for choices, which the test recordings may not make
AUGMENTATION = Augmentation(
    min_speed=0.88, max_speed=1.14, num_time_masks=1, num_mel_masks=2, max_mel_mask_bins=10
)  # fmt: skip
TRAINING = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1.5e-3,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 25,
    "use_cpu": True,
}


def make_processor() -> WhisperProcessor:
    """Returns Whisper's feature extractor for two seconds and its tokenizer, in which every digit is one token."""
    trainer = trainers.BpeTrainer(
        min_frequency=1, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.train_from_iterator([f" {digit}" for digit in DIGITS], trainer)
    vocabulary = learner.get_vocab()
    tokenizer = WhisperTokenizer(
        vocab=vocabulary | {END: len(vocabulary)},
        merges=[tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]],
        pad_token=END,
        additional_special_tokens=[*PROMPT_TOKENS, NO_TIMESTAMPS],
    )
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=80, chunk_length=CHUNK_SECONDS), tokenizer)


def make_model(processor: WhisperProcessor) -> WhisperForConditionalGeneration:
    """Returns an untrained Whisper of about 1.6 million parameters."""
    tokenizer = processor.tokenizer
    start, no_timestamps = tokenizer.convert_tokens_to_ids([START, NO_TIMESTAMPS])
    special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    special |= {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": start}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=processor.feature_extractor.feature_size,
        d_model=144,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=576,
        decoder_ffn_dim=576,
        max_source_positions=processor.feature_extractor.nb_max_frames // 2,
        max_target_positions=64,
        dropout=0.1,
        init_std=0.08,  # 1 / sqrt(144); Whisper's .02 leaves the sound a twentieth of the positions at this width
        **special,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        **special,
        is_multilingual=False,
        no_timestamps_token_id=no_timestamps,
        max_length=32,
    )
    return model


class GuidedWhisper(nn.Module):
    """
    Whisper whose encoder learns by CTC too, through a head that is dropped after the training.

    By the decoder's loss alone, the cross-attention of so small a corpus does not find where the words are.

    Source: Kim et al., "Joint CTC-Attention based End-to-End Speech Recognition" (arXiv 1609.06773).
    """

    def __init__(self, whisper: WhisperForConditionalGeneration, *, blank: int):
        super().__init__()
        self.whisper, self.blank = whisper, blank
        self.head = nn.Linear(whisper.config.d_model, whisper.config.vocab_size)

    def forward(self, input_features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the `loss` of a batch: the decoder's and CTC's, which sees the words alone."""
        output = self.whisper(input_features=input_features, labels=labels)
        log_probs = self.head(output.encoder_last_hidden_state).log_softmax(-1).transpose(0, 1)
        is_word = (labels >= 0) & (labels < self.blank)
        loss = nn.functional.ctc_loss(
            log_probs,
            labels[is_word],
            torch.full((len(labels),), len(log_probs)),
            is_word.sum(1),
            blank=self.blank,
        )
        return {"loss": output.loss + loss, "logits": output.logits}


def read_corpus(corpus: Dataset) -> Dataset:
    """Returns columns `name`, `speaker_id`, `text`, `samples` `(samples,)` and `num_samples` of a corpus."""
    columns = {name: corpus[name][:] for name in ("speaker_id", "text")}
    return read_concatenated(corpus, columns, sampling_rate=SAMPLING_RATE)


def split_recordings(corpus: Dataset) -> tuple[Dataset, Dataset]:
    """Returns the training recordings, and the first ones of every digit and speaker, which are held out of them."""
    seen: dict[tuple[str, str], int] = {}
    kept, held_out = [], []
    for row, key in enumerate(zip(corpus["speaker_id"], corpus["text"], strict=True)):
        seen[key] = seen.get(key, 0) + 1
        (held_out if seen[key] <= HELD_OUT_RECORDINGS else kept).append(row)
    return corpus.select(kept), corpus.select(held_out)


def synthesize_phrases(*, seed: int, num_phrases: int = PHRASES_PER_VOICE) -> Dataset:
    """Returns clips of one to three digits in the ordinary voices, as [`read_corpus`] does; no two are alike."""
    generator = np.random.default_rng(seed)
    rows = []
    for voice in ORDINARY_VOICES:
        for number in range(num_phrases):
            text = " ".join(generator.choice(DIGITS, generator.integers(1, MAX_DIGITS + 1)))
            rate = round(voice.rate_wpm * generator.uniform(1 - RATE_JITTER, 1 + RATE_JITTER))
            samples = synthesize(text, replace(voice, rate_wpm=rate))
            level = np.sqrt(np.mean(samples**2)) * 10 ** (-generator.uniform(*SNR_DB) / 20)
            samples = samples + level * generator.standard_normal(samples.size)
            clip = {"samples": samples.astype(np.float32), "num_samples": samples.size}
            rows.append({"name": f"{voice.speaker_id}/{number}", "speaker_id": voice.speaker_id, "text": text} | clip)
    return Dataset.from_list(rows)


class WhisperUtterances(UtteranceDataset):
    """Utterances as [`UtteranceDataset`] makes them, with Whisper's features and labels."""

    def __getitem__(self, index: int) -> dict:
        """Returns `input_features` `(mel, frames)` and `labels` `(tokens,)` of one utterance."""
        generator = np.random.default_rng([self.seed, self.epoch, index])
        extractor = self.processor.feature_extractor
        samples, words = [], []
        for row in self.groups[index]:
            clip = self.clips[row]["samples"]
            clip = self.augmentation.change_speed(clip, generator) if self.augmentation else clip
            if samples and sum(map(len, samples)) + len(clip) > extractor.n_samples:
                break  # what does not fit would be in the labels and not in the sound
            samples.append(clip)
            words.append(self.texts[row])
        features = extractor(np.concatenate(samples), sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
        features = features[0]
        if self.augmentation:
            features = self.augmentation.mask(features.T, generator).T
        text = " ".join(words)
        # The decoder is started with the first token, so that it is no label.
        return {"input_features": features, "labels": self.processor.tokenizer(f" {text}").input_ids[1:]}


class MixedUtterances(torch.utils.data.ConcatDataset):
    """Several utterance datasets as one, which draws their epochs too."""

    def set_epoch(self, epoch: int) -> None:
        """Draws the utterances of an epoch in each part."""
        for part in self.datasets:
            part.set_epoch(epoch)


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """Returns `input_features` `(batch, mel, frames)` and `labels` `(batch, tokens)` of a batch."""
    labels = [torch.tensor(item["labels"]) for item in items]
    return {
        "input_features": torch.stack([item["input_features"] for item in items]),
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


@torch.inference_mode()
def measure_wer(model, dataset: WhisperUtterances, *, batch_size: int = 64) -> float:
    """Returns the word error rate of greedy decoding."""
    model.eval()
    hypotheses = []
    for first in range(0, len(dataset), batch_size):
        batch = collate([dataset[row] for row in range(first, min(first + batch_size, len(dataset)))])
        tokens = model.generate(batch["input_features"])
        hypotheses += dataset.processor.batch_decode(tokens, skip_special_tokens=True)
    hypotheses = [text.strip() for text in hypotheses]
    return score_by_speaker(hypotheses, dataset.references, dataset.speakers)["overall"]["wer"]


def load_utterances(dataset: str, processor: WhisperProcessor, *, seed: int) -> tuple[torch.utils.data.Dataset, ...]:
    """Returns what is trained on, held-out recordings of the training split, and the test split."""
    train, held_out = split_recordings(load_corpus(dataset, split="train"))
    test = load_corpus(dataset, split="test")
    options = {"processor": processor, "concatenate": (1, MAX_DIGITS), "seed": seed}
    spoken = WhisperUtterances(read_corpus(train), augmentation=AUGMENTATION, **options)
    read = WhisperUtterances(synthesize_phrases(seed=seed), processor, augmentation=AUGMENTATION, seed=seed)
    return MixedUtterances([spoken, read]), *(
        WhisperUtterances(read_corpus(rows), **options) for rows in (held_out, test)
    )


def train_base(dataset: str, output_dir: Path, *, num_train_epochs: float = NUM_EPOCHS, seed: int = 0) -> dict:
    """
    Trains the base and writes it into `output_dir`.

    Args:
        dataset: Folder written by `python -m data.prepare_fsdd`.
        output_dir: Where model, processor and results go.
        num_train_epochs: Passes over the training utterances.
        seed: Of weights, phrases and order.

    Returns:
        Word error rates on held-out training recordings (`held_out_wer`) and on the test recordings (`eval_wer`).
    """
    set_seed(seed)
    processor = make_processor()
    model = make_model(processor)
    train, held_out, test = load_utterances(dataset, processor, seed=seed)
    options = {"output_dir": str(output_dir), "num_train_epochs": num_train_epochs, "seed": seed}
    trainer = AdapterTrainer(
        # Every token before the end of text is text; the end of text is no word and serves as the blank.
        model=GuidedWhisper(model, blank=processor.tokenizer.eos_token_id),
        args=RecipeTrainingArguments(**TRAINING, **options),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collate,
    )
    metrics = trainer.train().metrics
    results = {
        "held_out_wer": measure_wer(model, held_out),
        "eval_wer": measure_wer(model, test),
        "total_parameters": model.num_parameters(),
        "train_runtime": metrics["train_runtime"],
    }
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    write_results(output_dir, results)
    return results


def main() -> None:
    """Trains the base named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="Folder written by `python -m data.prepare_fsdd`.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where model, processor and results go.")
    parser.add_argument(
        "--num_train_epochs", type=float, default=NUM_EPOCHS, help="Passes over the training utterances."
    )
    arguments = parser.parse_args()
    print_results(train_base(arguments.dataset, arguments.output_dir, num_train_epochs=arguments.num_train_epochs))


if __name__ == "__main__":
    main()
