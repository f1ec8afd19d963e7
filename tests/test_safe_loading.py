"""An adapter's files are trusted in nothing, and an adapter that is refused leaves the model as it was."""

import io
import json
import os
import pickle
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers.integrations.peft import PeftAdapterMixin

from data.collators import CTCCollator
from modeling import DeepSpeech2ForCTC, SpeechAdapterConfig, save_adapter
from modeling.adapter_config import match_names
from modeling.adapter_loading import read_adapter
from modeling.adapters import ADAPTER_WEIGHTS_NAME, find_active_adapters
from training.trainer import AdapterTrainer, RecipeTrainingArguments

CONFIG_NAME = "adapter_config.json"


class Sentinel:
    """Its pickle makes a folder when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folder(tiny_adapters, tmp_path) -> Path:
    """A copy of alice's adapter, an mlp of 8 hidden units, to be damaged."""
    return Path(shutil.copytree(tiny_adapters["alice"], tmp_path / "alice"))


@pytest.fixture
def lora_folder(tiny_base, tmp_path) -> Path:
    """A LoRA adapter of the tiny recogniser, to be damaged."""
    model = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    model.add_adapter(LoraConfig(target_modules=["classifier.1"], r=2, init_lora_weights=False), "low")
    save_adapter(model, tmp_path / "low")
    return tmp_path / "low"


@pytest.fixture
def refuses(tiny_base, tiny_adapters):
    """Claims that an adapter is refused, by a fresh base and by one with adapters, and that both are as before."""

    def claim(path: Path, message: str) -> None:
        features = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
        for has_adapter in (False, True):
            model = DeepSpeech2ForCTC.from_pretrained(tiny_base)
            model.train()
            for name in ["bob"] * has_adapter:
                model.load_adapter(tiny_adapters["bob"], name, is_trainable=True)
            before = _state(model, features)
            with pytest.raises(ValueError, match=message):
                model.load_adapter(str(path), "alice")
            after = _state(model, features)
            assert torch.equal(after.pop("logits"), before.pop("logits"))
            assert after == before
            model.load_adapter(tiny_adapters["alice"], "alice")
            assert find_active_adapters(model) == ["alice"]

    return claim


@torch.no_grad()
def _state(model, features: torch.Tensor) -> dict[str, object]:
    modes = [(name, module.training) for name, module in model.named_modules()]
    was_training = model.training
    logits = model.eval()(features).logits
    for (_, training), module in zip(modes, model.modules(), strict=True):
        module.training = training
    return {
        "logits": logits,
        "is_training": was_training,
        "modules": [
            (name, type(module), training) for (name, training), module in zip(modes, model.modules(), strict=True)
        ],
        "trainable": [(name, value.requires_grad) for name, value in model.named_parameters()],
        "active": find_active_adapters(model),
        "configs": list(getattr(model, "peft_config", {})),
    }


def edit_config(folder: Path, **entries) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS_NAME)
    edit(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})


def write_header(folder: Path, header: bytes, length: int | None = None) -> None:
    num_bytes = len(header) if length is None else length
    (folder / ADAPTER_WEIGHTS_NAME).write_bytes(num_bytes.to_bytes(8, "little") + header)


# Files


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
    ],
)
def test_absurd_sizes_in_the_header_are_refused(folder, refuses, entry):
    write_header(folder, json.dumps({"huge": entry}).encode())
    refuses(folder, "must have whole weights, got a damaged .*adapter_model.safetensors")


