import json
import shutil
import tracemalloc
import unicodedata

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from data.audio import AudioError, read_audio
from data.corpora import load_corpus
from data.metrics import score_by_speaker
from data.utterances import UtteranceDataset, decode_clips
from inference import chunking
from inference.beam_search import BeamDecoder
from inference.chunking import Chunking, ChunkStitcher, RecordingPath, find_pause, stitch_chunks
from inference.decoding import Word, load_recognizer, locate_words, recognize_batch, transcribe_recordings
from inference.scoring import evaluate_dataset
from modeling import DeepSpeech2FeatureExtractor, DeepSpeech2Processor, JamoCTCTokenizer
from modeling.adapters import ADAPTER_WEIGHTS_NAME, BASE, adapters_off

QUICK = {"chunk_seconds": 0.4, "overlap_seconds": 0.12}  # 20 frames of 20 ms, 6 of them shared


@pytest.fixture
def recognizer(tiny_base, tiny_adapters):
    """The tiny recogniser with both adapters, and its processor."""
    return load_recognizer(tiny_base, tiny_adapters)


@pytest.fixture
def cat_decoder(tiny_processor, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("cat\ncut\n", encoding="utf-8")
    return BeamDecoder(tiny_processor.tokenizer, word_list=path)


def one_hot(tokenizer, path: str) -> np.ndarray:
    ids = [tokenizer.pad_token_id if letter == "_" else tokenizer.convert_tokens_to_ids(letter) for letter in path]
    return np.where(np.eye(len(tokenizer))[ids] > 0, 0.0, -10.0).astype(np.float32)


def recognize_alone(model, processor, samples: np.ndarray, adapter_name: str) -> np.ndarray:
    batch = processor([samples], sampling_rate=16_000, return_tensors="pt")
    return recognize_batch(model, batch, adapter_names=[adapter_name], as_log_probs=True)[0]


@pytest.mark.parametrize("shape", [(41,), (41, 3)])
@pytest.mark.parametrize("overlap", [0, 3, 4])
def test_stitch_chunks_gives_the_unchunked_frames_and_none_from_a_chunk_edge(shape, overlap):
    frames = np.random.default_rng(0).standard_normal(shape)
    chunks = []
    for start in range(0, 41 - overlap, 10):
        chunk = frames[start : start + 10 + overlap + 1].copy()  # a chunk has the frame at its very end too
        chunk[: overlap // 2 if start else 0] = np.nan
        chunk[10 + overlap // 2 :] = np.nan if start < 30 else chunk[10 + overlap // 2 :]
        chunks.append(chunk)

    stitched = stitch_chunks(chunks, step_frames=10, overlap_frames=overlap)

    assert np.array_equal(stitched[: len(frames)], frames)


def test_locate_words_gives_first_and_last_moment_of_each_word(tiny_processor):
    ids = one_hot(tiny_processor.tokenizer, "__cc_at_||_i|").argmax(-1)

    assert locate_words(tiny_processor, ids, seconds_per_frame=0.02) == [
        Word("cat", 0.04, 0.14),
        Word("i", 0.22, 0.24),
    ]


def test_locate_words_joins_jamo_to_syllables(tmp_path):
    jamo = unicodedata.normalize("NFD", "한국")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", "|", *sorted(set(jamo))])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    tokenizer = JamoCTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)
    processor = DeepSpeech2Processor(DeepSpeech2FeatureExtractor(), tokenizer)

    words = locate_words(processor, one_hot(tokenizer, jamo).argmax(-1), seconds_per_frame=0.5)

    assert words == [Word("한국", 0.0, 3.0)]


@pytest.mark.parametrize(
    ("frames", "cut"),
    [  # 0         1         2
        # 0123456789012345678901
        ("a_________ab_a_|__abb_", 16),  # behind the delimiter of the longest pause between words
        ("a|________ab_a|a____a_", 15),  # blanks alone stand within words too
        ("a_________ab_a____abb_", 16),
        ("____abab", 8),
    ],
)
def test_find_pause_ends_a_block_behind_a_word(tiny_processor, frames, cut):
    assert find_pause(one_hot(tiny_processor.tokenizer, frames), blank=0, delimiter=2) == cut


def test_find_pause_takes_the_frame_likeliest_to_be_one_where_there_is_none(tiny_processor):
    log_probs = one_hot(tiny_processor.tokenizer, "abababab")
    log_probs[5, 0] = -3.0
    assert find_pause(log_probs, blank=0, delimiter=2) == 6


def test_words_stay_apart_where_two_blocks_of_a_beam_search_meet(monkeypatch, tiny_processor, tmp_path):
    (tmp_path / "words.txt").write_text("on\nof\n", encoding="utf-8")
    decoder = BeamDecoder(tiny_processor.tokenizer, word_list=tmp_path / "words.txt")
    log_probs = one_hot(tiny_processor.tokenizer, "_on___of__" * 9)
    log_probs[log_probs[:, 0] == 0, 2] = -1.0  # in a pause the delimiter is nearly as likely as the blank
    monkeypatch.setattr(chunking, "BLOCK_FRAMES", 15)
    path = RecordingPath(ChunkStitcher(step_frames=10, overlap_frames=0), decoder)

    for start in range(0, len(log_probs), 10):
        path.add(log_probs[start : start + 10])

    ids = path.finish()
    assert len(ids) == len(log_probs)
    assert tiny_processor.decode(ids).split() == ["on", "of"] * 9 == decoder.decode(log_probs).split()


def test_recording_path_searched_in_blocks_is_the_path_searched_at_once(monkeypatch, tiny_processor, cat_decoder):
    log_probs = one_hot(tiny_processor.tokenizer, "__c_at__|__cc_ut_|_" * 8)
    searched = []
    align = cat_decoder.align
    monkeypatch.setattr(chunking, "BLOCK_FRAMES", 40)
    monkeypatch.setattr(cat_decoder, "align", lambda block, **cut: searched.append(len(block)) or align(block, **cut))
    path = RecordingPath(ChunkStitcher(step_frames=10, overlap_frames=0), cat_decoder)

    for start in range(0, len(log_probs), 10):
        path.add(log_probs[start : start + 10])

    assert np.array_equal(path.finish(), log_probs.argmax(-1))
    assert len(searched) > 2
    assert max(searched) <= 50


def test_recognize_batch_gives_each_row_what_it_gets_alone(tiny_model, tiny_processor):
    rows = [np.random.default_rng(row).standard_normal(samples) for row, samples in enumerate([8000, 5000, 400])]

    batch = tiny_processor(rows, sampling_rate=16_000, return_tensors="pt")
    together = recognize_batch(tiny_model, batch, as_log_probs=True)

    for row, log_probs in zip(rows, together, strict=True):
        alone = recognize_alone(tiny_model, tiny_processor, row, BASE)
        assert alone.shape == log_probs.shape == (len(row) // 320 + 1, 30)
        assert np.allclose(alone, log_probs, atol=1e-4)
        assert np.allclose(np.exp(log_probs).sum(-1), 1.0, atol=1e-5)


def test_recordings_in_one_batch_each_get_the_adapter_that_they_get_alone(recognizer, recordings, heard_batches):
    files, names = list(recordings.values()), ["alice", "bob", BASE, "alice"]

    together = transcribe_recordings(*recognizer, files, adapter_names=names, batch_size=4)
    alone = [
        transcribe_recordings(*recognizer, [file], adapter_names=[name])[0]
        for file, name in zip(files, names, strict=True)
    ]
    assert heard_batches == [4, 1, 1, 1, 1]
    others = transcribe_recordings(*recognizer, files, adapter_names=[BASE, "alice", "bob", BASE])

    assert together == alone
    assert all(left.text != right.text for left, right in zip(together, others, strict=True))


def test_a_short_recording_is_what_the_model_says_of_it(recognizer, recordings):
    model, processor = recognizer
    samples = read_audio(recordings["flac"])

    transcript = transcribe_recordings(model, processor, [recordings["flac"]], adapter_names=["alice"])[0]

    ids = recognize_alone(model, processor, samples, "alice").argmax(-1)
    assert transcript.text == processor.batch_decode(ids[None])[0]
    assert [word.word for word in transcript.words] == transcript.text.split()
    assert transcript.seconds == 1.0


def test_a_long_recording_is_its_chunks_heard_alone_and_joined(recognizer, tmp_path):
    model, processor = recognizer
    samples = 0.1 * np.random.default_rng(0).standard_normal(50_000)
    soundfile.write(tmp_path / "long.wav", samples, 16_000)
    heard = read_audio(tmp_path / "long.wav")

    (transcript,) = transcribe_recordings(
        model, processor, [tmp_path / "long.wav"], adapter_names=[BASE], batch_size=3, **QUICK
    )

    # Chunks of 20 frames at every 14th: 6 are shared, 3 from either side, 320 samples each.
    chunks = [heard[start : start + 20 * 320] for start in range(0, len(heard) - 6 * 320, 14 * 320)]
    ids = [recognize_alone(model, processor, chunk, BASE).argmax(-1) for chunk in chunks]
    expected = np.concatenate([ids[0][:17], *(row[3:17] for row in ids[1:-1]), ids[-1][3:]])
    assert len(chunks) == 11
    assert len(expected) == 50_000 // 320 + 1
    assert transcript.text == " ".join(processor.batch_decode(expected[None])[0].split())
    assert transcript.words == locate_words(processor, expected, seconds_per_frame=0.02)


def test_files_of_any_format_are_transcribed_in_the_order_given(recognizer, recordings, heard_batches):
    files = list(recordings.values())

    transcripts = transcribe_recordings(*recognizer, files[::-1], batch_size=2, **QUICK)
    assert set(heard_batches) == {2}
    assert sum(heard_batches) > len(files)  # longer recordings are several chunks
    heard_batches.clear()

    assert [transcript.seconds for transcript in transcripts] == pytest.approx([1.6, 1.3, 1.0, 0.7], abs=0.03)
    assert transcripts[::-1] == transcribe_recordings(*recognizer, files, batch_size=16, **QUICK)
    assert max(heard_batches) > 2


def test_beam_search_transcribes_words_of_the_list_alone(recognizer, recordings, cat_decoder):
    (transcript,) = transcribe_recordings(*recognizer, [recordings["mp3"]], decoder=cat_decoder, **QUICK)

    assert {word.word for word in transcript.words} <= {"cat", "cut"}
    assert transcript.text == " ".join(word.word for word in transcript.words)


def test_a_bad_recording_is_reported_and_the_others_are_transcribed(recognizer, recordings, tmp_path):
    (tmp_path / "text.wav").write_text("hello")
    soundfile.write(tmp_path / "silent.wav", np.zeros(20_000), 16_000)  # known to be silent only at its end
    files = [recordings["wav"], tmp_path / "text.wav", tmp_path / "silent.wav", recordings["ogg"]]

    first, text, silent, last = transcribe_recordings(*recognizer, files, **QUICK)

    assert [first, last] == transcribe_recordings(*recognizer, [files[0], files[3]], **QUICK)
    assert isinstance(text, AudioError)
    assert isinstance(silent, AudioError)
    assert "text.wav" in str(text)
    assert "silent.wav" in str(silent)


def test_a_long_recording_is_never_in_memory_as_a_whole(tiny_model, tiny_processor, tmp_path):
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 16_000, 1) as file:
        file.write(np.eye(1, 16_000)[0])  # a click, so that the file is not silent
        for _ in range(199):
            file.write(np.zeros(16_000))

    tracemalloc.start()
    (transcript,) = transcribe_recordings(
        tiny_model, tiny_processor, [tmp_path / "long.flac"], chunk_seconds=5, batch_size=1
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert transcript.seconds == 200.0
    assert peak < 200 * 16_000 * 4 / 2  # half of the samples alone


@pytest.mark.parametrize("overlap_seconds", [-0.1, 20.0, 30.0])
def test_chunking_refuses_an_overlap_that_is_no_part_of_a_chunk(overlap_seconds):
    with pytest.raises(ValueError, match="`overlap_seconds` must be at least 0 and less than `chunk_seconds` .20.0."):
        Chunking.fit(320, 16_000, chunk_seconds=20.0, overlap_seconds=overlap_seconds)


def test_transcribe_recordings_refuses_an_empty_batch(tiny_model, tiny_processor):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        transcribe_recordings(tiny_model, tiny_processor, [], batch_size=0)


@pytest.fixture
def utterances(tmp_path, tiny_processor):
    rows = ["file_name,speaker_id,text"]
    for row in range(6):
        samples = 0.1 * np.random.default_rng(row).standard_normal(8_000 + 2_000 * row)
        soundfile.write(tmp_path / f"{row}.wav", samples, 16_000)
        rows.append(f"{row}.wav,{'ann' if row % 2 else 'ben'},say {'abc'[row % 3]}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    clips = decode_clips(load_corpus(str(tmp_path)), tiny_processor, samples_per_logit=320)
    return UtteranceDataset(clips, tiny_processor, concatenate=(1, 2), seed=1)


def test_evaluate_dataset_scores_what_the_model_says_of_each_utterance_alone(tiny_model, tiny_processor, utterances):
    scores = evaluate_dataset(tiny_model.train(), tiny_processor, utterances, batch_size=3)

    assert tiny_model.training
    tiny_model.eval()
    hypotheses = []
    for row in range(len(utterances)):
        features = torch.from_numpy(utterances[row]["input_features"])[None]
        hypotheses += tiny_processor.batch_decode(tiny_model(features).logits.argmax(-1))
    assert any(hypotheses)
    assert scores == score_by_speaker(hypotheses, utterances.references, utterances.speakers)
    assert set(scores["speakers"]) == {"ann", "ben"}


def test_evaluate_dataset_uses_the_active_adapter_and_the_base_where_adapters_are_off(recognizer, utterances):
    model, processor = recognizer
    model.set_adapter("alice")

    adapted = evaluate_dataset(model, processor, utterances)
    with adapters_off(model):
        base = evaluate_dataset(model, processor, utterances)

    assert adapted != base
    model.delete_adapter(["alice", "bob"])
    assert evaluate_dataset(model, processor, utterances) == base


def test_evaluate_dataset_scores_what_the_beam_search_finds(tiny_model, tiny_processor, utterances, cat_decoder):
    scores = evaluate_dataset(tiny_model, tiny_processor, utterances, batch_size=3, decoder=cat_decoder)

    hypotheses = []
    for row in range(len(utterances)):
        logits = tiny_model(torch.from_numpy(utterances[row]["input_features"])[None]).logits
        hypotheses.append(cat_decoder.decode(logits[0].log_softmax(-1).detach().numpy()))
    assert any(hypotheses)
    assert scores == score_by_speaker(hypotheses, utterances.references, utterances.speakers)


def test_evaluate_dataset_refuses_an_empty_batch(tiny_model, tiny_processor, utterances):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        evaluate_dataset(tiny_model, tiny_processor, utterances, batch_size=0)


def test_load_recognizer_names_what_does_not_load(tiny_base, tiny_adapters, tmp_path):
    with pytest.raises(ValueError, match="`model_name_or_path` must be a CTC model with its .* got '.*nowhere'"):
        load_recognizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="`adapter` must be an adapter of this base, got .*nowhere"):
        load_recognizer(tiny_base, {"alice": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="`adapter` must be a folder with adapter_config.json, got .*base"):
        load_recognizer(tiny_base, {"alice": tiny_base})
    with pytest.raises(ValueError, match="`adapter_name` must be 1 to 64 letters"):
        load_recognizer(tiny_base, {"../alice": tiny_adapters["alice"]})


def test_load_recognizer_refuses_an_adapter_of_another_size_or_with_other_tensors(tiny_base, tiny_adapters, tmp_path):
    folder = shutil.copytree(tiny_adapters["alice"], tmp_path / "alice")
    tensors = load_file(folder / ADAPTER_WEIGHTS_NAME)
    first = next(iter(tensors))

    save_file({**tensors, "ghost": torch.zeros(1)}, folder / ADAPTER_WEIGHTS_NAME)
    with pytest.raises(ValueError, match="exactly the tensors of its configuration, got .*alice where 'ghost'"):
        load_recognizer(tiny_base, {"alice": str(folder)})
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, folder / ADAPTER_WEIGHTS_NAME)
    with pytest.raises(ValueError, match="exactly the tensors of its configuration, got .*is missing or too much"):
        load_recognizer(tiny_base, {"bob": tiny_adapters["bob"], "alice": str(folder)})
    save_file({**tensors, first: torch.zeros(3, 3)}, folder / ADAPTER_WEIGHTS_NAME)
    with pytest.raises(ValueError, match="`adapter` must be an adapter of this base, got .*alice"):
        load_recognizer(tiny_base, {"alice": str(folder)})


def test_load_recognizer_is_quiet_about_several_adapters(tiny_base, tiny_adapters, caplog, recwarn):
    load_recognizer(tiny_base, tiny_adapters)

    assert not caplog.records
    assert not [warning for warning in recwarn if "peft_config" in str(warning.message)]
