"""The report of a domain adaptation: what it notes while a real model trains, and what its pictures show."""

import copy
import json
import math
from unittest.mock import patch

import matplotlib.image
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.utils.data import Dataset
from transformers import TrainingArguments, WhisperConfig, WhisperForConditionalGeneration

from modeling import SpeechAdapterConfig
from modeling.adapters import adapters_off
from publishing.adapter_maps import AdapterMaps
from publishing.domain_report import (
    DomainReportCallback,
    draw_clip_maps,
    draw_maps,
    find_transformer_blocks,
    group_trainable,
    list_trainable_names,
    measure_gates,
    write_domain_report,
)
from training.trainer import AdapterTrainer

BLOCK = "model.encoder.layer_norm.speech_adapter_blocks.ldv"


class Utterances(Dataset):
    """Eight random utterances of a tiny Whisper, always the same."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        features = torch.randn(8, 40, generator=torch.Generator().manual_seed(index))
        return {"input_features": features, "labels": torch.tensor([5, 6 + index, 2])}


@pytest.fixture
def whisper() -> WhisperForConditionalGeneration:
    """Whisper of two layers, random and always the same, without dropout."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=60, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=20,
        max_target_positions=24, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, dropout=0.0,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


@pytest.fixture
def adapted(whisper: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    """The same with a transformer adapter of one layer and a gate."""
    sizes = {"num_layers": 1, "num_heads": 2, "ffn_size": 8, "use_gate": True, "dropout": 0.0}
    whisper.add_adapter(SpeechAdapterConfig(kind="transformer", **sizes), "ldv")
    return whisper


def train(model, folder, *, max_steps: int, **options) -> DomainReportCallback:
    callback = DomainReportCallback()
    arguments = TrainingArguments(
        str(folder), max_steps=max_steps, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    AdapterTrainer(
        model=model, args=arguments, train_dataset=Utterances(), eval_dataset=Utterances(), callbacks=[callback]
    ).train()
    return callback


def find_healthy_rows(callback: DomainReportCallback) -> list[dict]:
    return [row for row in callback.history if 0.3 <= row["gates"][BLOCK]["mean"] <= 0.7]


def test_trainable_rows_count_every_trainable_parameter_once(adapted):
    rows = list_trainable_names(adapted)
    expected = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)

    assert sum(row["parameters"] for row in rows) == expected
    assert sum(row["share"] for row in rows) == pytest.approx(expected / adapted.num_parameters())
    assert {row["module"]: row["parameters"] for row in rows}[f"{BLOCK}.gate"] == 16 * 16 + 16


def test_trainable_rows_take_the_layers_of_a_stack_together(whisper):
    whisper.add_adapter(LoraConfig(r=2, target_modules=r".*decoder.*self_attn\.q_proj"), "lora")
    assert [(row["module"], row["tensors"], row["parameters"]) for row in list_trainable_names(whisper)] == [
        ("model.decoder.layers.*.self_attn.q_proj.lora_A.lora", 2, 2 * 2 * 16),
        ("model.decoder.layers.*.self_attn.q_proj.lora_B.lora", 2, 2 * 2 * 16),
    ]


def test_gates_are_measured_without_padding():
    gates = torch.tensor([[[0.2, 0.4], [0.6, 0.8]], [[0.5, 0.5], [0.0, 1.0]]])
    padded, whole = AdapterMaps((), gates, torch.tensor([2, 1])), AdapterMaps((), gates, None)

    assert measure_gates([padded]).tolist() == pytest.approx([0.5, 0.2, 0.8])
    assert measure_gates([whole]).tolist() == pytest.approx([0.5, 0.0, 1.0])
    assert measure_gates([padded, padded]).tolist() == pytest.approx([0.5, 0.2, 0.8])
    assert measure_gates([AdapterMaps((), None, None)]) is None


def test_history_has_the_gradients_of_each_module_before_clipping(adapted, tmp_path):
    reference = copy.deepcopy(adapted).train()
    callback = train(adapted, tmp_path, max_steps=1, max_grad_norm=1e-3, train_sampling_strategy="sequential")
    items = [Utterances()[index] for index in range(4)]
    reference(**{key: torch.stack([item[key] for item in items]) for key in items[0]}).loss.backward()

    expected = {
        name: math.sqrt(sum(parameter.grad.square().sum().item() for parameter in parameters))
        for name, parameters in group_trainable(reference).items()
    }
    assert [row["step"] for row in callback.history] == [1]
    assert callback.history[0]["gradient_norms"] == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert expected[f"{BLOCK}.output_norm"] > 1e-3  # so that there was something to clip


def test_history_has_gates_and_scale_of_every_logged_step(adapted, tmp_path):
    reference = copy.deepcopy(adapted).eval()
    with adapters_off(reference), torch.no_grad():
        features = torch.stack([Utterances()[index]["input_features"] for index in range(4)])
        states = reference.model.encoder(features).last_hidden_state
        gates = torch.sigmoid(find_transformer_blocks(reference)[BLOCK].gate(states))
    callback = train(adapted, tmp_path, max_steps=3, train_sampling_strategy="sequential")

    expected = {"mean": gates.mean().item(), "min": gates.min().item(), "max": gates.max().item()}
    assert callback.history[0]["gates"][BLOCK] == pytest.approx(expected, rel=1e-5)
    assert [row["step"] for row in callback.history] == [1, 2, 3]
    assert callback.history[-1]["scale"] == {BLOCK: find_transformer_blocks(adapted)[BLOCK].scale.item()}


def test_history_leaves_evaluations_out(adapted, tmp_path):
    evaluated = copy.deepcopy(adapted)
    rows = train(adapted, tmp_path, max_steps=3).history
    assert train(evaluated, tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1).history == rows


def test_gates_out_of_the_healthy_range_are_warned_of_once(adapted, tmp_path, caplog):
    with torch.no_grad():
        find_transformer_blocks(adapted)[BLOCK].gate.bias.fill_(4.0)
    callback = train(adapted, tmp_path, max_steps=3)

    assert find_healthy_rows(callback) == []
    mean = callback.history[0]["gates"][BLOCK]["mean"]
    assert [record.message for record in caplog.records if "gates" in record.message] == [
        f"The gates of {BLOCK} have mean {mean:.2f} at step 1, where 0.3 to 0.7 is healthy. Lower the learning rate "
        "or leave the gates out."
    ]


def test_healthy_gates_are_not_warned_of(adapted, tmp_path, caplog):
    callback = train(adapted, tmp_path, max_steps=2)
    assert len(find_healthy_rows(callback)) == 2
    assert not [record.message for record in caplog.records if "gates" in record.message]


def test_history_of_another_method_has_neither_gates_nor_scale(whisper, tmp_path):
    whisper.add_adapter(LoraConfig(r=2, target_modules=r".*decoder.*self_attn\.q_proj"), "lora")
    callback = train(whisper, tmp_path, max_steps=2)
    assert [(row["gates"], row["scale"]) for row in callback.history] == [({}, {}), ({}, {})]
    assert write_domain_report(tmp_path, {"history": callback.history}) == ["report_gradients.png"]


def test_report_comes_back_from_disk_with_its_pictures(adapted, tmp_path):
    callback = train(adapted, tmp_path / "training", max_steps=2)
    results = {"ldv_wer_before": 0.5, "ldv_wer_after": 0.25, "microphone_wer_before": 0.1, "method": "domain_adapter"}
    report = {"trainable": list_trainable_names(adapted), "history": callback.history, "results": results}
    report["maps"] = [{"clip": "a.wav", "adapter": BLOCK, "picture": "report_maps_0.png"}]
    pictures = write_domain_report(tmp_path / "out", report)

    names = ["errors", "gradients", "gates", "scale", "maps_0"]
    assert pictures == [f"report_{name}.png" for name in names]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"domain_report.json", *pictures[:-1]}
    assert json.loads((tmp_path / "out" / "domain_report.json").read_text()) == report | {"pictures": pictures}


