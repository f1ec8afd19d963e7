"""KoSpeech's files: the same numbers after conversion, and nothing of a file is ever run.

The checkpoints are made in another process by stand-ins of KoSpeech's classes, which this process never sees.
"""

import functools
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from readme import find_arguments
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCTC, AutoProcessor

from converters.kospeech import convert_checkpoint, infer_num_mel_bins, read_vocabulary
from converters.pickles import load_legacy_checkpoint, read_legacy_pickle
from modeling import DeepSpeech2ForCTC, SpeechAdapterConfig, save_adapter
from recipes.convert_kospeech import main

# The recogniser of KoSpeech from its published description; `forward` is independent of the project's model.
KOSPEECH_MODEL = """
import torch
from torch import nn


class MaskConv2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = nn.Hardtanh(0, 20, inplace=True)
        self.sequential = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=(41, 11), stride=(2, 2), padding=(20, 5), bias=False),
            nn.BatchNorm2d(32), self.activation,
            nn.Conv2d(32, 32, kernel_size=(21, 11), stride=(2, 1), padding=(10, 5), bias=False),
            nn.BatchNorm2d(32), self.activation,
        )

    def forward(self, inputs, lengths):
        for index, module in enumerate(self.sequential):
            inputs = module(inputs)
            if index == 0:
                lengths = [(length + 2 * 5 - 10 - 1) // 2 + 1 for length in lengths]
            for row, length in enumerate(lengths):
                inputs[row, :, :, length:] = 0
        return inputs, lengths


class Extractor(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = MaskConv2d()


class BNReluRNN(nn.Module):
    def __init__(self, in_features, hidden, rnn):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(in_features)
        self.rnn = rnn(in_features, hidden, batch_first=True, bidirectional=True)

    def forward(self, inputs, lengths):
        inputs = self.batch_norm(inputs.transpose(1, 2)).relu().transpose(1, 2)
        packed = nn.utils.rnn.pack_padded_sequence(inputs, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


class Linear(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, inputs):
        return self.linear(inputs)


class DeepSpeech2(nn.Module):
    def __init__(self, mel, halved, hidden, layers, classes, rnn=nn.GRU):
        super().__init__()
        self.device = torch.device("cpu")
        self.conv = Extractor()
        widths = [32 * halved] + [2 * hidden] * (layers - 1)
        self.rnn_layers = nn.ModuleList(BNReluRNN(width, hidden, rnn) for width in widths)
        self.fc = nn.Sequential(nn.LayerNorm(2 * hidden), Linear(2 * hidden, classes))

    def forward(self, inputs, lengths):
        hidden, lengths = self.conv.conv(inputs.unsqueeze(1).transpose(2, 3), lengths)
        batch, channels, bins, frames = hidden.shape
        hidden = hidden.permute(0, 3, 1, 2).reshape(batch, frames, channels * bins)
        for layer in self.rnn_layers:
            hidden = layer(hidden, lengths)
        return self.fc(hidden).log_softmax(-1)
"""

MAKE_CHECKPOINTS = """
import torch
from torch import nn
from kospeech.models.deepspeech2.model import DeepSpeech2

torch.manual_seed(0)
model = DeepSpeech2(80, 20, 16, 2, 8).eval()
for name, tensor in model.state_dict().items():
    if tensor.dim() == 1 and tensor.is_floating_point():
        tensor.uniform_(0.5, 1.5)
features, lengths = torch.randn(2, 61, 80), [61, 40]
features[1, 40:] = 0
parallel = nn.DataParallel(model)
torch.save(parallel, "parallel.pt")
torch.save(model, "plain.pt")
torch.save(parallel, "old_format.pt", _use_new_zipfile_serialization=False)
torch.save(parallel.state_dict(), "state_dict.pt")
torch.save({"epoch": 3, "model_state_dict": model.state_dict()}, "training.pt")
with torch.no_grad():
    torch.save({"features": features, "log_probs": model(features.clone(), lengths)}, "reference.pt")
torch.save(DeepSpeech2(80, 20, 16, 2, 8, nn.LSTM), "lstm.pt")
torch.save(DeepSpeech2(161, 41, 4, 1, 8), "161.pt")
wide = DeepSpeech2(80, 20, 4, 1, 8)
wide.conv.conv.sequential[3] = nn.Conv2d(32, 32, (21, 7))
wide.attention = nn.Linear(2, 2)
del wide.fc[0]
torch.save(wide, "other_layout.pt")
model.fc[1].linear.weight.data[0, 0] = float("nan")
torch.save(model, "diverged.pt")
"""

