"""Any recogniser: CTC models of transformers and Whisper are transcribed with, scored and refused alike."""

import json

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from transformers import BertConfig, Wav2Vec2FeatureExtractor

from data.metrics import score_by_speaker
from data.score_text import find_score_normalizer
from inference.answering import answer
from inference.decoding import count_logits, extract_inputs, find_samples_per_logit
from inference.recognizers import CTCRecognizer, WhisperRecognizer, open_recognizer
from inference.transcript_output import format_captions
from recipes.evaluate_asr import main as evaluate_main
from recipes.transcribe import main as transcribe_main
from tests.ctc_models import MAKERS, save_ctc_base
from tests.speech_models import save_base

FAMILIES = sorted(MAKERS)
SIZES = (16_000, 23_000, 9_000, 70_000)
SAMPLES_PER_LOGIT = {"wav2vec2": 320, "hubert": 320, "wavlm": 320, "wav2vec2_bert": 640, "parakeet": 1280}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder for each family; the Whisper has no timestamps and hears a window of its own."""
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_ctc_base(family, folder / family) for family in FAMILIES} | {
        "whisper": str(save_base("whisper", folder / "whisper"))
    }


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Files of noise that swells and fades, each at a pace of its own."""
    folder, generator = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for index, size in enumerate(SIZES):
        swell = np.sin(np.arange(size) / (200 + 50 * index))
        soundfile.write(folder / f"{index}.wav", generator.normal(0, 0.1, size) * swell, 16_000)
    return [str(folder / f"{index}.wav") for index in range(len(SIZES))]


def make_corpus(clips, texts):
    audio = [{"path": path, "bytes": None} for path in clips]
    return Dataset.from_dict({"audio": audio, "text": texts, "speaker_id": ["ann"] * len(texts)})


