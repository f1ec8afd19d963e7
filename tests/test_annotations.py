"""Marks of a corpus's convention are no words, the choice is said aloud, and damaged text is refused."""

import doctest
import logging

import pytest
from datasets import Dataset, IterableDataset

import data.annotations
from data.annotations import STYLES, check_damage, find_styles, read_transcripts, strip_annotations
from data.text import normalize_text


def test_docstring_examples_hold():
    assert doctest.testmod(data.annotations) == doctest.TestResults(failed=0, attempted=3)


@pytest.mark.parametrize(
    ("style", "text", "said"),
    [
        ("plain", "&gt;&gt; turn&nbsp;on", "turn on"),
        ("plain", "turn (it) on", "turn it on"),
        ("brackets", "[noise] turn (laughter) on", "turn on"),
        ("brackets", "&lt;unk&gt; turn {um} <b>on</b> *sighs* （笑） 【音乐】", "turn on"),
        ("brackets", "turn [noise [loud] (far)] on ((x))", "turn on"),
        ("brackets", "3 < 5 (oops turn", "3 5 oops turn"),
        ("brackets", "[relax your mouth]", ""),
        ("kspon", "o/ 그 (70%)/(칠십 퍼센트) 확률", "그 칠십 퍼센트 확률"),
        ("kspon_spelling", "o/ 그 (70%)/(칠십 퍼센트) 확률", "그 70 확률"),
        ("kspon", "b/ 아/ 그+ 그래서 n/ 라* (3개)/(세 개) u/ 음 l/", "아 그 그래서 라 세 개 음"),
        ("kspon_spelling", "(1/2)/(이분의 일)", "1 2"),
        ("torgo", "[relax your mouth in its normal position]", ""),
        ("torgo", "input/images/x.jpg", ""),
        ("torgo", "xxx", ""),
        ("torgo", "jagged [say twice]", "jagged"),
        ("torgo", "The quick xxx fox", "the quick xxx fox"),
        ("switchboard", "[laughter-yes] th[at]- -[re]al [splace/space]", "yes th al splace"),
        ("switchboard", "the_1 {yuppiedom} [noise] <b_aside>", "the yuppiedom"),
        ("csj", "(F えーと)(W ニッポン;ニホン)の(D で)<H>", "えーとニッポンので"),
        ("csj", "(A イーユー;ＥＵ)(? か)(F (? あ))", "イーユーかあ"),
    ],
)  # fmt: skip
def test_a_style_leaves_what_is_said(style, text, said):
    assert normalize_text(strip_annotations(text, style)) == said


@pytest.mark.parametrize(
    ("text", "like"),
    [
        ("o/ 그 확률", "kspon"),
        ("그 (70%)/(칠십 퍼센트)", "kspon"),
        ("[laughter-yes]", "switchboard"),
        ("th[at]-", "switchboard"),
        ("(F えーと)", "csj"),
        ("input/images/x.JPG", "torgo"),
        ("[relax your mouth]", "brackets"),
        ("turn (laughter)", "brackets"),
        ("&lt;noise&gt; turn", "brackets"),
    ],
)
def test_a_corpus_in_another_convention_is_known(text, like):
    assert find_styles([text, "turn on", "and/or AC/DC, 3 < 5 > 2; it's"], "plain") == {like: [text]}
    assert find_styles([text], like) == {}


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match=f"`transcript_style` must be one of {', '.join(STYLES)}, got 'html'"):
        strip_annotations("a", "html")


def make_corpus(texts):
    return Dataset.from_dict({"audio": [f"{row}.wav" for row in range(len(texts))], "text": texts})


def test_the_choice_is_said_with_three_examples_and_a_warning(capsys, caplog):
    corpus = make_corpus(["one", "two", "[noise] three", "four", "five"])
    assert read_transcripts(corpus, "plain", name="home, split test")["text"][:] == corpus["text"][:]
    assert capsys.readouterr().err.splitlines() == [
        "Transcripts of home, split test are read as `plain`:", "  'one'", "  'two'", "  '[noise] three'"
    ]  # fmt: skip
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "1 of 5 transcripts in home, split test look like `brackets` and are read as `plain`, so that their marks "
        "become words: '[noise] three'."
    )


