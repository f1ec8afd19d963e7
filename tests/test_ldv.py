"""The simulated vibrometer changes speech by the amounts it states, in time with it, and the same way every time."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Dataset, Features, List, Value

from data.audio import AudioError, read_audio
from data.ldv import DRIFT_HZ, SURFACES, LDVChannel, main, simulate_clips, simulate_ldv
from data.synthesis import Voice, synthesize
from publishing.ldv_pictures import draw_pair
from publishing.ldv_pictures import main as draw_main
from training.arguments import parse_arguments

RATE = 16_000
DOCUMENT = (Path(__file__).parents[1] / "docs" / "ldv.md").read_text(encoding="utf-8")
# Without noise that a test could measure, drop-outs, drift, or differences between clips.
QUIET = {
    "ldv_snr_db": 80.0,
    "ldv_snr_jitter_db": 0.0,
    "ldv_resonance_jitter": 0.0,
    "ldv_dropouts_per_second": 0.0,
    "ldv_drift_level": 0.0,
}


def make_channel(**values: object) -> LDVChannel:
    return LDVChannel(**{**QUIET, **values})


def make_tones(*frequencies: float, seconds: float = 2.0, sampling_rate: int = RATE) -> np.ndarray:
    time = np.arange(round(seconds * sampling_rate)) / sampling_rate
    return 0.01 * sum(np.sin(2 * np.pi * frequency * time) for frequency in frequencies)


def make_noise(seconds: float, sampling_rate: int = RATE, level: float = 0.02) -> np.ndarray:
    return level * np.random.default_rng(0).standard_normal(round(seconds * sampling_rate))


def measure_tone(samples: np.ndarray, frequency: float) -> float:
    """Returns the amplitude at `frequency` in the middle second, away from the clip's ends."""
    middle = samples[RATE // 2 : 3 * RATE // 2]
    return 2 * abs(np.mean(middle * np.exp(-2j * np.pi * frequency * np.arange(RATE) / RATE)))


def measure_decibels(channel: LDVChannel, frequency: float, *, beside: float) -> float:
    """Returns how much more of `frequency` than of the frequency `beside` comes through."""
    heard = simulate_ldv(make_tones(frequency, beside), RATE, channel=channel, seed=0)
    return 20 * np.log10(measure_tone(heard, frequency) / measure_tone(heard, beside))


def rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def subtract(samples: np.ndarray, channel: LDVChannel, other: LDVChannel, seed: int = 0) -> np.ndarray:
    """Returns what `channel` adds to what `other` gives."""
    heard, without = (simulate_ldv(samples, RATE, channel=each, seed=seed) for each in (channel, other))
    return heard.astype(np.float64) - without


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return synthesize("open the window", Voice("ann", "en-us+f2", 160))


def test_high_cut_attenuates_24_db_an_octave_above_it():
    channel = make_channel(ldv_low_cut_hz=1.0, ldv_high_cut_hz=1_500.0)
    # A fourth-order Butterworth slope: 10 log10(1 + 2 ** 8) = 24.1.
    assert measure_decibels(channel, 3_000, beside=30) == pytest.approx(-24.1, abs=0.2)


def test_low_cut_attenuates_12_db_an_octave_below_it():
    channel = make_channel(ldv_low_cut_hz=60.0, ldv_high_cut_hz=7_900.0)
    # A second-order Butterworth slope: 10 log10(1 + 2 ** 4) = 12.3.
    assert measure_decibels(channel, 30, beside=3_000) == pytest.approx(-12.3, abs=0.2)


@pytest.mark.parametrize(("frequency", "gain_db"), [(190, 12), (460, 9), (1_100, 6)])
def test_glass_amplifies_its_resonances_by_the_stated_gain(frequency, gain_db):
    channel = make_channel(ldv_low_cut_hz=1.0, ldv_high_cut_hz=7_900.0)
    # The flanks of the other resonances add up to 0.3 dB.
    assert measure_decibels(channel, frequency, beside=3_000) == pytest.approx(gain_db, abs=0.35)


@pytest.mark.parametrize("surface", SURFACES)
def test_every_surface_passes_its_resonances_and_halves_the_power_at_its_cuts(surface):
    low_cut_hz, high_cut_hz, resonances = SURFACES[surface]
    assert low_cut_hz < resonances[0].frequency_hz
    assert resonances[-1].frequency_hz < high_cut_hz
    flat = make_channel(ldv_surface=surface, ldv_low_cut_hz=1e-3, ldv_high_cut_hz=1e9)
    cuts = np.array([low_cut_hz, high_cut_hz])
    shares = make_channel(ldv_surface=surface).gains(cuts) / flat.gains(cuts)
    assert shares == pytest.approx([0.5**0.5] * 2, abs=1e-3)


def test_resonances_move_by_at_most_the_jitter_from_clip_to_clip():
    frequencies = np.arange(120.0, 260.0, 0.1)
    channel = make_channel(ldv_resonance_jitter=0.1)
    peaks = [frequencies[channel.gains(frequencies, np.random.default_rng(seed)).argmax()] for seed in range(50)]
    assert 171 <= min(peaks) < 176  # 190 Hz less a tenth
    assert 204 < max(peaks) <= 209.1


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 30.0])
def test_noise_has_the_stated_snr(snr_db):
    samples = make_noise(2.0)
    noise = subtract(samples, make_channel(ldv_snr_db=snr_db), make_channel())
    speech = simulate_ldv(samples, RATE, channel=make_channel(), seed=0)
    assert 20 * np.log10(rms(speech) / rms(noise)) == pytest.approx(snr_db, abs=0.1)


