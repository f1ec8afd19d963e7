"""Speech units: the nearest centroid of every frame, from energies and from any encoder's layer."""

import csv
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from data.audio import read_audio
from data.corpora import load_corpus
from data.parallel_synthesis import TARGET_VOICE, write_parallel_corpus
from data.synthesis import synthesize
from inference.speech_units import LayerEncoder, UnitExtractor, load_unit_encoder, reduce_units
from recipes.extract_units import main

FEW = {"train": 12, "validation": 2, "test": 2}


@pytest.fixture(scope="module")
def speech() -> list[np.ndarray]:
    return [
        synthesize(text, TARGET_VOICE) for text in ("turn left at the bank", "press one", "it is now half past two")
    ]


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("wav2vec2")
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=[8] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=60, num_mel_bins=80, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "es"
    return write_parallel_corpus(folder, language="es", num_sentences=FEW, num_processes=1)


@pytest.fixture(scope="module")
def units_folder(tmp_path_factory, corpus_folder):
    folder = tmp_path_factory.mktemp("units") / "es"
    main(["--dataset", str(corpus_folder), "--num_units", "30", "--output_dir", str(folder)])
    return folder


def test_reduce_units_counts_the_frames_of_each_run():
    units = [3, 3, 1, 1, 1, 3, 0]
    reduced, durations = reduce_units(np.array(units))
    assert (reduced, durations) == ([3, 1, 3, 0], [2, 3, 1, 1])
    assert np.repeat(reduced, durations).tolist() == units


def test_units_are_the_nearest_centroids_and_k_means_has_found_them(speech):
    extractor = UnitExtractor.fit(speech, num_units=8)
    frames = torch.cat([extractor.encoder(samples) for samples in speech])
    units = np.concatenate([extractor(samples) for samples in speech])
    distances = ((frames[:, None] - extractor.centroids) ** 2).sum(-1)
    np.testing.assert_array_equal(units, distances.argmin(-1).numpy())
    spread = ((frames - frames.mean(0)) ** 2).sum(-1).mean()
    assert distances.min(-1).values.mean() < 0.25 * spread


