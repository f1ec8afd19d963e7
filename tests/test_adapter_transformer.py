"""The transformer block: nothing at the start, every part learns, padding does not matter, maps are what it did."""

import copy
import pickle

import pytest
import torch
from torch import nn

from modeling import SpeechAdapterConfig
from modeling.adapter_blocks import TransformerBlock, find_widths, make_block, make_positions
from publishing.adapter_maps import record_maps

WIDTH = 12


def configure(**settings) -> SpeechAdapterConfig:
    sizes = {"num_layers": 2, "num_heads": 3, "ffn_size": 8, "dropout": 0.0}
    return SpeechAdapterConfig(kind="transformer", **sizes | settings)


def make_trained(**settings) -> TransformerBlock:
    """A block with weights as after a training, in evaluation mode."""
    torch.manual_seed(0)
    block = TransformerBlock(WIDTH, configure(**settings)).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block


@pytest.fixture
def frames() -> torch.Tensor:
    """Three rows of seven frames."""
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("use_gate", [False, True])
def test_a_fresh_block_changes_nothing_bit_for_bit(frames, use_gate):
    block = TransformerBlock(WIDTH, configure(use_gate=use_gate))
    assert torch.equal(frames + block(frames), frames)
    zero = {name for name, value in block.named_parameters() if "norm" not in name and not value.any()}
    assert zero == set()
    assert not any(parameter.any() for parameter in block.last_layer.parameters())


@pytest.mark.parametrize("settings", [{}, {"use_gate": False, "use_positions": False}, {"scale_init": -0.1}])
def test_the_first_step_changes_the_block_and_the_second_reaches_every_part(frames, settings):
    torch.manual_seed(0)
    block = TransformerBlock(WIDTH, configure(**settings))
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    reached = []
    for _ in range(2):
        optimizer.zero_grad()
        (frames + block(frames) - frames.flip(0) - 1).square().mean().backward()  # 1: else the bias has no slope
        reached.append({name for name, value in block.named_parameters() if value.grad.any()})
        optimizer.step()
    assert reached[0] == {"output_norm.weight", "output_norm.bias"}
    assert reached[1] == {name for name, _ in block.named_parameters()}


@pytest.mark.parametrize(
    ("preset", "parameters", "of_the_original", "more"),
    [  # the original's positions are a table, and its lightweight has no output projection and norm
        ("lightweight", 10_829_825, 9_187_585, 1280 * 1280 + 3 * 1280),
        ("standard", 26_902_017, 30_742_017, -3000 * 1280),
        ("heavy", 71_501_825, 75_341_825, -3000 * 1280),
    ],
)
def test_presets_have_the_parameters_of_the_table(preset, parameters, of_the_original, more):
    with torch.device("meta"):
        block = TransformerBlock(1280, SpeechAdapterConfig(kind="transformer", preset=preset))
    assert sum(parameter.numel() for parameter in block.parameters()) == parameters == of_the_original + more
    assert all(f"{count:,}" in TransformerBlock.__doc__ for count in (parameters, of_the_original))


def test_a_block_says_what_its_formula_says(frames):
    block = make_trained(num_layers=1, num_heads=1, scale_init=0.5)
    layer, scale = block.layers[0], block.scale.item()
    states = frames + make_positions(7, WIDTH, frames.device)
    query, key, value = layer.query_key_value(layer.attention_norm(states)).chunk(3, dim=-1)
    weights = (query @ key.mT / WIDTH**0.5).softmax(-1)
    states = states + layer.attention_output(weights @ value)
    states = states + layer.ffn(layer.ffn_norm(states))
    expected = scale * torch.sigmoid(block.gate(frames)) * block.output_norm(block.output(states))
    torch.testing.assert_close(block(frames), expected, atol=1e-5, rtol=1e-5)


def test_what_is_switched_off_has_no_part_in_the_result(frames):
    shuffled = frames[:, torch.tensor([3, 0, 6, 1, 5, 2, 4])]
    for use_positions, is_same in ((False, True), (True, False)):
        block = make_trained(use_positions=use_positions)
        change = block(frames)[:, torch.tensor([3, 0, 6, 1, 5, 2, 4])]
        assert torch.allclose(block(shuffled), change, atol=1e-4) is is_same
    assert make_trained(use_gate=False).gate is None


