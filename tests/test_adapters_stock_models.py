"""Speech adapters keep their contract inside a model that is not the project's: Whisper, generating with beams."""

import pytest
import torch
from peft import LoraConfig
from transformers import WhisperConfig, WhisperForConditionalGeneration

from modeling import SpeechAdapterConfig, adapter_rows, save_adapter
from modeling.adapters import BASE, adapters_off, find_active_adapters, is_adapter_parameter

PLACES = {
    "encoder": r"model\.encoder\.layers\.0\.fc2",
    "decoder": r"model\.decoder\.layers\.1\.fc2",
}


@pytest.fixture
def whisper() -> WhisperForConditionalGeneration:
    """Whisper of two layers, random and always the same; its text is loud enough to be changed."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=60,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=20,
        max_target_positions=24,
        init_std=1.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows of 40 frames and the start of a text."""
    features = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": torch.tensor([[3, 7, 9]] * 3)}


def add_adapter(model, name: str, config: object) -> None:
    model.add_adapter(config, name)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_adapter_parameter(key) and f".{name}." in key:
                parameter.normal_(std=3.0, generator=generator)
    model.eval()


def bottleneck(place: str) -> SpeechAdapterConfig:
    return SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[4], target_modules=PLACES[place])


@torch.no_grad()
def logits(model, batch: dict) -> torch.Tensor:
    return model(**batch).logits


def generate(model, batch: dict, **settings) -> list[list[int]]:
    rows = model.generate(batch["input_features"], max_new_tokens=8, do_sample=False, **settings)
    return [[token for token in row if token not in (0, 2)] for row in rows.tolist()]


@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_in_whisper_starts_as_nothing_trains_alone_and_leaves_no_trace(whisper, batch, place):
    before = logits(whisper, batch)
    whisper.add_adapter(bottleneck(place), "room")
    assert torch.equal(logits(whisper, batch), before)

    whisper(**batch, labels=torch.tensor([[7, 9, 11]] * 3)).loss.backward()
    with_gradient = {name for name, value in whisper.named_parameters() if value.grad is not None}
    assert with_gradient == {name for name, _ in whisper.named_parameters() if is_adapter_parameter(name)} != set()

    add_adapter(whisper, "other", bottleneck(place))
    assert not torch.allclose(logits(whisper, batch), before, atol=0.1)
    with adapters_off(whisper):
        assert torch.equal(logits(whisper, batch), before)


def test_a_saved_adapter_gives_whisper_equal_logits(whisper, batch, tmp_path):
    whisper.save_pretrained(tmp_path / "base")
    add_adapter(whisper, "room", bottleneck("encoder"))
    save_adapter(whisper, tmp_path / "room")

    fresh = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    fresh.load_adapter(str(tmp_path / "room"), "room")
    assert find_active_adapters(fresh) == ["room"]
    assert torch.equal(logits(fresh, batch), logits(whisper, batch))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "config", [bottleneck("encoder"), bottleneck("decoder"), LoraConfig(target_modules=["q_proj"])]
)
def test_every_row_generates_with_its_own_adapter(whisper, batch, num_beams, config):
    alone = {BASE: generate(whisper, batch, num_beams=num_beams)}
    add_adapter(whisper, "ann", config)
    alone["ann"] = generate(whisper, batch, num_beams=num_beams)
    add_adapter(whisper, "ben", bottleneck("decoder"))
    alone["ben"] = generate(whisper, batch, num_beams=num_beams)

    names = ["ann", BASE, "ben"]
    with adapter_rows(whisper, names):
        together = generate(whisper, batch, num_beams=num_beams)

    assert together == [alone[name][row] for row, name in enumerate(names)]
    assert together[0] != alone[BASE][0]
    assert together[2] != alone[BASE][2]


def test_targets_must_be_named_in_a_model_without_a_default(whisper):
    with pytest.raises(
        ValueError, match="`target_modules` must be given for a replacement adapter in a model of type 'whisper'"
    ):
        whisper.add_adapter(SpeechAdapterConfig(kind="replacement"), "room")
