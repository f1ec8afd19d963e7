"""A CTC tokenizer over Hangul jamo."""

import unicodedata

from transformers import Wav2Vec2CTCTokenizer

# Precomposed syllables (Unicode chapter 3.12); only they are decomposed, so that "é" stays one character.
FIRST_SYLLABLE, LAST_SYLLABLE = "가", "힣"


class JamoCTCTokenizer(Wav2Vec2CTCTokenizer):
    """
    Spells Hangul syllables as their two or three jamo, so that 67 classes write all 11,172 syllables, and joins them
    again when it decodes.
    """

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        letters = [
            unicodedata.normalize("NFD", letter) if FIRST_SYLLABLE <= letter <= LAST_SYLLABLE else letter
            for letter in text
        ]
        return super()._tokenize("".join(letters), **kwargs)

    def convert_tokens_to_string(self, tokens: list[str], **kwargs) -> dict:
        output = super().convert_tokens_to_string(tokens, **kwargs)
        return {**output, "text": unicodedata.normalize("NFC", output["text"])}
