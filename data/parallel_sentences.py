"""A grammar of sentences in English, Spanish and Korean: times, dates, numbers, orders, directions, telephone prompts.

Every sentence has one translation, and no two have the same words in any of the languages, so that a sentence kept for
testing is new whichever language is heard.
"""

import random
import re
from collections.abc import Iterator
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import xxhash

from data.spoken_numbers import (
    WEEKDAYS,
    Words,
    add_particle,
    list_dates,
    list_times,
    list_weekday_dates,
    spell_digits,
    spell_english,
    spell_english_ordinal,
    spell_native_korean,
    spell_sino_korean,
    spell_spanish,
)

# Of 20 sentences one is for validation and one for testing, by a digest of its English words.
NUM_SHARES, VALIDATION_SHARE, TEST_SHARE = 20, 0, 1
SPLITS = ("train", "validation", "test")
PUNCTUATION = re.compile(r"[.,?!¿¡;:]")


class Noun(NamedTuple):
    """A thing with its article: Spanish "el" or "la"; Korean has none."""

    en: str
    es: str
    gender: str
    ko: str

    @property
    def the(self) -> str:
        """The Spanish noun with its article."""
        return f"{'el' if self.gender == 'm' else 'la'} {self.es}"

    @property
    def of_the(self) -> str:
        """The Spanish noun after "de", which melts with "el"."""
        return f"del {self.es}" if self.gender == "m" else f"de la {self.es}"

    @property
    def to_the(self) -> str:
        """The Spanish noun after "a", which melts with "el"."""
        return f"al {self.es}" if self.gender == "m" else f"a la {self.es}"

    @property
    def topic(self) -> str:
        """The Korean noun with 은 or 는."""
        return add_particle(self.ko, "은")


class Item(NamedTuple):
    """Something to order: singular with article and plural, and the Korean counter, which takes native numerals."""

    en_one: str
    en_many: str
    es_one: str
    es_many: str
    gender: str
    ko: str
    counter: str

    def count(self, number: int) -> Words:
        """Returns "two coffees" in the three languages."""
        english = self.en_one if number == 1 else f"{spell_english(number)} {self.en_many}"
        spanish = f"{spell_spanish(number, self.gender)} {self.es_one if number == 1 else self.es_many}"
        return Words(english, spanish, f"{self.ko} {spell_native_korean(number)} {self.counter}")


