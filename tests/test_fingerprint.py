"""A base has one fingerprint, however it is wrapped, saved and loaded, and no other base has it."""

import copy
import json
import time
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from stock_models import make_whisper
from torch import nn
from transformers import AutoModelForCTC, AutoProcessor, BitsAndBytesConfig, WhisperForConditionalGeneration

from modeling import DeepSpeech2Config, DeepSpeech2FeatureExtractor, DeepSpeech2ForCTC, SpeechAdapterConfig
from modeling.fingerprint import (
    BLOCK_WORDS,
    FACTORS,
    PIECE_VALUES,
    count_unknown,
    fingerprint_base,
    fingerprint_processor,
    list_differences,
    sum_blocks,
)
from training.checkpoint_digest import digest_base

SPEECH = SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[4])
# Written by the code before fingerprints had a version.
FIRST_VERSION = Path(__file__).parent / "fixtures" / "adapters_of_version_1"
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


@pytest.mark.parametrize("describe", [lambda model: fingerprint_base(model)["weights"], digest_base])
def test_one_changed_bit_anywhere_changes_the_fingerprint(describe):
    model = linear()
    words = model.weight.data.view(torch.int32).view(-1)
    before = describe(model)
    for position in (0, 1, 2 * BLOCK_WORDS - 1, 2 * BLOCK_WORDS, len(words) - 1):
        for bit in (1 << 16, 1 << 30, -(1 << 31)):  # of those that bf16 keeps
            words[position] ^= bit
            assert describe(model) != before
            words[position] ^= bit
    assert describe(model) == before


def test_a_bit_that_no_half_precision_keeps_changes_the_digest_of_what_was_computed_alone():
    model = linear()
    before, digest = fingerprint_base(model), digest_base(model)
    model.weight.data.view(torch.int32).view(-1)[0] ^= 1
    assert digest_base(model) != digest
    assert list_differences(before, fingerprint_base(model)) == []


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


def test_shapes_and_buffers_count_names_and_precision_do_not():
    before = fingerprint_base(linear())
    renamed = nn.Linear(300, 300)
    renamed.other, renamed.shift = renamed.weight, renamed.bias
    del renamed.weight, renamed.bias
    renamed.other.data, renamed.shift.data = linear().weight.data, linear().bias.data
    assert [name for name, _ in renamed.named_parameters()] == ["other", "shift"]
    hidden = linear()
    hidden.register_buffer("window", torch.zeros(3), persistent=False)
    for same in (
        linear(dtype=torch.bfloat16),
        linear(dtype=torch.float16),
        linear(dtype=torch.float64),
        hidden,
        renamed,
    ):
        assert list_differences(before, fingerprint_base(same)) == []
        assert list_differences(fingerprint_base(same), before) == []

    reshaped = linear()
    reshaped.weight = nn.Parameter(reshaped.weight.view(150, 600))
    buffered = linear()
    buffered.register_buffer("mean", torch.zeros(3))
    for other in (reshaped, buffered):
        assert any(line.startswith("shapes: ") for line in list_differences(before, fingerprint_base(other)))


def test_two_layers_of_one_shape_that_are_swapped_are_another_base():
    layers = [linear(), nn.Linear(300, 300)]
    before = fingerprint_base(nn.Sequential(*layers))
    assert list_differences(before, fingerprint_base(nn.Sequential(*layers[::-1])))[1] == "4 of 4 tensors differ"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained_in", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_is_the_same_and_a_trained_one_is_not(tiny_base, trained_in, dtype):
    theirs = fingerprint_base(DeepSpeech2ForCTC.from_pretrained(tiny_base, dtype=trained_in))
    model = DeepSpeech2ForCTC.from_pretrained(tiny_base, dtype=dtype)
    assert list_differences(theirs, fingerprint_base(model)) == []
    with torch.no_grad():
        model.classifier[1].weight.mul_(1.02)
    assert list_differences(theirs, fingerprint_base(model))[1] == "1 of 28 tensors differ"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_the_same_and_a_trained_one_is_not(tmp_path, bits):
    model = make_whisper(width=64)
    model.save_pretrained(tmp_path)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**settings if bits == 4 else {"load_in_8bit": True})
    quantised = WhisperForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    assert not quantised.model.encoder.layers[0].fc1.weight.is_floating_point()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        theirs = fingerprint_base(model.to(dtype))
        assert list_differences(theirs, fingerprint_base(quantised)) == []
        assert list_differences(fingerprint_base(quantised), theirs) == []
        assert count_unknown(theirs, fingerprint_base(quantised)) == (0, 50)
    model.float()
    with torch.no_grad():
        model.model.encoder.layers[0].fc1.weight.add_(torch.randn(16, 64))  # as much as it has
    assert list_differences(fingerprint_base(model), fingerprint_base(quantised))[1] == "1 of 50 tensors differ"
    with torch.no_grad():
        model.model.encoder.layer_norm.weight[0] += 0.1  # not quantised, so it is compared to the digit
    assert list_differences(fingerprint_base(model), fingerprint_base(quantised))[1] == "2 of 50 tensors differ"


