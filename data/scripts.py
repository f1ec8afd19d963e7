"""What a script or a language needs so that a word has one spelling, where Unicode's properties and NFC do not say it.

`regex` brings the properties: the tables are its own and not copied here.
"""

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

import regex
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

Rule = tuple[regex.Pattern, str | Callable[[regex.Match], str]]

# Three-letter codes and others of the languages that have a rule here.
ALIASES = {"tur": "tr", "aze": "az", "azj": "az", "kaz": "kk", "tat": "tt", "fas": "fa", "per": "fa", "pes": "fa"}
ALIASES |= {"prs": "fa", "urd": "ur", "ron": "ro", "rum": "ro", "cat": "ca", "uzb": "uz", "uzn": "uz", "swe": "sv"}
ALIASES |= {"fin": "fi", "tah": "ty", "ton": "to", "smo": "sm", "jpn": "ja", "zho": "zh", "chi": "zh", "cmn": "zh"}
ALIASES |= {"tha": "th", "lao": "lo", "khm": "km", "mya": "my", "bur": "my"}
# Those of languages that many corpora are in, as the Hub's cards name them.
ALIASES |= {"eng": "en", "kor": "ko", "spa": "es", "fra": "fr", "fre": "fr", "deu": "de", "ger": "de", "ita": "it"}
ALIASES |= {"por": "pt", "nld": "nl", "dut": "nl", "rus": "ru", "ukr": "uk", "ara": "ar", "heb": "he", "hin": "hi"}
ALIASES |= {"vie": "vi", "ell": "el", "gre": "el", "pol": "pl", "ces": "cs", "cze": "cs", "hun": "hu", "ben": "bn"}
DOTLESS_I = {"tr", "az", "crh", "gag", "kk", "tt"}  # "I" is the capital of "ı", "İ" that of "i"
UNSPACED = {"ja", "zh", "yue", "wuu", "nan", "hak", "lzh", "th", "lo", "km", "my", "shn"}
UNSPACED_LETTER = regex.compile(r"[\p{LB=SA}\p{scx=Hani}\p{scx=Hira}\p{scx=Kana}&&\p{L}]", regex.V1)