def test_error_picture_shows_the_bars_of_both_domains(tmp_path):
    results = {"ldv_wer_before": 0.8, "ldv_wer_after": 0.2, "microphone_wer_before": 0.4, "microphone_wer_on": 0.1}
    assert write_domain_report(tmp_path, {"results": results}) == ["report_errors.png"]
    base, adapter_on = (count_pixels(tmp_path / "report_errors.png", color) for color in ("9aa5b1", "1f7a8c"))
    # Bars of 80 and 40 % are four times those of 20 and 10 %, but for the legend's two equal patches.
    assert base / adapter_on == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize(("rate", "label"), [("wer", "word error rate (%)"), ("cer", "character error rate (%)")])
def test_error_picture_names_the_rate_that_judges(tmp_path, rate, label):
    with patch("publishing.domain_report.save_figure") as save:
        write_domain_report(tmp_path, {"results": {f"ldv_{rate}_before": 0.8, f"ldv_{rate}_after": 0.2}})
    (axes,) = save.call_args[0][0].axes
    assert axes.get_ylabel() == label
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([80, 20])


def count_pixels(path, color: str) -> int:
    pixels = (matplotlib.image.imread(path)[:, :, :3] * 255).round().astype(int)
    rgb = [int(color[first : first + 2], 16) for first in (0, 2, 4)]
    return int((abs(pixels - rgb).sum(-1) < 6).sum())