def test_a_chosen_style_shows_what_it_changes_and_is_not_warned_of(capsys, caplog):
    corpus = make_corpus(["one", "two", "[noise] three", "four (x)", "five"])
    assert read_transcripts(corpus, "brackets", name="home")["text"][:] == ["one", "two", "three", "four", "five"]
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  '[noise] three' -> 'three'", "  'four (x)' -> 'four'", "  'one'"
    ]  # fmt: skip
    assert caplog.text == ""


def test_rows_of_annotations_alone_are_left_out_by_name(caplog):
    corpus = make_corpus(["[relax your mouth]", "input/images/x.jpg", "stick"])
    kept = read_transcripts(corpus, "torgo", name="torgo")
    assert (kept["text"][:], kept["audio"][:]) == (["stick"], ["2.wav"])
    assert "2 of 3 transcripts in torgo hold no words by `transcript_style` torgo and are left out: " in caplog.text
    with pytest.raises(ValueError, match="`transcript_style` must leave words in torgo, got 'torgo', which leaves"):
        read_transcripts(corpus.select([0, 1]), "torgo", name="torgo")


def test_a_stream_is_read_like_a_corpus(capsys, caplog):
    texts = ["[relax]", "o/ turn (x) on", "off"]
    stream = IterableDataset.from_generator(lambda: ({"text": text} for text in texts))
    with caplog.at_level(logging.WARNING):
        assert [row["text"] for row in read_transcripts(stream, "brackets", name="home")] == ["o/ turn on", "off"]
    assert "'o/ turn (x) on' -> 'o/ turn on'" in capsys.readouterr().err
    assert "look like `kspon` and are read as `brackets`" in caplog.text


def test_a_corpus_without_transcripts_stays_as_it_is():
    corpus = Dataset.from_dict({"audio": ["a.wav"]})
    assert read_transcripts(corpus, "brackets", name="home") is corpus


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("caf\ufffd", "U\\+FFFD"),
        ("don\x92t", "U\\+0092"),
        ("t\x00u\x00r\x00n", "U\\+0000"),
        ("a\uffff", "U\\+FFFF"),
        ("a&#xFFFD;", "U\\+FFFD"),
    ],
)
def test_damaged_text_is_refused_as_decoded_wrongly(text, named):
    with pytest.raises(ValueError, match=rf"`text` of home is decoded wrongly: .*{named}\) in 1 row\(s\): 2\. Read"):
        read_transcripts(make_corpus(["good", text]), "plain", name="home")
    stream = IterableDataset.from_generator(lambda: iter([{"text": "good"}, {"text": text}]))
    with pytest.raises(ValueError, match="is decoded wrongly"):
        list(read_transcripts(stream, "plain", name="home"))


def test_white_space_and_marks_of_direction_are_no_damage():
    check_damage(["a\tb\r\nc\u2028d \u200fe\ufeff"], name="home")


def test_escapes_that_nobody_has_read_are_warned_of(caplog):
    read_transcripts(make_corpus(["good", "caf\\u00e9", "a\\nb", "AC\\DC"]), "plain", name="home")
    assert "2 of 4 transcripts in home have escapes that nobody has read, whose letters become words: " in caplog.text
    assert repr("caf\\u00e9") in caplog.text


def test_three_different_transcripts_are_shown(capsys):
    read_transcripts(make_corpus(["one"] * 200 + ["two (x)", "three"]), "brackets", name="home")
    assert capsys.readouterr().err.splitlines()[1:] == ["  'two (x)' -> 'two'", "  'one'", "  'three'"]


def test_utf8_read_as_windows_1252_is_warned_of(caplog):
    read_transcripts(make_corpus(["good", "café", "안녕".encode().decode("cp1252")]), "plain", name="home")
    assert "1 of 3 transcripts in home look decoded wrongly, UTF-8 read as Windows-1252" in caplog.text
    assert "perhaps '안녕'" in caplog.text
