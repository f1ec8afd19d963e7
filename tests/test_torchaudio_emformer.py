"""torchaudio's Emformer and RNN-T convert by name; its own file, where it can be had, gives the same values."""

import json
import os
import sys
import zipfile
from types import ModuleType

import pytest
import torch

from benchmarks import emformer
from converters.torchaudio_emformer import convert_emformer_checkpoint, infer_emformer_config, to_torchaudio_name
from modeling import EmformerConfig, EmformerModel

CONTEXTS = {"segment_length": 4, "left_context_length": 6, "right_context_length": 2, "max_memory_size": 3}
SETTINGS = {"num_attention_heads": 2, "hidden_act": "relu", "memory_activation": "tanh", **CONTEXTS}


def make_model(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "dropout": 0.0}
    return EmformerModel(EmformerConfig(**SETTINGS, **sizes, **settings)).eval()


def save(model, path, *, is_rnnt, **others):
    start = "transcriber." if is_rnnt else ""
    state = {start + to_torchaudio_name(name, is_rnnt=is_rnnt): value for name, value in model.state_dict().items()}
    torch.save(state | others, path)
    return path


def test_an_emformer_converts_by_name(tmp_path):
    model = make_model(num_mel_bins=16, subsampling="none", subsampling_factor=1)
    path = save(model, tmp_path / "emformer.pt", is_rnnt=False)
    assert "emformer_layers.1.attention.emb_to_key_value.weight" in torch.load(path)
    frames = torch.randn(1, 50, 16)
    converted = convert_emformer_checkpoint(path, **SETTINGS)
    assert torch.equal(converted(frames).last_hidden_state, model(frames).last_hidden_state)


def test_the_transcriber_of_an_rnnt_converts_by_name(tmp_path):
    model = make_model(num_mel_bins=8, subsampling="stack", output_size=20)
    others = {"predictor.embedding.weight": torch.zeros(3, 4), "joiner.linear.weight": torch.zeros(3, 4)}
    path = save(model, tmp_path / "rnnt.pt", is_rnnt=True, **others)
    features = torch.randn(1, 90, 8)
    converted = convert_emformer_checkpoint(path, **SETTINGS)
    assert converted.config.subsampling_factor == 4
    assert torch.equal(converted(features).last_hidden_state, model(features).last_hidden_state)


def test_the_preset_needs_no_settings():
    shapes = {"input_linear.weight": (128, 80), "output_linear.weight": (1024, 512)}
    shapes |= {f"transformer.emformer_layers.{index}.pos_ff.1.weight": (2048, 512) for index in range(20)}
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = infer_emformer_config(state, path="emformer_rnnt_base.pt")
    assert (config.segment_length, config.right_context_length, config.left_context_length) == (4, 1, 30)
    assert (config.num_attention_heads, config.hidden_act, config.output_size) == (8, "gelu", 1024)


def test_what_no_shape_tells_must_be_given(tmp_path):
    model = make_model(num_mel_bins=16, subsampling="none", subsampling_factor=1)
    path = save(model, tmp_path / "emformer.pt", is_rnnt=False)
    settings = {name: value for name, value in SETTINGS.items() if name != "segment_length"}
    with pytest.raises(ValueError, match="`segment_length` must be given: no shape in .*emformer.pt tells it"):
        convert_emformer_checkpoint(path, **settings)