def test_snr_varies_within_its_jitter_from_clip_to_clip():
    samples = make_noise(0.1)
    channel = make_channel(ldv_snr_db=10.0, ldv_snr_jitter_db=3.0)
    noises = [subtract(samples, channel, make_channel(), seed) for seed in range(60)]
    snrs_db = [20 * np.log10(rms(samples) / rms(noise)) for noise in noises]
    assert 6.9 < min(snrs_db) < 8
    assert 12 < max(snrs_db) < 13.1


def test_noise_grows_with_the_frequency_above_2_khz():
    noise = subtract(make_noise(30.0), make_channel(ldv_snr_db=0.0), make_channel())
    spectrum = np.abs(np.fft.rfft(noise)) ** 2
    low, high = (spectrum[30 * first : 30 * last].mean() for first, last in ((50, 150), (3_950, 4_050)))
    # 10 log10(1 + (4 / 2) ** 2) = 7.0 against a hundredth of a dB at 100 Hz.
    assert 10 * np.log10(high / low) == pytest.approx(7.0, abs=0.3)


def test_dropouts_darken_the_share_that_rate_and_duration_give():
    tone = make_tones(500, seconds=300.0, sampling_rate=8_000)
    values = {"ldv_dropout_ms": 50.0, "ldv_dropout_depth_db": 20.0, "ldv_click_level": 0.0}
    heard, lit = (
        simulate_ldv(tone, 8_000, channel=make_channel(ldv_dropouts_per_second=rate, **values), seed=0)
        for rate in (2.0, 0.0)
    )
    is_loud = np.abs(lit) > rms(lit)
    ratios = heard[is_loud] / lit[is_loud]
    # Drop-outs of 2 a second and 0.05 s overlap now and then: a Poisson process leaves exp(-0.1) lit.
    assert np.mean(ratios < 0.5) == pytest.approx(1 - np.exp(-0.1), rel=0.1)
    assert ratios.min() == pytest.approx(0.1, rel=0.01)  # -20 dB
    assert np.median(ratios) == pytest.approx(1.0, rel=1e-3)


def test_dropouts_click_at_the_stated_level():
    samples = make_noise(10.0)
    dropouts = {"ldv_dropouts_per_second": 3.0, "ldv_dropout_depth_db": 0.0}
    silent, clicking = (make_channel(ldv_click_level=level, **dropouts) for level in (0.0, 2.0))
    clicks = subtract(samples, clicking, silent) / rms(samples)
    assert clicks.max() == pytest.approx(2.0, abs=0.01)
    assert clicks.min() == pytest.approx(-2.0, abs=0.01)
    # About thirty, each of a millisecond: 0.3 % of the ten seconds.
    assert 0.001 < np.mean(np.abs(clicks) > 0.01) < 0.006