def test_maps_show_gates_and_attention_on_the_same_time(tmp_path):
    gates = np.repeat([[1.0] * 6 + [0.0] * 2], 10, axis=0)  # of 10 frames, six channels of eight are open
    attention = np.eye(10)
    spectrogram = np.zeros((4, 20))
    path = tmp_path / "maps.png"
    draw_maps(path, spectrogram=spectrogram, attention=attention, gates=gates, name="a clip")
    opened, closed = count_pixels(path, "fee838"), count_pixels(path, "00224e")  # the ends of the colours of gates
    diagonal, elsewhere = count_pixels(path, "fde725"), count_pixels(path, "440154")  # and of attention

    assert opened / closed == pytest.approx(3, rel=0.1)
    assert elsewhere / diagonal == pytest.approx(9, rel=0.1)


def test_maps_leave_out_the_padding(tmp_path):
    attention = np.zeros((10, 10))
    attention[:5, :5] = 1.0
    maps = {"spectrogram": np.zeros((4, 20)), "attention": attention, "gates": None}
    draw_maps(tmp_path / "all.png", **maps, name="a clip")
    draw_maps(tmp_path / "clip.png", **maps, name="a clip", seconds=0.1)
    areas = [count_pixels(tmp_path / name, "fde725") for name in ("all.png", "clip.png")]
    assert areas[1] / areas[0] == pytest.approx(4, rel=0.1)


def test_clip_maps_are_drawn_for_each_clip(adapted, tmp_path):
    clips = {name: Utterances()[index]["input_features"] for index, name in enumerate(["one.wav", "two.wav"])}
    rows = draw_clip_maps(tmp_path, adapted.eval(), clips, adapted.model.encoder, seconds={"two.wav": 0.2})

    assert rows == [
        {"clip": "one.wav", "adapter": BLOCK, "picture": "report_maps_0.png"},
        {"clip": "two.wav", "adapter": BLOCK, "picture": "report_maps_1.png"},
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report_maps_0.png", "report_maps_1.png"]
    images = [matplotlib.image.imread(tmp_path / row["picture"]) for row in rows]
    assert (images[0] != images[1]).any()


def test_clip_maps_are_empty_without_a_transformer(whisper, tmp_path):
    whisper.add_adapter(SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[4]), "ldv")
    clips = {"one.wav": Utterances()[0]["input_features"]}
    assert draw_clip_maps(tmp_path, whisper, clips, whisper.model.encoder) == []
    assert list(tmp_path.iterdir()) == []
