"""Names of a batch's rows reach the right rows of every layer: clips of a prompt, beams, pieces of a recording."""

import pytest
import torch
from peft import IA3Config, LoraConfig
from stock_models import (
    AUDIO_TOKEN,
    FRAMES,
    add_trained,
    configure,
    generate,
    logits,
    make_batch,
    make_qwen2_audio,
    make_whisper,
)

from modeling import SpeechAdapterConfig, adapter_rows
from modeling.adapters import BASE, adapters_off


def make_prompts(*lengths_of_rows: list[int]) -> dict[str, torch.Tensor]:
    """A batch of prompts with clips of so many frames of the tower each, from no clip on."""
    lengths = [length for row in lengths_of_rows for length in row]
    rows = [[token for length in row for token in [4] + [AUDIO_TOKEN] * length] + [5, 6] for row in lengths_of_rows]
    width = max(map(len, rows))
    features = torch.randn(len(lengths), 8, FRAMES, generator=torch.Generator().manual_seed(2))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "input_features": features,
        "feature_attention_mask": (torch.arange(FRAMES) < 4 * torch.tensor(lengths).unsqueeze(1)).long(),
    }


@pytest.fixture
def chat():
    """Qwen2-Audio with adapters `ann` and `ben` before its projector."""
    model = make_qwen2_audio()
    for name in ("ann", "ben"):
        add_trained(model, name, configure("bottleneck"))
    return model


def logits_alone(model, names: list[str], batch: dict) -> torch.Tensor:
    """The other route: the whole batch with one adapter at a time."""
    said = {}
    for name in ("ann", "ben"):
        model.set_adapter(name)
        said[name] = logits(model, batch)
    with adapters_off(model):
        said[BASE] = logits(model, batch)
    return torch.stack([said[name][row] for row, name in enumerate(names)])


@pytest.mark.parametrize("clips", [([5, 7, 6], [4]), ([3], [4, 9]), ([5, 5], []), ([], [6, 2, 3]), ([1, 1], [1])])
def test_a_clip_has_the_adapter_of_its_prompt(chat, clips):
    batch = make_prompts(*clips)
    for names in (["ann", "ben"], ["ben", BASE], [BASE, "ann"], ["ann", "ann"]):
        expected = logits_alone(chat, names, batch)
        with adapter_rows(chat, names):
            torch.testing.assert_close(logits(chat, batch), expected, atol=1e-4, rtol=1e-4)
            text = generate(chat, batch)
        assert text == [generate_alone(chat, name, batch)[row] for row, name in enumerate(names)]
    assert not torch.allclose(logits_alone(chat, ["ann", "ben"], batch), logits_alone(chat, ["ben", "ann"], batch))


def generate_alone(model, name: str, batch: dict) -> list[list[int]]:
    with adapter_rows(model, [name] * len(batch["input_ids"])):
        return generate(model, batch)


def test_a_placeholder_for_a_whole_clip_counts_as_one(chat):
    batch = make_prompts([5, 7], [4])
    rows = [[4, AUDIO_TOKEN, 4, AUDIO_TOKEN, 5], [0, 4, AUDIO_TOKEN, 5, 6]]
    batch |= {"input_ids": torch.tensor(rows), "attention_mask": (torch.tensor(rows) > 0).long()}
    names = ["ann", "ben"]
    expected = logits_alone(chat, names, batch)
    with adapter_rows(chat, names):
        torch.testing.assert_close(logits(chat, batch), expected, atol=1e-4, rtol=1e-4)


def test_the_tower_takes_a_name_a_clip_where_nothing_else_acts(chat):
    batch = make_prompts([5, 7, 6], [4])
    expected = logits_alone(chat, ["ann", "ben"], batch)
    with adapter_rows(chat, ["ann", "ann", "ann", "ben"]):
        torch.testing.assert_close(logits(chat, batch), expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="one name a clip in the audio tower, got 4 names for 2 rows"):
            chat.model.multi_modal_projector(torch.zeros(2, 10, 16))


def test_language_model_and_tower_may_both_have_adapters(chat):
    batch = make_prompts([5, 7, 6], [4])
    add_trained(chat, "low", LoraConfig(target_modules=["language_model.layers.0.self_attn.q_proj"], r=2))
    low = logits(chat, batch)
    expected = torch.stack([low[0], logits_alone(chat, [BASE, "ben"], batch)[1]])
    with adapter_rows(chat, ["low", "ben"]):
        torch.testing.assert_close(logits(chat, batch), expected, atol=1e-4, rtol=1e-4)
    with adapter_rows(chat, ["low", "low", "low", "ben"]), pytest.raises(ValueError, match="one name a row, got 4"):
        chat(**batch)


def test_rows_are_not_taken_for_beams_outside_generate():
    model = make_whisper()
    for name in ("ann", "ben"):
        add_trained(model, name, configure("bottleneck"))
    batch = {name: torch.cat([value, value]) for name, value in make_batch(model).items()}
    with adapter_rows(model, ["ann", BASE, "ben"]):
        generate(model, {name: value[:3] for name, value in batch.items()}, num_beams=2)
        with pytest.raises(ValueError, match="one name a row, got 3 names for 6 rows"):
            model(**batch)


