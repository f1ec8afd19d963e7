"""Numbers, times, dates and particles as English, Spanish and Korean say them.

num2words knows the three languages, but neither Spanish apocope and gender (`veintiún euros`, `veintiuna personas`)
nor the native Korean numerals that counters and hours take (`스물한 명`, `세 시`).
"""

import calendar
from typing import NamedTuple

MAX_NUMBER = 999
MAX_NATIVE = 99  # beyond it Korean counts with Sino-Korean numerals
LEAP_YEAR = 2024  # so that the 29th of February is a day of the year

ENGLISH_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
ENGLISH_TENS = ("", "", *"twenty thirty forty fifty sixty seventy eighty ninety".split())
ENGLISH_ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
).split()
SPANISH_SMALL = (
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete "
    "dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis veintisiete "
    "veintiocho veintinueve"
).split()
SPANISH_TENS = ("", "", "", *"treinta cuarenta cincuenta sesenta setenta ochenta noventa".split())
SPANISH_HUNDREDS = (
    "",
    *"ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos novecientos".split(),
)
KOREAN_SMALL = ("", *"일 이 삼 사 오 육 칠 팔 구".split())
KOREAN_DIGITS = ("공", *KOREAN_SMALL[1:])  # 0 as in telephone numbers
KOREAN_NATIVE_ONES = ("", *"한 두 세 네 다섯 여섯 일곱 여덟 아홉".split())  # before a counter
KOREAN_NATIVE_TENS = ("", *"열 스물 서른 마흔 쉰 예순 일흔 여든 아흔".split())

MONTHS = (
    ("January", "enero", "일월"),
    ("February", "febrero", "이월"),
    ("March", "marzo", "삼월"),
    ("April", "abril", "사월"),
    ("May", "mayo", "오월"),
    ("June", "junio", "유월"),  # not "육월"
    ("July", "julio", "칠월"),
    ("August", "agosto", "팔월"),
    ("September", "septiembre", "구월"),
    ("October", "octubre", "시월"),  # not "십월"
    ("November", "noviembre", "십일월"),
    ("December", "diciembre", "십이월"),
)
WEEKDAYS = (
    ("Monday", "lunes", "월요일"),
    ("Tuesday", "martes", "화요일"),
    ("Wednesday", "miércoles", "수요일"),
    ("Thursday", "jueves", "목요일"),
    ("Friday", "viernes", "금요일"),
    ("Saturday", "sábado", "토요일"),
    ("Sunday", "domingo", "일요일"),
)
# Minutes past (or, below 0, to) the hour that is named.
MINUTES = (0, 5, 10, 15, 20, 30, -20, -15, -10, -5)
# Part of the day, and the hours that are named with it.
DAY_PARTS = (
    (("", "", ""), range(1, 13)),
    ((" in the morning", " de la mañana", "오전 "), range(6, 12)),
    ((" in the afternoon", " de la tarde", "오후 "), range(1, 6)),
    ((" at night", " de la noche", "밤 "), range(8, 12)),
)

HANGUL_START, NUM_FINALS, FINAL_RIEUL = 0xAC00, 28, 8  # of Unicode's composed syllables
PARTICLES = {"은": ("은", "는"), "이": ("이", "가"), "을": ("을", "를"), "으로": ("으로", "로")}


class Words(NamedTuple):
    """The same thing in English, Spanish and Korean."""

    en: str
    es: str
    ko: str