def test_drift_is_slow_and_has_the_stated_level():
    samples = make_noise(10.0)
    drift = subtract(samples, make_channel(ldv_drift_level=0.5), make_channel())
    assert rms(drift) / rms(samples) == pytest.approx(0.5, abs=0.001)
    power = np.abs(np.fft.rfft(drift)) ** 2
    assert power[: 10 * (DRIFT_HZ + 1)].sum() > 0.99 * power.sum()


@pytest.mark.parametrize("surface", SURFACES)
def test_simulate_ldv_keeps_time(speech, surface):
    heard = simulate_ldv(speech, RATE, channel=LDVChannel(ldv_surface=surface), seed=0)
    # The correlation of a signal with itself filtered without phase has its peak at no shift.
    shifts = range(-160, 161)
    middle = slice(1_000, len(speech) - 1_000)
    products = [np.dot(speech[middle], np.roll(heard, -shift)[middle]) for shift in shifts]
    assert shifts[int(np.argmax(products))] == 0


@pytest.mark.parametrize("num_samples", [400, 401, 16_001])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_simulate_ldv_keeps_the_number_of_samples(num_samples, dtype):
    heard = simulate_ldv(make_noise(2.0)[:num_samples].astype(dtype), RATE, channel=LDVChannel(), seed=0)
    assert heard.shape == (num_samples,)
    assert heard.dtype == np.float32
    assert np.isfinite(heard).all()


def test_simulate_ldv_keeps_the_level(speech):
    heard = simulate_ldv(0.1 * speech, RATE, channel=make_channel(), seed=0)
    assert rms(heard) == pytest.approx(rms(0.1 * speech), rel=1e-4)


def test_simulate_ldv_scales_what_would_clip(speech):
    loud = speech / np.abs(speech).max()
    channel = make_channel(ldv_snr_db=-10.0)
    heard, quiet = (simulate_ldv(samples, RATE, channel=channel, seed=0) for samples in (loud, 0.01 * loud))
    assert np.abs(heard).max() == pytest.approx(0.99, abs=1e-6)
    np.testing.assert_allclose(heard / rms(heard), quiet / rms(quiet), atol=1e-4)


