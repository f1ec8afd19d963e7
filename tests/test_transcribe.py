import doctest
import json
import runpy
import sys
from pathlib import Path

import pytest

from recipes import transcribe
from recipes.decoding import load_recognizer, transcribe_recordings
from recipes.transcribe import BASE, choose_adapters, flag_files, main, parse_adapters

ROOT = Path(__file__).parents[1]


@pytest.fixture
def named(tiny_adapters):
    """`--adapter` values of both adapters."""
    return [f"{name}={folder}" for name, folder in tiny_adapters.items()]


@pytest.mark.parametrize(
    "tokens",
    [
        "--speaker x y --adapter x=1/x y=2/y --format json a.wav b.wav",
        "--adapter x=1/x --adapter y=2/y --speaker x --speaker y a.wav b.wav --format json",
        "a.wav b.wav --adapter=x=1/x --adapter=y=2/y --speaker x y --format=json",
        "a.wav --format json --speaker x y b.wav --adapter x=1/x y=2/y",
        "--format json --speaker x y --adapter x=1/x y=2/y --files a.wav b.wav",
    ],
)
def test_flag_files_finds_the_files_wherever_they_stand(tokens):
    flagged = flag_files(tokens.split())

    groups = {}
    for token in flagged:
        if token.startswith("--"):
            groups[token.split("=")[0]] = values = token.split("=")[1:]
        else:
            values.append(token)
    assert groups == {
        "--files": ["a.wav", "b.wav"],
        "--adapter": ["x=1/x", "y=2/y"],
        "--speaker": ["x", "y"],
        "--format": ["json"],
    }


def test_flag_files_takes_the_folder_of_an_unnamed_adapter_for_no_file():
    assert flag_files(["--adapter", "out/x", "a.wav"]) == ["--files", "a.wav", "--adapter", "out/x"]


def test_flag_files_takes_a_negative_number_for_a_value():
    assert flag_files(["--word_score", "-1", "a.wav"]) == ["--files", "a.wav", "--word_score", "-1"]


def test_example_of_flag_files_runs():
    assert doctest.testmod(transcribe) == doctest.TestResults(failed=0, attempted=1)


def test_parse_adapters_reads_one_folder_or_several_names():
    assert parse_adapters(["out/x"]) == {"adapter": "out/x"}
    assert parse_adapters(["./a=b/x"]) == {"adapter": "./a=b/x"}
    assert parse_adapters(["x=out/x", "y=/tmp/a=b"]) == {"x": "out/x", "y": "/tmp/a=b"}
    assert parse_adapters([]) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["x=1", "x=2"], "`adapter` must have each name once, got 'x' twice"),
        (["x=1", "out/y"], "`adapter` must be NAME=FOLDER where there are several, got 'out/y'"),
        (["x.y=1"], "`adapter_name` must be 1 to 64 letters, digits, '_' or '-', got 'x.y'"),
        (["..=1"], "`adapter_name` must be 1 to 64 letters"),
        (["base=1"], "`adapter` must not be named 'base', which means no adapter"),
    ],
)
def test_parse_adapters_refuses_wrong_names(values, message):
    with pytest.raises(ValueError, match=message):
        parse_adapters(values)


def test_choose_adapters_gives_each_file_its_own():
    adapters = {"x": "1", "y": "2"}

    assert choose_adapters(["y", "base", "__base__", "x"], adapters, 4) == ["y", BASE, BASE, "x"]
    assert choose_adapters([], {"x": "1"}, 2) == ["x", "x"]
    assert choose_adapters([], {}, 2) == [BASE, BASE]


@pytest.mark.parametrize(
    ("speakers", "adapters", "message"),
    [
        (["x"], {"x": "1"}, "`speaker` must be given once a file, got 1 speakers for 2 files"),
        (
            ["x", "z"],
            {"x": "1"},
            r"name of an adapter \(x\) or `base`, got 'z'. Give its folder with `--adapter z=",
        ),
        (["x", "base"], {}, r"the name of an adapter \(none given\) or `base`, got 'x'"),
        ([], {"x": "1", "y": "2"}, r"`speaker` must say which of the adapters \(x, y\) each file needs, got none"),
    ],
)
def test_choose_adapters_refuses_speakers_that_do_not_fit(speakers, adapters, message):
    with pytest.raises(ValueError, match=message):
        choose_adapters(speakers, adapters, 2)


def test_text_of_one_file_stands_alone_and_that_of_several_behind_their_names(tiny_base, recordings, capsys):
    first, second = recordings["wav"], recordings["flac"]
    texts = [said.text for said in transcribe_recordings(*load_recognizer(tiny_base), [first, second])]
    base = ["--model_name_or_path", tiny_base]

    assert main([*base, first]) == 0
    assert capsys.readouterr().out == f"{texts[0]}\n"
    assert main([*base, first, second]) == 0
    assert capsys.readouterr().out == f"{first}\t{texts[0]}\n{second}\t{texts[1]}\n"