@pytest.mark.parametrize("length", [10**15, 2**63, 2**64 - 1])
def test_an_absurd_length_of_the_header_is_refused(folder, refuses, length):
    write_header(folder, b"{}", length)
    refuses(folder, "must have whole weights, got a damaged .*adapter_model.safetensors")


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
def test_truncated_weights_are_refused(folder, refuses, num_bytes):
    path = folder / ADAPTER_WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:num_bytes])
    refuses(folder, "must have whole weights, got a damaged .*adapter_model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(folder, refuses, value):
    def spoil(tensors: dict) -> None:
        tensors["base_model.model.classifier.speech_adapter_blocks.0.bias"][3] = value

    edit_weights(folder, spoil)
    refuses(
        folder, "finite weights, got NaN or infinity in 'base_model.model.classifier.speech_adapter_blocks.0.bias'"
    )


def test_extra_tensors_are_refused_by_name(folder, refuses):
    edit_weights(folder, lambda tensors: tensors.update(ghost=torch.zeros(1)))
    refuses(folder, "exactly the tensors of its configuration, got .*alice where 'ghost' is missing or too much")


def test_tensors_of_the_base_in_an_adapter_are_refused_by_name(folder, refuses):
    name = "base_model.model.classifier.1.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(30, 32)}))
    refuses(folder, f"exactly the tensors of its configuration, got .*alice where '{name}'")


def test_missing_tensors_are_refused_by_name(folder, refuses):
    name = "base_model.model.classifier.speech_adapter_blocks.0.bias"
    edit_weights(folder, lambda tensors: tensors.pop(name))
    refuses(folder, f"exactly the tensors of its configuration, got .*alice where '{name}' is missing")


def test_tensors_of_another_shape_or_of_integers_are_refused_by_name(folder, refuses):
    name = "base_model.model.classifier.speech_adapter_blocks.0.bias"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(9)}))
    refuses(folder, rf"an adapter of this base, got .*alice \('{name}' is torch.float32 \(9,\) and should be \(8,\)\)")
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(8, dtype=torch.int32)}))
    refuses(folder, rf"'{name}' is torch.int32 \(8,\)")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_sizes": "a"}, "`hidden_sizes` must be a list of positive integers, got 'a'"),
        ({"hidden_sizes": [10**15]}, "got .*alice"),
        ({"hidden_sizes": [2**40, 8]}, "got .*alice"),
        ({"dropout": "0.1"}, "`dropout` must be from 0 to below 1, got '0.1'"),
        ({"kind": 3}, "`kind` must be one of mlp, bottleneck, replacement, transformer, got 3"),
        ({"kind": ["mlp"]}, r"`kind` must be one of mlp, bottleneck, replacement, transformer, got \['mlp'\]"),
        ({"target_modules": {}}, "`target_modules` must be a list of names or a regular expression, got {}"),
        ({"target_modules": [3]}, r"`target_modules` must be a list of names or a regular expression, got \[3\]"),
        ({"exclude_modules": 3}, "`exclude_modules` must be a list of names or a regular expression, got 3"),
        ({"target_modules": "("}, r"`target_modules` must be names or a regular expression, got '\('"),
        ({"exclude_modules": "*"}, r"`exclude_modules` must be names or a regular expression, got '\*'"),
        ({"target_modules": "nowhere"}, "must be an adapter of this base, got .*alice .*nowhere"),
        ({"target_modules": ["encoder.dropout"]}, "must name modules with `in_features` and `out_features`"),
        ({"peft_type": "GHOST"}, "`peft_type` must be a method of this PEFT, got 'GHOST'"),
        ({"task_type": "GHOST"}, "must have a configuration of its method, got .*adapter_config.json: .*GHOST"),
        ({"base_fingerprint": [1]}, r"a fingerprint that is a JSON object, got .*\[1\]"),
        ({"base_mismatch_allowed": "yes"}, "a fingerprint that is a JSON object, got .*'yes'"),
    ],
)
def test_a_configuration_of_wrong_types_or_values_is_refused(folder, refuses, entries, message):
    edit_config(folder, **entries)
    refuses(folder, message)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_refused(folder, refuses, content):
    (folder / CONFIG_NAME).write_bytes(content)
    refuses(folder, "`adapter` must have .* configuration, got .*adapter_config.json")


ENDLESS = [r"(\w+\.?)+!", "(.|.|.)*!", "(a|b|c|.)?" * 30 + "!", ".*.*.*.*.*.*.*.*.*!", r"(x+x+)+y"]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_regular_expression_that_would_never_end_is_refused(folder, refuses, pattern):
    edit_config(folder, target_modules=pattern)
    start = time.perf_counter()
    refuses(folder, "`target_modules` must (match a module of the model|be matched in 5 seconds), got ")
    assert time.perf_counter() - start < 25


def test_a_regular_expression_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr("modeling.adapter_config.PATTERN_SECONDS", 0.2)
    with pytest.raises(ValueError, match="`target_modules` must be matched in 0.2 seconds, got "):
        match_names("target_modules", "(?:x|xx|xxx)*[ab]", ["x" * 60 + "c"])


def test_a_regular_expression_that_counts_too_far_is_not_even_compiled():
    with pytest.raises(ValueError, match="`target_modules` must not count to more than 1000 in braces, got "):
        match_names("target_modules", "((a{1000}){1000}){1000}", ["a"])