def test_sequences_of_one_row_have_its_adapter():
    model = make_whisper()
    target = r"model\.(encoder|decoder)\.layer_norm"
    for name in ("ann", "ben"):
        add_trained(model, name, configure("bottleneck", target_modules=target))
    batch, settings = make_batch(model), {"num_beams": 3, "num_return_sequences": 2}
    alone = {}
    for name in ("ann", "ben"):
        model.set_adapter(name)
        alone[name] = generate(model, batch, **settings)
    with adapter_rows(model, ["ann", "ben", "ann"]):
        together = generate(model, batch, **settings)
    assert together == [*alone["ann"][:2], *alone["ben"][2:4], *alone["ann"][4:]]
    assert alone["ann"] != alone["ben"]


def test_beams_over_prompts_of_several_clips_are_refused(chat):
    with adapter_rows(chat, ["ann", "ben"]):
        for clips in (([5, 7, 6], [4]), ([5, 5], [])):
            with pytest.raises(ValueError, match="`num_beams` and `num_return_sequences` must be 1 .* got 2"):
                generate(chat, make_prompts(*clips), num_beams=2)
        one_each = make_prompts([5], [4])
        beams = generate(chat, one_each, num_beams=2)
    chat.set_adapter("ann")
    assert beams[0] == generate(chat, one_each, num_beams=2)[0]


def test_placeholders_that_belong_to_no_clip_are_refused(chat):
    batch = make_prompts([5, 7], [4])
    batch["input_ids"][0, batch["input_ids"][0] == AUDIO_TOKEN] = torch.tensor([AUDIO_TOKEN] * 11 + [5])
    batch["input_ids"][1, 0] = AUDIO_TOKEN
    with adapter_rows(chat, ["ann", "ben"]), pytest.raises(ValueError, match="placeholders for whole clips, got"):
        chat(**batch)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"frames": 2 * FRAMES}, "80 frames, above 40"),
        ({"return_timestamps": True}, "timestamps"),
        ({"temperature": (0.0, 0.4)}, "several temperatures"),
    ],
)
def test_whisper_refuses_different_rows_where_it_drops_those_that_are_done(settings, reason):
    model = make_whisper()
    for name in ("ann", "ben"):
        add_trained(model, name, configure("bottleneck"))
    frames = settings.pop("frames", FRAMES)
    features = torch.randn(3, 8, frames, generator=torch.Generator().manual_seed(3))
    calls = []
    model.model.encoder.register_forward_pre_hook(lambda *_: calls.append(0))
    with adapter_rows(model, ["ann", BASE, "ben"]):
        with pytest.raises(ValueError, match=rf"same for all rows.*got \['__base__', 'ann', 'ben'\] with {reason}"):
            model.generate(features, max_new_tokens=3, **settings)
    assert calls == []


def test_whisper_takes_rows_of_one_adapter_through_a_long_recording():
    model = make_whisper()
    model.generation_config.no_timestamps_token_id = 30
    for name in ("ann", "ben"):
        add_trained(model, name, configure("bottleneck"))
    features = torch.randn(2, 8, 3 * FRAMES, generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(3 * FRAMES) < torch.tensor([[3 * FRAMES], [FRAMES]])).long()
    long = {"attention_mask": mask, "return_timestamps": True, "max_new_tokens": 3}
    said = {}
    for name in ("ann", "ben"):
        model.set_adapter(name)
        said[name] = model.generate(features, **long).tolist()
    with adapter_rows(model, ["ann", "ann"]):
        assert model.generate(features, **long).tolist() == said["ann"]
    assert said["ann"] != said["ben"]


def test_names_without_effect_are_refused(tiny_model, five_rows):
    add_trained(tiny_model, "ann", SpeechAdapterConfig(hidden_sizes=[4]))
    for names in (["ann"] * 5, ["ann", BASE, BASE, BASE, BASE]):
        with adapters_off(tiny_model), pytest.raises(ValueError, match=r"while adapters are on, got \['ann'\] and"):
            adapter_rows(tiny_model, names).__enter__()
    tiny_model.disable_adapters()
    with pytest.raises(ValueError, match="while adapters are on.*Call `model.enable_adapters"):
        adapter_rows(tiny_model, ["ann"] * 5).__enter__()
    with adapter_rows(tiny_model, [BASE] * 5):
        logits(tiny_model, five_rows)


def test_methods_that_cannot_tell_rows_apart_are_refused_unless_no_row_wants_them(tiny_model, five_rows):
    add_trained(tiny_model, "ann", SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[4]))
    ann = logits(tiny_model, five_rows)
    scaled = IA3Config(target_modules=["classifier.1"], feedforward_modules=[])
    add_trained(tiny_model, "scaled", scaled)
    with pytest.raises(ValueError, match=r"that tells rows apart, got \['scaled'\] at classifier.1, a peft.*ia3"):
        adapter_rows(tiny_model, ["scaled", "ann", "ann", "ann", "ann"]).__enter__()
    with adapter_rows(tiny_model, ["ann"] * 5):
        torch.testing.assert_close(logits(tiny_model, five_rows), ann)