def test_padding_changes_nothing_and_is_not_changed(frames):
    block = make_trained()
    lengths = torch.tensor([7, 4, 1])
    together = block(frames, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = block(frames[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=1e-5)
        assert not together[row, length:].any()
    noisy = torch.where(torch.arange(7)[None, :, None] < lengths[:, None, None], frames, 1e4)
    assert torch.equal(block(noisy, lengths), together)


def test_rows_without_padding_and_without_frames_are_finite(frames):
    block = make_trained()
    assert torch.equal(block(frames, torch.tensor([7, 9, 7])), block(frames))
    empty = block(frames, torch.tensor([7, 0, 7]))
    assert empty.isfinite().all()
    assert not empty[1, 1:].any()


def test_recorded_maps_are_those_of_the_call(frames):
    block = make_trained(num_layers=1)
    lengths = torch.tensor([7, 4, 7])
    layer = block.layers[0]
    with torch.no_grad(), record_maps(block) as maps:
        change = block(frames, lengths)
        block(frames[:1])
    assert torch.equal(block(frames, lengths), change)
    assert len(maps) == 2

    attention, gates = maps[0].attentions[0], maps[0].gates
    assert attention.shape == (3, 3, 7, 7)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 3, 7))
    assert not attention[1, :, :, 4:].any()
    torch.testing.assert_close(gates, torch.sigmoid(block.gate(frames)).detach())
    assert torch.equal(maps[0].frame_lengths, lengths)
    # The other route: the recorded weights, applied to the values by hand, give what the block computed.
    states = layer.attention_norm(frames + make_positions(7, WIDTH, frames.device))
    values = layer.query_key_value(states)[..., 2 * WIDTH :].view(3, 7, 3, 4).transpose(1, 2)
    by_hand = layer.attention_output((attention @ values).transpose(1, 2).reshape(3, 7, WIDTH))
    is_frame = torch.arange(7) < lengths.unsqueeze(1)
    torch.testing.assert_close(layer._attend(states, is_frame), by_hand, atol=1e-5, rtol=1e-5)


def test_recording_ends_and_can_leave_the_attention_out(frames):
    block = make_trained(use_gate=False)
    with record_maps(block, with_attention=False) as maps:
        block(frames)
    block(frames)
    assert [(part.attentions, part.gates, part.frame_lengths) for part in maps] == [((), None, None)]


def test_copies_and_pickles_of_a_block_do_what_it_does(frames):
    block = make_trained()
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(frames), block(frames))


def test_positions_are_sines_and_cosines():
    positions = make_positions(3, 6, torch.device("cpu"))
    for frame in range(3):
        angles = torch.tensor([frame / 10_000 ** (channel / 3) for channel in range(3)])
        torch.testing.assert_close(positions[frame], torch.cat([angles.sin(), angles.cos()]))
    assert make_positions(4, 5, torch.device("cpu")).shape == (4, 5)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="`num_heads` must divide the width of the wrapped module, 12, got 5"):
        TransformerBlock(WIDTH, configure(num_heads=5))


def test_widths_are_those_of_maps_norms_and_modules_around_one_map():
    around_one = nn.ModuleDict({"linear": nn.Linear(3, 5)})
    around_two = nn.ModuleDict({"one": nn.Linear(3, 5), "two": nn.Linear(5, 3)})
    assert find_widths(nn.Linear(3, 5)) == (3, 5)
    assert find_widths(nn.LayerNorm(4)) == (4, 4)
    assert find_widths(around_one) == (3, 5)
    for module in (around_two, nn.LayerNorm((2, 4)), nn.BatchNorm1d(4)):
        assert find_widths(module) == (None, None)


@pytest.mark.parametrize(
    ("kind", "sizes"), [("transformer", {"num_heads": 1, "ffn_size": 4}), ("bottleneck", {"hidden_sizes": [2]})]
)
def test_a_position_decides_which_width_a_block_has(kind, sizes):
    for position, width in (("before", 3), ("after", 5), (None, 5)):
        block = make_block(nn.Linear(3, 5), SpeechAdapterConfig(kind=kind, position=position, **sizes))
        assert block(torch.zeros(1, 2, width)).shape == (1, 2, width)
        assert block.position == (position or "after")


