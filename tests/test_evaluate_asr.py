import json

import numpy as np
import pytest
import soundfile
from readme import find_arguments

from data.metrics import score_by_speaker
from inference.beam_search import BeamDecoder
from inference.decoding import load_recognizer, transcribe_recordings
from recipes.evaluate_asr import check_regression, format_comparison, main

TEXTS = ["go on", "stop now", "go home", "stop it"]
SPEAKERS = ["ann", "ann", "ben", "ben"]


@pytest.fixture
def corpus(tmp_path):
    rows = ["file_name,speaker_id,text,split"]
    for row, (speaker, text) in enumerate(zip(SPEAKERS, TEXTS, strict=True)):
        samples = 0.1 * np.random.default_rng(row).standard_normal(10_000 + 3_000 * row)
        soundfile.write(tmp_path / f"{row}.wav", samples, 16_000)
        rows.append(f"{row}.wav,{speaker},{text.upper()},test")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def test_scores_are_those_of_the_files_transcribed_and_stand_in_table_and_json(
    tiny_base, tiny_adapters, corpus, tmp_path, capsys
):
    output = tmp_path / "scores" / "out.json"

    main(["--model_name_or_path", tiny_base, "--adapter", tiny_adapters["alice"], "--dataset", str(corpus)]
         + ["--batch_size", "3", "--output_file", str(output)])  # fmt: skip

    recognizer = load_recognizer(tiny_base, {"alice": tiny_adapters["alice"]})
    said = transcribe_recordings(*recognizer, [corpus / f"{row}.wav" for row in range(4)])
    expected = score_by_speaker([transcript.text for transcript in said], TEXTS, SPEAKERS)
    assert json.loads(output.read_text()) == {
        **expected,
        "model": tiny_base,
        "adapter": tiny_adapters["alice"],
        "dataset": str(corpus),
        "split": "test",
    }
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["speaker", "ann", "ben", "overall"]
    assert f"{100 * expected['overall']['wer']:.2f}" in table[-1]


def test_only_the_named_speakers_are_scored_and_clips_are_joined(tiny_base, corpus, tmp_path):
    output = tmp_path / "out.json"

    main(["--model_name_or_path", tiny_base, "--dataset", str(corpus), "--speaker_id", "ben", "--concatenate_min", "2"]
         + ["--concatenate_max", "2", "--output_file", str(output)])  # fmt: skip

    scores = json.loads(output.read_text())
    assert list(scores["speakers"]) == ["ben"]
    assert (scores["overall"]["utterances"], scores["overall"]["words"]) == (1, 4)
    assert scores["adapter"] is None


def test_a_corpus_without_speakers_is_scored_as_a_whole(tiny_base, corpus, capsys):
    (corpus / "metadata.csv").write_text("file_name,text,split\n0.wav,go on,test\n", encoding="utf-8")

    main(["--model_name_or_path", tiny_base, "--dataset", str(corpus)])

    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["speaker", "overall"]


def test_the_training_split_is_warned_of_and_text_stands_in_the_named_column(tiny_base, corpus, tmp_path, caplog):
    rows = (corpus / "metadata.csv").read_text().replace("text,split", "said,split").replace(",test", ",train")
    (corpus / "metadata.csv").write_text(rows)
    output = tmp_path / "out.json"
    main(["--model_name_or_path", tiny_base, "--dataset", str(corpus), "--split", "train", "--text_column", "said"]
         + ["--output_file", str(output)])  # fmt: skip
    assert json.loads(output.read_text())["overall"]["words"] == 8
    assert "`split` is 'train', which recipes train on: such scores say nothing of new speech." in caplog.text


def test_beam_search_finds_words_of_the_list_alone(tiny_base, corpus, tmp_path):
    (tmp_path / "words.txt").write_text("go\nstop\n", encoding="utf-8")
    output = tmp_path / "out.json"

    main(["--model_name_or_path", tiny_base, "--dataset", str(corpus), "--output_file", str(output)]
         + ["--word_list", str(tmp_path / "words.txt"), "--beam_size", "20"])  # fmt: skip

    model, processor = load_recognizer(tiny_base)
    decoder = BeamDecoder(processor.tokenizer, word_list=tmp_path / "words.txt", beam_size=20)
    said = transcribe_recordings(model, processor, [corpus / f"{row}.wav" for row in range(4)], decoder=decoder)
    texts = [transcript.text for transcript in said]
    assert {word for text in texts for word in text.split()} <= {"go", "stop"}
    assert json.loads(output.read_text())["overall"] == score_by_speaker(texts, TEXTS, SPEAKERS)["overall"]


def test_unknown_speaker_and_split_are_refused(tiny_base, corpus):
    with pytest.raises(ValueError, match="`speaker_id` must be one of .*ann, ben.*got 'eve'"):
        main(["--model_name_or_path", tiny_base, "--dataset", str(corpus), "--speaker_id", "eve"])
    with pytest.raises(ValueError, match="`split` must be one of test in .*, got 'dev'"):
        main(["--model_name_or_path", tiny_base, "--dataset", str(corpus), "--split", "dev"])


@pytest.fixture
def compare(tiny_base, tiny_adapters, corpus, tmp_path):
    """Compares alice's adapter on ann's recordings and on ben's; returns the scores that were written."""

    def run(*flags: str) -> dict:
        output = tmp_path / "comparison.json"
        main(["--compare", "--model_name_or_path", tiny_base, "--adapter", tiny_adapters["alice"]]
             + ["--dataset", str(corpus), "--speaker_id", "ann", "--base_dataset", str(corpus)]
             + ["--base_speaker_id", "ben", "--output_file", str(output), *flags])  # fmt: skip
        return json.loads(output.read_text())

    return run


