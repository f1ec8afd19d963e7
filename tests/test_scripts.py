"""A word has one spelling, whatever the script, the keyboard or the encoding that it came through."""

import doctest
import json
import unicodedata
from itertools import product

import pytest
from transformers import AutoProcessor, AutoTokenizer, Wav2Vec2CTCTokenizer

import data.scripts
from data.prepare_fsdd import DIGITS
from data.scripts import has_spaces, parse_language
from data.synthesis import list_sentences
from data.text import (
    _normalize_before,
    build_vocabulary,
    describe_transcripts,
    find_language,
    find_normalizer,
    normalize_text,
    set_language,
)
from modeling import DeepSpeech2FeatureExtractor, DeepSpeech2Processor, JamoCTCTokenizer

ZWNJ, ZWJ, ZWSP = "\u200c", "\u200d", "\u200b"


def test_docstring_examples_hold():
    assert doctest.testmod(data.scripts) == doctest.TestResults(failed=0, attempted=2)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        # What nobody hears.
        ("I ❤\ufe0f you", "i you"),
        ("1\ufe0f\u20e3 two", "1 two"),
        ("👨\u200d👩\u200d👧 a 👍🏽 ok 🏴\U000e0067\U000e007f", "a ok"),
        ("a\u034fb c\u2060d \u202be\u202c", "ab cd e"),
        ("\u3164한\u115f국", "한국"),
        ("✓\u0308 a", "a"),
        # Joiners, where the script needs them.
        (f"می{ZWNJ}خواهم! کتاب{ZWNJ}ها", f"می{ZWNJ}خواهم کتاب{ZWNJ}ها"),
        (f"می{ZWNJ}{ZWNJ}خواهم{ZWNJ} {ZWNJ}او", f"می{ZWNJ}خواهم او"),
        (f"داد{ZWNJ}ه", "داده"),
        (f"ශ්{ZWJ}රී ලංකා{ZWJ}ව", f"ශ්{ZWJ}රී ලංකාව"),
        (f"क्{ZWJ}षण क्{ZWNJ}ष क{ZWJ}ल क्{ZWJ}", f"क्{ZWJ}षण क्{ZWNJ}ष कल क्"),
        (f"র{ZWJ}্যাব", f"র{ZWJ}্যাব"),
        (f"ఫోన్{ZWNJ}లో", f"ఫోన్{ZWNJ}లో"),
        (f"അവന്{ZWJ} ഉത്{ZWNJ}സവം", f"അവ\u0d7b ഉത്{ZWNJ}സവം"),
        (f"tu{ZWNJ}rn{ZWJ} on{ZWSP}ly", "turn only"),
        # A zero-width space ends a word where no other space is written.
        (f"ខ្ញុំ{ZWSP}ទៅ", "ខ្ញុំ ទៅ"),
        (f"ฉัน{ZWSP}ไป{ZWSP}TV", "ฉัน ไป tv"),
        (f"ຂ້ອຍ{ZWSP}ໄປ ကျွန်တော်{ZWSP}သွား", "ຂ້ອຍ ໄປ ကျွန်တော် သွား"),
        (f"你{ZWSP}好", "你好"),
        # Marks that belong to a word between its letters.
        ('צה״ל צה"ל ג׳ירף ג\'ירף "שלום" \'שלום\'', "צה״ל צה״ל ג׳ירף ג׳ירף שלום שלום"),
        ("COL·LEGI co\u0140legi a · b", "col·legi col·legi a b"),
        ("卡尔·马克思 ジョン・スミス", "卡尔 马克思 ジョン スミス"),
        ("ինչպե՞ս քո՞ Հայ՛", "ինչպես քո հայ"),
        # Apostrophes, hyphens.
        ("м’ята мʼята м'ята об`єкт", "м'ята м'ята м'ята об'єкт"),
        ("Hawaiʻi", "hawaiʻi"),
        ("well\u2011known a\u2212b x\u2010y soft\u00adware", "well known a b x y software"),
        # Compatibility forms.
        ("ＴＵＲＮ\u3000ＯＮ！ ｱｲｳ ﾊﾟﾝ ｺｰﾋｰ", "turn on アイウ パン コーヒー"),
        ("ﬁne oﬃce 𝐛𝐨𝐥𝐝 ① Ǆ ĳs", "fine office bold 1 dž ijs"),
        ("ﺳﻼﻡ ســلام ﺑﹷ", "سلام سلام بَ"),
        ("か\u309b は\u309c すご〜い すご～い", "が ぱ すごーい すごーい"),
        ("x² ½", "x² ½"),  # read otherwise than x2 and 12
        ("นํ้า น้ํา น้ำ ทํา เเม่", "น้ำ น้ำ น้ำ ทำ แม่"),
        ("ນໍ້າ ນ້ໍາ ນ້ຳ", "ນ້ຳ ນ້ຳ ນ້ຳ"),
        ("ㅋㅋㅋ ﾡ ㄱㅏ", "ㅋㅋㅋ ㄱ ㄱㅏ"),
        # Marks and case.
        ("שָׁלוֹם \ufb2a", "ש\u05b8\u05c1לו\u05b9ם ש\u05c1"),
        ("السَّلامُ", "السَّلامُ"),
        ("Tie\u0302\u0301ng Vie\u0323\u0302t", "tiếng việt"),
        ("İzmir i\u0307zmir I\u0307zmir", "izmir izmir izmir"),
        ("ΟΔΟΣ ΟΔΟΣ.ΑΒ Σ ο\u03f2", "οδος οδος αβ σ ος"),
        ("Straße STRASSE GROẞ ſo", "straße strasse groß so"),
        ("ᲗᲑᲘᲚᲘᲡᲘ", "თბილისი"),
        ("你好，世界。「はい」", "你好 世界 はい"),
    ],
)  # fmt: skip
def test_a_word_has_one_spelling_in_every_script(text, normalized):
    assert normalize_text(text) == unicodedata.normalize("NFC", normalized)
    assert normalize_text(normalized) == unicodedata.normalize("NFC", normalized)