def test_simulate_ldv_repeats_itself_bit_for_bit(speech):
    first, again = (simulate_ldv(speech, RATE, channel=LDVChannel(), seed=[3, 5]) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("seed", [4, [3, 5], [4, 5], [3, 6]])
def test_simulate_ldv_differs_between_seeds(speech, seed):
    heard, other = (simulate_ldv(speech, RATE, channel=LDVChannel(), seed=each) for each in (3, seed))
    assert np.corrcoef(heard - speech, other - speech)[0, 1] < 0.99


def test_snr_leaves_dropouts_where_they_are(speech):
    values = {"ldv_dropouts_per_second": 5.0, "ldv_dropout_depth_db": 0.0, "ldv_click_level": 2.0}
    clicks = [
        subtract(0.1 * speech, make_channel(**values, ldv_snr_db=snr_db), make_channel(ldv_snr_db=snr_db))
        for snr_db in (10.0, 40.0)
    ]
    np.testing.assert_allclose(*clicks, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("surface", "curtain", "`ldv_surface` must be one of glass, wall, paper_bag, got 'curtain'"),
        ("low_cut_hz", 0.0, "`ldv_low_cut_hz` must be positive and below `ldv_high_cut_hz`, got 0.0 and 3000"),
        ("high_cut_hz", 70.0, "`ldv_low_cut_hz` must be positive and below `ldv_high_cut_hz`, got 80 and 70.0"),
        ("resonance_jitter", 1.0, "`ldv_resonance_jitter` must be at least 0 and below 1, got 1.0"),
        ("snr_db", 81.0, "`ldv_snr_db` must lie between -80 and 80, got 81.0"),
        ("snr_db", float("nan"), "`ldv_snr_db` must lie between -80 and 80, got nan"),
        (
            "low_cut_hz",
            float("nan"),
            "`ldv_low_cut_hz` must be positive and below `ldv_high_cut_hz`, got nan and 3000",
        ),
        ("snr_jitter_db", -1.0, "`ldv_snr_jitter_db` must be at least 0 and finite, got -1.0"),
        ("dropouts_per_second", -1.0, "`ldv_dropouts_per_second` must be at least 0 and finite, got -1.0"),
        ("dropout_ms", float("inf"), "`ldv_dropout_ms` must be at least 0 and finite, got inf"),
        ("dropout_depth_db", -1.0, "`ldv_dropout_depth_db` must be at least 0 and finite, got -1.0"),
        ("click_level", -1.0, "`ldv_click_level` must be at least 0 and finite, got -1.0"),
        ("drift_level", float("nan"), "`ldv_drift_level` must be at least 0 and finite, got nan"),
    ],
)
def test_channel_refuses_values_out_of_range(name, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LDVChannel(**{f"ldv_{name}": value})


@pytest.mark.parametrize(
    ("samples", "sampling_rate", "message"),
    [
        (np.ones((2, 800)), RATE, r"`samples` must have the shape \(samples,\), got \(2, 800\)"),
        (np.ones(800), 6_000, "`sampling_rate` must be above 6000 Hz, twice .*, got 6000. Resample, or lower"),
        (np.ones(0), RATE, "`samples` must be at least 25 ms long, got 0 samples"),
        (np.ones(399), RATE, "`samples` must be at least 25 ms long, got 399 samples"),
        (np.full(800, np.nan), RATE, "`samples` must hold finite samples, got 800 of 800"),
        (np.zeros(800), RATE, "`samples` must hold sound, got silence"),
        (np.full(800, 5.0), RATE, "`samples` must have samples in .* got a peak of 5"),
    ],
)
def test_simulate_ldv_refuses_what_it_cannot_use(samples, sampling_rate, message):
    with pytest.raises(ValueError, match=message):
        simulate_ldv(samples, sampling_rate, channel=LDVChannel(), seed=0)


def test_channel_s_fields_are_flags_of_a_recipe():
    (channel,) = parse_arguments(
        LDVChannel, argv=["--ldv_surface", "wall", "--ldv_snr_db", "5", "--ldv_high_cut_hz", "900"]
    )
    assert channel == LDVChannel(ldv_surface="wall", ldv_snr_db=5.0, ldv_high_cut_hz=900.0)
    assert (channel.low_cut_hz, channel.high_cut_hz) == (60, 900)


@pytest.fixture
def clips() -> Dataset:
    """Two decoded clips."""
    arrays = [make_noise(0.1).astype(np.float32), make_noise(0.2).astype(np.float32)]
    return Dataset.from_dict(
        {"name": ["a.wav", "b.wav"], "domain": ["kitchen", "hall"], "samples": arrays, "num_samples": [1_600, 3_200]},
        features=Features(
            {
                "name": Value("string"),
                "domain": Value("string"),
                "samples": List(Value("float32")),
                "num_samples": Value("int64"),
            }
        ),
    )


def test_simulate_clips_hears_every_clip_by_seed_and_row(clips):
    heard = simulate_clips(clips, RATE, channel=LDVChannel(), seed=7)
    assert heard.remove_columns("samples").to_dict() == clips.remove_columns("samples").to_dict()
    assert heard.features == clips.features
    for row in range(2):
        samples = np.array(clips[row]["samples"], dtype=np.float32)
        expected = simulate_ldv(samples, RATE, channel=LDVChannel(), seed=[7, row])
        np.testing.assert_array_equal(np.array(heard[row]["samples"], dtype=np.float32), expected)


def test_simulate_clips_is_cached_by_channel_and_seed(clips):
    channels = [(LDVChannel(), 0), (LDVChannel(), 0), (LDVChannel(ldv_snr_db=14.0), 0), (LDVChannel(), 1)]
    first, again, *others = (
        simulate_clips(clips, RATE, channel=channel, seed=seed)._fingerprint for channel, seed in channels
    )
    assert first == again
    assert len({first, *others}) == 3


@pytest.fixture
def recording(tmp_path, monkeypatch, speech) -> np.ndarray:
    """speech.wav in the working directory."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("speech.wav", speech, RATE)
    return read_audio("speech.wav")


def test_main_writes_what_simulate_ldv_gives(recording):
    main(["speech.wav", "heard/glass.wav", "--surface", "wall", "--snr_db", "10", "--seed", "3"])
    channel = LDVChannel(ldv_surface="wall", ldv_snr_db=10.0)
    expected = simulate_ldv(recording, RATE, channel=channel, seed=3)
    np.testing.assert_allclose(read_audio("heard/glass.wav"), expected, atol=2**-15)
    assert [path.name for path in Path("heard").iterdir()] == ["glass.wav"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--surface", "curtain"], "`surface` must be one of glass, wall, paper_bag, got 'curtain'"),
        (["--high_cut_hz", "8000"], "`sampling_rate` must be above 16000 Hz, .* lower `high_cut_hz`"),
    ],
)
def test_main_refuses_bad_flags_in_the_user_s_words(recording, capsys, flags, message):  # noqa: ARG001
    with pytest.raises(SystemExit):
        main(["speech.wav", "heard.wav", *flags])
    assert re.search(message, capsys.readouterr().err)
    assert not Path("heard.wav").exists()


def test_main_refuses_other_files_than_wav(capsys):
    with pytest.raises(SystemExit):
        main(["missing.wav", "heard.mp3"])
    assert "`heard.mp3` must end in .wav" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["missing.wav", "heard.wav"])
    assert "`missing.wav` must be a file" in capsys.readouterr().err


def test_draw_pair_shows_both(tmp_path, speech):
    heard = simulate_ldv(speech, RATE, channel=LDVChannel(), seed=0)
    draw_pair(tmp_path / "pair.png", speech, heard, RATE)
    draw_pair(tmp_path / "same.png", speech, speech, RATE)
    pictures = [(tmp_path / name).read_bytes() for name in ("pair.png", "same.png")]
    assert pictures[0][:8] == b"\x89PNG\r\n\x1a\n"
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["speech.wav", "speech.wav", "pair.jpg"], "`pair.jpg` must end in .png"),
        (["speech.wav", "missing.wav", "pair.png"], "`missing.wav` must be a file"),
    ],
)
def test_pictures_refuse_bad_files_in_the_user_s_words(recording, capsys, files, message):  # noqa: ARG001
    with pytest.raises(SystemExit):
        draw_main(files)
    assert message in capsys.readouterr().err
    assert not Path(files[-1]).exists()


def test_the_document_s_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    exec(block, {})
    commands = re.findall(r"^python -m (data\.ldv|publishing\.ldv_pictures) (.*)$", DOCUMENT, flags=re.MULTILINE)
    for module, words in commands:
        {"data.ldv": main, "publishing.ldv_pictures": draw_main}[module](shlex.split(words))
    pictures = sorted(path.name for path in Path("docs/pictures").iterdir())
    assert pictures == sorted(f"ldv_{surface}.png" for surface in SURFACES)
    assert all(f"(pictures/{name})" in DOCUMENT for name in pictures)


@pytest.mark.parametrize("surface", SURFACES)
def test_the_document_states_the_surface_s_values(surface):
    low_cut_hz, high_cut_hz, resonances = SURFACES[surface]
    modes = ", ".join(f"{mode.frequency_hz:,} Hz +{mode.gain_db} dB (Q {mode.quality})" for mode in resonances)
    assert f"| `{surface}` | {low_cut_hz:,} to {high_cut_hz:,} Hz | {modes} |" in DOCUMENT


def test_audio_errors_are_value_errors_of_the_simulator():
    with pytest.raises(AudioError, match="silence"):
        simulate_ldv(np.zeros(800), RATE, channel=LDVChannel(), seed=0)