def test_stock_doors_match_in_bounded_time_too(folder, tiny_base):
    edit_config(folder, target_modules=r"(\w+\.?)+!")
    model = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    with pytest.raises(ValueError, match="`target_modules` must match a module of the model, got "):
        PeftAdapterMixin.load_adapter(model, str(folder), "alice")
    edit_config(folder, target_modules=r"(\w+\.?)+ier", base_fingerprint=None)
    PeftAdapterMixin.load_adapter(model, str(folder), "alice")
    assert find_active_adapters(model) == ["alice"]
    assert model.peft_config["alice"].target_modules == r"(\w+\.?)+ier"


@pytest.mark.parametrize(
    "pattern", [r".*(encoder|model)?.*classifi.{0,3}r", r"(classifier|head|nothing){1}", "classifier"]
)
def test_a_regular_expression_that_ends_is_matched(folder, tiny_model, pattern):
    edit_config(folder, target_modules=pattern)
    tiny_model.load_adapter(str(folder), "alice")
    assert find_active_adapters(tiny_model) == ["alice"]


def test_lora_with_patterns_that_never_end_or_no_patterns_is_refused(lora_folder, refuses):
    edit_config(lora_folder, rank_pattern={r"(\w+\.?)+!": 4})
    refuses(lora_folder, "`rank_pattern` must repeat single characters only")
    edit_config(lora_folder, rank_pattern={"(": 4})
    refuses(lora_folder, "`rank_pattern` must be names or a regular expression")
    edit_config(lora_folder, rank_pattern={}, target_modules=r"(\w+\.?)+!")
    refuses(lora_folder, "`target_modules` must match a module of the model")


@pytest.mark.parametrize("depth", [30, 900, 5_000])
def test_deep_nesting_is_refused(folder, refuses, depth):
    path = folder / CONFIG_NAME
    text = json.dumps(json.loads(path.read_text()) | {"base_fingerprint": "?"})
    path.write_text(text.replace('"?"', '{"a":' * depth + "1" + "}" * depth))
    refuses(folder, "must have a JSON file as configuration, got .*adapter_config.json: .*(brackets|recursion)")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(lora_folder, refuses, number):
    path = lora_folder / CONFIG_NAME
    path.write_text(path.read_text().replace('"lora_alpha": 8', f'"lora_alpha": {number}'))
    assert number in path.read_text()
    refuses(lora_folder, f"must have a JSON file as configuration, got .*: {number} is no finite number")


def test_weights_that_no_fp32_can_hold_are_refused(folder, refuses):
    name = "base_model.model.classifier.speech_adapter_blocks.0.bias"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.full((8,), 1e300, dtype=torch.float64)}))
    refuses(folder, f"finite weights, got NaN or infinity in '{name}'")


def test_weights_that_the_precision_of_the_model_cannot_hold_are_refused(lora_folder, tiny_base):
    edit_weights(lora_folder, lambda tensors: [tensor.fill_(1e30) for tensor in tensors.values()])
    model = DeepSpeech2ForCTC.from_pretrained(tiny_base, dtype=torch.float16)
    with pytest.raises(ValueError, match="finite in float16, got others in '.*lora_|got NaN with 'low'"):
        model.load_adapter(str(lora_folder), "low")


def test_a_configuration_that_is_too_large_is_not_read(folder, refuses):
    with (folder / CONFIG_NAME).open("r+b") as file:
        file.truncate(2 * 10**9)  # sparse: it takes no room on the disk
    refuses(folder, "must have a configuration of at most 1048576 bytes, got 2000000000 in ")


