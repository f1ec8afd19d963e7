"""What the Hub takes as metadata of a card, checked before a training and not after it.

Source: "Licenses" and "Model cards" of the Hub's documentation (https://huggingface.co/docs/hub); it refuses others.
"""

from collections.abc import Sequence

from data.scripts import parse_language

# Identifiers of licences; every other one is `other`.
LICENCES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense
    zlib pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other
    """.split()
)
# ISO 639-1; a language without such a code has one of three letters.
LANGUAGES = frozenset(
    """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv
    ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne
    ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st
    su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    """.split()
)


def check_languages(languages: Sequence[str] | None) -> list[str] | None:
    """
    Returns the codes of languages as the Hub writes them.

    Args:
        languages: Codes such as `en` or `pt-BR`, or English names.

    Raises:
        ValueError: One is neither.

    Example:

    ```python
    >>> from publishing.card_metadata import check_languages

    >>> check_languages(["English", "pt-BR", "kor", "yue"])
    ['en', 'pt', 'ko', 'yue']

    ```
    """
    if languages is None:
        return None
    codes = [parse_language(language) for language in languages]
    codes = ["jv" if code == "jw" else code for code in codes]  # Whisper's word for Javanese
    for language, code in zip(languages, codes, strict=True):
        if len(code) == 2 and code not in LANGUAGES:
            raise ValueError(f"`language` must be a code of ISO 639 such as en or yue, got {language!r}. Correct it.")
    return codes


def check_licence(licence: str | None, *, flag: str) -> str | None:
    """
    Returns an identifier of a licence as the Hub writes it.

    Raises:
        ValueError: The Hub has none of that name.
    """
    identifier = licence.strip().lower().replace(" ", "-") if licence else None
    if identifier is not None and identifier not in LICENCES:
        raise ValueError(
            f"`{flag}` must be a licence identifier of the Hub such as apache-2.0 or cc-by-sa-4.0, got {licence!r}. "
            "Give `other` for one that it does not list."
        )
    return identifier