def test_json_holds_speaker_words_and_seconds_of_each_file(tiny_base, tiny_adapters, named, recordings, capsys):
    files = [recordings["wav"], recordings["mp3"], recordings["ogg"]]
    speakers = ["alice", "bob", "base"]

    assert main(["--model_name_or_path", tiny_base, "--adapter", *named, "--speaker", *speakers, *files]
                + ["--format", "json"]) == 0  # fmt: skip

    entries = json.loads(capsys.readouterr().out)
    said = transcribe_recordings(
        *load_recognizer(tiny_base, tiny_adapters), files, adapter_names=["alice", "bob", BASE]
    )
    assert [set(entry) for entry in entries] == [{"file", "speaker", "text", "words", "seconds"}] * 3
    assert [entry["file"] for entry in entries] == files
    assert [entry["speaker"] for entry in entries] == speakers
    assert [entry["text"] for entry in entries] == [transcript.text for transcript in said]
    assert entries[1]["words"] == [vars(word) for word in said[1].words]
    assert entries[0]["seconds"] == 0.7


def test_one_adapter_without_a_name_acts_on_all_files(tiny_base, tiny_adapters, recordings, capsys):
    files = [recordings["wav"], recordings["flac"]]

    assert main(["--model_name_or_path", tiny_base, "--adapter", tiny_adapters["bob"], *files]) == 0

    said = transcribe_recordings(*load_recognizer(tiny_base, {"bob": tiny_adapters["bob"]}), files)
    assert capsys.readouterr().out == "".join(
        f"{file}\t{transcript.text}\n" for file, transcript in zip(files, said, strict=True)
    )


def test_speakers_of_a_store_are_transcribed_as_with_their_adapters(tiny_base, people, recordings, capsys):
    files = [recordings["wav"], recordings["mp3"], recordings["ogg"], recordings["flac"]]
    speakers = ["ann", "base", "cho", "ben"]
    base = ["--model_name_or_path", tiny_base, "--speaker", *speakers, *files]

    assert main([*base, "--adapter", *(f"{name}={people / name}" for name in ("ann", "ben", "cho"))]) == 0
    expected = capsys.readouterr().out
    for capacity in ("1", "64"):  # in batches of one adapter, and together
        assert main([*base, "--adapter_store", str(people), "--max_loaded_adapters", capacity]) == 0
        assert capsys.readouterr().out == expected
    assert len(set(line.split("\t")[1] for line in expected.splitlines())) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--speaker", "bem"], "`speaker` must be an adapter of `adapter_store` or `base`: .*Did you mean 'ben'"),
        ([], "`speaker` must be given once a file with a store, got 0 speakers for 1 files"),
        (["--speaker", "ann", "--adapter", "out/x"], "`adapter` must not be given with `adapter_store`"),
        (["--speaker", "base"], "`adapter_store` must not hold an adapter 'base', which means none"),
        (["--speaker", "dan"], "`adapter` must be a folder with adapter_model.safetensors, got .*dan"),
    ],
)
def test_a_store_and_its_speakers_are_checked_before_anything_is_heard(
    tiny_base, store_folder, recordings, flags, message
):
    (store_folder / "ann").rename(store_folder / "base")
    (store_folder / "dan" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        main(["--model_name_or_path", tiny_base, "--adapter_store", str(store_folder), *flags, recordings["wav"]])


def test_word_list_restricts_the_transcript(tiny_base, recordings, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("cat\n", encoding="utf-8")

    main(["--model_name_or_path", tiny_base, "--word_list", str(tmp_path / "words.txt"), recordings["wav"]])

    assert set(capsys.readouterr().out.split()) <= {"cat"}


def test_no_such_adapter_folder_is_named(tiny_base, recordings, tmp_path):
    with pytest.raises(ValueError, match="`adapter` must be an adapter of this base, got .*nowhere"):
        main(["--model_name_or_path", tiny_base, "--adapter", str(tmp_path / "nowhere"), recordings["wav"]])


def test_misspelt_flag_is_refused(tiny_base, recordings):
    with pytest.raises(ValueError, match="`--speakers` is not a flag of this recipe. Did you mean `speaker`"):
        main(["--model_name_or_path", tiny_base, "--speakers", "x", recordings["wav"]])


def test_script_reports_a_bad_file_writes_the_others_and_exits_with_1(
    tiny_base, recordings, tmp_path, capsys, monkeypatch
):
    bad, output = tmp_path / "bad.wav", tmp_path / "said" / "out.txt"
    bad.write_text("no audio")
    flags = ["--model_name_or_path", tiny_base, "--output_file", str(output)]
    monkeypatch.setattr(sys, "argv", ["transcribe.py", *flags, recordings["wav"], str(bad), recordings["ogg"]])

    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / "recipes" / "transcribe.py"), run_name="__main__")

    said = capsys.readouterr()
    assert exit_info.value.code == 1
    assert said.out == ""
    assert f"error: `{bad}` must be wav, flac, ogg or mp3 audio" in said.err
    assert [line.split("\t")[0] for line in output.read_text().splitlines()] == [recordings["wav"], recordings["ogg"]]


def test_no_good_file_gives_an_empty_list_and_exit_status_1(tiny_base, tmp_path, capsys):
    assert main(["--model_name_or_path", tiny_base, "--format", "json", str(tmp_path / "missing.wav")]) == 1

    said = capsys.readouterr()
    assert json.loads(said.out) == []
    assert "missing.wav` must be a file, got none at that path" in said.err