def test_weights_that_are_too_large_are_refused_by_their_header(folder, refuses):
    entry = {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}
    write_header(folder, json.dumps({"ghost": entry}).encode())
    with (folder / ADAPTER_WEIGHTS_NAME).open("r+b") as file:
        file.truncate(file.seek(0, 2) + 4 * 10**9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(folder, "where '.*' is missing or too much")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_header_of_too_many_tensors_is_not_read(folder, refuses):
    entries = {f"t{index}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for index in range(40_000)}
    header = json.dumps(entries).encode()
    write_header(folder, header + b" " * (-len(header) % 8))
    with (folder / ADAPTER_WEIGHTS_NAME).open("ab") as file:
        file.write(bytes(8))
    refuses(folder, "must have a header of at most 2097152 bytes, got ")


LONG = "x" * 10**5


@pytest.mark.parametrize(
    "entries",
    [
        {"kind": LONG},
        {"target_modules": "(" * 10**5},
        {"target_modules": LONG},
        {"target_modules": [LONG]},
        {"peft_type": LONG},
        {"task_type": LONG},
        {"base_fingerprint": {"architecture": LONG}},
        {"hidden_sizes": LONG},
    ],
)
def test_messages_are_of_bounded_length(folder, tiny_model, entries):
    edit_config(folder, **entries)
    with pytest.raises(ValueError, match="must be|must have") as caught:
        tiny_model.load_adapter(str(folder), "alice")
    assert len(str(caught.value)) < 3_000


@pytest.mark.parametrize("name", [CONFIG_NAME, ADAPTER_WEIGHTS_NAME])
def test_files_that_may_not_be_read_are_refused(folder, name, monkeypatch):
    real_open = io.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)  # whoever runs the tests may be allowed to read all
    with pytest.raises(ValueError, match=f"must be files that can be read, got .*Permission denied.*{name}"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"r": 10**13}, "got .*low"),
        ({"r": 3}, "lora_A.weight. is torch.float32 .2, 32. and should be .3, 32."),
        ({"r": 1}, "got .*low"),
        ({"r": "a"}, "got .*low"),
        ({"target_modules": ["nowhere"]}, "must be an adapter of this base, got .*low .*nowhere"),
        ({"modules_to_save": ["encoder"]}, "got .*low"),
        ({"lora_dropout": []}, "got .*low"),
    ],
)
def test_lora_that_does_not_fit_its_configuration_is_refused(lora_folder, refuses, entries, message):
    edit_config(lora_folder, **entries)
    refuses(lora_folder, message)


# Pickles


def test_pickled_weights_are_refused_and_not_read(folder, refuses, tmp_path):
    (folder / ADAPTER_WEIGHTS_NAME).unlink()
    sentinel = tmp_path / "executed"
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Sentinel(sentinel)))
    refuses(folder, "weights in adapter_model.safetensors, got the pickle adapter_model.bin")
    torch.save(Sentinel(sentinel), folder / "adapter_model.bin")
    refuses(folder, "weights in adapter_model.safetensors, got the pickle adapter_model.bin")
    assert not sentinel.exists()


def test_pickles_beside_an_adapter_are_not_read(folder, tiny_model, tmp_path):
    sentinel = tmp_path / "executed"
    for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Sentinel(sentinel)))
    tiny_model.load_adapter(str(folder), "alice")
    assert not sentinel.exists()


class NoiseDataset(torch.utils.data.Dataset):
    """Two utterances of noise."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict:
        features = torch.randn(20, 16, generator=torch.Generator().manual_seed(index))
        return {"input_features": features.numpy(), "labels": [3, 4]}


@pytest.fixture
def train(tiny_base, tiny_processor, tmp_path):
    """Trains an adapter of the tiny recogniser into the same folder, a checkpoint every step."""

    def run(max_steps: int, resume_from_checkpoint: str | None = None) -> Path:
        model = DeepSpeech2ForCTC.from_pretrained(tiny_base)
        model.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[8]), "a")
        settings = {"max_steps": max_steps, "save_steps": 1, "save_total_limit": 5, "use_cpu": True}
        args = RecipeTrainingArguments(output_dir=str(tmp_path / "run"), disable_tqdm=True, **settings)
        trainer = AdapterTrainer(
            model=model, args=args, train_dataset=NoiseDataset(), data_collator=CTCCollator(tiny_processor)
        )
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        return tmp_path / "run" / f"checkpoint-{max_steps}"

    return run


def test_resuming_does_not_read_pickled_training_arguments(train, tmp_path):
    checkpoint = train(1)
    sentinel = tmp_path / "executed"
    torch.save(Sentinel(sentinel), checkpoint / "training_args.bin")
    assert (train(2, str(checkpoint)) / ADAPTER_WEIGHTS_NAME).is_file()
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resuming_refuses_other_pickles_that_run_a_program(train, name, tmp_path):
    checkpoint = train(1)
    sentinel = tmp_path / "executed"
    torch.save(Sentinel(sentinel), checkpoint / name)
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        train(2, str(checkpoint))
    assert not sentinel.exists()
