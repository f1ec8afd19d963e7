"""A base has one fingerprint, however it is wrapped, saved and loaded, and no other base has it."""

import copy
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCTC, AutoProcessor

from modeling import DeepSpeech2Config, DeepSpeech2FeatureExtractor, DeepSpeech2ForCTC, SpeechAdapterConfig
from modeling.fingerprint import BLOCK_WORDS, fingerprint_base, fingerprint_processor, list_differences

SPEECH = SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[4])
LORA = LoraConfig(target_modules=["classifier.1"], r=2)


def linear(size: int = 300, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(size, size).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_survives_saving_and_loading_in_the_same_precision(tiny_base, tmp_path, dtype):
    model = DeepSpeech2ForCTC.from_pretrained(tiny_base, dtype=dtype)
    model.save_pretrained(tmp_path)
    assert fingerprint_base(AutoModelForCTC.from_pretrained(tmp_path, dtype=dtype)) == fingerprint_base(model)


@pytest.mark.parametrize("config", [SPEECH, LORA], ids=["speech", "lora"])
def test_fingerprint_is_the_same_with_and_without_adapters(tiny_model, config):
    before = fingerprint_base(tiny_model)
    tiny_model.add_adapter(copy.deepcopy(config), "alice")
    assert fingerprint_base(tiny_model) == before
    tiny_model.add_adapter(SpeechAdapterConfig(kind="mlp", hidden_sizes=[4]), "bob")
    assert fingerprint_base(tiny_model) == before
    tiny_model.delete_adapter("alice")
    assert fingerprint_base(tiny_model) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_fingerprint_is_the_base_s_inside_a_peft_model_that_keeps_modules(tiny_model):
    before = fingerprint_base(tiny_model)
    config = LoraConfig(target_modules=["encoder.conv.layers.0"], r=2, modules_to_save=["classifier"])
    assert fingerprint_base(get_peft_model(tiny_model, config)) == before


def test_fingerprint_says_what_the_base_is(tiny_model):
    fingerprint = fingerprint_base(tiny_model)
    assert fingerprint["architecture"] == "DeepSpeech2ForCTC (deepspeech2)"
    assert fingerprint["num_parameters"] == sum(value.numel() for value in tiny_model.parameters())
    assert fingerprint["dtype"] == "float32"
    assert len(fingerprint["weights"]) == 32


def test_one_changed_bit_anywhere_changes_the_fingerprint():
    model = linear()
    words = model.weight.data.view(torch.int32).view(-1)
    before = fingerprint_base(model)["weights"]
    for position in (0, 1, 2 * BLOCK_WORDS - 1, 2 * BLOCK_WORDS, len(words) - 1):
        for bit in (1, 1 << 30, -(1 << 31)):
            words[position] ^= bit
            assert fingerprint_base(model)["weights"] != before
            words[position] ^= bit
    assert fingerprint_base(model)["weights"] == before


def test_two_changed_signs_two_swapped_weights_and_two_swapped_rows_change_the_fingerprint():
    seen = set()
    for change in ([0, 1], [1, 3], [0, 2], None):
        model = linear()
        if change:
            model.weight.data.view(-1)[change] *= -1
        seen.add(fingerprint_base(model)["weights"])
    for order in ([1, 0], [2, 1, 0]):
        model = linear()
        model.weight.data.view(-1)[: len(order)] = model.weight.data.view(-1)[order].clone()
        seen.add(fingerprint_base(model)["weights"])
        model = linear()
        model.weight.data[: len(order)] = model.weight.data[order].clone()
        seen.add(fingerprint_base(model)["weights"])
    assert len(seen) == 8


def test_names_shapes_precision_and_buffers_count():
    fingerprints = [fingerprint_base(model)["weights"] for model in (linear(), linear(dtype=torch.bfloat16))]
    renamed = nn.Module()
    renamed.other, renamed.bias = linear().weight, linear().bias
    reshaped = linear()
    reshaped.weight = nn.Parameter(reshaped.weight.view(150, 600))
    buffered = linear()
    buffered.register_buffer("mean", torch.zeros(3))
    hidden = linear()
    hidden.register_buffer("window", torch.zeros(3), persistent=False)
    fingerprints += [fingerprint_base(model)["weights"] for model in (renamed, reshaped, buffered)]

    assert len(set(fingerprints)) == 5
    assert fingerprint_base(hidden)["weights"] == fingerprints[0]


def test_batch_norm_statistics_that_have_moved_change_the_fingerprint(tiny_model):
    before = fingerprint_base(tiny_model)
    tiny_model.train()(torch.randn(2, 20, 16))
    assert list_differences(before, fingerprint_base(tiny_model))[0].startswith("weights: ")


def test_weights_that_are_not_in_memory_have_no_fingerprint_and_differ_from_none():
    with torch.device("meta"):
        fingerprint = fingerprint_base(nn.Linear(300, 300))
    assert fingerprint["weights"] is None
    assert list_differences(fingerprint, fingerprint_base(linear())) == []


@pytest.mark.parametrize("length", [1, 3, 7, 8, 9])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.int64])
def test_tensors_of_any_length_and_type_are_read_to_their_last_byte(length, dtype):
    model = nn.Module()
    model.register_buffer("counts", torch.zeros(length, dtype=dtype))
    before = fingerprint_base(model)["weights"]
    model.counts[-1] = 1
    assert fingerprint_base(model)["weights"] != before


def test_fingerprint_of_10_million_parameters_takes_less_than_a_tenth_of_a_second_on_one_core():
    model = nn.Sequential(*(nn.Linear(1580, 1580) for _ in range(4)))
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(10e6, rel=0.01)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        fingerprint_base(model)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1  # 1 s for 100 million


def test_fingerprint_of_a_processor_survives_saving_and_loading(tiny_processor, tiny_base):
    fingerprint = fingerprint_processor(tiny_processor)
    assert fingerprint_processor(AutoProcessor.from_pretrained(tiny_base)) == fingerprint
    assert fingerprint["features"]["feature_size"] == 16


def test_fingerprint_of_a_processor_tells_vocabularies_and_features_apart(tiny_processor):
    fingerprint = fingerprint_processor(tiny_processor)
    other = copy.deepcopy(tiny_processor)
    other.tokenizer.add_tokens(["ß"])
    other.feature_extractor = DeepSpeech2FeatureExtractor(feature_size=20)
    differences = list_differences(fingerprint, fingerprint_processor(other))

    assert [line.split(":")[0] for line in differences] == ["features.feature_size", "vocabulary"]
    assert differences[0] == "features.feature_size: 16 / 20"


def test_differences_show_both_sides(tiny_model):
    other = DeepSpeech2ForCTC(DeepSpeech2Config(num_mel_bins=16, hidden_size=8, num_hidden_layers=1, vocab_size=30))
    theirs, ours = fingerprint_base(tiny_model), fingerprint_base(other)
    assert list_differences(theirs, ours) == [
        f"num_parameters: {theirs['num_parameters']} / {ours['num_parameters']}",
        f"weights: '{theirs['weights']}' / '{ours['weights']}'",
    ]
    assert list_differences(theirs, theirs) == []
