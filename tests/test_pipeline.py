"""The library's pipeline finds each tone where it sounds, in batches and in chunks, to within two frames."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import pipeline

from modeling import DeepSpeech2Config, DeepSpeech2ForCTC

TONES_HZ = {"a": 400.0, "b": 1200.0, "c": 3000.0}
TWO_FRAMES = 0.04  # seconds


def sing(*words: str) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """Audio at 16 kHz of a tone of 0.2 s a letter with 0.3 s of hiss around words; and where each word sounds."""
    generator = np.random.default_rng(len(words))
    parts, spans, second = [np.zeros(4800)], [], 0.3
    for word in words:
        time = np.arange(3200) / 16_000
        parts += [0.3 * np.sin(2 * np.pi * TONES_HZ[letter] * time) for letter in word] + [np.zeros(4800)]
        spans.append((word, second, second + 0.2 * len(word)))
        second += 0.2 * len(word) + 0.3
    samples = np.concatenate(parts)
    return (samples + 0.003 * generator.standard_normal(len(samples))).astype(np.float32), spans


def label_frames(spans: list[tuple[str, float, float]], num_frames: int, vocabulary: dict[str, int]) -> torch.Tensor:
    """Class of each frame of 20 ms: the letter that sounds at its centre, else the word delimiter."""
    classes = torch.full((num_frames,), vocabulary["|"])
    for word, start, _ in spans:
        for index, letter in enumerate(word):
            first = round((start + 0.2 * index) / 0.02)
            classes[first : first + 10] = vocabulary[letter]
    return classes


@pytest.fixture(scope="module")
def recognize(tiny_processor):
    """A pipeline around a recogniser that has learnt three tones, frame by frame."""
    torch.manual_seed(0)
    config = DeepSpeech2Config(num_mel_bins=16, conv_channels=4, hidden_size=16, num_hidden_layers=1, vocab_size=30)
    model = DeepSpeech2ForCTC(config)
    songs = [sing("ab", "c"), sing("ca", "b", "a"), sing("bc", "a"), sing("c", "ba")]
    batch = tiny_processor([samples for samples, _ in songs], return_tensors="pt")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        output = model(**batch)
        loss = sum(
            nn.functional.cross_entropy(
                logits[:frames], label_frames(spans, frames, tiny_processor.tokenizer.get_vocab())
            )
            for logits, frames, (_, spans) in zip(output.logits, output.logits_lengths, songs, strict=True)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return pipeline(
        "automatic-speech-recognition",
        model=model.eval(),
        tokenizer=tiny_processor.tokenizer,
        feature_extractor=tiny_processor.feature_extractor,
    )


def assert_spans(chunks: list[dict], spans: list[tuple[str, float, float]]) -> None:
    assert [chunk["text"] for chunk in chunks] == [word for word, _, _ in spans]
    for chunk, (_, start, end) in zip(chunks, spans, strict=True):
        assert chunk["timestamp"] == pytest.approx((start, end), abs=TWO_FRAMES)


def test_words_are_found_where_they_sound(recognize):
    samples, spans = sing("ba", "c", "ab")
    result = recognize(samples, return_timestamps="word")

    assert result["text"].split() == ["ba", "c", "ab"]
    assert_spans(result["chunks"], spans)


def test_characters_are_found_where_they_sound(recognize):
    samples, _ = sing("ba", "c")
    chunks = recognize(samples, return_timestamps="char")["chunks"]

    letters = [chunk for chunk in chunks if chunk["text"].strip()]
    assert_spans(letters, [("b", 0.3, 0.5), ("a", 0.5, 0.7), ("c", 1.0, 1.2)])


def test_a_batch_gives_what_each_recording_gives_alone(recognize):
    recordings = [sing(*words)[0] for words in (("ab",), ("c", "ba", "b"), ("a", "b"))]

    together = recognize([samples.copy() for samples in recordings], batch_size=3, return_timestamps="word")
    alone = [recognize(samples.copy(), return_timestamps="word") for samples in recordings]

    assert together == alone
    assert [result["text"].split() for result in alone] == [["ab"], ["c", "ba", "b"], ["a", "b"]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_chunks_find_words_where_they_sound_in_the_whole(recognize, batch_size):
    samples, spans = sing(*["ab", "c", "ba", "a", "cb"] * 3)
    assert len(samples) > 4 * 2 * 16_000

    result = recognize(
        samples, chunk_length_s=2.0, stride_length_s=0.5, batch_size=batch_size, return_timestamps="word"
    )

    assert result["text"].split() == [word for word, _, _ in spans]
    assert_spans(result["chunks"], spans)
