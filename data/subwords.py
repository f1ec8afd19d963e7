"""Subword vocabularies: byte-pair encoding trained on transcripts, as a stock tokenizer of transformers."""

import logging
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .text import TRANSCRIPTS, describe_transcripts

logger = logging.getLogger(__name__)

# In the order of fairseq's dictionaries: the first is the blank of CTC, too.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
# Stands for a space, as in sentencepiece.
SPACE = "▁"


def train_subwords(texts: Iterable[str], vocab_size: int, *, language: str | None = None) -> PreTrainedTokenizerFast:
    """
    Returns a tokenizer of subwords that write `texts`, most of them in few; it adds no special tokens by itself.

    Every character of the texts is a subword, so there may be fewer than `vocab_size` for few texts and never fewer
    than characters.

    Args:
        texts: Normalised transcripts.
        vocab_size: Most subwords, four special tokens among them: `<s>` 0, the CTC blank; `<pad>` 1; `</s>` 2;
            `<unk>` 3.
        language: Code of what they are in, which the tokenizer keeps.

    Raises:
        ValueError: There is no text, or `vocab_size` has no room for its characters.

    Example:

    ```python
    >>> from data.subwords import train_subwords

    >>> tokenizer = train_subwords(["press one", "press two"] * 5, 40)
    >>> tokenizer.decode(tokenizer("press two", add_special_tokens=False).input_ids)
    'press two'

    ```
    """
    texts = sorted(set(texts))
    characters = sorted({character for text in texts for character in text} - {" "} | {SPACE}) if texts else []
    if not characters:
        raise ValueError("`texts` must have at least one transcript, got none.")
    if vocab_size < len(characters) + len(SPECIAL_TOKENS):
        raise ValueError(
            f"`vocab_size` must be at least {len(characters) + len(SPECIAL_TOKENS)}, for the {len(characters)} "
            f"characters of the transcripts and {len(SPECIAL_TOKENS)} special tokens, got {vocab_size}."
        )
    # Not the unigram model of the same library (0.23): on a few hundred words it leaves most in letters, and twice
    # trained on the same texts it gives two vocabularies.
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=characters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, pad, eos, unknown = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        pad_token=pad,
        eos_token=eos,
        unk_token=unknown,
        **{TRANSCRIPTS: describe_transcripts(language)},
    )


def count_unwritable(tokenizer, texts: Iterable[str]) -> int:
    """Returns how many of `texts` hold something that the tokenizer has no subword for."""
    ids = tokenizer(list(texts), add_special_tokens=False).input_ids
    return sum(tokenizer.unk_token_id in row for row in ids)


__all__ = ["SPECIAL_TOKENS", "count_unwritable", "train_subwords"]
