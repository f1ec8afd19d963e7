"""EchoStream's filter banks against the library's, in streams, and normalised by a corpus's statistics."""

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from modeling import EchoStreamFeatureExtractor


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    """A second of noise that grows."""
    noise = np.random.default_rng(0).standard_normal(16_000)
    return (0.1 * noise * np.linspace(0.01, 1, 16_000)).astype(np.float32)


def test_features_are_those_of_kaldi_as_the_library_computes_them(sound):
    filters = mel_filter_bank(257, 80, 20.0, 8000.0, 16_000, norm=None, mel_scale="kaldi",
                              triangularize_in_mel_space=True)  # fmt: skip
    expected = spectrogram(
        sound.astype(np.float64) * 2**15, window_function(400, "povey", periodic=False), frame_length=400,
        hop_length=160, fft_length=512, power=2.0, center=False, preemphasis=0.97, mel_filters=filters,
        log_mel="log", mel_floor=1.192092955078125e-07, remove_dc_offset=True,
    ).T  # fmt: skip
    features = EchoStreamFeatureExtractor().log_mel(sound)
    assert features.shape == (98, 80) == expected.shape
    np.testing.assert_allclose(features.numpy(), expected, atol=2e-3)


def test_a_stream_s_features_are_those_of_the_whole(sound):
    extractor = EchoStreamFeatureExtractor()
    whole = extractor.log_mel(sound)
    parts = [extractor.log_mel(sound[start * 160 : (start + 13) * 160 + 240]) for start in (0, 13, 26)]
    assert [len(part) for part in parts] == [13, 13, 13]
    torch.testing.assert_close(torch.cat(parts), whole[:39])


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16_000, 98)])
def test_the_number_of_frames_is_counted_rightly(samples, frames):
    extractor = EchoStreamFeatureExtractor()
    assert extractor.get_num_frames(samples) == frames
    assert frames == 0 or len(extractor.log_mel(np.zeros(samples))) == frames


def test_statistics_of_a_corpus_give_mean_zero_and_deviation_one_over_it(sound):
    extractor = EchoStreamFeatureExtractor()
    clips = [sound, sound[:5000] * 3, np.zeros(100)]
    extractor.set_statistics(*extractor.measure(clips))
    frames = torch.cat([extractor.normalize(extractor.log_mel(clip)) for clip in clips[:2]])
    deviation, mean = torch.std_mean(frames, dim=0, correction=0)
    torch.testing.assert_close(mean, torch.zeros(80), atol=1e-3, rtol=0)
    torch.testing.assert_close(deviation, torch.ones(80), atol=1e-3, rtol=0)
    first = extractor.normalize(extractor.log_mel(sound)).mean()
    assert abs(first) > 1e-3  # an utterance keeps what it differs by


def test_the_statistics_come_back_from_a_file(sound, tmp_path):
    extractor = EchoStreamFeatureExtractor()
    extractor.set_statistics(*extractor.measure([sound]))
    extractor.save_pretrained(tmp_path)
    loaded = EchoStreamFeatureExtractor.from_pretrained(tmp_path)
    first, second = (one(sound, return_tensors="pt")["input_features"] for one in (extractor, loaded))
    assert torch.equal(first, second)
    assert not torch.equal(first, EchoStreamFeatureExtractor()(sound, return_tensors="pt")["input_features"])


def test_a_batch_is_padded_and_masked(sound):
    batch = EchoStreamFeatureExtractor()([sound, sound[:400]], sampling_rate=16_000, return_tensors="pt")
    assert batch["input_features"].shape == (2, 98, 80)
    assert batch["attention_mask"].sum(1).tolist() == [98, 1]
    assert batch["input_features"][1, 1:].abs().max() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"win_length": 600}, r"`win_length` must be from 1 to `n_fft` \(512\), got 600"),
        ({"mean": [0.0] * 80}, "`mean` and `std` must be given together, got mean alone"),
        ({"std": [1.0] * 80}, "`mean` and `std` must be given together, got std alone"),
        ({"mean": [0.0] * 79, "std": [1.0] * 80}, "`mean` must be 80 finite numbers, one a mel bin, got 79 numbers"),
        ({"mean": [0.0] * 80, "std": [float("nan")] * 80}, "`std` must be 80 finite numbers.*with NaN or infinity"),
        ({"mean": [0.0] * 80, "std": [0.0] * 80}, "`std` must be positive, got 0.0"),
    ],
)
def test_settings_that_make_no_features_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EchoStreamFeatureExtractor(**settings)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (np.zeros(1000), {"sampling_rate": 8000}, "`sampling_rate` must be 16000, got 8000"),
        (np.zeros(399), {}, r"`raw_speech` must be at least 400 finite samples .* got shape \(399,\) in row 0"),
        (np.zeros((2, 1000)), {}, r"`raw_speech` must be at least 400 finite samples"),
        (np.full(1000, np.nan), {}, "in row 0 with NaN or infinity"),
    ],
)
def test_audio_that_gives_no_features_is_refused(samples, options, message):
    with pytest.raises(ValueError, match=message):
        EchoStreamFeatureExtractor()(samples, **options)


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="`clips` must have a frame of 400 samples, got none"):
        EchoStreamFeatureExtractor().measure([np.zeros(10)])


def test_the_auto_class_knows_the_extractor(tmp_path):
    EchoStreamFeatureExtractor().save_pretrained(tmp_path)
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is EchoStreamFeatureExtractor