VOCABULARY = 'id,char,freq\n0,<pad>,0\n1,<sos>,0\n2,<eos>,0\n3, ,5774462\n4,이,463\n5,다,462\n6,",",31\n'


@pytest.fixture(scope="module")
def kospeech_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kospeech_files")
    package = folder / "kospeech" / "models" / "deepspeech2"
    package.mkdir(parents=True)
    (package / "model.py").write_text(KOSPEECH_MODEL, encoding="utf-8")
    (folder / "make.py").write_text(MAKE_CHECKPOINTS, encoding="utf-8")
    subprocess.run([sys.executable, "make.py"], cwd=folder, check=True)
    (folder / "vocab.csv").write_text(VOCABULARY, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base_folder(kospeech_folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        run(
            patch,
            checkpoint=kospeech_folder / "parallel.pt",
            vocabulary=kospeech_folder / "vocab.csv",
            output_dir=kospeech_folder / "base",
        )
    return kospeech_folder / "base"


def run(monkeypatch, **flags) -> None:
    tokens = [str(token) for name, value in flags.items() for token in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["convert_kospeech.py", *tokens])
    main()


class Attack:
    """Pickles as a call of a function, as malicious files do."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def make_attacks(sentinel: Path) -> dict[str, Attack]:
    code = f"open({str(sentinel)!r}, 'w')"
    return {
        "posix.system": Attack(os.system, f"touch {sentinel}"),
        "builtins.eval": Attack(eval, code),
        "builtins.exec": Attack(exec, code),
        "builtins.getattr": Attack(getattr, "text", "format"),
        "functools.partial": Attack(functools.partial, os.system, f"touch {sentinel}"),
        "shutil.copyfile": Attack(shutil.copyfile, __file__, str(sentinel)),
        "torch.serialization.load": Attack(torch.load, str(sentinel)),
    }


ATTACKS = list(make_attacks(Path("sentinel")))


def make_adapter_content(**changes) -> dict:
    torch.manual_seed(1)
    mlp = nn.Sequential(
        nn.Linear(32, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 8)
    )
    content = {
        "adapter_state_dict": mlp.state_dict(),
        "input_dim": 32,
        "hidden_dims": [12, 6],
        "output_dim": 8,
        "adapter_name": "alice",
    }
    return content | changes


@pytest.mark.parametrize("name", ["parallel", "plain", "old_format", "state_dict", "training"])
def test_checkpoint_gives_the_reference_log_probabilities_in_every_form(kospeech_folder, name):
    reference = torch.load(kospeech_folder / "reference.pt", weights_only=True)
    mask = torch.ones(2, 61, dtype=torch.long)
    mask[1, 40:] = 0

    model = convert_checkpoint(kospeech_folder / f"{name}.pt")
    with torch.no_grad():
        log_probs = model(reference["features"], attention_mask=mask).logits.log_softmax(-1)

    assert "kospeech" not in sys.modules
    torch.testing.assert_close(log_probs[0], reference["log_probs"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(log_probs[1, :20], reference["log_probs"][1, :20], atol=1e-5, rtol=0)


def test_converted_folder_loads_with_the_auto_classes_and_gives_the_reference(kospeech_folder, base_folder):
    reference = torch.load(kospeech_folder / "reference.pt", weights_only=True)

    model = AutoModelForCTC.from_pretrained(base_folder)
    with torch.no_grad():
        log_probs = model(reference["features"][:1]).logits.log_softmax(-1)

    assert isinstance(model, DeepSpeech2ForCTC)
    assert (model.config.num_mel_bins, model.config.hidden_size, model.config.num_hidden_layers) == (80, 16, 2)
    assert (model.config.vocab_size, model.config.pad_token_id, model.config.inputs_to_logits_ratio) == (8, 7, 320)
    torch.testing.assert_close(log_probs[0], reference["log_probs"][0], atol=1e-5, rtol=0)


def test_converted_processor_spells_and_decodes_with_kospeech_classes(base_folder):
    processor = AutoProcessor.from_pretrained(base_folder)

    assert processor(text="이다 다,").labels == [4, 5, 3, 5, 6]
    assert processor(text="이x").labels == [4, 0]
    assert processor.tokenizer.pad_token_id == 7
    assert len(processor.tokenizer) == 8
    assert processor.tokenizer.convert_tokens_to_ids(["<eos>", "|"]) == [2, 3]
    assert processor.decode([7, 4, 4, 7, 3, 5, 7, 5, 6]) == "이 다다,"


def test_converted_processor_has_kospeech_windows_and_normalization(base_folder):
    extractor = AutoProcessor.from_pretrained(base_folder).feature_extractor

    features = extractor(np.sin(np.arange(16_000) / 20), sampling_rate=16_000, return_tensors="pt").input_features

    assert (extractor.win_length, extractor.hop_length, extractor.feature_size) == (320, 160, 80)
    assert features.shape == (1, 101, 80)
    assert features.mean().item() == pytest.approx(0, abs=1e-4)
    assert features.std(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("halved", "bins"), [(20, 80), (41, 161), (64, 256), (10, 40)])
def test_mel_bins_follow_from_the_width_when_one_usual_number_fits(halved, bins):
    assert infer_num_mel_bins(halved) == bins


def test_mel_bins_are_the_users_choice_when_it_fits(kospeech_folder):
    assert convert_checkpoint(kospeech_folder / "161.pt").config.num_mel_bins == 161
    assert convert_checkpoint(kospeech_folder / "161.pt", num_mel_bins=164).config.num_mel_bins == 164


@pytest.mark.parametrize(("halved", "bins"), [(20, 81), (20, 76), (50, None)])
def test_mel_bins_are_refused_when_they_do_not_fit_or_are_not_known(halved, bins):
    with pytest.raises(ValueError, match=rf"`num_mel_bins` must be one of {4 * halved - 3}, .*, got {bins}"):
        infer_num_mel_bins(halved, bins)


def test_checkpoint_with_lstm_gates_is_refused_by_name(kospeech_folder):
    with pytest.raises(ValueError, match=r"rnn_layers\.0\.rnn\.weight_hh_l0 has 3 rows a unit, got shape \(64, 16\)"):
        convert_checkpoint(kospeech_folder / "lstm.pt")


def test_checkpoint_with_other_names_is_refused_with_all_of_them(kospeech_folder):
    state = load_legacy_checkpoint(kospeech_folder / "state_dict.pt")
    state["attention.weight"] = torch.zeros(2)
    del state["fc.0.bias"], state["rnn_layers.1.rnn.weight_hh_l0_reverse"]
    torch.save(state, kospeech_folder / "renamed.pt")

    with pytest.raises(
        ValueError,
        match=r"missing names: fc\.0\.bias, rnn_layers\.1\.rnn\.weight_hh_l0_reverse; leftover names: attention\.w",
    ):
        convert_checkpoint(kospeech_folder / "renamed.pt")


def test_checkpoint_without_the_classifier_is_refused_by_name(kospeech_folder):
    with pytest.raises(ValueError, match=r"without fc\.1\.linear\.weight"):
        convert_checkpoint(kospeech_folder / "other_layout.pt")


def test_checkpoint_with_another_kernel_is_refused_with_both_shapes(kospeech_folder):
    state = load_legacy_checkpoint(kospeech_folder / "state_dict.pt")
    state["conv.conv.sequential.3.weight"] = torch.zeros(32, 32, 21, 7)
    torch.save(state, kospeech_folder / "kernel.pt")

    with pytest.raises(ValueError, match=r"sequential\.3\.weight of \(32, 32, 21, 7\), not \(32, 32, 21, 11\)"):
        convert_checkpoint(kospeech_folder / "kernel.pt")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("conv.conv.sequential.0.weight", (32, 41), r"must have 4 dimensions in conv\.conv\.sequential\.0\.weight"),
        ("rnn_layers.0.rnn.weight_ih_l0", (48, 641), r"a multiple of its 32 channels, got 641"),
    ],
)
def test_checkpoint_of_impossible_sizes_is_refused(kospeech_folder, name, shape, message):
    state = load_legacy_checkpoint(kospeech_folder / "state_dict.pt")
    torch.save(state | {name: torch.zeros(shape)}, kospeech_folder / "impossible.pt")

    with pytest.raises(ValueError, match=message):
        convert_checkpoint(kospeech_folder / "impossible.pt")


def test_checkpoint_with_nan_is_refused_by_name(kospeech_folder):
    with pytest.raises(ValueError, match=r"got NaN or infinity in .*: fc\.1\.linear\.weight"):
        convert_checkpoint(kospeech_folder / "diverged.pt")


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_in_a_checkpoint_is_refused_by_name_and_not_run(tmp_path, name, is_zip):
    sentinel = tmp_path / "sentinel"
    content = {"fc.0.weight": torch.zeros(2), "hook": make_attacks(sentinel)[name]}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=is_zip)

    with pytest.raises(ValueError, match=rf"`.*evil\.pt` must hold tensors and layers .* got the global '{name}'"):
        convert_checkpoint(tmp_path / "evil.pt")
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_in_a_bare_pickle_is_refused_by_name_and_not_run(tmp_path, name):
    sentinel = tmp_path / "sentinel"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(make_attacks(sentinel)[name], protocol=2))

    with pytest.raises(ValueError, match=f"got the global '{name}'"):
        read_legacy_pickle(tmp_path / "evil.pt")
    assert not sentinel.exists()


def test_attack_in_an_adapter_file_is_refused_by_name_and_not_run(tmp_path, base_folder, monkeypatch):
    attack = make_attacks(tmp_path / "sentinel")["posix.system"]
    torch.save(make_adapter_content(adapter_name=attack), tmp_path / "evil.pt")

    with pytest.raises(ValueError, match=r"evil\.pt.*'posix\.system'"):
        run(
            monkeypatch,
            adapter_checkpoint=tmp_path / "evil.pt",
            model_name_or_path=base_folder,
            output_dir=tmp_path / "alice",
        )
    assert not (tmp_path / "sentinel").exists()
    assert not (tmp_path / "alice").exists()


def test_attack_as_a_vocabulary_is_refused_and_not_run(tmp_path):
    attack = make_attacks(tmp_path / "sentinel")["posix.system"]
    (tmp_path / "vocab.csv").write_bytes(pickle.dumps(attack, protocol=2))

    with pytest.raises(ValueError, match="`vocabulary` must be a CSV file"):
        read_vocabulary(tmp_path / "vocab.csv")
    assert not (tmp_path / "sentinel").exists()


def test_layer_classes_are_stand_ins_that_run_nothing_when_called(tmp_path):
    # torch.nn.modules.module.warnings is a module of Python inside torch.nn: the name must not lead out of it.
    call = b"\x80\x02ctorch.nn.modules.module\nwarnings\nX\x02\x00\x00\x00hi\x85R."
    (tmp_path / "call.pt").write_bytes(call)

    with pytest.raises(ValueError, match="`.*call.pt` must be a whole file"):
        read_legacy_pickle(tmp_path / "call.pt")


def test_pickle_cannot_alter_the_functions_it_may_call(tmp_path):
    (tmp_path / "alter.pt").write_bytes(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x01\x00\x00\x00aK\x01s\x86b.")

    with pytest.raises(ValueError, match="must not alter the functions"):
        read_legacy_pickle(tmp_path / "alter.pt")


def test_pickle_cannot_replace_attributes_of_a_stand_in(tmp_path):
    state = b"N}X\x09\x00\x00\x00__class__ccollections\nOrderedDict\ns\x86"
    stand_in = b"\x80\x02ckospeech.models\nDeepSpeech2\n)\x81" + state + b"b."
    with zipfile.ZipFile(tmp_path / "replace.pt", "w") as archive:
        archive.writestr("archive/data.pkl", stand_in)
        archive.writestr("archive/version", "3")

    with pytest.raises(ValueError, match="got a LegacyModule without them"):
        load_legacy_checkpoint(tmp_path / "replace.pt")


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensor_that_claims_more_than_is_stored_is_refused(tmp_path, is_zip):
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "huge.pt", _use_new_zipfile_serialization=is_zip)

    with pytest.raises(ValueError, match=r"shape \(1099511627776,\) over 1 stored numbers"):
        load_legacy_checkpoint(tmp_path / "huge.pt")


def test_truncated_checkpoint_is_refused(tmp_path, kospeech_folder):
    for name in ("parallel", "old_format"):
        data = (kospeech_folder / f"{name}.pt").read_bytes()
        (tmp_path / "half.pt").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=r"`.*half\.pt` must be a whole file"):
            load_legacy_checkpoint(tmp_path / "half.pt")


def test_layers_that_contain_themselves_end(tmp_path):
    # A layer whose `_modules` hold the layer itself.
    cycle = b"\x80\x02ctorch.nn\nModule\n)\x81q\x00}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00ah\x00ssb."
    with zipfile.ZipFile(tmp_path / "cycle.pt", "w") as archive:
        archive.writestr("archive/data.pkl", cycle)
        archive.writestr("archive/version", "3")

    with pytest.raises(ValueError, match="got a LegacyModule without them"):
        load_legacy_checkpoint(tmp_path / "cycle.pt")


def test_torchscript_and_tar_archives_and_missing_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
        archive.writestr("archive/version", "3")
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.add(tmp_path / "script.pt", "pickle")

    with pytest.raises(ValueError, match="got a TorchScript program"):
        load_legacy_checkpoint(tmp_path / "script.pt")
    with pytest.raises(ValueError, match="got a tar archive"):
        load_legacy_checkpoint(tmp_path / "old.pt")
    with pytest.raises(ValueError, match="which does not exist"):
        load_legacy_checkpoint(tmp_path / "none.pt")


def test_checkpoint_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "empty.pt")

    with pytest.raises(ValueError, match="must hold a model or its tensors by name, got a dict"):
        load_legacy_checkpoint(tmp_path / "empty.pt")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949"])
def test_vocabulary_is_read_in_every_encoding_seen(tmp_path, encoding):
    (tmp_path / "vocab.csv").write_text(VOCABULARY, encoding=encoding)

    assert read_vocabulary(tmp_path / "vocab.csv") == {
        "<pad>": 0,
        "<sos>": 1,
        "<eos>": 2,
        "|": 3,
        "이": 4,
        "다": 5,
        ",": 6,
        "<blank>": 7,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xff\xff", "in UTF-8 or CP949"),
        (b"", "with columns id and char in every row"),
        (b"char,freq\na,1\n", "with columns id and char in every row"),
        (b"id,char\n0,<pad>\n2,a\n", "must number its rows 0, 1, 2"),
        (b"id,char\n0,<pad>\n1,a\n2,a\n", "every character once, got a again"),
        (b"id,char\n0,<pad>\n1, \n2,|\n", r"every character once, got \| again"),
        (b"id,char\n0,<pad>\n1,<blank>\n", "every character once, got <blank> again"),
    ],
)
def test_vocabulary_is_refused_when_it_is_none(tmp_path, content, message):
    (tmp_path / "vocab.csv").write_bytes(content)

    with pytest.raises(ValueError, match=message):
        read_vocabulary(tmp_path / "vocab.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,char\n0,<pad>\n1,a\n", "one row for each of the 8 classes but the blank, got 2 rows"),
        ("id,char\n0,a\n1,b\n2,c\n3,d\n4,e\n5,f\n6,g\n", "must have a row for <pad>"),
    ],
)
def test_vocabulary_of_another_model_is_refused(tmp_path, kospeech_folder, monkeypatch, content, message):
    (tmp_path / "vocab.csv").write_text(content, encoding="utf-8")

    with pytest.raises(ValueError, match=message):
        run(
            monkeypatch,
            checkpoint=kospeech_folder / "plain.pt",
            vocabulary=tmp_path / "vocab.csv",
            output_dir=tmp_path / "base",
        )
    assert not (tmp_path / "base").exists()


def test_vocabulary_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`vocabulary` must be a CSV file, got .* which does not exist"):
        read_vocabulary(tmp_path / "none.csv")


@pytest.mark.parametrize("prefix", ["", "layers.", "adapter.mlp.", "module."])
def test_adapter_file_gives_the_reference_logits_in_the_classifiers_place(tmp_path, base_folder, monkeypatch, prefix):
    content = make_adapter_content()
    mlp = nn.Sequential(nn.Linear(32, 12), nn.ReLU(), nn.Identity(), nn.Linear(12, 6), nn.ReLU(), nn.Identity())
    mlp.append(nn.Linear(6, 8)).load_state_dict(content["adapter_state_dict"])
    state = OrderedDict((prefix + name, tensor) for name, tensor in content["adapter_state_dict"].items())
    torch.save(content | {"adapter_state_dict": state, "hidden_dims": (12, 6)}, tmp_path / "alice.pt")

    run(
        monkeypatch,
        adapter_checkpoint=tmp_path / "alice.pt",
        model_name_or_path=base_folder,
        output_dir=tmp_path / "alice",
    )
    model = AutoModelForCTC.from_pretrained(base_folder)
    model.load_adapter(str(tmp_path / "alice"), adapter_name="alice")
    with torch.no_grad():
        output = model.eval()(torch.randn(1, 50, 80), output_hidden_states=True)
        expected = mlp(output.hidden_states[-1])

    torch.testing.assert_close(output.logits, expected, atol=1e-6, rtol=0)


def test_adapter_goes_to_kospeech_and_back_bit_for_bit(tmp_path, base_folder, monkeypatch):
    torch.save(make_adapter_content(), tmp_path / "alice.pt")

    run(
        monkeypatch,
        adapter_checkpoint=tmp_path / "alice.pt",
        model_name_or_path=base_folder,
        output_dir=tmp_path / "alice",
    )
    run(monkeypatch, adapter=tmp_path / "alice", output_file=tmp_path / "out" / "again.pt")
    again = torch.load(tmp_path / "out" / "again.pt", weights_only=True)
    first = make_adapter_content()

    assert list(again["adapter_state_dict"]) == list(first["adapter_state_dict"])
    assert all(torch.equal(again["adapter_state_dict"][k], v) for k, v in first["adapter_state_dict"].items())
    assert {**again, "adapter_state_dict": None} == {**first, "adapter_state_dict": None}
    assert set(load_file(tmp_path / "alice" / "adapter_model.safetensors")) == {
        f"base_model.model.classifier.speech_adapter_blocks.{layer}.{kind}"
        for layer in (0, 3, 6)
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dims": None}, "without a usable hidden_dims"),
        ({"hidden_dims": [12, -6]}, r"must have positive sizes, got \[32, 12, -6, 8\]"),
        ({"hidden_dims": [12]}, r"leftover names: 6\.bias, 6\.weight"),
        ({"hidden_dims": [12, 7]}, r"3\.bias of \(6,\), not \(7,\)"),
        ({"adapter_state_dict": nn.Linear(32, 8).state_dict(), "hidden_dims": []}, r"missing names: 0\.bias"),
        ({"adapter_state_dict": nn.Sequential(nn.Linear(9, 8)).state_dict(), "hidden_dims": [], "input_dim": 9},
         "must map 32 features to 8 classes, got 9 to 8"),
    ],
)  # fmt: skip
def test_adapter_file_of_another_layout_is_refused(tmp_path, base_folder, monkeypatch, changes, message):
    torch.save(make_adapter_content(**changes), tmp_path / "alice.pt")

    with pytest.raises(ValueError, match=message):
        run(
            monkeypatch,
            adapter_checkpoint=tmp_path / "alice.pt",
            model_name_or_path=base_folder,
            output_dir=tmp_path / "alice",
        )


def test_adapter_of_another_kind_is_not_exported(tmp_path, base_folder, monkeypatch):
    model = AutoModelForCTC.from_pretrained(base_folder)
    model.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[4]), "alice")
    save_adapter(model, tmp_path / "alice", "alice")

    with pytest.raises(ValueError, match="must be of kind replacement, got mlp"):
        run(monkeypatch, adapter=tmp_path / "alice", output_file=tmp_path / "alice.pt")
    with pytest.raises(ValueError, match=r"must be a folder with adapter_model\.safetensors"):
        run(monkeypatch, adapter=tmp_path / "none", output_file=tmp_path / "alice.pt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "One of checkpoint, adapter_checkpoint, adapter must be given, got none"),
        ({"checkpoint": "a", "adapter": "b"}, "got checkpoint and adapter"),
        ({"checkpoint": "a", "output_dir": "b"}, "`vocabulary` must be given with `checkpoint`"),
        ({"adapter": "a"}, "`output_file` must be given with `adapter`"),
    ],
)
def test_arguments_are_refused_when_they_name_no_single_conversion(monkeypatch, flags, message):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, **flags)


def test_readme_command_converts_a_checkpoint(kospeech_folder, tmp_path, run_recipe_main):
    files = {"checkpoint": kospeech_folder / "parallel.pt", "vocabulary": kospeech_folder / "vocab.csv"}
    run_recipe_main(main, *find_arguments("convert_kospeech.py", **files, output_dir=tmp_path / "out"))
    assert type(AutoModelForCTC.from_pretrained(tmp_path / "out")) is DeepSpeech2ForCTC


def save_memo(path: Path) -> None:
    path.write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")  # a list that is number 2^31 of the pickle: 16 GB in C


def save_copies(path: Path) -> None:
    class Copy:
        def __init__(self, items):
            self.items = items

        def __reduce__(self):
            return list, (self.items,)

    items = list(range(10_000))
    torch.save({f"w{index}": Copy(items) for index in range(3_000)}, path)


def save_storage(path: Path) -> None:
    torch.save({"w": torch.zeros(1_000_003)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    count = (1_000_003).to_bytes(4, "little")
    assert count in content
    path.write_bytes(content.replace(b"J" + count, b"\x8a\x05" + (6 * 10**9).to_bytes(5, "little")))


def save_views(path: Path) -> None:
    whole = torch.zeros(2_000_000)
    torch.save({f"w{index}": whole.view(-1) for index in range(3_000)}, path)


def save_bomb(path: Path) -> None:
    torch.save({"w": torch.zeros(8_000_000)}, path.with_suffix(".whole"))
    with (
        zipfile.ZipFile(path.with_suffix(".whole")) as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in whole.namelist():
            bomb.writestr(entry, whole.read(entry))


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_memo, "must be a whole file of `torch.save`"),
        (save_copies, "copies of more than 1000000 items"),
        (save_storage, "storages of 24000000000 bytes in a file of "),
        (save_views, "must not use its weights more than 4 times, got tensors of 24000000000 bytes over 8000000"),
        (save_bomb, "got a compressed archive"),
    ],
)
def test_a_small_file_that_asks_for_much_memory_is_refused(tmp_path, save, message):
    save(tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 9_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        load_legacy_checkpoint(tmp_path / "small.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_numbers_that_no_fp32_can_hold_are_refused(kospeech_folder, tmp_path):
    state = {name: tensor.double() for name, tensor in load_legacy_checkpoint(kospeech_folder / "parallel.pt").items()}
    name = "fc.1.linear.weight"
    state[name][0, 0] = 1e300
    torch.save(state, tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=f"must hold finite numbers, got NaN or infinity in .*: {name}"):
        convert_checkpoint(tmp_path / "wide.pt")