def spell_english(number: int) -> str:
    """Returns a number from 0 to 999 in American English: "two hundred forty-one"."""
    _check(number, 0, MAX_NUMBER)
    if number < 20:
        return ENGLISH_SMALL[number]
    if number < 100:
        return ENGLISH_TENS[number // 10] + (f"-{ENGLISH_SMALL[number % 10]}" if number % 10 else "")
    return f"{ENGLISH_SMALL[number // 100]} hundred" + (f" {spell_english(number % 100)}" if number % 100 else "")


def spell_english_ordinal(number: int) -> str:
    """Returns "first" to "ninety-ninth"."""
    _check(number, 1, 99)
    if number <= 20:
        return ENGLISH_ORDINALS[number - 1]
    tens = ENGLISH_TENS[number // 10]
    return f"{tens}-{ENGLISH_ORDINALS[number % 10 - 1]}" if number % 10 else f"{tens.removesuffix('y')}ieth"


def spell_spanish(number: int, gender: str = "") -> str:
    """
    Returns a number from 0 to 999 in Spanish.

    Args:
        number: What to spell.
        gender: "m" or "f": of the noun that follows; "": none does.

    Example:
        >>> spell_spanish(21), spell_spanish(21, "m"), spell_spanish(201, "f"), spell_spanish(100)
        ('veintiuno', 'veintiún', 'doscientas una', 'cien')
    """
    _check(number, 0, MAX_NUMBER)
    if number == 100:
        return "cien"
    hundreds, rest = SPANISH_HUNDREDS[number // 100], number % 100
    if gender == "f" and number >= 200:
        hundreds = hundreds.removesuffix("os") + "as"
    if rest < 30:
        small = SPANISH_SMALL[rest] if rest or not hundreds else ""
    else:
        small = SPANISH_TENS[rest // 10] + (f" y {SPANISH_SMALL[rest % 10]}" if rest % 10 else "")
    if gender and small.endswith("uno"):
        stem = small.removesuffix("uno")
        small = stem + ("una" if gender == "f" else "ún" if stem == "veinti" else "un")
    return " ".join(part for part in (hundreds, small) if part)


def spell_sino_korean(number: int) -> str:
    """Returns a number from 1 to 999 as before 분, 원, 층 or 번: 241 is "이백사십일"."""
    _check(number, 1, MAX_NUMBER)
    hundreds, tens, ones = number // 100, number // 10 % 10, number % 10
    spelled = "".join(
        ("" if digit == 1 else KOREAN_SMALL[digit]) + unit for digit, unit in ((hundreds, "백"), (tens, "십")) if digit
    )
    return spelled + KOREAN_SMALL[ones]


def spell_native_korean(number: int) -> str:
    """Returns a number from 1 to 99 as before 시, 명 or 개: 3 is "세", 20 "스무", 21 "스물한"."""
    _check(number, 1, MAX_NATIVE)
    return "스무" if number == 20 else KOREAN_NATIVE_TENS[number // 10] + KOREAN_NATIVE_ONES[number % 10]


def spell_digits(digits: str) -> Words:
    """Returns digits that are read one by one, as of a telephone number."""
    numbers = [int(digit) for digit in digits]
    tables = (ENGLISH_SMALL, SPANISH_SMALL, KOREAN_DIGITS)
    return Words(*(" ".join(table[number] for number in numbers) for table in tables))


def add_particle(word: str, particle: str) -> str:
    """
    Returns a Korean word with the form of a particle that its last syllable asks for.

    Args:
        word: Ends in Hangul.
        particle: "은", "이", "을" or "으로".

    Example:
        >>> add_particle("은행", "은"), add_particle("학교", "은"), add_particle("호텔", "으로")
        ('은행은', '학교는', '호텔로')
    """
    final = (ord(word[-1]) - HANGUL_START) % NUM_FINALS
    after_consonant, after_vowel = PARTICLES[particle]
    is_vowel = final == 0 or (particle == "으로" and final == FINAL_RIEUL)
    return word + (after_vowel if is_vowel else after_consonant)


def list_times() -> list[Words]:
    """Returns times of day as after "at": "a quarter to eight at night", "las ocho menos cuarto de la noche"."""
    return [
        _spell_time(hour, minutes, Words(*part)) for part, hours in DAY_PARTS for hour in hours for minutes in MINUTES
    ]


def _spell_time(hour: int, minutes: int, part: Words) -> Words:
    amount = abs(minutes)
    english = {0: "", 15: "a quarter", 30: "half"}.get(amount, spell_english(amount))
    english += {0: f"{spell_english(hour)} o'clock"}.get(
        amount, f" {'to' if minutes < 0 else 'past'} {spell_english(hour)}"
    )
    spanish = "la una" if hour == 1 else f"las {spell_spanish(hour)}"
    if amount:
        words = {15: "cuarto", 30: "media"}.get(amount, spell_spanish(amount))
        spanish += f" {'menos' if minutes < 0 else 'y'} {words}"
    korean_hour = (hour + 10) % 12 + 1 if minutes < 0 else hour
    korean = f"{spell_native_korean(korean_hour)} 시"
    if amount:
        korean += " 반" if amount == 30 else f" {spell_sino_korean(minutes % 60)} 분"
    return Words(english + part.en, spanish + part.es, part.ko + korean)


def list_dates() -> list[Words]:
    """Returns the days of a leap year: "May third", "tres de mayo", "오월 삼일"."""
    dates = []
    for month, names in enumerate(MONTHS, start=1):
        for day in range(1, calendar.monthrange(LEAP_YEAR, month)[1] + 1):
            english = f"{names[0]} {spell_english_ordinal(day)}"
            spanish = f"{'primero' if day == 1 else spell_spanish(day)} de {names[1]}"
            dates.append(Words(english, spanish, f"{names[2]} {spell_sino_korean(day)}일"))
    return dates


def list_weekday_dates() -> list[Words]:
    """Returns the days of a leap year alone and with each weekday, with what stands before them.

    Example:
        >>> list_weekday_dates()[400]
        Words(en='on Monday, February fourth', es='el lunes cuatro de febrero', ko='이월 사일 월요일')
    """
    dates = list_dates()
    plain = [Words(f"on {date.en}", f"el {date.es}", date.ko) for date in dates]
    return plain + [
        Words(f"on {day[0]}, {date.en}", f"el {day[1]} {date.es}", f"{date.ko} {day[2]}")
        for day in WEEKDAYS
        for date in dates
    ]


def _check(number: int, lowest: int, highest: int) -> None:
    if not lowest <= number <= highest:
        raise ValueError(f"`number` must be from {lowest} to {highest}, got {number}. Choose one between.")
