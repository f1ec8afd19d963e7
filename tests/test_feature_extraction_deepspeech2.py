"""Features are librosa's log-mel energies, normalised, 10 ms a frame."""

import json

import librosa
import numpy as np
import pytest
import torch

from modeling import DeepSpeech2FeatureExtractor
from modeling.feature_extraction_deepspeech2 import split_into_bands


@pytest.fixture
def samples() -> np.ndarray:
    """One second of a falling tone in noise at 16 kHz."""
    noise = 0.01 * np.random.default_rng(0).standard_normal(16_000)
    return (librosa.chirp(fmin=3000, fmax=200, sr=16_000, duration=1) + noise).astype(np.float32)


@pytest.mark.parametrize("settings", [{}, {"feature_size": 16, "hop_length": 80, "win_length": 400}])
def test_log_mel_equals_librosa(samples, settings):
    extractor = DeepSpeech2FeatureExtractor(**settings)
    power = librosa.feature.melspectrogram(
        y=samples,
        sr=16_000,
        n_fft=512,
        hop_length=extractor.hop_length,
        win_length=extractor.win_length,
        n_mels=extractor.feature_size,
        pad_mode="constant",
    )
    np.testing.assert_allclose(extractor.log_mel(samples), np.log(power.T), atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{}, {"n_fft": 401, "win_length": 400}, {"hop_length": 700}, {"feature_size": 7, "n_fft": 1024}]
)
@pytest.mark.parametrize("num_samples", [1, 5000, 100_000])
def test_log_mel_equals_a_dense_product_with_the_spectrum_of_torch(settings, num_samples):
    extractor = DeepSpeech2FeatureExtractor(**settings)
    samples = torch.randn(num_samples, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(samples, (extractor.n_fft // 2, extractor.n_fft))
    spectrum = torch.stft(
        padded,
        extractor.n_fft,
        extractor.hop_length,
        extractor.win_length,
        window=torch.hann_window(extractor.win_length),
        center=False,
        return_complex=True,
    )[:, : extractor.get_num_frames(num_samples)]
    energies = spectrum.abs().square().T @ torch.from_numpy(extractor.mel_filters)
    torch.testing.assert_close(extractor.log_mel(samples), energies.log(), atol=1e-4, rtol=0)


def test_filters_narrower_than_a_bin_of_the_spectrum_give_silence():
    filters = np.zeros((5, 40), dtype=np.float32)
    filters[2, 35] = 1.0
    (_, empty_bins, empty), (mels, bins, band) = split_into_bands(filters)

    assert (empty_bins, empty.abs().sum()) == (slice(0, 1), 0)
    assert (mels, bins) == (slice(32, 64), slice(2, 3))
    assert band.tolist() == [[0, 0, 0, 1, 0, 0, 0, 0]]


def test_silence_is_finite():
    features = DeepSpeech2FeatureExtractor()(np.zeros(1600)).input_features[0]
    np.testing.assert_array_equal(features, np.zeros((11, 80)))


@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 16_000])
def test_get_num_frames_counts_what_comes_out(num_samples):
    extractor = DeepSpeech2FeatureExtractor()
    assert extractor.get_num_frames(num_samples) == len(extractor.log_mel(np.ones(num_samples)))


def test_normalisation_over_the_utterance_keeps_the_balance_of_bins(samples):
    features = DeepSpeech2FeatureExtractor(normalization="utterance")(samples).input_features[0]
    assert features.mean() == pytest.approx(0, abs=1e-5)
    assert features.std() == pytest.approx(1, abs=1e-5)
    assert np.abs(features.mean(0)).max() > 0.1


def test_normalisation_over_each_bin_removes_a_constant_channel(samples):
    extractor = DeepSpeech2FeatureExtractor(normalization="bin")
    features = extractor.log_mel(samples)
    tilt = torch.linspace(-2, 2, 80)

    torch.testing.assert_close(extractor.normalize(features), extractor.normalize(features + tilt), atol=1e-4, rtol=0)
    torch.testing.assert_close(extractor.normalize(features).mean(0), torch.zeros(80), atol=1e-5, rtol=0)


def test_a_batch_is_its_rows_padded(samples):
    extractor = DeepSpeech2FeatureExtractor()
    batch = extractor([samples, samples[:4000]], sampling_rate=16_000, return_tensors="pt")
    alone = extractor(samples[:4000]).input_features[0]

    assert batch.input_features.shape == (2, 101, 80)
    assert batch.attention_mask.sum(-1).tolist() == [101, 26]
    assert np.array_equal(batch.input_features[1, :26], alone)
    assert batch.input_features[1, 26:].abs().max() == 0


@pytest.mark.parametrize("convert", [list, lambda samples: [samples], lambda samples: [samples.tolist()]])
def test_lists_mean_the_same_as_arrays(samples, convert):
    extractor = DeepSpeech2FeatureExtractor()
    np.testing.assert_array_equal(extractor(convert(samples)).input_features[0], extractor(samples).input_features[0])


def test_another_sampling_rate_is_refused(samples):
    with pytest.raises(ValueError, match="`sampling_rate` must be 16000, got 8000. Resample the audio first."):
        DeepSpeech2FeatureExtractor()(samples, sampling_rate=8000)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ([], r"got shape \(0,\) in row 0"),
        (np.zeros((2, 100)), r"got shape \(2, 100\) in row 0"),
        ([np.ones(100), np.array([1.0, np.nan])], r"got shape \(2,\) in row 1 with NaN or infinite values"),
        ([np.ones(100), np.array([])], r"got shape \(0,\) in row 1\."),
    ],
)
def test_audio_that_is_none_is_refused_by_row(audio, message):
    with pytest.raises(ValueError, match=message):
        DeepSpeech2FeatureExtractor()(audio)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalization": "speaker"}, '`normalization` must be "utterance" or "bin", got \'speaker\''),
        ({"win_length": 600}, r"`win_length` must be from 1 to `n_fft` \(512\), got 600"),
        ({"win_length": 0}, "`win_length` must be from 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DeepSpeech2FeatureExtractor(**settings)


def test_settings_survive_save_and_load_without_the_filters(samples, tmp_path):
    extractor = DeepSpeech2FeatureExtractor(16, hop_length=80, normalization="bin")
    extractor.save_pretrained(tmp_path)
    reloaded = DeepSpeech2FeatureExtractor.from_pretrained(tmp_path)

    assert "mel_filters" not in json.loads((tmp_path / "preprocessor_config.json").read_text())
    np.testing.assert_array_equal(reloaded(samples).input_features[0], extractor(samples).input_features[0])
