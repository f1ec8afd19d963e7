import doctest
import json
import os
import runpy
import shutil
import struct
import sys
import threading
from itertools import islice
from pathlib import Path

import pytest

from inference.decoding import iterate_transcripts, load_recognizer, transcribe_recordings
from recipes import transcribe
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


def test_an_existing_file_is_a_file_wherever_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("alice", "-loud.wav", "--take.wav", "x=y.wav", "true"):
        Path(name).touch()

    assert flag_files(["--speaker", "ann", "alice", "--adapter", "x=1", "x=y.wav"]) == [
        "--files", "alice", "x=y.wav", "--speaker", "ann", "--adapter", "x=1",
    ]  # fmt: skip
    assert flag_files(["-loud.wav", "--format", "json", "--take.wav"]) == [
        "--files", "./-loud.wav", "./--take.wav", "--format", "json",
    ]  # fmt: skip
    assert flag_files(["--speaker", "alice", "--output_file", "x=y.wav"]) == [
        "--speaker", "alice", "--output_file", "x=y.wav",
    ]  # fmt: skip


def test_all_behind_two_dashes_are_files():
    tokens = ["--format", "json", "a.wav", "--", "--speaker", "-x.wav", "y=z.wav", "-"]
    assert flag_files(tokens) == ["--files", "a.wav", "./--speaker", "./-x.wav", "y=z.wav", "-", "--format", "json"]


def test_a_file_behind_a_switch_is_a_file():
    assert flag_files(["--allow_base_mismatch", "a.wav"]) == ["--files", "a.wav", "--allow_base_mismatch"]
    assert flag_files(["--allow_base_mismatch", "false", "-"]) == ["--files", "-", "--allow_base_mismatch", "false"]


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


def test_speakers_of_a_store_are_transcribed_as_with_their_adapters(
    tiny_base, people, recordings, heard_batches, capsys
):
    files = [recordings["wav"], recordings["mp3"], recordings["ogg"], recordings["flac"]]
    speakers = ["ann", "base", "cho", "ben"]
    base = ["--model_name_or_path", tiny_base, "--speaker", *speakers, *files]

    assert main([*base, "--adapter", *(f"{name}={people / name}" for name in ("ann", "ben", "cho"))]) == 0
    expected = capsys.readouterr().out
    for capacity, sizes in (("1", [1, 1, 2]), ("64", [4])):  # in batches of one adapter beside the base, and together
        heard_batches.clear()
        assert main([*base, "--adapter_store", str(people), "--max_loaded_adapters", capacity]) == 0
        assert capsys.readouterr().out == expected
        assert heard_batches == sizes
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


def test_names_that_are_no_utf8_keep_their_bytes_and_lose_no_answers(tiny_base, recordings, tmp_path, capsysbinary):
    odd = os.fsencode(tmp_path) + b"/\xff\xe9.wav"
    shutil.copy(recordings["wav"], odd)
    files = [recordings["wav"], os.fsdecode(odd)]
    base = ["--model_name_or_path", tiny_base]

    assert main([*base, *files]) == 0
    first, second = capsysbinary.readouterr().out.splitlines()
    assert main([*base, *files, "--output_file", str(tmp_path / "out.txt")]) == 0
    assert main([*base, *files, "--format", "json", "--output_file", str(tmp_path / "out.json")]) == 0

    assert second == odd + first[len(os.fsencode(recordings["wav"])) :]
    assert (tmp_path / "out.txt").read_bytes() == first + b"\n" + second + b"\n"
    assert [entry["file"] for entry in json.loads((tmp_path / "out.json").read_text("utf-8"))] == files


def test_files_that_cannot_be_used_lose_no_answers_and_are_named(tiny_base, recordings, tmp_path, capsys):
    (tmp_path / "fast.wav").write_bytes(set_rate(recordings["wav"], 2_000_000_000))
    (tmp_path / "slow.wav").write_bytes(set_rate(recordings["wav"], 1))
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    bad = [
        str(tmp_path / ("n" * 300)),
        str(tmp_path / "fast.wav"),
        str(tmp_path / "slow.wav"),
        str(tmp_path),
        str(tmp_path / "loop.wav"),
        "/dev/zero",
        os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav"),
    ]
    files = [bad[0], recordings["wav"], *bad[1:], recordings["flac"]]

    assert main(["--model_name_or_path", tiny_base, "--", *files]) == 1

    said = capsys.readouterr()
    assert [line.split("\t")[0] for line in said.out.splitlines()] == [recordings["wav"], recordings["flac"]]
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    expected = ["File name too long", "got 2000000000", "got 1. ", "got a folder", "symbolic links", "got a device",
                r"\xff.wav` must be a file, got none"]  # fmt: skip
    assert [text in error for text, error in zip(expected, errors, strict=True)] == [True] * 7
    assert max(map(len, errors)) < 450