@pytest.mark.parametrize(
    ("language", "text", "normalized", "without"),
    [
        ("tr", "IŞIK İzmir Isı", "ışık izmir ısı", "işik izmir isı"),
        ("az-Latn-AZ", "QIZ", "qız", "qiz"),
        ("haw", "‘Ōlelo Hawai'i", "ʻōlelo hawaiʻi", "ōlelo hawai'i"),
        ("uz", "o'zbek tog' ma’no", "oʻzbek togʻ ma'no", "o'zbek tog ma'no"),
        ("fa", "كتاب علي", "کتاب علی", "كتاب علي"),
        ("ro", "ştiinţă", "știință", "ştiinţă"),
        ("ca", "col.legi", "col·legi", "col legi"),
        ("sv", "EU:s 12:30", "eu:s 12 30", "eu s 12 30"),
    ],
)
def test_the_language_decides_where_unicode_alone_cannot(language, text, normalized, without):
    assert normalize_text(text, language=language) == normalized
    assert normalize_text(normalized, language=language) == normalized
    assert normalize_text(text) == without


def test_normalising_twice_changes_nothing_in_every_script():
    rows = [code for code in range(0x3400) if unicodedata.category(chr(code)) != "Cn"]
    rows += [*range(0xA640, 0xA700), *range(0xFB00, 0x10000), *range(0x1D400, 0x1D420), *range(0x1F000, 0x1F700)]
    for start in range(0, len(rows), 64):
        letters = map(chr, rows[start : start + 64])
        once = normalize_text(" ".join(f"a{x}b {x}'{x} l{x}l क्{x}ष ש{x}ב σ{x}Σ" for x in letters))
        assert normalize_text(once) == once, hex(rows[start])
        assert unicodedata.is_normalized("NFC", once), hex(rows[start])


def test_transcripts_of_the_demo_and_of_digits_are_what_they_were():
    sentences = [
        *DIGITS,
        *(text for language in ("en", "ko") for split in list_sentences(language).values() for text in split),
    ]
    assert len(sentences) > 400
    assert [normalize_text(text) for text in sentences] == [_normalize_before(text) for text in sentences]
    # A witness that the rules of before are others.
    assert _normalize_before("ＯＮ") != normalize_text("ＯＮ")


@pytest.mark.parametrize(("language", "code"), [("pt_BR", "pt"), ("TUR", "tr"), ("turkish", "tr"), (None, None)])
def test_a_language_is_known_by_its_code(language, code):
    assert parse_language(language) == code


@pytest.mark.parametrize("language", ["Klingon!", "e", "", "en ko"])
def test_what_is_no_language_code_is_refused(language):
    with pytest.raises(ValueError, match="`language` must be a language code such as tr or pt-BR, got "):
        normalize_text("a", language=language)


