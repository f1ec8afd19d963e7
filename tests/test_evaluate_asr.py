import json

import numpy as np
import pytest
import soundfile

from data.metrics import score_by_speaker
from recipes.beam_search import BeamDecoder
from recipes.decoding import load_recognizer, transcribe_recordings
from recipes.evaluate_asr import main

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