def test_other_checkpoints_are_refused(tmp_path):
    model = make_model(num_mel_bins=16, subsampling="none", subsampling_factor=1)
    path = save(model, tmp_path / "more.pt", is_rnnt=False, extra=torch.zeros(1))
    with pytest.raises(ValueError, match="the weights of torchaudio's layout, got .*; leftover names: extra"):
        convert_emformer_checkpoint(path, **SETTINGS)
    torch.save({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match="`checkpoint` must be torchaudio's Emformer or RNN-T, got .*other.pt without"
    ):
        convert_emformer_checkpoint(tmp_path / "other.pt", **SETTINGS)


@pytest.fixture(scope="module")
def wheel():
    """Path of a wheel of torchaudio, which is no requirement."""
    path = os.environ.get("TORCHAUDIO_WHEEL")
    if not path:
        pytest.skip("TORCHAUDIO_WHEEL names no wheel of torchaudio (`pip download --no-deps torchaudio`)")
    return path


@pytest.fixture(scope="module")
def torchaudio_models(wheel):
    """torchaudio's own `emformer` and `rnnt`, from its wheel, without the rest of torchaudio."""
    package, models = ModuleType("torchaudio"), ModuleType("torchaudio.models")
    sys.modules |= {"torchaudio": package, "torchaudio.models": models}
    for name in ("emformer", "rnnt"):
        source = zipfile.ZipFile(wheel).read(f"torchaudio/models/{name}.py").decode()
        # Its softmax is in fp32 whatever the model is in; here all is in float64.
        source = source.replace("attention_weights.float()", "attention_weights")
        module = ModuleType(f"torchaudio.models.{name}")
        exec(compile(source, name, "exec"), vars(module))
        models.__dict__.update({key: vars(module)[key] for key in module.__all__})
    yield models
    for name in ("torchaudio", "torchaudio.models"):
        del sys.modules[name]


@pytest.mark.parametrize("memory_activation", ["tanh", "clamp"])
def test_values_and_gradients_are_those_of_torchaudio(memory_activation, torchaudio_models, tmp_path):
    torch.manual_seed(0)
    theirs = torchaudio_models.Emformer(
        16,
        2,
        24,
        3,
        4,
        left_context_length=6,
        right_context_length=2,
        max_memory_size=3,
        tanh_on_mem=memory_activation == "tanh",
    )
    torch.save(theirs.state_dict(), tmp_path / "emformer.pt")
    ours = convert_emformer_checkpoint(
        tmp_path / "emformer.pt", **SETTINGS | {"memory_activation": memory_activation}
    ).double()
    theirs = theirs.double().eval()
    for num_frames in (1, 50, 151):
        # Their right context follows the frames that are encoded; ours is at the end of an utterance cut short.
        frames = torch.randn(1, num_frames + 2, 16, dtype=torch.double)
        expected = theirs(frames, torch.tensor([num_frames]))[0]
        encoded = ours(frames).last_hidden_state[:, :num_frames]
        torch.testing.assert_close(encoded, expected, rtol=0, atol=1e-12)
        weights = torch.randn_like(expected)
        gradients = [
            torch.autograd.grad((states * weights).sum(), list(model.parameters()))
            for model, states in ((ours, encoded), (theirs, expected))
        ]
        by_name = dict(zip(dict(theirs.named_parameters()), gradients[1], strict=True))
        for (name, _), gradient in zip(ours.named_parameters(), gradients[0], strict=True):
            torch.testing.assert_close(gradient, by_name[to_torchaudio_name(name, is_rnnt=False)], rtol=0, atol=1e-12)


def test_the_rnnt_preset_of_torchaudio_converts(torchaudio_models, tmp_path):
    theirs = torchaudio_models.emformer_rnnt_base(5).eval()
    torch.save(theirs.state_dict(), tmp_path / "rnnt.pt")
    ours = convert_emformer_checkpoint(tmp_path / "rnnt.pt")
    features = torch.randn(1, 84, 80)
    expected, lengths = theirs.transcribe(features, torch.tensor([80]))
    assert lengths.tolist() == [20]
    torch.testing.assert_close(ours(features).last_hidden_state[:, :20], expected, rtol=0, atol=1e-4)


def test_the_benchmark_compares_equal_outputs(wheel, tmp_path, capsys):
    emformer.main(["--torchaudio", wheel, "--quick", "--results_folder", str(tmp_path)])
    rows = json.loads((tmp_path / "emformer.json").read_text())["rows"]
    assert rows[0]["max_difference"] < 1e-12
    assert rows[-1]["max_difference"] < 1e-4
    table = capsys.readouterr().out
    assert [name for name in emformer.GOALS if name not in table.replace("difference", "gradient")] == []
