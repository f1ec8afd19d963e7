"""Vocabularies of sentencepiece as stock tokenizers of transformers, their subwords numbered as fairseq does."""

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .subwords import SPACE, SPECIAL_TOKENS
from .text import TRANSCRIPTS, describe_transcripts

MODEL_SUFFIX = ".model"
NUM_COMPARED = 500  # pieces that the model and its copy must cut alike


def read_sentencepiece(path: str | Path, *, language: str | None = None) -> PreTrainedTokenizerFast:
    """
    Returns the tokenizer of a unigram model, as StreamSpeech uses it: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, then
    the model's pieces in their order.

    The model's own normalisation is left out: texts here are normalised before.

    Args:
        path: `.model` file.
        language: Code of the texts' language, which the tokenizer keeps.

    Raises:
        ValueError: The file is no model of sentencepiece, or not one of the kind unigram.
    """
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"`{path}` must be a model of sentencepiece, got ({error}). Name its .model file.") from error
    special = {
        number for number in range(len(processor)) if processor.is_control(number) or processor.is_unknown(number)
    }
    numbers = [number for number in range(len(processor)) if number not in special]
    pieces = [(processor.id_to_piece(number), processor.get_score(number)) for number in numbers]
    vocabulary = [(token, 0.0) for token in SPECIAL_TOKENS] + pieces
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL_TOKENS.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    _compare(processor, tokenizer, path)
    bos, pad, eos, unknown = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        pad_token=pad,
        eos_token=eos,
        unk_token=unknown,
        **{TRANSCRIPTS: describe_transcripts(language)},
    )


def _compare(processor: SentencePieceProcessor, tokenizer: Tokenizer, path: str | Path) -> None:
    """Raises where the copy cuts words made of the model's own pieces in another way, as that of a BPE model would."""
    step = max(1, len(processor) // NUM_COMPARED)
    words = [processor.id_to_piece(number).replace(SPACE, "") for number in range(0, len(processor), step)]
    words = [word for word in words if word and "<" not in word]
    for left, right in zip(words, [*words[1:], *words[:1]], strict=True):
        theirs, ours = processor.encode(left + right, out_type=str), tokenizer.encode(left + right).tokens
        if theirs != ours:
            raise ValueError(
                f"`{path}` must be a unigram model of sentencepiece, got one that cuts {left + right!r} into {theirs} "
                f"and not into {ours}. Train it with `--model_type=unigram`."
            )