@pytest.mark.parametrize("kind", ["mlp", "replacement"])
def test_a_module_of_which_one_width_is_unknown_is_refused_where_it_matters(kind):
    module = nn.Identity()
    module.out_features = 4
    with pytest.raises(ValueError, match="must name modules with `in_features` and `out_features`, got a Identity"):
        make_block(module, SpeechAdapterConfig(kind=kind))
    assert make_block(module, SpeechAdapterConfig(kind="bottleneck")).position == "after"
    with pytest.raises(ValueError, match="got a Identity. Name the linear map"):
        make_block(module, SpeechAdapterConfig(kind="bottleneck", position="before"))


def test_fields_that_are_given_win_over_the_preset_and_the_preset_over_the_default():
    sizes = ("num_layers", "num_heads", "ffn_size", "dropout", "use_gate", "use_positions", "scale_init")

    def read(**settings) -> list:
        config = SpeechAdapterConfig(kind="transformer", **settings)
        return [getattr(config, name) for name in sizes]

    assert read() == [2, 8, 2048, 0.1, True, True, 1.0]
    assert read(preset="lightweight") == [1, 4, 1024, 0.1, False, True, 1.0]
    assert read(preset="standard") == [2, 8, 2048, 0.1, True, True, 1.0]
    assert read(preset="heavy") == [4, 16, 4096, 0.15, True, True, 1.0]
    given = {"num_layers": 3, "dropout": 0.0, "use_gate": False, "use_positions": False, "scale_init": 0.5}
    assert read(preset="heavy", **given) == [3, 16, 4096, 0.0, False, False, 0.5]


def test_a_configuration_comes_back_from_its_file(tmp_path):
    config = SpeechAdapterConfig(kind="transformer", preset="heavy", num_layers=1, position="before")
    config.save_pretrained(tmp_path)
    assert SpeechAdapterConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "huge"}, "`preset` must be one of lightweight, standard, heavy, got 'huge'"),
        ({"preset": ["heavy"]}, r"`preset` must be one of lightweight, standard, heavy, got \['heavy'\]"),
        ({"hidden_sizes": [8]}, r"`hidden_sizes` must be left out of a transformer, got \[8\]"),
        ({"num_layers": 0}, "`num_layers` must be a positive integer, got 0"),
        ({"num_layers": 65}, "`num_layers` must be at most 64, got 65"),
        ({"num_heads": 2.0}, "`num_heads` must be a positive integer, got 2.0"),
        ({"ffn_size": True}, "`ffn_size` must be a positive integer, got True"),
        ({"use_gate": 1}, "`use_gate` must be true or false, got 1"),
        ({"use_positions": "no"}, "`use_positions` must be true or false, got 'no'"),
        ({"scale_init": 0.0}, "`scale_init` must be a number other than 0, got 0.0"),
        ({"scale_init": float("nan")}, "`scale_init` must be a number other than 0, got nan"),
        ({"scale_init": "1"}, "`scale_init` must be a number other than 0, got '1'"),
        ({"dropout": 1.0}, "`dropout` must be from 0 to below 1, got 1.0"),
        ({"position": "beside"}, "`position` must be one of before, after, got 'beside'"),
    ],
)
def test_a_configuration_of_no_transformer_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SpeechAdapterConfig(kind="transformer", **settings)


@pytest.mark.parametrize("kind", ["mlp", "bottleneck", "replacement"])
@pytest.mark.parametrize(
    "settings", [{"preset": "heavy"}, {"num_layers": 1}, {"num_heads": 1}, {"ffn_size": 1}, {"use_gate": False},
                 {"use_positions": True}, {"scale_init": 1.0}]
)  # fmt: skip
def test_a_field_of_the_transformer_is_refused_for_other_kinds(kind, settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"`{name}` must be left out of a {kind} adapter: only a transformer has it"):
        SpeechAdapterConfig(kind=kind, **settings)


@pytest.mark.parametrize("kind", ["mlp", "replacement"])
def test_a_position_is_refused_for_adapters_beside_their_module(kind):
    with pytest.raises(ValueError, match=f"`position` must be left out of a {kind} adapter"):
        SpeechAdapterConfig(kind=kind, position="before")