def test_units_do_not_depend_on_the_run(speech):
    first, again, other = (UnitExtractor.fit(speech, num_units=8, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint


def test_units_come_each_20_ms(speech):
    extractor = UnitExtractor.fit(speech, num_units=4)
    assert extractor.settings.hop_samples == 320
    assert len(extractor(speech[0])) == len(speech[0]) // 320 + 1


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layers_states_are_those_of_the_model(wav2vec2, speech, layer):
    frames = load_unit_encoder(wav2vec2, layer)(speech[0])
    inputs = Wav2Vec2FeatureExtractor.from_pretrained(wav2vec2)(speech[0], sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        output = Wav2Vec2Model.from_pretrained(wav2vec2).eval()(inputs.input_values, output_hidden_states=True)
    torch.testing.assert_close(frames, output.hidden_states[layer][0])
    assert load_unit_encoder(wav2vec2, layer).hop_samples == 320


def test_whispers_frames_end_with_the_clip(whisper, speech):
    encoder = LayerEncoder(whisper, 2)
    assert encoder.hop_samples == 320
    assert encoder(speech[0]).shape == (-(-len(speech[0]) // 320), 16)


def test_whisper_refuses_a_clip_that_it_would_cut(whisper, speech):
    extractor = UnitExtractor.fit(speech, num_units=4, encoder=whisper, layer=1)
    with pytest.raises(ValueError, match="A clip must have at most 30 s for .*, got 31.0 s. Cut it"):
        extractor(np.zeros(31 * 16_000, np.float32))


def test_a_layer_that_the_model_lacks_is_refused(wav2vec2):
    with pytest.raises(ValueError, match="`layer` must be from 0 to 2 of .*, got 3"):
        load_unit_encoder(wav2vec2, 3)


@pytest.mark.parametrize(("encoder", "layer", "rule"), [("log_mel", 2, "left out"), ("a/model", None, "given")])
def test_a_layer_belongs_to_a_model_and_not_to_energies(encoder, layer, rule):
    with pytest.raises(ValueError, match=f"`layer` must be {rule} for {encoder}, got {layer}"):
        load_unit_encoder(encoder, layer)


def test_a_model_of_another_sampling_rate_is_refused(wav2vec2, tmp_path):
    folder = shutil.copytree(wav2vec2, tmp_path / "model")
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(folder)
    with pytest.raises(ValueError, match="`encoder` must hear 16000 Hz, got .* which hears 8000 Hz"):
        load_unit_encoder(str(folder), 1)


@pytest.mark.parametrize("num_units", [0, 100_000])
def test_fewer_frames_than_units_are_refused(speech, num_units):
    with pytest.raises(
        ValueError, match=rf"`num_units` must be from 1 to \d+, the frames of the clips, got {num_units}"
    ):
        UnitExtractor.fit(speech, num_units=num_units)


def test_saved_units_are_the_same_units(speech, tmp_path, wav2vec2):
    extractor = UnitExtractor.fit(speech, num_units=6, encoder=wav2vec2, layer=1)
    extractor.save_pretrained(tmp_path / "units")
    loaded = UnitExtractor.from_pretrained(tmp_path / "units")
    assert loaded.settings == extractor.settings
    np.testing.assert_array_equal(loaded(speech[1]), extractor(speech[1]))


def test_a_folder_without_units_and_one_with_others_are_refused(speech, tmp_path):
    with pytest.raises(ValueError, match="`units` must be a folder of extract_units.py, got .* without unit_settings"):
        UnitExtractor.from_pretrained(tmp_path)
    for seed in (0, 1):
        UnitExtractor.fit(speech, num_units=6, seed=seed).save_pretrained(tmp_path / str(seed))
    shutil.copy(tmp_path / "1" / "centroids.safetensors", tmp_path / "0")
    with pytest.raises(
        ValueError, match="`units` must hold the centroids of fingerprint .*, got .* Extract the units"
    ):
        UnitExtractor.from_pretrained(tmp_path / "0")


def test_the_recipes_folder_is_a_corpus_with_the_units_of_its_recordings(units_folder):
    columns = ("text", "target_text", "units", "durations", "target_audio")
    extractor = UnitExtractor.from_pretrained(units_folder)
    for split, num_rows in FEW.items():
        corpus = load_corpus(str(units_folder), split=split, required_columns=columns)
        assert corpus.num_rows == num_rows
        units = extractor(read_audio(corpus[0]["target_audio"]))
        np.testing.assert_array_equal(np.repeat(corpus[0]["units"], corpus[0]["durations"]), units)


def test_the_recipes_manifests_have_streamspeechs_columns(units_folder):
    with (units_folder / "train.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    first = {"id", "src_audio", "src_n_frames", "src_text", "tgt_text", "tgt_audio", "tgt_n_frames"}
    assert first <= set(rows[0])
    assert [int(row["tgt_n_frames"]) for row in rows] == [len(row["tgt_audio"].split()) for row in rows]


def test_the_recipe_takes_the_centroids_of_another_folder(units_folder, corpus_folder, tmp_path):
    main(["--dataset", str(corpus_folder), "--units", str(units_folder), "--output_dir", str(tmp_path / "again")])
    again = UnitExtractor.from_pretrained(tmp_path / "again")
    assert again.fingerprint == UnitExtractor.from_pretrained(units_folder).fingerprint
    assert (tmp_path / "again" / "test.tsv").read_text("utf-8") == (units_folder / "test.tsv").read_text("utf-8")


def test_the_recipe_refuses_a_folder_with_files(corpus_folder, units_folder):
    with pytest.raises(ValueError, match="`folder` must be new or empty, got .*, which holds files"):
        main(["--dataset", str(corpus_folder), "--output_dir", str(units_folder)])


def test_the_recipe_names_and_counts_recordings_that_cannot_be_read(corpus_folder, tmp_path):
    folder = shutil.copytree(corpus_folder, tmp_path / "corpus")
    (folder / "en" / "test_00000.flac").write_bytes(b"no audio")
    with pytest.raises(ValueError, match=r"1 of 16 rows cannot be turned into units: .*test_00000.flac"):
        main(["--dataset", str(folder), "--num_units", "8", "--output_dir", str(tmp_path / "units")])
