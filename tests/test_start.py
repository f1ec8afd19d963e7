"""Checkpoints of other projects under this one's names, and what each way to start takes of them."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from converters.pickles import RefusedGlobalError
from converters.streamspeech import read_checkpoint, rename_weights
from data.subwords import count_unwritable, train_subwords
from modeling import EchoStreamConfig, EchoStreamFeatureExtractor, EchoStreamProcessor
from recipes.inspect_checkpoint import main as inspect_main
from tests.translation_models import make_translation_batch, make_translation_model
from training.start import (
    StartArguments,
    check_special_tokens,
    choose_tokenizers,
    find_num_units,
    load_weights,
    make_translation_config,
    parse_fields,
    plan_loading,
    recommend_start,
)

# This project's names under StreamSpeech's.
THEIRS = {
    "encoder.subsampler.convolutions.": "encoder.subsample.conv_layers.",
    "encoder.subsampler.projection.": "encoder.linear.",
    "asr_ctc_decoder.": "source_unigram_decoder.proj.",
    "st_ctc_decoder.": "ctc_target_unigram_decoder.proj.",
    "mt_decoder.": "target_unigram_decoder.",
    "t2u_encoder.": "synthesizer_encoder.",
    "unit_decoder.": "decoder.",
}
TEXTS = ["press one", "press two", "please hold"]


def write_streamspeech(path, model, **entries) -> dict[str, torch.Tensor]:
    """Writes a model's weights as StreamSpeech does, with a Conformer in the encoder's place."""
    state = {}
    for name, value in model.state_dict().items():
        prefix = next((ours for ours in THEIRS if name.startswith(ours)), None)
        if prefix:
            state[THEIRS[prefix] + name.removeprefix(prefix)] = value.clone()
    state["target_unigram_decoder.output_projection.weight"] = state["target_unigram_decoder.embed_tokens.weight"]
    state["encoder.conformer_layers.0.self_attn.linear_q.weight"] = torch.ones(4, 4)
    content = {"args": argparse.Namespace(arch="streamspeech"), "model": state, "optimizer_history": [], **entries}
    torch.save(content, path)
    return state


def write_folder(folder, model, *, texts=TEXTS) -> EchoStreamProcessor:
    """Writes a model and vocabularies of its sizes, as a training leaves them."""
    tokenizers = [train_subwords(texts, 60), train_subwords(texts, 60)]
    processor = EchoStreamProcessor(EchoStreamFeatureExtractor(), *tokenizers)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


def make_louder(**fields):
    """A model that differs from the one the tests start."""
    model = make_translation_model(**fields)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.01)
    return model


# Names


@torch.no_grad()
def test_streamspeech_s_decoders_load_and_say_what_they_said(tmp_path):
    source, model = make_louder(), make_translation_model()
    write_streamspeech(tmp_path / "s.pt", source)
    report = load_weights(model, read_checkpoint(tmp_path / "s.pt"), "partial")
    states = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(0))
    tokens, lengths = torch.tensor([[2, 5, 6]]), torch.tensor([20])
    for mine, theirs in (
        (model.asr_ctc_decoder, source.asr_ctc_decoder),
        (model.st_ctc_decoder, source.st_ctc_decoder),
    ):
        assert torch.equal(mine(states), theirs(states))
    hidden = [one._decode(tokens, states, lengths)[0] for one in (model, source)]
    assert torch.equal(*hidden)
    assert torch.equal(*(one.unit_decoder(one.t2u_encoder(hidden[0])) for one in (model, source)))
    assert report.mismatched == {}
    assert all(name.startswith("encoder.") for name in report.fresh)
    assert set(report.skipped.values()) == {"of the encoder, which is new"}
    assert "encoder.conformer_layers.0.self_attn.linear_q.weight" in report.skipped


def test_a_conformer_is_refused_where_the_encoder_is_wanted(tmp_path):
    write_streamspeech(tmp_path / "s.pt", make_translation_model())
    checkpoint = read_checkpoint(tmp_path / "s.pt")
    assert (checkpoint.kind, checkpoint.encoder_kind) == ("streamspeech", "conformer")
    with pytest.raises(ValueError, match=r"must have an Emformer's encoder for `--start transfer`, got a Conformer's"):
        load_weights(make_translation_model(), checkpoint, "transfer")


def test_the_original_s_file_is_read_with_its_epoch_and_its_layers_names(tmp_path):
    model = make_louder()
    theirs = {"encoder.layers.": "encoder.emformer_layers.", "asr_ctc_decoder.": "asr_ctc_decoder.proj."}
    state = {}
    for name, value in model.state_dict().items():
        prefix = next((ours for ours in theirs if name.startswith(ours)), "")
        state[theirs.get(prefix, "") + name.removeprefix(prefix)] = value
    optimizer = {"state": {}, "param_groups": []}
    torch.save({"epoch": 7, "model": state, "optimizer": optimizer, "loss": 1.5}, tmp_path / "e.pt")
    checkpoint = read_checkpoint(tmp_path / "e.pt")
    assert (checkpoint.kind, checkpoint.encoder_kind) == ("original", "emformer")
    assert checkpoint.facts == {"epoch": 7, "loss": 1.5}
    fresh = make_translation_model()
    report = load_weights(fresh, checkpoint, "transfer")
    assert (report.fresh, report.skipped) == ([], {})
    assert all(torch.equal(fresh.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_pickle_that_calls_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("no",)

    torch.save({"model": {"mt_decoder.x": torch.ones(1)}, "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(RefusedGlobalError, match="got the global 'builtins.print'"):
        read_checkpoint(tmp_path / "evil.pt")


def test_weights_that_are_tied_have_one_name_and_others_keep_theirs():
    one, two = torch.ones(2, 2), torch.zeros(2, 2)
    embeddings, projection = "decoder.embed_tokens.weight", "decoder.output_projection.weight"
    tied = {"target_unigram_decoder.x": one, embeddings: one, projection: one.clone()}
    assert sorted(rename_weights(tied)) == ["mt_decoder.x", "unit_decoder.output_projection.weight"]
    assert rename_weights({"target_unigram_decoder.x": one, embeddings: one}) == {
        "mt_decoder.x": "target_unigram_decoder.x",
        "unit_decoder.output_projection.weight": embeddings,
    }
    assert "unit_decoder.embed_tokens.weight" in rename_weights({**tied, embeddings: two})


def test_a_safetensors_file_is_weights_by_name(tmp_path):
    model = make_louder()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    checkpoint = read_checkpoint(tmp_path / "w.safetensors")
    assert (checkpoint.kind, checkpoint.is_whole) == ("weights", False)
    assert load_weights(make_translation_model(), checkpoint, "transfer").fresh == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.parent, "`checkpoint` must be a folder or a file, got .*, which does not exist"),
        (lambda path: path.mkdir(), "`checkpoint` must be a folder with config.json and model.safetensors"),
        (
            lambda path: torch.save({"fc.weight": torch.ones(1)}, path),
            "`checkpoint` must have weights of an EchoStream",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, make, message):
    make(tmp_path / "c")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "c")


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="`checkpoint` must hold an EchoStream, got a 'whisper' model"):
        read_checkpoint(tmp_path)


# What is taken


def test_another_size_is_reported_in_a_partial_start_and_refused_in_a_transfer(tmp_path):
    make_louder(decoder_intermediate_size=48).save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    report = load_weights(make_translation_model(), checkpoint, "partial")
    assert report.mismatched["mt_decoder.layers.0.fc1.weight"] == "(48, 24) there, (32, 24) here"
    assert "mt_decoder.layers.0.self_attn.q_proj.weight" in report.loaded
    assert "Of another shape: mt_decoder.layers.0.fc1.weight ((48, 24) there, (32, 24) here)" in report.describe()
    with pytest.raises(ValueError, match="`checkpoint` must have the model's sizes for `--start transfer`"):
        load_weights(make_translation_model(), checkpoint, "transfer")


def test_weights_of_another_vocabulary_are_not_taken_though_they_would_fit(tmp_path):
    make_louder().save_pretrained(tmp_path)
    model = make_translation_model()
    before = model.asr_ctc_decoder.weight.clone()
    excluded = {"asr_ctc_decoder.": "of another source vocabulary"}
    report = load_weights(model, read_checkpoint(tmp_path), "transfer", excluded=excluded)
    assert torch.equal(model.asr_ctc_decoder.weight, before)
    assert report.skipped == dict.fromkeys(
        ("asr_ctc_decoder.weight", "asr_ctc_decoder.bias"), excluded["asr_ctc_decoder."]
    )
    assert sorted(report.fresh) == ["asr_ctc_decoder.bias", "asr_ctc_decoder.weight"]


def test_nothing_that_fits_and_numbers_that_are_none_are_refused(tmp_path):
    save_file({"mt_decoder.x": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="`checkpoint` must have weights that fit, got w.safetensors with none"):
        load_weights(make_translation_model(), read_checkpoint(tmp_path / "w.safetensors"), "partial")
    save_file({"asr_ctc_decoder.bias": torch.full((32,), torch.nan)}, tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match="must hold finite numbers, got NaN or infinity in asr_ctc_decoder.bias"):
        load_weights(make_translation_model(), read_checkpoint(tmp_path / "n.safetensors"), "partial")


def test_a_report_is_stored_with_all_names(tmp_path):
    make_louder().save_pretrained(tmp_path / "m")
    report = load_weights(make_translation_model(), read_checkpoint(tmp_path / "m"), "partial")
    report.write(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "start_report.json").read_text())
    assert (stored["start"], stored["checkpoint"]) == ("partial", "m")
    assert "encoder.layers.0.attention.out_proj.bias" in stored["fresh"]
    assert len(stored["loaded"]) + len(stored["fresh"]) == len(make_translation_model().state_dict())


# Vocabularies and configurations


def test_an_adapter_s_base_keeps_its_vocabulary_or_is_refused(tmp_path):
    processor = write_folder(tmp_path, make_translation_model())
    checkpoint, arguments = read_checkpoint(tmp_path), StartArguments(start="transfer", checkpoint="x", vocab_size=60)
    good = {"source": TEXTS, "target": TEXTS}
    source, _, excluded = choose_tokenizers(arguments, checkpoint, good, None, keeps_own=True)
    assert (source.get_vocab(), excluded) == (processor.tokenizer.get_vocab(), {})
    bad = {"source": TEXTS, "target": ["press 1", "press two"]}
    with pytest.raises(ValueError, match=r"`target_text` must be written in .* got 1 of 2 rows .*'1' \(U\+0031\)"):
        choose_tokenizers(arguments, checkpoint, bad, None, keeps_own=True)
    train_subwords([*TEXTS, "other words"], 50).save_pretrained(tmp_path / "other")
    named = StartArguments(start="transfer", checkpoint="x", source_tokenizer=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="`source_tokenizer` must be the base's own where an adapter is trained"):
        choose_tokenizers(named, checkpoint, good, None, keeps_own=True)


def test_a_folder_s_vocabulary_is_kept_where_it_writes_the_texts_and_else_made_anew(tmp_path):
    processor = write_folder(tmp_path, make_translation_model())
    checkpoint, arguments = read_checkpoint(tmp_path), StartArguments(start="partial", checkpoint="x", vocab_size=60)
    texts = {"source": ["불 켜 줘", "불 꺼 줘"], "target": TEXTS}
    source, target, excluded = choose_tokenizers(arguments, checkpoint, texts, ["ko", "en"])
    assert target.get_vocab() == processor.target_tokenizer.get_vocab()
    assert count_unwritable(source, texts["source"]) == 0 < count_unwritable(processor.tokenizer, texts["source"])
    assert excluded == {"asr_ctc_decoder.": "of another source vocabulary"}


def test_weights_alone_ask_for_a_vocabulary(tmp_path):
    write_streamspeech(tmp_path / "s.pt", make_translation_model())
    arguments, texts = StartArguments(start="partial", checkpoint="x"), {"source": TEXTS, "target": TEXTS}
    with pytest.raises(ValueError, match="`target_tokenizer` must be given with s.pt, which holds weights alone"):
        choose_tokenizers(arguments, read_checkpoint(tmp_path / "s.pt"), texts, None)


def test_special_tokens_of_other_numbers_are_refused():
    tokenizer = train_subwords(TEXTS, 40)
    tokenizer.convert_tokens_to_ids = len
    with pytest.raises(ValueError, match="`target_tokenizer` must have <s>, <pad>, </s>, <unk> as its first ids"):
        check_special_tokens(tokenizer, "target_tokenizer")


def test_subwords_write_what_they_were_trained_on_and_are_the_same_each_time():
    first, second = train_subwords(TEXTS, 30), train_subwords(reversed(TEXTS), 30)
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 30
    assert [first.decode(row) for row in first(TEXTS, add_special_tokens=False).input_ids] == TEXTS
    assert first.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [([], 40, "`texts` must have at least one transcript, got none"), (TEXTS, 8, "`vocab_size` must be at least 1")],
)
def test_a_vocabulary_of_nothing_or_too_small_a_one_is_refused(texts, size, message):
    with pytest.raises(ValueError, match=message):
        train_subwords(texts, size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": "partial"}, "`checkpoint` must be given with `--start partial`, got none"),
        ({"checkpoint": "x"}, "`checkpoint` must be left out with `--start scratch`, got x"),
    ],
)
def test_starts_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        StartArguments(**fields)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (
            "segment_length",
            "`model_fields` must be name=value with a field of the configuration, got 'segment_length'",
        ),
        ("nothing=1", "`model_fields` must be name=value with a field of the configuration, got 'nothing=1'"),
        ("dropout=low", "`model_fields` must give `dropout` a number, got 'low'"),
    ],
)
def test_fields_that_are_none_are_refused(token, message):
    with pytest.raises(ValueError, match=message):
        parse_fields([token])


def test_a_partial_start_has_the_checkpoint_s_decoders_and_an_encoder_of_its_own(tmp_path):
    make_translation_model(unit_upsampling=30).save_pretrained(tmp_path)
    fields = ["encoder.num_hidden_layers=3", "segment_length=16"]
    arguments = StartArguments(start="partial", checkpoint=str(tmp_path), model_fields=fields)
    sizes = {"source_vocab_size": 50, "vocab_size": 40, "num_units": 9}
    config = make_translation_config(arguments, read_checkpoint(tmp_path), **sizes)
    assert (config.decoder_hidden_size, config.unit_upsampling, config.unit_vocab_size) == (24, 30, 25)
    assert (config.num_hidden_layers, config.segment_length, config.hidden_size) == (3, 16, 128)
    assert config.source_vocab_size == 50
    scratch = make_translation_config(StartArguments(), None, **sizes)
    assert (scratch.num_units, scratch.unit_vocab_size) == (9, 14)


def test_units_are_counted_up_to_the_greatest():
    assert find_num_units([[1, 5], None, [0]]) == 6
    assert find_num_units([None, []]) is None


# Advice


def test_the_recommended_start_follows_from_what_fits(tmp_path, capsys):
    model = make_translation_model()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "m")
    assert recommend_start(read_checkpoint(tmp_path / "m"), shapes)[0] == "transfer"
    (tmp_path / "m" / "trainer_state.json").write_text("{}")
    assert recommend_start(read_checkpoint(tmp_path / "m"), shapes)[0] == "resume"
    write_streamspeech(tmp_path / "s.pt", model)
    assert recommend_start(read_checkpoint(tmp_path / "s.pt"), shapes)[0] == "partial"
    other = {name: torch.Size([1, *shape]) for name, shape in shapes.items()}
    assert recommend_start(read_checkpoint(tmp_path / "s.pt"), other)[0] == "scratch"
    wider = shapes | {"encoder.layers.0.attention.out_proj.bias": torch.Size([99])}
    assert recommend_start(read_checkpoint(tmp_path / "m"), wider)[0] == "partial"

    inspect_main([str(tmp_path / "m")])
    told = capsys.readouterr().out
    assert "a folder of this project" in told
    assert f"transfer  {len(shapes)} loaded, 0 skipped, 0 of another shape, 0 new" in told
    assert "recommended: --start resume\nbecause it is a checkpoint of a training" in told


def test_inspect_checkpoint_says_what_a_run_s_model_would_take(tmp_path, capsys):
    write_streamspeech(tmp_path / "s.pt", make_translation_model())
    (tmp_path / "run.yaml").write_text("dataset: synthetic_s2st/es\nsize: mini\nnum_units: 20\n")
    inspect_main([str(tmp_path / "s.pt"), "--config", str(tmp_path / "run.yaml")])
    told = capsys.readouterr().out
    assert "a StreamSpeech checkpoint" in told
    assert "encoder: conformer" in told
    assert "another shape" in told
    assert "recommended: --start partial --checkpoint" in told or "recommended: --start scratch" in told


def test_planning_loads_nothing(tmp_path):
    model = make_translation_model()
    make_louder().save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shapes = {name: value.shape for name, value in before.items()}
    assert len(plan_loading(shapes, read_checkpoint(tmp_path), "transfer").loaded) == len(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_of_the_helpers_fits_the_model():
    assert make_translation_model()(**make_translation_batch()).loss.isfinite()
    assert isinstance(make_translation_model().config, EchoStreamConfig)
