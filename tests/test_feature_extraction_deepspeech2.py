"""Features are librosa's log-mel energies, normalised, 10 ms a frame."""

import json

import librosa
import numpy as np
import pytest
import torch

from modeling import DeepSpeech2FeatureExtractor
from modeling.feature_extraction_deepspeech2 import normalize_speech, split_into_bands


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


@pytest.fixture
def words() -> np.ndarray:
    """Two seconds of noise at 16 kHz that swells and fades four times: 40 dB from the loudest to the softest."""
    noise = np.random.default_rng(1).standard_normal(32_000)
    loudness_db = -20 + 20 * np.cos(2 * np.pi * 2 * np.arange(32_000) / 16_000)
    return (0.1 * noise * 10 ** (loudness_db / 20)).astype(np.float32)


@pytest.mark.parametrize("noise_rms", [0.0, 1e-5, 3e-4])
@pytest.mark.parametrize("seconds", [0.1, 3.0])
def test_speech_normalisation_does_not_hear_how_much_silence_stands_around(words, noise_rms, seconds):
    num_samples = round(seconds * 16_000)
    pause = (noise_rms * np.random.default_rng(2).standard_normal((2, num_samples))).astype(np.float32)
    longer = np.concatenate([pause[0], words, pause[1]])
    start = num_samples // 160
    differences = {}
    for normalization in ("speech", "bin", "utterance"):
        extractor = DeepSpeech2FeatureExtractor(40, normalization=normalization)
        alone, within = (extractor(samples).input_features[0] for samples in (words, longer))
        # The first and the last frame have a window that reaches into the pause.
        differences[normalization] = np.abs(within[start + 1 : start + 200] - alone[1:-1]).max()

    assert differences["speech"] < 0.02
    assert min(differences["bin"], differences["utterance"]) > 0.1


@pytest.mark.parametrize("gain_db", [-30, -10, 10])
def test_speech_normalisation_does_not_hear_the_level(words, gain_db):
    extractor = DeepSpeech2FeatureExtractor(40, normalization="speech")
    expected = extractor(words).input_features[0]
    louder = extractor(words * np.float32(10 ** (gain_db / 20))).input_features[0]
    np.testing.assert_allclose(louder, expected, atol=1e-3)


def test_speech_normalisation_floors_45_db_below_the_level():
    extractor = DeepSpeech2FeatureExtractor(40, normalization="speech")
    steady = np.random.default_rng(1).standard_normal(32_000).astype(np.float32)
    log_mel = extractor.log_mel(np.concatenate([steady, np.zeros(16_000, np.float32)]))
    features = normalize_speech(log_mel)
    level = log_mel[5:195].exp().mean().log()
    deviation = 45 * np.log(10) / 10 / 1.15  # white noise deviates by less than 5 dB

    silence = features[205:] + (log_mel[5:195].mean(0) - level) / 1.15
    torch.testing.assert_close(silence, torch.full_like(silence, -deviation), atol=0.15, rtol=0)
    torch.testing.assert_close(features[5:195].mean(0), torch.zeros(40), atol=0.1, rtol=0)


def test_speech_normalisation_gives_frames_of_speech_mean_0_and_deviation_1(words):
    extractor = DeepSpeech2FeatureExtractor(40, normalization="speech")
    log_mel = extractor.log_mel(words)
    power = log_mel.exp().mean(1)
    level = (power**2).sum() / power.sum()
    speech = normalize_speech(log_mel)[power > level / 100]  # 20 dB

    torch.testing.assert_close(speech.mean(0), torch.zeros(40), atol=1e-4, rtol=0)
    torch.testing.assert_close(speech.std(0, correction=0), torch.ones(40), atol=1e-4, rtol=0)


def test_speech_normalisation_does_not_blow_up_a_band_that_is_empty(words):
    # As of a recording at 8 kHz: nothing above 4 kHz but, in some frames, a trace just over the floor.
    extractor = DeepSpeech2FeatureExtractor(40, normalization="speech")
    spectrum = np.fft.rfft(words)
    spectrum[len(spectrum) // 2 :] *= 10 ** (-42 / 20)
    narrow = np.fft.irfft(spectrum).astype(np.float32)

    assert np.abs(extractor(narrow).input_features[0]).max() < 15
    np.testing.assert_array_equal(extractor(np.zeros(1600)).input_features[0], np.zeros((11, 40)))


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
        ({"normalization": "speaker"}, "`normalization` must be one of utterance, bin, speech, got 'speaker'"),
        ({"win_length": 600}, r"`win_length` must be from 1 to `n_fft` \(512\), got 600"),
        ({"win_length": 0}, "`win_length` must be from 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DeepSpeech2FeatureExtractor(**settings)


def test_folders_saved_without_a_normalisation_are_heard_as_before(samples, tmp_path):
    extractor = DeepSpeech2FeatureExtractor(16)
    extractor.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "normalization"}))
    log_mel = extractor.log_mel(samples)
    deviation, mean = torch.std_mean(log_mel, correction=0)

    reloaded = DeepSpeech2FeatureExtractor.from_pretrained(tmp_path)
    np.testing.assert_array_equal(reloaded(samples).input_features[0], (log_mel - mean) / deviation)


@pytest.mark.parametrize("normalization", ["bin", "speech"])
def test_settings_survive_save_and_load_without_the_filters(samples, tmp_path, normalization):
    extractor = DeepSpeech2FeatureExtractor(16, hop_length=80, normalization=normalization)
    extractor.save_pretrained(tmp_path)
    reloaded = DeepSpeech2FeatureExtractor.from_pretrained(tmp_path)

    assert "mel_filters" not in json.loads((tmp_path / "preprocessor_config.json").read_text())
    np.testing.assert_array_equal(reloaded(samples).input_features[0], extractor(samples).input_features[0])