def test_quantised_weights_that_have_all_moved_a_little_are_another_base(tmp_path):
    model = make_whisper(width=64)
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = WhisperForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, nn.Linear):
                module.weight.add_(0.4 * module.weight.std() * torch.randn_like(module.weight))
    differences = list_differences(fingerprint_base(model), fingerprint_base(quantised))
    assert differences[1] == "rounded tensors differ by more than rounding"


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_weights_that_are_views_between_two_words_are_read(offset, dtype):
    whole = torch.arange(2000).to(dtype)
    model = nn.Module()
    model.register_buffer("view", whole[offset:1900])
    copied = nn.Module()
    copied.register_buffer("view", whole[offset:1900].clone())
    assert model.view.storage_offset() * dtype.itemsize % 8
    assert fingerprint_base(model) == fingerprint_base(copied)
    assert fingerprint_base(model, version=1) == fingerprint_base(copied, version=1)
    assert digest_base(model) == digest_base(copied)


def test_weights_of_several_pieces_are_read_to_their_last_value():
    model = nn.Linear(3, PIECE_VALUES // 3 + 5, bias=False)
    before = fingerprint_base(model)
    model.weight.data[-1, -1] += 1
    assert fingerprint_base(model)["weights"] != before["weights"]


def test_sums_are_those_of_the_formula():
    values = torch.randn(3 * BLOCK_WORDS + 7)
    words = values.view(torch.uint8)
    words = nn.functional.pad(words, (0, -len(words) % 8)).view(torch.int64).tolist()
    factors = [[int(factor) for factor in row] for row in FACTORS]
    expected = []
    for start in range(0, len(words), BLOCK_WORDS):
        block = words[start : start + BLOCK_WORDS]
        for row, shift in zip(factors, (0, 32), strict=True):
            expected.append(sum((word >> shift) * factor for word, factor in zip(block, row, strict=False)) % 2**64)
    assert [value % 2**64 for value in sum_blocks(values).flatten().tolist()] == expected


def test_adapters_of_version_1_are_compared_as_they_were():
    theirs = json.loads((FIRST_VERSION / "speech" / "adapter_config.json").read_text())["base_fingerprint"]
    model = DeepSpeech2ForCTC.from_pretrained(FIRST_VERSION / "base")
    assert fingerprint_base(model, version=1) == theirs
    with torch.no_grad():
        model.classifier[1].weight[0, 0] += 1
    assert list_differences(theirs, fingerprint_base(model, version=1))[0].startswith("weights: ")


@pytest.mark.parametrize("init", ["pissa", "olora", True])
def test_initialisations_that_change_the_base_leave_it_the_same_base(tiny_model, init):
    before = fingerprint_base(tiny_model)
    weight = tiny_model.classifier[1].weight.detach().clone()
    tiny_model.add_adapter(LoraConfig(target_modules=["classifier.1"], r=2, init_lora_weights=init), "low")
    assert torch.equal(tiny_model.classifier[1].base_layer.weight, weight) == (init is True)
    after = fingerprint_base(tiny_model)
    assert list_differences(before, after) == list_differences(after, before) == []
    assert count_unknown(before, after) == (int(init is not True), 28)
    with torch.no_grad():
        tiny_model.encoder.rnn_layers[0].rnn.weight_ih_l0[0, 0] += 1
    assert list_differences(before, fingerprint_base(tiny_model))[1] == "1 of 28 tensors differ"


def offload_to_disk(folder):
    return WhisperForConditionalGeneration.from_pretrained(
        folder, device_map={"model.encoder": "cpu", "model.decoder": "disk", "proj_out": "disk"}, offload_folder=folder
    )


def offload_to_cpu(folder):
    return cpu_offload(WhisperForConditionalGeneration.from_pretrained(folder))


@pytest.mark.parametrize("offload", [offload_to_disk, offload_to_cpu])
def test_an_offloaded_base_is_the_same_base(tmp_path, offload):
    make_whisper().save_pretrained(tmp_path)
    whole = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert whole.proj_out.weight is whole.model.decoder.embed_tokens.weight
    model = offload(tmp_path)
    assert model.model.decoder.layers[0].fc1.weight.is_meta
    assert fingerprint_base(model) == fingerprint_base(whole)
    with torch.no_grad():
        whole.model.decoder.layers[0].fc1.weight[0, 0] += 1
    assert list_differences(fingerprint_base(whole), fingerprint_base(model))[1] == "1 of 50 tensors differ"


@pytest.mark.parametrize("tensors", ["?", "AAAA", 3, None, [], "AAAA" * 19])
def test_records_of_unknown_origin_that_are_none_are_another_base(tensors):
    ours = fingerprint_base(linear())
    assert list_differences(ours | {"tensors": tensors}, ours)[1].endswith(" tensors / 2 tensors")


def test_a_later_version_is_another_base():
    ours = fingerprint_base(linear())
    assert list_differences(ours | {"version": 3}, ours) == ["version: 3 / 2"]


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
        f"shapes: '{theirs['shapes']}' / '{ours['shapes']}'",
        f"weights: '{theirs['weights']}' / '{ours['weights']}'",
    ]
    assert list_differences(theirs, theirs) == []
