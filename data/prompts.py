"""What a model is asked about audio, the same in training and in inference: Whisper's start tokens, or a chat.

A prompt has the same parts for both families:

    extract       clips -> features and their mask, as `forward` takes them
    ask           instruction and frames of audio -> tokens that the model is given
    answer        text -> tokens that it shall give back, the last one its end
    pad_training  prompts and answers -> a batch with labels, in which the prompt is ignored
    pad_asking    prompts -> a batch for `generate`
    read          tokens of `generate` -> texts
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin, Qwen2AudioProcessor, WhisperProcessor

from .collators import IGNORED_LABEL

DEFAULT_INSTRUCTION = "Transcribe the speech."
TURN_END = "<|im_end|>"  # of a chat in Qwen's template


class WhisperPrompt:
    """
    Audio and text as Whisper takes them: the decoder starts with the tokenizer's prefix and writes the transcript.

        decoder_input_ids   <start> <language> <task> <notimestamps>  one   two
        labels                -100     -100     -100       one        two   <end>

    Args:
        processor: Of the model.
        language: Language code for a multilingual tokenizer. Default: the one that the tokenizer was saved with.

    Raises:
        ValueError: The tokenizer has no token of the language.
    """

    # Padding is part of what Whisper hears: its decoder attends to all frames of the window.
    hears_padding = True

    def __init__(self, processor: WhisperProcessor, *, language: str | None = None):
        self.processor, self.extractor, self.tokenizer = processor, processor.feature_extractor, processor.tokenizer
        if language is not None:
            if f"<|{language}|>" not in self.tokenizer.get_vocab():
                raise ValueError(
                    f"`language` must be one of the model's, got {language!r}, for which its tokenizer has no token. "
                    "Leave it out, or choose a multilingual model."
                )
            self.tokenizer.set_prefix_tokens(language=language, task="transcribe")

    @property
    def max_samples(self) -> int:
        """Samples that the model hears at once."""
        return self.extractor.n_samples

    def count_frames(self, num_samples: int) -> int:
        """Returns the frames of the encoder that `num_samples` samples fill: every second one of the features."""
        return (count_mel_frames(self.extractor, num_samples) - 1) // 2 + 1

    def mask_frames(self, num_samples: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns `attention_mask` `(batch, mel frames)` of clips of so many samples."""
        return {"attention_mask": mask_mel_frames(self.extractor, num_samples)}

    def extract(self, clips: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Returns `input_features` `(batch, mel, frames)` and `attention_mask` `(batch, frames)` of `clips`."""
        return {
            "input_features": extract_features(self.extractor, clips),
            **self.mask_frames([len(clip) for clip in clips]),
        }

    def ask(self, instruction: str | None, num_frames: Sequence[int]) -> list[int]:
        """
        Returns the tokens that the decoder starts with.

        Raises:
            ValueError: There is an instruction, or not one clip: Whisper can only transcribe.
        """
        if instruction is not None or len(num_frames) != 1:
            raise ValueError(
                f"Whisper transcribes one clip and takes no question, got {instruction!r} and {len(num_frames)} clips."
            )
        return list(self.tokenizer.prefix_tokens)

    def answer(self, text: str) -> list[int]:
        """Returns the tokens of a transcript; a space stands before it, as in what Whisper learned from."""
        tokens = self.tokenizer(f" {text.strip()}", add_special_tokens=False).input_ids
        return [*tokens, self.tokenizer.eos_token_id]

    def pad_training(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Returns `decoder_input_ids` and `labels`, both `(batch, tokens)`."""
        inputs = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [
            [IGNORED_LABEL] * (len(prompt) - 1) + answer for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return {
            "decoder_input_ids": pad_rows(inputs, self.tokenizer.pad_token_id),
            "labels": pad_rows(labels, IGNORED_LABEL),
        }

    def pad_asking(self, prompts: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Returns `decoder_input_ids` `(batch, tokens)`."""
        return {"decoder_input_ids": torch.tensor(prompts)}

    def read(self, tokens: torch.Tensor, num_asked: int) -> list[str]:
        """Returns the texts of `tokens` `(batch, tokens)`; `generate` may or may not repeat the prompt."""
        del num_asked  # all of it are special tokens
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


class ChatPrompt:
    """
    Audio and text as Qwen2-Audio takes them: a chat by the processor's template, with a placeholder a frame.

        input_ids   <|im_start|>user ... <|AUDIO|><|AUDIO|> ... <|im_start|>assistant   one   <|im_end|>
        labels         -100     -100 ...   -100     -100    ...    -100         -100    one   <|im_end|>

    Args:
        processor: Of the model.
    """

    # The language model is given the frames of speech alone.
    hears_padding = False

    def __init__(self, processor: Qwen2AudioProcessor):
        self.processor, self.extractor, self.tokenizer = processor, processor.feature_extractor, processor.tokenizer

    @property
    def max_samples(self) -> int:
        """Samples of a clip that the model hears at once."""
        return self.extractor.n_samples

    def count_frames(self, num_samples: int) -> int:
        """Returns the frames of the audio tower for `num_samples` samples: 40 ms each, as many as placeholders."""
        return ((count_mel_frames(self.extractor, num_samples) - 1) // 2 + 1 - 2) // 2 + 1

    def mask_frames(self, num_samples: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns `feature_attention_mask` `(batch, mel frames)` of clips of so many samples."""
        return {"feature_attention_mask": mask_mel_frames(self.extractor, num_samples)}

    def extract(self, clips: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Returns `input_features` `(clips, mel, frames)` and `feature_attention_mask` `(clips, frames)`."""
        return {
            "input_features": extract_features(self.extractor, clips),
            **self.mask_frames([len(clip) for clip in clips]),
        }

    def ask(self, instruction: str | None, num_frames: Sequence[int]) -> list[int]:
        """
        Returns the tokens of a chat up to where the model answers.

        Args:
            instruction: The user's words. Default: to transcribe.
            num_frames: Of each clip, from [`count_frames`].

        Raises:
            ValueError: The chat does not have one placeholder a clip, because the words hold one or the template none.
        """
        content = [{"type": "audio", "audio": str(number)} for number in range(len(num_frames))]
        content.append({"type": "text", "text": DEFAULT_INSTRUCTION if instruction is None else instruction})
        chat = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        parts = chat.split(self.processor.audio_token)
        if len(parts) != len(num_frames) + 1:
            raise ValueError(
                f"The chat must have one placeholder {self.processor.audio_token} a clip, got {len(parts) - 1} for "
                f"{len(num_frames)} clips. Take it out of the question, or check the processor's chat template."
            )
        text = parts[0]
        for count, part in zip(num_frames, parts[1:], strict=True):
            text += self.processor.audio_token * count + part
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def answer(self, text: str) -> list[int]:
        """Returns the tokens of an answer and of the end of its turn."""
        return self.tokenizer(f"{text.strip()}{TURN_END}", add_special_tokens=False).input_ids

    def pad_training(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask` and `labels`, all `(batch, tokens)`, padded on the right."""
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [[IGNORED_LABEL] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return {
            "input_ids": pad_rows(rows, self.tokenizer.pad_token_id),
            # By number and not by token: the padding may be a token of the text.
            "attention_mask": pad_rows([[1] * len(row) for row in rows], 0),
            "labels": pad_rows(labels, IGNORED_LABEL),
        }

    def pad_asking(self, prompts: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids` and `attention_mask`, both `(batch, tokens)`, padded on the left."""
        return {
            "input_ids": pad_rows(prompts, self.tokenizer.pad_token_id, side="left"),
            "attention_mask": pad_rows([[1] * len(row) for row in prompts], 0, side="left"),
        }

    def read(self, tokens: torch.Tensor, num_asked: int) -> list[str]:
        """Returns the texts of `tokens` `(batch, tokens)`, whose first `num_asked` are the padded prompt."""
        answers = self.tokenizer.batch_decode(tokens[:, num_asked:], skip_special_tokens=True)
        return [text.strip() for text in answers]


Prompt = WhisperPrompt | ChatPrompt


def make_prompt(processor: ProcessorMixin, *, language: str | None = None) -> Prompt:
    """
    Returns what asks the model of `processor`.

    Raises:
        ValueError: The processor is neither Whisper's nor Qwen2-Audio's, or has no such language.
    """
    if isinstance(processor, WhisperProcessor):
        return WhisperPrompt(processor, language=language)
    if isinstance(processor, Qwen2AudioProcessor):
        return ChatPrompt(processor)
    raise ValueError(
        f"`model_name_or_path` must be a Whisper or a Qwen2-Audio, got a model with a {type(processor).__name__}."
    )


def count_mel_frames(extractor, num_samples: int) -> int:
    """Returns the frames of features, a hop each, that `num_samples` samples begin."""
    return -(-num_samples // extractor.hop_length)


def mask_mel_frames(extractor, num_samples: Sequence[int]) -> torch.Tensor:
    """Returns 1 for frames of the clips and 0 for padding, `(batch, extractor.nb_max_frames)`."""
    counts = torch.tensor([count_mel_frames(extractor, count) for count in num_samples])
    return (torch.arange(extractor.nb_max_frames) < counts[:, None]).long()


def extract_features(extractor, clips: Sequence[np.ndarray]) -> torch.Tensor:
    """
    Returns `input_features` `(batch, mel, frames)` of clips `(samples,)`, padded to the window.

    Raises:
        ValueError: A clip is longer than the window; the extractor alone would cut it in silence.
    """
    longest = max(map(len, clips))
    if longest > extractor.n_samples:
        raise ValueError(
            f"A clip must be at most {extractor.n_samples / extractor.sampling_rate:g} s long, got "
            f"{longest / extractor.sampling_rate:g} s. Split it with `data.domain_clips.find_cuts`."
        )
    return extractor(list(clips), sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features


def pad_rows(rows: Sequence[Sequence[int]], value: int, *, side: str = "right") -> torch.Tensor:
    """
    Returns rows of different length as one tensor `(batch, tokens)`.

    Example:

    ```python
    >>> from data.prompts import pad_rows

    >>> pad_rows([[1, 2], [3]], 0, side="left").tolist()
    [[1, 2], [0, 3]]

    ```
    """
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)


def check_placeholders(batch: Mapping[str, torch.Tensor], *, audio_token_id: int, num_frames: Sequence[int]) -> None:
    """
    Makes sure that a batch has as many placeholders as frames of audio, before the model finds out.

    Args:
        batch: With `input_ids` `(batch, tokens)`.
        audio_token_id: The placeholder.
        num_frames: Of every clip in the batch.

    Raises:
        ValueError: It does not.
    """
    there = int((batch["input_ids"] == audio_token_id).sum())
    if there != sum(num_frames):
        raise ValueError(
            f"`input_ids` must hold a placeholder for each frame of audio, got {there} placeholders for "
            f"{sum(num_frames)} frames. Build the prompt with `ChatPrompt.ask` from the clips' own frames."
        )


__all__ = ["DEFAULT_INSTRUCTION", "ChatPrompt", "Prompt", "WhisperPrompt", "check_placeholders", "make_prompt"]