# Full and half width, presentation forms, ligatures, letters in circles or in mathematical fonts: not superscripts and
# fractions, which are read otherwise, and not Hangul letters, Armenian "ew", Thai and Lao "am", which are the usual
# spelling.
FORM = regex.compile(
    r"[\p{dt=wide}\p{dt=narrow}\p{dt=initial}\p{dt=medial}\p{dt=final}\p{dt=isolated}\p{dt=font}\p{dt=circle}"
    r"\p{dt=square}\p{dt=vertical}\p{dt=small}\p{dt=nobreak}[\p{dt=compat}--\p{Hangul}--[\u0587\u0e33\u0eb3]]]",
    regex.V1,
)
APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u055a\u2032\uff07`\u00b4"), "'")
HEBREW, LATIN = r"[\p{Hebrew}&&\p{L}]", r"[\p{Latin}&&\p{L}]"
KANA_MARKS = {"\u309b": "\u3099", "\u309c": "\u309a"}  # voicing marks that stand beside their letter
CHILLUS = dict(zip("\u0d23\u0d28\u0d30\u0d32\u0d33\u0d15", "\u0d7a\u0d7b\u0d7c\u0d7d\u0d7e\u0d7f", strict=True))

# Where a joiner decides what a word looks like, RFC 5892, appendices A.1 and A.2; Bengali and Sinhala also have one
# before the virama. Anywhere else it changes nothing.
JOINER = regex.compile(
    r"((?<=[\p{L}\p{M}]\p{ccc=9})[\u200c\u200d](?=\p{L})|(?<=[\p{L}\p{M}])[\u200c\u200d](?=\p{ccc=9}\p{L})"
    r"|(?<=[\p{jt=D}\p{jt=L}]\p{jt=T}*)\u200c(?=\p{jt=T}*[\p{jt=D}\p{jt=R}]))|[\u200c\u200d]"
)
# Marks of no script: emoji's variation selectors, keycaps, fillers, tags. ZWSP and the joiners have their own rules.
IGNORABLE = regex.compile(r"[[\p{DI}\p{Cf}\p{Me}]--[\u200b-\u200d]]", regex.V1)
SCRIPT_RULES: list[Rule] = [
    (regex.compile(r"(?<=[ij])\u0307"), ""),  # what lower-casing leaves of a Turkish capital
    (regex.compile(r"[\p{jt=C}--\u200d]", regex.V1), ""),  # tatweel: it stretches a word and is no letter
    (regex.compile(r"(?<=\p{Armenian})[\u055b\u055c\u055e\u055f]"), ""),  # stress and question stand inside the word
    (regex.compile(r"\u0e40\u0e40"), "\u0e41"),  # Thai ae typed as two e, then Lao
    (regex.compile(r"\u0ec0\u0ec0"), "\u0ec1"),
    (regex.compile(r"\u0e4d([\u0e48-\u0e4b]?)\u0e32|([\u0e48-\u0e4b])\u0e4d\u0e32"), r"\1\2" "\u0e33"),  # Thai am
    (regex.compile(r"\u0ecd([\u0ec8-\u0ecb]?)\u0eb2|([\u0ec8-\u0ecb])\u0ecd\u0eb2"), r"\1\2" "\u0eb3"),  # Lao am
    (regex.compile(r"(?<=[\p{Hiragana}\p{Katakana}])[\u309b\u309c]"), lambda match: KANA_MARKS[match[0]]),
    (regex.compile(r"(?<=[\p{Hiragana}\p{Katakana}\u30fc])[\u301c~]"), "\u30fc"),  # a wave for the long mark
    (regex.compile("([\u0d23\u0d28\u0d30\u0d32\u0d33\u0d15])\u0d4d\u200d"), lambda match: CHILLUS[match[1]]),
    (regex.compile("\u09a4\u09cd\u200d"), "\u09ce"),  # Bengali khanda ta, as before Unicode 4.1
    (regex.compile(r"(?<=\p{LB=SA})\u200b+|\u200b+(?=\p{LB=SA})"), " "),  # a word's end where no space is written
    (regex.compile(r"\u200b"), ""),
    (regex.compile(r"([\u200c\u200d])[\u200c\u200d]+"), r"\1"),
    (JOINER, lambda match: match[1] or ""),
    (regex.compile(rf"(?<={HEBREW}\p{{M}}*)'(?={HEBREW})", regex.V1), "\u05f3"),
    (regex.compile(rf"(?<={HEBREW}\p{{M}}*)[\"\u201c-\u201f\u2033](?={HEBREW})", regex.V1), "\u05f4"),
]
# Marks that belong to a word between two of its letters: gershayim and geresh, and the Catalan middle dot.
INNER = rf"(?<={HEBREW}\p{{M}}*)[\u05f3\u05f4](?={HEBREW})|(?<={LATIN}\p{{M}}*)\xb7(?={LATIN})"
_OKINA: list[Rule] = [(regex.compile("['\u02bb](?=[aeiou\u0101\u0113\u012b\u014d\u016b])"), "\u02bb")]
_PERSIAN: list[Rule] = [(regex.compile("\u0643"), "\u06a9"), (regex.compile("[\u064a\u0649]"), "\u06cc")]
LANGUAGE_RULES: dict[str, list[Rule]] = {
    **dict.fromkeys(("haw", "ty", "to", "sm"), _OKINA),  # the glottal stop is a letter, also at a word's start
    **dict.fromkeys(("fa", "ur"), _PERSIAN),  # kaf and ye typed on an Arabic keyboard
    "uz": [(regex.compile("(?<=[og])['\u02bb]"), "\u02bb")],
    "ro": [(regex.compile("\u015f"), "\u0219"), (regex.compile("\u0163"), "\u021b")],  # cedilla for comma
    "ca": [(regex.compile(r"(?<=l)[.\u2022\u2027\u2219\u22c5](?=l)"), "\xb7")],
}
INNER_COLON = {"sv", "fi"}  # "EU:n" is one word
FINAL_SIGMA: list[Rule] = [
    (regex.compile(r"(?<=\p{L}\p{M}*)\u03c3(?!['\p{L}\p{M}\p{N}])"), "\u03c2"),
    (regex.compile(r"\u03c2(?=['\p{L}\p{M}\p{N}])"), "\u03c3"),
]


@cache
def parse_language(language: str | None) -> str | None:
    """
    Returns the main part of a language code, in lower case: two letters where there are two.

    Args:
        language: Such as "tr", "tr-TR", "tur" or a name that Whisper knows.

    Raises:
        ValueError: It is no code.

    Example:
        >>> parse_language("pt-BR"), parse_language("tur"), parse_language("Turkish")
        ('pt', 'tr', 'tr')
    """
    if language is None:
        return None
    name = TO_LANGUAGE_CODE.get(language.lower(), language.lower().replace("_", "-"))
    if not regex.fullmatch(r"[a-z]{2,3}(-[a-z0-9]{1,8})*", name):
        raise ValueError(f"`language` must be a language code such as tr or pt-BR, got {language!r}. Correct it.")
    code = name.partition("-")[0]
    return ALIASES.get(code, code)


def has_rules(language: str) -> bool:
    """Whether a language, from [`parse_language`], decides anything in transcripts or in how they are scored."""
    return language in {*DOTLESS_I, *LANGUAGE_RULES, *INNER_COLON, *UNSPACED}


def fold_scripts(text: str, language: str | None = None) -> str:
    """
    Returns `text` in lower case, with one spelling for what is one letter, and without what nobody hears.

    Args:
        text: Any text.
        language: From [`parse_language`]; decides what the characters do not tell, such as the lower case of "I".
    """
    if text.isascii() and language not in DOTLESS_I:  # no rule below says anything of it
        return text.translate(APOSTROPHES).lower()
    text = unicodedata.normalize("NFC", FORM.sub(lambda match: _expand(match[0]), unicodedata.normalize("NFC", text)))
    text = IGNORABLE.sub("", text.translate(APOSTROPHES))
    text = text.replace("I", "\u0131") if language in DOTLESS_I else text
    return _apply(SCRIPT_RULES, unicodedata.normalize("NFC", text.replace("\u0130", "i").lower()))


def fold_language(text: str, language: str | None) -> str:
    """Returns lower-case `text` by the rules of one language alone."""
    return _apply(LANGUAGE_RULES.get(language, ()), text)


def fold_final_sigma(text: str) -> str:
    """Returns `text` with the final sigma where a word ends and nowhere else."""
    return _apply(FINAL_SIGMA, text)


def has_spaces(texts: Sequence[str], language: str | None = None) -> bool:
    """
    Returns whether words are apart in normalised transcripts, so that they can be counted.

    They are not in languages that write none, where most letters are of such scripts, and where no transcript has a
    space though they are long.

    Example:
        >>> has_spaces(["turn on", "go"]), has_spaces(["\u958b\u71c8"]), has_spaces(["turnonthelight"])
        (True, False, False)
    """
    if language is not None and language in UNSPACED:
        return False
    joined = "".join(texts)
    letters = len(regex.findall(r"\p{L}", joined))
    if len(UNSPACED_LETTER.findall(joined)) > letters / 2:
        return False
    words = [unicodedata.normalize("NFD", text) for text in texts if text]
    return any(" " in text for text in words) or sum(map(len, words)) < MIN_UNSPACED * len(words) or not words


MIN_UNSPACED = 12  # letters (jamo) of a mean transcript that is taken for several words without spaces


def _apply(rules: list[Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _expand(form: str) -> str:
    """Returns what a compatibility form stands for; one that stands for a space and a mark stays."""
    kind, *codes = unicodedata.decomposition(form).split() or [""]
    plain = "".join(chr(int(code, 16)) for code in codes)
    if kind == "<isolated>":
        plain = plain.strip(" ")
    if (
        not plain
        or (plain[0] == " " and len(plain) > 1)
        or (kind != "<narrow>" and regex.search(r"\p{Hangul}", plain))
    ):
        return form
    return FORM.sub(lambda match: _expand(match[0]), plain)