@pytest.mark.parametrize(
    ("texts", "language", "expected"),
    [
        (["turn on the light", "go"], None, True),
        (["seven", "six"], None, True),
        (["안녕", "네"], None, True),
        ([], None, True),
        (["turnonthelight", "switchoffthelamp"], None, False),
        (["거실불을켜줘"], None, False),
        (["打开 灯"], None, False),
        (["ฉันไป ตลาด"], None, False),
        (["コーヒー"], None, False),
        (["abc def"], "ja", False),
        (["abc def"], "en", True),
    ],
)
def test_words_are_counted_where_spaces_part_them(texts, language, expected):
    assert has_spaces(texts, language) is expected


def make_tokenizer(folder, texts, tokenizer_class=Wav2Vec2CTCTokenizer, **options):
    unit = "jamo" if tokenizer_class is JamoCTCTokenizer else "character"
    path = folder / "vocab.json"
    path.write_text(json.dumps(build_vocabulary(texts, text_unit=unit)), encoding="utf-8")
    return tokenizer_class(str(path), bos_token=None, eos_token=None, **options)


@pytest.mark.parametrize("tokenizer_class", [Wav2Vec2CTCTokenizer, JamoCTCTokenizer])
def test_the_language_travels_with_the_processor(tokenizer_class, tmp_path):
    tokenizer = make_tokenizer(tmp_path, ["ısı"], tokenizer_class, transcripts=describe_transcripts("tr-TR"))
    DeepSpeech2Processor(DeepSpeech2FeatureExtractor(16), tokenizer).save_pretrained(tmp_path / "once")
    AutoProcessor.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")

    for loaded in (
        AutoProcessor.from_pretrained(tmp_path / "twice").tokenizer,
        AutoTokenizer.from_pretrained(tmp_path / "twice"),
    ):
        assert find_language(loaded) == "tr"
        assert find_normalizer(loaded)("ISI") == "ısı"


def test_another_language_than_the_model_s_is_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path, ["ısı"], transcripts=describe_transcripts("tr"))
    set_language(tokenizer, ["en", "tr"])
    set_language(tokenizer, None)
    with pytest.raises(ValueError, match="`language` must be tr, by which the model's transcripts .* got en, ko"):
        set_language(tokenizer, ["en", "ko"])
    assert find_language(tokenizer) == "tr"


def test_a_folder_of_before_keeps_its_rules_where_its_vocabulary_needs_them(tmp_path):
    persian, wide, hebrew = f"می{ZWNJ}خواهم", "ＯＮ", "צה״ל"
    before = find_normalizer(make_tokenizer(tmp_path, map(_normalize_before, [persian, wide, hebrew])))
    assert [before(text) for text in (persian, wide, hebrew)] == ["میخواهم", "ｏｎ", "צה ל"]

    now = find_normalizer(make_tokenizer(tmp_path, ["on"], transcripts=describe_transcripts()))
    assert [now(text) for text in (persian, wide, hebrew)] == [persian, "on", hebrew]


def test_a_language_for_a_folder_without_one_holds_for_the_run_and_is_said(tmp_path, caplog):
    tokenizer = make_tokenizer(tmp_path, ["ısı isi"])
    set_language(tokenizer, ["tr", "en"])
    assert find_normalizer(tokenizer)("ISI") == "ısı"
    assert (
        "saved without a language: its transcripts are normalised as `tr` in this run. Give `--language tr`"
        in caplog.text
    )


def test_a_folder_of_before_takes_the_rules_of_today_where_its_own_fail(tmp_path, caplog):
    normalize = find_normalizer(make_tokenizer(tmp_path, ["i you turn on gt"]))
    texts = ["I ❤\ufe0f you", "ＴＵＲＮ ＯＮ", "&gt;&gt; turn"]
    assert [normalize(text) for text in texts] == ["i you", "turn on", "turn"]
    turkish = make_tokenizer(tmp_path, ["ısı isi"])
    assert find_normalizer(turkish)("ISI") == "isi"
    set_language(turkish, ["en"])
    assert caplog.text == ""
    set_language(turkish, ["en", "tr"])
    assert find_normalizer(turkish)("ISI") == "isi"


def test_joiners_and_inner_marks_survive_the_tokenizer(tmp_path):
    texts = [f"می{ZWNJ}خواهم", "צה״ל ג׳ירף", "col·legi", f"ශ්{ZWJ}රී"]
    tokenizer = make_tokenizer(tmp_path, texts)
    for text, blank in product(texts, [False, True]):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode([part for label in ids for part in ([label, 0] if blank else [label])]) == text