PLACES = (
    Noun("bank", "banco", "m", "은행"),
    Noun("museum", "museo", "m", "박물관"),
    Noun("station", "estación", "f", "역"),
    Noun("pharmacy", "farmacia", "f", "약국"),
    Noun("hospital", "hospital", "m", "병원"),
    Noun("hotel", "hotel", "m", "호텔"),
    Noun("park", "parque", "m", "공원"),
    Noun("school", "escuela", "f", "학교"),
    Noun("library", "biblioteca", "f", "도서관"),
    Noun("market", "mercado", "m", "시장"),
    Noun("church", "iglesia", "f", "교회"),
    Noun("post office", "oficina de correos", "f", "우체국"),
    Noun("restaurant", "restaurante", "m", "식당"),
    Noun("airport", "aeropuerto", "m", "공항"),
    Noun("theater", "teatro", "m", "극장"),
    Noun("beach", "playa", "f", "해변"),
    Noun("supermarket", "supermercado", "m", "슈퍼마켓"),
    Noun("university", "universidad", "f", "대학교"),
    Noun("police station", "comisaría", "f", "경찰서"),
    Noun("bakery", "panadería", "f", "빵집"),
)
INDOORS = (
    Noun("office", "oficina", "f", "사무실"),
    Noun("cafeteria", "cafetería", "f", "구내식당"),
    Noun("bathroom", "baño", "m", "화장실"),
    Noun("meeting room", "sala de reuniones", "f", "회의실"),
    Noun("gym", "gimnasio", "m", "체육관"),
    Noun("reception desk", "recepción", "f", "안내 데스크"),
    Noun("gift shop", "tienda de regalos", "f", "선물 가게"),
    Noun("swimming pool", "piscina", "f", "수영장"),
    Noun("parking lot", "estacionamiento", "m", "주차장"),
)
GOODS = (
    Noun("shirt", "camisa", "f", "셔츠"),
    Noun("jacket", "chaqueta", "f", "재킷"),
    Noun("book", "libro", "m", "책"),
    Noun("bag", "bolso", "m", "가방"),
    Noun("watch", "reloj", "m", "시계"),
    Noun("hat", "sombrero", "m", "모자"),
    Noun("umbrella", "paraguas", "m", "우산"),
    Noun("map", "mapa", "m", "지도"),
    Noun("dress", "vestido", "m", "드레스"),
    Noun("lamp", "lámpara", "f", "램프"),
    Noun("chair", "silla", "f", "의자"),
    Noun("phone", "teléfono", "m", "전화기"),
)
EVENTS = (
    Noun("meeting", "reunión", "f", "회의"),
    Noun("concert", "concierto", "m", "연주회"),
    Noun("exam", "examen", "m", "시험"),
    Noun("wedding", "boda", "f", "결혼식"),
    Noun("party", "fiesta", "f", "파티"),
    Noun("class", "clase", "f", "수업"),
    Noun("conference", "conferencia", "f", "학회"),
    Noun("game", "partido", "m", "경기"),
    Noun("interview", "entrevista", "f", "면접"),
    Noun("exhibition", "exposición", "f", "전시회"),
)
ITEMS = (
    Item("a coffee", "coffees", "café", "cafés", "m", "커피", "잔"),
    Item("a tea", "teas", "té", "tés", "m", "차", "잔"),
    Item("an orange juice", "orange juices", "jugo de naranja", "jugos de naranja", "m", "오렌지 주스", "잔"),
    Item("a beer", "beers", "cerveza", "cervezas", "f", "맥주", "잔"),
    Item("a glass of wine", "glasses of wine", "copa de vino", "copas de vino", "f", "와인", "잔"),
    Item("a bottle of water", "bottles of water", "botella de agua", "botellas de agua", "f", "물", "병"),
    Item("a sandwich", "sandwiches", "sándwich", "sándwiches", "m", "샌드위치", "개"),
    Item("a salad", "salads", "ensalada", "ensaladas", "f", "샐러드", "접시"),
    Item("a soup", "soups", "sopa", "sopas", "f", "수프", "그릇"),
    Item("a pizza", "pizzas", "pizza", "pizzas", "f", "피자", "판"),
    Item("a hamburger", "hamburgers", "hamburguesa", "hamburguesas", "f", "햄버거", "개"),
    Item("an ice cream", "ice creams", "helado", "helados", "m", "아이스크림", "개"),
    Item("a piece of cake", "pieces of cake", "trozo de pastel", "trozos de pastel", "m", "케이크", "조각"),
    Item("an apple", "apples", "manzana", "manzanas", "f", "사과", "개"),
    Item("a ticket", "tickets", "boleto", "boletos", "m", "표", "장"),
    Item("a newspaper", "newspapers", "periódico", "periódicos", "m", "신문", "부"),
)
CITIES = (
    Words("Madrid", "Madrid", "마드리드"),
    Words("Barcelona", "Barcelona", "바르셀로나"),
    Words("Seville", "Sevilla", "세비야"),
    Words("Valencia", "Valencia", "발렌시아"),
    Words("Seoul", "Seúl", "서울"),
    Words("Busan", "Busan", "부산"),
    Words("London", "Londres", "런던"),
    Words("Paris", "París", "파리"),
    Words("Rome", "Roma", "로마"),
    Words("Lisbon", "Lisboa", "리스본"),
    Words("Berlin", "Berlín", "베를린"),
    Words("Tokyo", "Tokio", "도쿄"),
)
VEHICLES = (
    Noun("train", "tren", "m", "기차"),
    Noun("bus", "autobús", "m", "버스"),
    Noun("flight", "vuelo", "m", "비행기"),
)
# Infinitives, in Korean with the ending "in order to" that a caller is addressed with.
ACTIONS = (
    Words("speak with an agent", "hablar con un agente", "상담원과 통화하시려면"),
    Words("listen to your messages", "escuchar sus mensajes", "메시지를 들으시려면"),
    Words("record a greeting", "grabar un saludo", "인사말을 녹음하시려면"),
    Words("change your password", "cambiar su contraseña", "비밀번호를 변경하시려면"),
    Words("check your balance", "consultar su saldo", "잔액을 확인하시려면"),
    Words("make a payment", "hacer un pago", "결제를 하시려면"),
    Words("hear this menu again", "escuchar este menú de nuevo", "이 메뉴를 다시 들으시려면"),
    Words("cancel your order", "cancelar su pedido", "주문을 취소하시려면"),
    Words("confirm your appointment", "confirmar su cita", "예약을 확인하시려면"),
    Words("leave the conference", "salir de la conferencia", "회의에서 나가시려면"),
    Words("leave a message", "dejar un mensaje", "메시지를 남기시려면"),
    Words("delete this message", "borrar este mensaje", "이 메시지를 삭제하시려면"),
    Words("save this message", "guardar este mensaje", "이 메시지를 저장하시려면"),
    Words("return to the main menu", "regresar al menú principal", "주 메뉴로 돌아가시려면"),
    Words("continue in English", "continuar en inglés", "영어로 계속하시려면"),
    Words("increase the volume", "subir el volumen", "음량을 높이시려면"),
    Words("decrease the volume", "bajar el volumen", "음량을 낮추시려면"),
    Words("lock the conference", "bloquear la conferencia", "회의를 잠그시려면"),
    Words("report a problem", "reportar un problema", "문제를 신고하시려면"),
    Words("transfer the call", "transferir la llamada", "전화를 돌리시려면"),
)
ENTRIES = (
    Noun("account number", "número de cuenta", "m", "계좌 번호"),
    Noun("password", "contraseña", "f", "비밀번호"),
    Noun("extension number", "número de extensión", "m", "내선 번호"),
    Noun("telephone number", "número de teléfono", "m", "전화번호"),
    Noun("agent number", "número de agente", "m", "상담원 번호"),
    Noun("card number", "número de tarjeta", "m", "카드 번호"),
    Noun("conference number", "número de conferencia", "m", "회의 번호"),
    Noun("date of birth", "fecha de nacimiento", "f", "생년월일"),
    Noun("order number", "número de pedido", "m", "주문 번호"),
)
HANDS = (Words("left", "izquierda", "왼쪽"), Words("right", "derecha", "오른쪽"))
DAYS = (Words("today", "hoy", "오늘"), Words("tomorrow", "mañana", "내일")) + tuple(
    Words(f"on {day[0]}", f"el {day[1]}", day[2]) for day in WEEKDAYS
)


