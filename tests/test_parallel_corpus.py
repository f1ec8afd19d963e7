"""The embedded parallel corpus: correct translations, disjoint splits, the same files everywhere."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.audio import read_audio
from data.corpora import load_corpus
from data.parallel_sentences import SPLITS, choose_sentences, find_split, list_templates, write_transcript
from data.parallel_synthesis import SOURCES, TARGET_VOICE, list_source_voices, main, write_parallel_corpus
from data.spoken_numbers import (
    Words,
    add_particle,
    list_dates,
    list_times,
    spell_digits,
    spell_english,
    spell_english_ordinal,
    spell_native_korean,
    spell_sino_korean,
    spell_spanish,
)
from data.synthesis import synthesize

FEW = {"train": 40, "validation": 4, "test": 6}


@pytest.fixture(scope="module")
def templates():
    return list_templates()


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "ko"
    return write_parallel_corpus(folder, language="ko", num_sentences=FEW, num_processes=1)


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_english_numbers_are_spelled_as_in_speech():
    assert [spell_english(number) for number in (0, 13, 20, 45, 100, 512)] == [
        "zero", "thirteen", "twenty", "forty-five", "one hundred", "five hundred twelve",
    ]  # fmt: skip
    assert [spell_english_ordinal(number) for number in (1, 12, 20, 23, 30)] == [
        "first", "twelfth", "twentieth", "twenty-third", "thirtieth",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "gender", "expected"),
    [
        (1, "", "uno"), (1, "m", "un"), (1, "f", "una"), (16, "", "dieciséis"), (21, "m", "veintiún"),
        (21, "f", "veintiuna"), (31, "m", "treinta y un"), (31, "f", "treinta y una"), (100, "m", "cien"),
        (101, "", "ciento uno"), (201, "f", "doscientas una"), (500, "m", "quinientos"),
        (999, "", "novecientos noventa y nueve"),
    ],
)  # fmt: skip
def test_spanish_numbers_agree_with_their_noun(number, gender, expected):
    assert spell_spanish(number, gender) == expected


@pytest.mark.parametrize(
    ("number", "sino", "native"),
    [(1, "일", "한"), (4, "사", "네"), (10, "십", "열"), (16, "십육", "열여섯"), (20, "이십", "스무"),
     (21, "이십일", "스물한"), (35, "삼십오", "서른다섯"), (99, "구십구", "아흔아홉")],
)  # fmt: skip
def test_korean_has_sino_korean_and_native_numbers(number, sino, native):
    assert (spell_sino_korean(number), spell_native_korean(number)) == (sino, native)


def test_sino_korean_hundreds_have_no_one_before_them():
    assert [spell_sino_korean(number) for number in (100, 110, 241, 801)] == ["백", "백십", "이백사십일", "팔백일"]


@pytest.mark.parametrize(
    ("spell", "number"),
    [(spell_english, 1000), (spell_spanish, -1), (spell_native_korean, 100), (spell_sino_korean, 0),
     (spell_english_ordinal, 0)],
)  # fmt: skip
def test_numbers_without_a_spelling_are_refused(spell, number):
    with pytest.raises(ValueError, match=f"`number` must be from .* to .*, got {number}"):
        spell(number)


@pytest.mark.parametrize(
    ("word", "particle", "expected"),
    [("은행", "은", "은행은"), ("학교", "은", "학교는"), ("약국", "을", "약국을"), ("번호", "을", "번호를"),
     ("공원", "으로", "공원으로"), ("호텔", "으로", "호텔로"), ("학교", "으로", "학교로"), ("역", "이", "역이"),
     ("메시지", "이", "메시지가")],
)  # fmt: skip
def test_korean_particles_follow_the_last_syllable(word, particle, expected):
    assert add_particle(word, particle) == expected


def test_times_name_the_hour_that_each_language_names():
    times = list_times()
    assert Words("a quarter to one", "la una menos cuarto", "열두 시 사십오 분") in times
    assert Words("half past seven in the morning", "las siete y media de la mañana", "오전 일곱 시 반") in times
    assert Words("twenty past nine at night", "las nueve y veinte de la noche", "밤 아홉 시 이십 분") in times


def test_dates_are_those_of_a_leap_year_with_koreas_two_irregular_months():
    dates = list_dates()
    assert len(dates) == 366
    assert Words("June sixth", "seis de junio", "유월 육일") in dates
    assert Words("October first", "primero de octubre", "시월 일일") in dates
    assert Words("February twenty-ninth", "veintinueve de febrero", "이월 이십구일") in dates


def test_digits_are_read_one_by_one():
    assert spell_digits("205") == Words("two zero five", "dos cero cinco", "이 공 오")


def test_grammar_has_enough_sentences_and_each_is_one_of_a_kind_in_every_language(templates):
    sentences = [words for kind in templates.values() for words in kind]
    assert len(sentences) >= 50_000
    for language in Words._fields:
        transcripts = {write_transcript(getattr(words, language)) for words in sentences}
        assert len(transcripts) == len(sentences)


def test_grammar_speaks_of_all_that_it_should(templates):
    for kind, words in {
        "departures": Words("The bus to Seoul leaves at half past one.", "El autobús a Seúl sale a la una y media.",
                            "서울행 버스는 한 시 반에 출발합니다."),
        "events": Words("The meeting is on Monday, May third.", "La reunión es el lunes tres de mayo.",
                        "회의는 오월 삼일 월요일입니다."),
        "crowds": Words("There are twenty-one people in the school.", "Hay veintiuna personas en la escuela.",
                        "학교에 스물한 명이 있습니다."),
        "pairs_of_orders": Words("I would like a coffee and two salads to go, please.",
                                 "Quisiera un café y dos ensaladas para llevar, por favor.",
                                 "커피 한 잔하고 샐러드 두 접시 포장해 주세요."),
        "routes": Words("How do I get from the museum to the station by bus?",
                        "¿Cómo llego del museo a la estación en autobús?", "박물관에서 역까지 버스로 어떻게 가나요?"),
        "menus": Words("To leave a message, press four.", "Para dejar un mensaje, presione cuatro.",
                       "메시지를 남기시려면 사 번을 누르세요."),
        "messages": Words("You have one new message.", "Usted tiene un mensaje nuevo.", "새 메시지가 한 개 있습니다."),
    }.items():  # fmt: skip
        assert words in templates[kind]


def test_transcripts_have_no_capitals_and_no_punctuation():
    assert write_transcript("¿Cómo llego, por favor?") == "cómo llego por favor"
    assert write_transcript("It's twenty-one o'clock.") == "it's twenty-one o'clock"


def test_choose_sentences_takes_each_kind_in_turn_from_one_split_alone():
    chosen = {split: choose_sentences(split, 400, seed=0) for split in SPLITS}
    assert all({find_split(words) for words in chosen[split]} == {split} for split in SPLITS)
    assert len({words for split in SPLITS for words in chosen[split]}) == 1200
    assert chosen["train"] != choose_sentences("train", 400, seed=1)
    firsts = Counter(words.en.split()[0] for words in chosen["train"])
    assert firsts["Extension"] == firsts["Bus"] == 11  # of a kind with thousands of sentences and of one with hundreds


@pytest.mark.parametrize("num_sentences", [0, 1_000_000])
def test_choose_sentences_refuses_more_than_there_are(num_sentences):
    with pytest.raises(ValueError, match=rf"`num_sentences` must be from 1 to \d+, .* got {num_sentences}"):
        choose_sentences("test", num_sentences, seed=0)


def test_choose_sentences_refuses_an_unknown_split():
    with pytest.raises(ValueError, match="`split` must be one of train, validation, test, got 'dev'"):
        choose_sentences("dev", 1, seed=0)


@pytest.mark.parametrize("source", SOURCES)
def test_voices_are_in_one_split_each_and_none_is_another_one(source):
    voices = {split: list_source_voices(source, split) for split in SPLITS}
    speakers = [voice.speaker_id for split in SPLITS for voice in voices[split]]
    assert len(set(speakers)) == len(speakers) == 30
    read = {synthesize("uno dos" if source == "es" else "일 이", voice).tobytes() for voice in voices["test"]}
    assert len(read) == len(voices["test"])


def test_corpus_has_both_sides_of_every_pair_and_disjoint_splits(corpus_folder):
    rows = read_rows(corpus_folder)
    assert Counter(row["split"] for row in rows) == FEW
    for column in ("text", "target_text", "speaker_id"):
        values = [{row[column] for row in rows if row["split"] == split} for split in SPLITS]
        assert sum(map(len, values)) == len(set().union(*values))
    by_korean = {
        write_transcript(words.ko): words for split in SPLITS for words in choose_sentences(split, FEW[split], seed=0)
    }
    for row in rows[::10]:
        words = by_korean[row["text"]]
        assert row["target_text"] == write_transcript(words.en)
        target = read_audio(str(corpus_folder / row["target_audio"]))
        np.testing.assert_allclose(target, synthesize(words.en, TARGET_VOICE), atol=2**-15)
        assert read_audio(str(corpus_folder / row["file_name"])).size > 8000


def test_corpus_does_not_depend_on_the_number_of_processes(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("data.parallel_synthesis.CHUNK_SIZE", 20)
    again = write_parallel_corpus(tmp_path / "again", language="ko", num_sentences=FEW, num_processes=2)
    files = sorted(path.relative_to(again) for path in again.rglob("*.*"))
    assert len(files) == 2 * sum(FEW.values()) + 1
    assert all((again / file).read_bytes() == (corpus_folder / file).read_bytes() for file in files)


def test_corpus_is_a_dataset_with_the_houses_columns(corpus_folder):
    corpus = load_corpus(str(corpus_folder), split="test", required_columns=("text", "target_text", "target_audio"))
    assert set(corpus.column_names) == {
        "audio", "text", "target_text", "target_audio", "speaker_id", "split", "pair_id",
    }  # fmt: skip
    assert len(corpus) == FEW["test"]
    assert corpus[0]["target_audio"]["path"].endswith("en/test_00000.flac")


def test_load_corpus_makes_the_parallel_corpus_once(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("data.parallel_synthesis.NUM_SENTENCES", {"train": 2, "validation": 1, "test": 1})
    corpus = load_corpus("synthetic_s2st", split="train")
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
    assert (len(corpus), len(made)) == (2, 8)
    load_corpus("synthetic_s2st/es", split="test")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")} == made


def test_load_corpus_refuses_a_language_without_a_parallel_corpus():
    with pytest.raises(ValueError, match='`dataset` must be one of "synthetic_s2st/es", "synthetic_s2st/ko", got'):
        load_corpus("synthetic_s2st/fr")


def test_write_parallel_corpus_refuses_an_unknown_language(tmp_path):
    with pytest.raises(ValueError, match="`language` must be one of es, ko, got 'en'"):
        write_parallel_corpus(tmp_path / "corpus", language="en")


def test_command_line_writes_the_corpus(tmp_path):
    folder = tmp_path / "corpus"
    main([str(folder), "--num_train", "2", "--num_validation", "1", "--num_test", "1"])
    assert [row["split"] for row in read_rows(folder)] == ["train", "train", "validation", "test"]