def test_compare_shows_target_and_base_domain_with_the_adapter_on_and_off(
    compare, tiny_base, tiny_adapters, corpus, capsys
):
    scores = compare("--max_regression=1e9")

    for state, adapters in (("on", {"alice": tiny_adapters["alice"]}), ("off", {})):
        said = transcribe_recordings(
            *load_recognizer(tiny_base, adapters), [corpus / f"{row}.wav" for row in range(4)]
        )
        texts = [transcript.text for transcript in said]
        assert scores["target"][state] == score_by_speaker(texts[:2], TEXTS[:2], SPEAKERS[:2])["overall"]
        assert scores["base"][state] == score_by_speaker(texts[2:], TEXTS[2:], SPEAKERS[2:])["overall"]
    header, _, target, base = capsys.readouterr().out.splitlines()
    assert [name.strip() for name in header.strip("|").split("|")] == [
        "data", "utterances", "WER off %", "WER on %", "CER off %", "CER on %", "change"
    ]  # fmt: skip
    for line, name in ((target, "target"), (base, "base")):
        off, on = (100 * scores[name][state]["wer"] for state in ("off", "on"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert (cells[0], cells[2], cells[3], cells[6]) == (name, f"{off:.2f}", f"{on:.2f}", f"{on - off:+.2f}")


def test_compare_fails_exactly_when_the_base_domain_loses_more_than_allowed(compare):
    scores = compare("--max_regression=1e9")
    regression = scores["base"]["on"]["wer"] - scores["base"]["off"]["wer"]
    compare(f"--max_regression={regression}")
    with pytest.raises(SystemExit, match=r"more than `max_regression`") as failure:
        compare(f"--max_regression={regression - 1e-6}")
    assert failure.value.code


def score_states(*, references, off, on):
    """Scores of both data sets with the adapter off and on."""
    pair = {
        name: score_by_speaker(said, references, [""] * len(said))["overall"]
        for name, said in (("off", off), ("on", on))
    }
    return {"target": pair, "base": pair}


def test_compare_guards_characters_where_no_spaces_part_words():
    # The transcript is one word, wrong before and after; of its 8 characters 1 is wrong before, and all are after.
    scores = score_states(references=["打开灯吧关上灯吧"], off=["打开灯吧关上灯"], on=["大"])
    assert scores["base"]["on"]["wer"] == scores["base"]["off"]["wer"] == 1.0
    with pytest.raises(SystemExit, match=r"adds 0\.8750 to the base's CER, more than `max_regression` \(0\.02\)"):
        check_regression(scores, 0.02)
    assert format_comparison(scores).splitlines()[-1].split("|")[-2].strip() == "+87.50 CER"


def test_a_reference_that_the_model_cannot_write_is_scored(tiny_base, corpus, tmp_path, caplog):
    (corpus / "metadata.csv").write_text("file_name,text,split\n0.wav,é é,test\n1.wav,go on,test\n", encoding="utf-8")
    output = tmp_path / "out.json"

    main(["--model_name_or_path", tiny_base, "--dataset", str(corpus), "--output_file", str(output)])

    said = transcribe_recordings(*load_recognizer(tiny_base), [corpus / f"{row}.wav" for row in range(2)])
    texts = [transcript.text for transcript in said]
    assert json.loads(output.read_text())["overall"] == score_by_speaker(texts, ["é é", "go on"], ["", ""])["overall"]
    assert (
        "1 of 2 references have characters outside the model's vocabulary, which count as errors: 'é'" in caplog.text
    )


def test_style_and_language_are_the_user_s(tiny_base, corpus, tmp_path, capsys):
    (corpus / "metadata.csv").write_text("file_name,text,split\n0.wav,[noise] EU:s,test\n", encoding="utf-8")
    arguments = [
        "--model_name_or_path",
        tiny_base,
        "--dataset",
        str(corpus),
        "--output_file",
        str(tmp_path / "out.json"),
    ]
    words = []
    for flags in ([], ["--transcript_style", "brackets"], ["--transcript_style", "brackets", "--language", "sv"]):
        main([*arguments, *flags])
        words.append(json.loads((tmp_path / "out.json").read_text())["overall"]["words"])
    assert words == [3, 2, 1]
    assert "are read as `brackets`:\n  '[noise] EU:s' -> 'EU:s'" in capsys.readouterr().err


def test_compare_needs_an_adapter_and_the_data_of_the_base(tiny_base, tiny_adapters, corpus):
    flags = ["--compare", "--model_name_or_path", tiny_base, "--dataset", str(corpus)]
    with pytest.raises(ValueError, match="`adapter` must be given with `compare`, got none"):
        main([*flags, "--base_dataset", str(corpus)])
    with pytest.raises(ValueError, match="`base_dataset` must be given with `compare`, got none"):
        main([*flags, "--adapter", tiny_adapters["alice"]])


def test_readme_command_compares_an_adapter(tiny_base, tiny_adapters, small_corpus, capsys):
    replacements = {"dataset": small_corpus, "base_dataset": small_corpus, "speaker_id": "ann", "adam": "ben"}
    replacements |= {"model_name_or_path": tiny_base, "adapter": tiny_adapters["alice"], "bella": "ben"}
    main(find_arguments("--compare", **replacements, max_regression=100))
    _, _, target, base = capsys.readouterr().out.splitlines()
    # The fixture's corpus has three test recordings of ann, and three of ben.
    assert [line.split("|")[2].strip() for line in (target, base)] == ["3", "3"]