def list_templates() -> dict[str, list[Words]]:
    """Returns the sentences of each kind, as they are written for a voice to read."""
    kinds = (
        departures, requests, openings, clock,
        events, appointments, parcels, bookings, nights,
        codes, prices, crowds, durations, gates, buses, degrees,
        orders, pairs_of_orders, tables,
        neighbors, distances, walks, turns, streets, routes, floors, journeys,
        menus, double_menus, entries, digits, messages, extensions, waits, queues, conferences,
    )  # fmt: skip
    return {kind.__name__: list(kind()) for kind in kinds}


def choose_sentences(split: str, num_sentences: int, *, seed: int) -> list[Words]:
    """
    Draws different sentences of one split, of each kind equally many while there are.

    Args:
        split: "train", "validation" or "test".
        num_sentences: How many to draw.
        seed: Of the drawing; which split a sentence is in does not depend on it.

    Raises:
        ValueError: The split is unknown or has fewer sentences.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}. Choose one of them.")
    generator = random.Random(f"{split} {seed}")
    kinds = [list(kind[split]) for kind in _list_by_split()]
    for kind in kinds:
        generator.shuffle(kind)
    num_there = sum(map(len, kinds))
    if not 0 < num_sentences <= num_there:
        raise ValueError(
            f"`num_sentences` must be from 1 to {num_there}, the sentences for {split}, got {num_sentences}. "
            "Choose a number between."
        )
    chosen: list[Words] = []
    while len(chosen) < num_sentences:
        kinds = [kind for kind in kinds if kind]
        chosen += [kind.pop() for kind in kinds]
    return chosen[:num_sentences]


@cache
def _list_by_split() -> list[dict[str, list[Words]]]:
    """Returns the sentences of every kind by their splits; finding them takes two seconds."""
    found = []
    for kind in list_templates().values():
        by_split: dict[str, list[Words]] = {split: [] for split in SPLITS}
        for words in kind:
            by_split[find_split(words)].append(words)
        found.append(by_split)
    return found


def find_split(words: Words) -> str:
    """Returns the split of a sentence: 18 of 20 are for training, one for validation and one for testing."""
    share = xxhash.xxh3_64_intdigest(write_transcript(words.en).encode()) % NUM_SHARES
    return {VALIDATION_SHARE: "validation", TEST_SHARE: "test"}.get(share, "train")


def write_transcript(sentence: str) -> str:
    """Returns a sentence in lower case without punctuation, as models write it."""
    return PUNCTUATION.sub("", sentence).lower()


def departures() -> Iterator[Words]:
    for vehicle, city, time in product(VEHICLES, CITIES, list_times()):
        yield Words(
            f"The {vehicle.en} to {city.en} leaves at {time.en}.",
            f"{vehicle.the.capitalize()} a {city.es} sale a {time.es}.",
            f"{city.ko}행 {vehicle.topic} {time.ko}에 출발합니다.",
        )
        yield Words(
            f"The {vehicle.en} from {city.en} arrives at {time.en}.",
            f"{vehicle.the.capitalize()} de {city.es} llega a {time.es}.",
            f"{city.ko}에서 오는 {vehicle.topic} {time.ko}에 도착합니다.",
        )


def requests() -> Iterator[Words]:
    verbs = (
        Words("wake me up", "despiérteme", "깨워 주세요"),
        Words("call me", "llámeme", "전화해 주세요"),
        Words("pick me up", "recójame", "데리러 와 주세요"),
    )
    for verb, day, time in product(verbs, DAYS, list_times()):
        yield Words(
            f"Please {verb.en} {day.en} at {time.en}.",
            f"Por favor, {verb.es} {day.es} a {time.es}.",
            f"{day.ko} {time.ko}에 {verb.ko}.",
        )


def openings() -> Iterator[Words]:
    verbs = (Words("opens", "abre", "문을 엽니다"), Words("closes", "cierra", "문을 닫습니다"))
    for place, verb, time in product(PLACES, verbs, list_times()):
        yield Words(
            f"The {place.en} {verb.en} at {time.en}.",
            f"{place.the.capitalize()} {verb.es} a {time.es}.",
            f"{place.topic} {time.ko}에 {verb.ko}.",
        )


def clock() -> Iterator[Words]:
    for time in list_times():
        verb = "es" if time.es.startswith("la ") else "son"
        yield Words(f"It is now {time.en}.", f"Ahora {verb} {time.es}.", f"지금은 {time.ko}입니다.")


def events() -> Iterator[Words]:
    for event, date in product(EVENTS, list_weekday_dates()):
        yield Words(
            f"The {event.en} is {date.en}.",
            f"{event.the.capitalize()} es {date.es}.",
            f"{event.topic} {date.ko}입니다.",
        )


def appointments() -> Iterator[Words]:
    for event, day, time in product(EVENTS, DAYS, list_times()):
        yield Words(
            f"The {event.en} is {day.en} at {time.en}.",
            f"{event.the.capitalize()} es {day.es} a {time.es}.",
            f"{event.topic} {day.ko} {time.ko}입니다.",
        )


def parcels() -> Iterator[Words]:
    for date in list_weekday_dates():
        yield Words(
            f"The package will arrive {date.en}.", f"El paquete llegará {date.es}.", f"소포는 {date.ko}에 도착합니다."
        )


def bookings() -> Iterator[Words]:
    for date in list_weekday_dates():
        english, spanish = date.en.removeprefix("on "), date.es.removeprefix("el ")
        yield Words(
            f"I want to change my reservation to {english}.",
            f"Quiero cambiar mi reserva al {spanish}.",
            f"예약을 {add_particle(date.ko, '으로')} 바꾸고 싶습니다.",
        )


def nights() -> Iterator[Words]:
    rooms = (Words("single", "individual", "일인실"), Words("double", "doble", "이인실"))
    for room, number, date in product(rooms, range(2, 11), list_dates()):
        yield Words(
            f"I want to book a {room.en} room for {spell_english(number)} nights from {date.en}.",
            f"Quiero reservar una habitación {room.es} por {spell_spanish(number, 'f')} noches desde el {date.es}.",
            f"{date.ko}부터 {room.ko}을 {spell_sino_korean(number)} 박 예약하고 싶습니다.",
        )


def codes() -> Iterator[Words]:
    subjects = (
        Words("My telephone number is", "Mi número de teléfono es", "제 전화번호는"),
        Words("The password is", "La contraseña es", "비밀번호는"),
        Words("The confirmation code is", "El código de confirmación es", "확인 번호는"),
    )
    for number in range(10_000):
        subject, code = subjects[number % len(subjects)], spell_digits(f"{number:04d}")
        yield Words(f"{subject.en} {code.en}.", f"{subject.es} {code.es}.", f"{subject.ko} {code.ko}입니다.")


def prices() -> Iterator[Words]:
    currencies = (Words("euros", "euros", "유로"), Words("dollars", "dólares", "달러"))
    for thing, number, currency in product(GOODS, (*range(2, 200), *range(200, 1000, 5)), currencies):
        yield Words(
            f"The {thing.en} costs {spell_english(number)} {currency.en}.",
            f"{thing.the.capitalize()} cuesta {spell_spanish(number, 'm')} {currency.es}.",
            f"{thing.topic} {spell_sino_korean(number)} {currency.ko}입니다.",
        )


def crowds() -> Iterator[Words]:
    for place, number in product(PLACES, range(2, 100)):
        yield Words(
            f"There are {spell_english(number)} people in the {place.en}.",
            f"Hay {spell_spanish(number, 'f')} personas en {place.the}.",
            f"{place.ko}에 {spell_native_korean(number)} 명이 있습니다.",
        )


def durations() -> Iterator[Words]:
    units = (
        (Words("minutes", "minutos", "분"), "m", spell_sino_korean),
        (Words("hours", "horas", "시간"), "f", spell_native_korean),
        (Words("weeks", "semanas", "주"), "f", spell_sino_korean),
    )
    for (unit, gender, spell_korean), number in product(units, range(2, 60)):
        yield Words(
            f"I need {spell_english(number)} more {unit.en}.",
            f"Necesito {spell_spanish(number, gender)} {unit.es} más.",
            f"{spell_korean(number)} {unit.ko} 더 필요합니다.",
        )


def gates() -> Iterator[Words]:
    for city, number in product(CITIES, range(1, 100)):
        yield Words(
            f"The flight to {city.en} leaves from gate {spell_english(number)}.",
            f"El vuelo a {city.es} sale de la puerta {spell_spanish(number)}.",
            f"{city.ko}행 비행기는 {spell_sino_korean(number)} 번 탑승구에서 출발합니다.",
        )


def buses() -> Iterator[Words]:
    for place, number in product(PLACES, range(1, 100)):
        yield Words(
            f"Bus number {spell_english(number)} goes to the {place.en}.",
            f"El autobús número {spell_spanish(number)} va {place.to_the}.",
            f"{spell_sino_korean(number)} 번 버스는 {add_particle(place.ko, '으로')} 갑니다.",
        )


def degrees() -> Iterator[Words]:
    for city, day, number in product(CITIES, DAYS[:2], range(2, 40)):
        tense = Words("is", "hace", "입니다") if day.en == "today" else Words("will be", "hará", "일 것입니다")
        yield Words(
            f"It {tense.en} {spell_english(number)} degrees in {city.en} {day.en}.",
            f"{day.es.capitalize()} {tense.es} {spell_spanish(number, 'm')} grados en {city.es}.",
            f"{day.ko} {add_particle(city.ko, '은')} {spell_sino_korean(number)} 도{tense.ko}.",
        )


def orders() -> Iterator[Words]:
    for item, number in product(ITEMS, range(1, 20)):
        counted = item.count(number)
        yield Words(
            f"I would like {counted.en}, please.", f"Quisiera {counted.es}, por favor.", f"{counted.ko} 주세요."
        )
        yield Words(
            f"Could you bring us {counted.en}?",
            f"¿Nos podría traer {counted.es}?",
            f"{counted.ko} 가져다주시겠어요?",
        )


def pairs_of_orders() -> Iterator[Words]:
    food = [item for item in ITEMS if item.en_many not in ("tickets", "newspapers")]
    endings = (
        Words("", "", "주세요"),
        Words(" to go", " para llevar", "포장해 주세요"),
    )
    for (first, second), one, two, ending in product(permutations(food, 2), range(1, 6), range(1, 6), endings):
        left, right = first.count(one), second.count(two)
        yield Words(
            f"I would like {left.en} and {right.en}{ending.en}, please.",
            f"Quisiera {left.es} y {right.es}{ending.es}, por favor.",
            f"{left.ko}하고 {right.ko} {ending.ko}.",
        )


def tables() -> Iterator[Words]:
    for number, day, time in product((2, 3, 4, 6, 8, 12), DAYS, list_times()):
        yield Words(
            f"I want to book a table for {spell_english(number)} people {day.en} at {time.en}.",
            f"Quiero reservar una mesa para {spell_spanish(number, 'f')} personas {day.es} a {time.es}.",
            f"{day.ko} {time.ko}에 {spell_native_korean(number)} 명 자리를 예약하고 싶습니다.",
        )


def neighbors() -> Iterator[Words]:
    relations = (
        Words("next to", "al lado", "옆에"),
        Words("across from", "enfrente", "맞은편에"),
        Words("behind", "detrás", "뒤에"),
        Words("near", "cerca", "근처에"),
    )
    for (place, other), relation in product(permutations(PLACES, 2), relations):
        yield Words(
            f"The {place.en} is {relation.en} the {other.en}.",
            f"{place.the.capitalize()} está {relation.es} {other.of_the}.",
            f"{place.topic} {other.ko} {relation.ko} 있습니다.",
        )


def distances() -> Iterator[Words]:
    for (place, other), number in product(permutations(PLACES, 2), range(50, 950, 50)):
        yield Words(
            f"The {place.en} is {spell_english(number)} meters from the {other.en}.",
            f"{place.the.capitalize()} está a {spell_spanish(number, 'm')} metros {other.of_the}.",
            f"{place.topic} {other.ko}에서 {spell_sino_korean(number)} 미터 떨어져 있습니다.",
        )


def walks() -> Iterator[Words]:
    for (place, other), number in product(permutations(PLACES, 2), (2, 3, 5, 7, 10, 15, 20, 25, 30, 40)):
        yield Words(
            f"The {place.en} is a {spell_english(number)} minute walk from the {other.en}.",
            f"{place.the.capitalize()} está a {spell_spanish(number, 'm')} minutos a pie {other.of_the}.",
            f"{place.topic} {other.ko}에서 걸어서 {spell_sino_korean(number)} 분 거리에 있습니다.",
        )


def turns() -> Iterator[Words]:
    for number, hand, place in product(range(50, 950, 50), HANDS, PLACES):
        yield Words(
            f"Go straight for {spell_english(number)} meters and turn {hand.en} at the {place.en}.",
            f"Siga recto {spell_spanish(number, 'm')} metros y gire a la {hand.es} en {place.the}.",
            f"{spell_sino_korean(number)} 미터 직진하신 다음 {place.ko}에서 {add_particle(hand.ko, '으로')} 도세요.",
        )


def streets() -> Iterator[Words]:
    ordinals = ("첫 번째", "두 번째", "세 번째", "네 번째", "다섯 번째")
    feminine = ("primera", "segunda", "tercera", "cuarta", "quinta")
    for place, hand, number in product(PLACES, HANDS, range(5)):
        yield Words(
            f"After the {place.en}, take the {spell_english_ordinal(number + 1)} street on the {hand.en}.",
            f"Después {place.of_the}, tome la {feminine[number]} calle a la {hand.es}.",
            f"{add_particle(place.ko, '을')} 지나서 {hand.ko} {ordinals[number]} 길로 가세요.",
        )


def routes() -> Iterator[Words]:
    means = (
        Words("", "", ""),
        Words(" on foot", " a pie", "걸어서 "),
        Words(" by bus", " en autobús", "버스로 "),
        Words(" by subway", " en metro", "지하철로 "),
    )
    for (start, goal), way in product(permutations(PLACES, 2), means):
        yield Words(
            f"How do I get from the {start.en} to the {goal.en}{way.en}?",
            f"¿Cómo llego {start.of_the} {goal.to_the}{way.es}?",
            f"{start.ko}에서 {goal.ko}까지 {way.ko}어떻게 가나요?",
        )


def floors() -> Iterator[Words]:
    masculine = "primer segundo tercer cuarto quinto sexto séptimo octavo noveno décimo".split()
    for room, number in product(INDOORS, range(10)):
        yield Words(
            f"The {room.en} is on the {spell_english_ordinal(number + 1)} floor.",
            f"{room.the.capitalize()} está en el {masculine[number]} piso.",
            f"{room.topic} {spell_sino_korean(number + 1)} 층에 있습니다.",
        )


def journeys() -> Iterator[Words]:
    means = (
        Words("by train", "en tren", "기차로"),
        Words("by bus", "en autobús", "버스로"),
        Words("by plane", "en avión", "비행기로"),
    )
    for (start, goal), way, number in product(permutations(CITIES, 2), means, range(2, 13)):
        yield Words(
            f"It takes {spell_english(number)} hours from {start.en} to {goal.en} {way.en}.",
            f"Se tardan {spell_spanish(number, 'f')} horas de {start.es} a {goal.es} {way.es}.",
            f"{start.ko}에서 {goal.ko}까지 {way.ko} {spell_native_korean(number)} 시간 걸립니다.",
        )


def menus() -> Iterator[Words]:
    keys = [
        Words(digit.en, digit.es, add_particle(f"{digit.ko} 번", "을")) for digit in map(spell_digits, "0123456789")
    ]
    keys += [
        Words("the star key", "la tecla de asterisco", "별표를"),
        Words("the pound key", "la tecla de numeral", "우물 정자를"),
    ]
    for action, key in product(ACTIONS, keys):
        yield Words(
            f"To {action.en}, press {key.en}.",
            f"Para {action.es}, presione {key.es}.",
            f"{action.ko} {key.ko} 누르세요.",
        )


def double_menus() -> Iterator[Words]:
    digits = [spell_digits(digit) for digit in "12345"]
    for (first, second), (one, two) in product(permutations(ACTIONS, 2), permutations(digits, 2)):
        yield Words(
            f"To {first.en}, press {one.en}, and to {second.en}, press {two.en}.",
            f"Para {first.es}, presione {one.es}, y para {second.es}, presione {two.es}.",
            f"{first.ko} {one.ko} 번을, {second.ko} {two.ko} 번을 누르세요.",
        )


def entries() -> Iterator[Words]:
    keys = (Words("pound", "numeral", "우물 정자를"), Words("star", "asterisco", "별표를"))
    for entry, key in product(ENTRIES, keys):
        ending = "o" if entry.gender == "m" else "a"
        yield Words(
            f"Please enter your {entry.en} followed by the {key.en} key.",
            f"Por favor, ingrese su {entry.es} seguid{ending} por la tecla de {key.es}.",
            f"{add_particle(entry.ko, '을')} 입력하신 후 {key.ko} 눌러 주세요.",
        )


def digits() -> Iterator[Words]:
    ends = (
        Words("last", "últimos", "마지막"),
        Words("first", "primeros", "처음"),
    )
    for entry, end, number in product(ENTRIES, ends, range(2, 10)):
        yield Words(
            f"Please enter the {end.en} {spell_english(number)} digits of your {entry.en}.",
            f"Por favor, ingrese los {end.es} {spell_spanish(number, 'm')} dígitos de su {entry.es}.",
            f"{entry.ko} {end.ko} {spell_native_korean(number)} 자리를 입력해 주세요.",
        )


def messages() -> Iterator[Words]:
    kinds = (
        Words("new", "nuevo", "새 메시지가"),
        Words("saved", "guardado", "저장된 메시지가"),
        Words("urgent", "urgente", "긴급 메시지가"),
    )
    for kind, number in product(kinds, range(1, 100)):
        counted = f"{spell_english(number)} {kind.en} message{'s' if number > 1 else ''}"
        plural = "s" if number > 1 else ""
        yield Words(
            f"You have {counted}.",
            f"Usted tiene {spell_spanish(number, 'm')} mensaje{plural} {kind.es}{plural}.",
            f"{kind.ko} {spell_native_korean(number)} 개 있습니다.",
        )


def extensions() -> Iterator[Words]:
    states = (
        Words("is busy", "está ocupada", "통화 중입니다"),
        Words("is not available", "no está disponible", "연결할 수 없습니다"),
        Words("does not answer", "no contesta", "응답하지 않습니다"),
    )
    for number, state in product(range(1000), states):
        spelled = spell_digits(f"{number:03d}")
        yield Words(
            f"Extension {spelled.en} {state.en}.",
            f"La extensión {spelled.es} {state.es}.",
            f"내선 {spelled.ko} 번은 {state.ko}.",
        )


def waits() -> Iterator[Words]:
    for number in range(2, 61):
        yield Words(
            f"The waiting time is about {spell_english(number)} minutes.",
            f"El tiempo de espera es de unos {spell_spanish(number, 'm')} minutos.",
            f"대기 시간은 약 {spell_sino_korean(number)} 분입니다.",
        )


def queues() -> Iterator[Words]:
    for number in range(2, 100):
        yield Words(
            f"You are caller number {spell_english(number)} in the queue.",
            f"Usted es la llamada número {spell_spanish(number)} en la fila.",
            f"고객님의 대기 순서는 {spell_native_korean(number)} 번째입니다.",
        )


def conferences() -> Iterator[Words]:
    for number in range(2, 100):
        yield Words(
            f"There are {spell_english(number)} participants in the conference.",
            f"Hay {spell_spanish(number, 'm')} participantes en la conferencia.",
            f"회의에 참가자가 {spell_native_korean(number)} 명 있습니다.",
        )