@pytest.mark.parametrize("family", FAMILIES)
def test_text_of_a_clip_does_not_depend_on_what_it_is_heard_with(family, bases, clips):
    recognizer = open_recognizer(bases[family])
    assert isinstance(recognizer, CTCRecognizer)
    together = list(recognizer.transcribe(clips, batch_size=4))
    alone = list(recognizer.transcribe(clips, batch_size=1))
    assert [said.text for said in together] == [said.text for said in alone]
    assert len({said.text for said in alone}) == len(clips)
    assert [said.seconds for said in alone] == [round(size / 16_000, 3) for size in SIZES]


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_of_logits_are_counted_as_the_model_makes_them(family, bases, clips):
    recognizer = open_recognizer(bases[family])
    model, processor = recognizer.model, recognizer.processor
    for path in clips:
        inputs = extract_inputs(processor, [soundfile.read(path, dtype="float32")[0]])
        length = int(inputs["attention_mask"].sum())
        logits = model(inputs[model.main_input_name][:, :length]).logits
        assert logits.shape[1] == count_logits(model, torch.tensor([length])).item()
    assert find_samples_per_logit(model, processor) == SAMPLES_PER_LOGIT[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_words_have_times_within_the_recording_and_make_the_text(family, bases, clips):
    for said in open_recognizer(bases[family]).transcribe(clips[:2], batch_size=2):
        assert " ".join(word.word for word in said.words) == said.text
        times = [time for word in said.words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert 0 <= times[0]
        assert times[-1] <= said.seconds + 0.08


@pytest.mark.parametrize("family", FAMILIES)
def test_a_corpus_is_scored_by_what_is_transcribed(family, bases, clips):
    recognizer = open_recognizer(bases[family], language=["en"])
    utterances = recognizer.load_utterances(make_corpus(clips[:3], ["zero", "one two", "no one"]))
    said = [said.text for said in recognizer.transcribe(clips[:3], batch_size=1)]
    scores = recognizer.score(utterances, batch_size=2)
    assert scores == score_by_speaker(said, utterances.references, ["ann"] * 3)
    assert scores["overall"]["words"] == 5
    assert any(said)


def test_a_corpus_is_scored_by_what_whisper_answers(bases, clips):
    recognizer = open_recognizer(bases["whisper"], language=["en"])
    utterances = recognizer.load_utterances(make_corpus(clips[:3], ["zero", "1 2", "no one"]))
    normalize = find_score_normalizer(recognizer.processor.tokenizer)
    said = [
        answer(recognizer.model, recognizer.prompt, [(None, [soundfile.read(path, dtype="float32")[0]])],
               max_new_tokens=recognizer.max_new_tokens)[0]
        for path in clips[:3]
    ]  # fmt: skip
    scores = recognizer.score(utterances, batch_size=2)
    assert scores == score_by_speaker(list(map(normalize, said)), ["zero", "one two", "no one"], ["ann"] * 3)
    assert any(said)


def test_transcripts_are_written_in_capitals_for_a_model_that_has_no_others(bases, clips):
    utterances = open_recognizer(bases["hubert"]).load_utterances(make_corpus(clips[:1], ["One, two!"]))
    assert utterances.references == ["ONE TWO"]
    assert open_recognizer(bases["parakeet"]).load_utterances(make_corpus(clips[:1], ["One, two!"])).references == [
        "one two"
    ]


def test_recipes_transcribe_and_evaluate_a_model_of_transformers(bases, clips, tmp_path, capsys):
    transcribe_main(["--model_name_or_path", bases["hubert"], "--format", "vtt", clips[0]])
    head, _, captions = capsys.readouterr().out.partition("\n\n")
    said = next(open_recognizer(bases["hubert"]).transcribe(clips[:1]))
    assert head == "WEBVTT"
    assert captions == format_captions(said.captions, "vtt").partition("\n\n")[2]

    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = ["file_name,text,speaker_id,split", f"{clips[0]},zero,ann,test"]
    (tmp_path / "corpus.csv").write_text("\n".join(rows))
    evaluate_main(
        ["--model_name_or_path", bases["hubert"], "--dataset", str(tmp_path / "corpus.csv"), "--output_file",
         str(tmp_path / "scores.json")]
    )  # fmt: skip
    assert json.loads((tmp_path / "scores.json").read_text())["overall"]["words"] == 1


def test_captions_of_several_recordings_are_refused(bases, clips):
    with pytest.raises(ValueError, match="`format` srt is for one recording, got 2. Run the recipe once for each."):
        transcribe_main(["--model_name_or_path", bases["hubert"], "--format", "srt", *clips[:2]])


def test_whisper_says_the_same_in_a_batch_and_alone(bases, clips):
    recognizer = open_recognizer(bases["whisper"], language=["en"])
    assert isinstance(recognizer, WhisperRecognizer)
    together = [said.text for said in recognizer.transcribe(clips[:3], batch_size=3)]
    assert together == [said.text for said in recognizer.transcribe(clips[:3], batch_size=1)]
    assert any(together)


def test_whisper_refuses_a_word_list(bases, tmp_path, clips):
    (tmp_path / "words.txt").write_text("zero\n")
    with pytest.raises(ValueError, match="`word_list` must be left out for a Whisper"):
        transcribe_main(
            ["--model_name_or_path", bases["whisper"], "--language", "en", "--word_list", str(tmp_path / "words.txt"),
             clips[0]]
        )  # fmt: skip


def test_whisper_without_timestamps_refuses_what_is_longer_than_its_window(bases, tmp_path):
    recognizer = open_recognizer(bases["whisper"], language=["en"])
    recognizer.model.generation_config.no_timestamps_token_id = None
    samples = np.random.default_rng(0).normal(0, 0.1, recognizer.prompt.max_samples + 16_000)
    soundfile.write(tmp_path / "long.wav", samples, 16_000)
    with pytest.raises(ValueError, match="A recording must be at most .* s long for a Whisper without timestamps"):
        list(recognizer.transcribe([str(tmp_path / "long.wav")]))


def test_model_that_is_no_recogniser_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a CTC model or a Whisper, got a model of type 'bert'"):
        open_recognizer(str(tmp_path))


def test_model_without_a_tokenizer_is_refused(tmp_path, bases):
    model = open_recognizer(bases["hubert"]).model
    model.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a recogniser with a feature extractor and a tokenizer, got"):
        open_recognizer(str(tmp_path))


def test_model_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="`model_name_or_path` must be a recogniser, got 'no/such'"):
        open_recognizer("no/such")


def test_model_that_does_not_say_how_many_frames_it_makes_is_refused():
    class Silent(torch.nn.Module):
        base_model = None

    with pytest.raises(ValueError, match="must be a model that says how many frames it makes .* got a Silent"):
        count_logits(Silent(), torch.tensor([1]))


class Tokenizer:
    language = None


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("zero one two", "0, 1, 2."),
        ("twenty three", "23"),
        ("one hundred and five", "105"),
        ("zero one two", "012"),
        ("press one", "Press 1!"),
        ("it is", "It's"),
    ],
)
def test_figures_and_words_of_a_number_are_the_same(reference, hypothesis):
    normalize = find_score_normalizer(Tokenizer())
    assert normalize(reference) == normalize(hypothesis)
    assert normalize(reference) != normalize(f"{hypothesis} more")


def test_other_languages_are_compared_by_their_own_rules():
    assert find_score_normalizer(Tokenizer(), "de")("Zwei, bitte!") == "zwei bitte"
    assert find_score_normalizer(Tokenizer(), "en")("two, please") == "two please"