def test_each_answer_is_written_when_it_is_there(tiny_base, recordings, tmp_path, capsys, monkeypatch):
    files = [recordings["wav"], recordings["flac"]]

    def break_down(*arguments, **options):
        yield from islice(iterate_transcripts(*arguments, **options), 1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("inference.recognizers.iterate_transcripts", break_down)
    base = ["--model_name_or_path", tiny_base, *files]
    for flags in (["--format", "json"], ["--format", "json", "--output_file", str(tmp_path / "out.json")]):
        with pytest.raises(RuntimeError, match="out of memory"):
            main([*base, *flags])

    printed = capsys.readouterr().out
    assert [entry["file"] for entry in json.loads(printed)] == files[:1]
    assert (tmp_path / "out.json").read_text() == printed


def test_recordings_come_in_their_order_and_the_first_before_the_last_is_opened(tiny_base, recordings, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    files = [tmp_path / "none.wav", *[recordings["wav"]] * 70, tmp_path / "pipe"]

    answers = iterate_transcripts(*load_recognizer(tiny_base), files, batch_size=16)

    assert "none.wav" in str(next(answers))
    assert next(answers).seconds == 0.7


def test_a_recording_comes_through_a_pipe_and_through_standard_input(tiny_base, recordings, capsys, monkeypatch):
    content = Path(recordings["mp3"]).read_bytes()
    pipes = [os.pipe() for _ in range(2)]
    for _, end in pipes:
        threading.Thread(target=write_and_close, args=(end, content), daemon=True).start()
    monkeypatch.setattr(sys, "stdin", os.fdopen(pipes[0][0]))
    flags = ["--model_name_or_path", tiny_base, "--format", "json"]

    substituted = f"/dev/fd/{pipes[1][0]}"  # what a shell makes of <(...)
    assert main([*flags, "-", substituted]) == 0
    piped = json.loads(capsys.readouterr().out)

    assert main([*flags, recordings["mp3"]]) == 0
    (expected,) = json.loads(capsys.readouterr().out)
    assert piped == [{**expected, "file": "-"}, {**expected, "file": substituted}]


def test_standard_input_is_read_once(tiny_base):
    with pytest.raises(ValueError, match="`files` must name standard input, `-`, once, got it twice"):
        main(["--model_name_or_path", tiny_base, "-", "-"])


def test_every_channel_is_transcribed_alone_under_the_file_and_its_name(tiny_base, recordings, capsys):
    base = ["--model_name_or_path", tiny_base]
    texts = {}
    for channel in ("left", "2", "mix"):
        assert main([*base, "--channel", channel, recordings["flac"]]) == 0
        texts[channel] = capsys.readouterr().out
    assert len(set(texts.values())) == 3

    assert main([*base, "--channel", "all", recordings["flac"], recordings["wav"]]) == 0
    left, right, mono = capsys.readouterr().out.splitlines(keepends=True)
    assert left == f"{recordings['flac']}:left\t{texts['left']}"
    assert right == f"{recordings['flac']}:right\t{texts['2']}"
    assert mono.startswith(f"{recordings['wav']}\t")

    assert main([*base, "--channel", "all", "--format", "json", recordings["flac"]]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [(entry["file"], entry["channel"]) for entry in entries] == [
        (recordings["flac"], "left"),
        (recordings["flac"], "right"),
    ]


def test_all_channels_of_a_pipe_are_transcribed(tiny_base, recordings, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(
        target=lambda: (tmp_path / "pipe").write_bytes(Path(recordings["flac"]).read_bytes()), daemon=True
    )
    writer.start()
    assert main(["--model_name_or_path", tiny_base, "--channel", "all", str(tmp_path / "pipe")]) == 0
    names = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [f"{tmp_path / 'pipe'}:left", f"{tmp_path / 'pipe'}:right"]


def test_a_speaker_of_a_file_speaks_on_all_its_channels(tiny_base, named, recordings, capsys):
    files = [recordings["flac"], recordings["wav"]]
    flags = ["--model_name_or_path", tiny_base, "--adapter", *named, "--speaker", "alice", "bob"]
    assert main([*flags, "--channel", "all", "--format", "json", "--files", *files]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["speaker"] for entry in entries] == ["alice", "alice", "bob"]


def test_a_channel_that_no_file_can_have_is_refused(tiny_base, recordings):
    with pytest.raises(ValueError, match="`channel` must be left, right, mix or a number from 1, got 'middle'"):
        main(["--model_name_or_path", tiny_base, "--channel", "middle", recordings["wav"]])


def write_and_close(descriptor: int, content: bytes) -> None:
    with os.fdopen(descriptor, "wb") as pipe:
        pipe.write(content)


def set_rate(path: str, rate: int) -> bytes:
    """The content of a wav with another sampling rate in its header."""
    content = Path(path).read_bytes()
    return content[:24] + struct.pack("<I", rate) + content[28:]
