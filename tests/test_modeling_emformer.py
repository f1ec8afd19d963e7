"""Emformer gives what its equations say, whole, in batches and in streams."""

import copy
import itertools

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from slow_emformer import encode
from transformers import AutoModel, AutoModelForCTC

from modeling import EmformerCache, EmformerConfig, EmformerForCTC, EmformerModel, SpeechAdapterConfig

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
# Segment, left context, right context, memories.
CONTEXTS = [
    (segment, left, right, memory)
    for segment, left, right, memory in itertools.product((1, 3, 4), (0, 5, 30), (0, 1, 3), (0, 1, 3))
    if right <= segment
]


def make_model(context=(4, 5, 2, 3), model_class=EmformerModel, **settings):
    torch.manual_seed(0)
    segment, left, right, memory = context
    config = EmformerConfig(
        segment_length=segment,
        left_context_length=left,
        right_context_length=right,
        max_memory_size=memory,
        **{**SIZES, "num_mel_bins": 8, "subsampling_channels": 12, **settings},
    )
    return model_class(config).eval()


@pytest.mark.parametrize("memory_type", ["attention", "mean"])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_forward_gives_what_the_equations_of_the_paper_give(context, memory_type):
    model = make_model(context, memory_type=memory_type).double()
    for num_frames in (1, 10, 97):  # 97 frames of the shortest contexts are several blocks
        frames = torch.randn(num_frames, 16, dtype=torch.double)
        with torch.no_grad():
            output = model(inputs_embeds=frames[None]).last_hidden_state[0]
            torch.testing.assert_close(output, encode(model, frames), rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory_type", ["attention", "mean"])
def test_gradients_are_those_of_the_equations(memory_type):
    model = make_model(memory_type=memory_type).double()
    frames = torch.randn(150, 16, dtype=torch.double, requires_grad=True)
    weights, gradients = torch.randn(150, 16, dtype=torch.double), []
    for encoded in (model(inputs_embeds=frames[None]).last_hidden_state[0], encode(model, frames)):
        used = [frames, *(value for name, value in model.named_parameters() if not name.startswith("subsampler"))]
        gradients.append(torch.autograd.grad((encoded * weights).sum(), used))
    assert min(gradient.abs().max() for gradient in gradients[0]) > 1e-3
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def stream(model, features, cuts, **caches):
    """Encodes `features` `(batch, frames, mel)` cut at `cuts`; returns all frames, and the last call's output."""
    parts, start = [], 0
    for end in [*cuts, features.shape[1]]:
        is_last = end == features.shape[1]
        output = model(features[:, start:end], use_cache=True, is_last=is_last, **caches)
        caches = {"past_key_values": output.past_key_values, "padding_cache": output.padding_cache}
        parts.append(output[0])
        start = end
    return torch.cat(parts, 1), output


@pytest.mark.parametrize("memory_type", ["attention", "mean"])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_a_stream_gives_what_the_whole_utterance_gives(context, memory_type):
    model = make_model(context, memory_type=memory_type)
    for num_frames in (50, 143):
        features = torch.randn(1, num_frames, 8)
        streamed, _ = stream(model, features, sorted({1, 2, 9, 17, 40, 41} & set(range(num_frames))))
        with torch.no_grad():
            torch.testing.assert_close(streamed, model(features).last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"subsampling": "stack"}, {"subsampling_factor": 8}, {"output_size": 12}], ids=str
)
def test_a_stream_gives_what_the_whole_utterance_gives_behind_other_subsamplings(settings):
    model = make_model(**settings)
    features = torch.randn(2, 150, 8)
    streamed, _ = stream(model, features, [3, 40, 40, 90])  # a call may bring nothing
    with torch.no_grad():
        torch.testing.assert_close(streamed, model(features).last_hidden_state, rtol=0, atol=1e-5)


def test_a_stream_gives_each_layer_what_the_whole_utterance_gives():
    model = make_model()
    features = torch.randn(1, 100, 8)
    first = model(features[:, :61], use_cache=True, output_hidden_states=True)
    caches = {"past_key_values": first.past_key_values, "padding_cache": first.padding_cache}
    second = model(features[:, 61:], **caches, is_last=True, output_hidden_states=True)
    whole = model(features, output_hidden_states=True)
    assert len(whole.hidden_states) == 3
    for early, late, state in zip(first.hidden_states, second.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(torch.cat([early, late], 1), state, rtol=0, atol=1e-5)


def test_an_embedded_stream_gives_what_the_whole_utterance_gives():
    model = make_model()
    frames = torch.randn(1, 30, 16)
    first = model(inputs_embeds=frames[:, :13], use_cache=True)
    second = model(inputs_embeds=frames[:, 13:], past_key_values=first.past_key_values, is_last=True)
    streamed = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
    torch.testing.assert_close(streamed, model(inputs_embeds=frames).last_hidden_state, rtol=0, atol=1e-5)


def take(output, row):
    """The real frames of a row."""
    return output.last_hidden_state[row, : output.attention_mask[row].sum()]


def test_streams_of_a_batch_are_where_they_are_alone():
    model = make_model()
    features = torch.randn(3, 120, 8)
    # New frames of each stream in each call; a stream is over with its last.
    calls = [(5, 40, 0), (0, 3, 21), (60, 30, 1), (55, 0, 50), (0, 0, 9)]
    ends = [sum(call[row] for call in calls) for row in range(3)]
    caches, starts, parts = {}, [0, 0, 0], [[], [], []]
    for call in calls:
        chunk = torch.full((3, 60, 8), torch.nan)  # padding may be anything
        for row, count in enumerate(call):
            chunk[row, :count] = features[row, starts[row] : starts[row] + count]
            starts[row] += count
        mask = torch.arange(60) < torch.tensor(call)[:, None]
        is_last = torch.tensor(starts) == torch.tensor(ends)
        output = model(chunk, mask, use_cache=True, is_last=is_last, **caches)
        caches = {"past_key_values": output.past_key_values, "padding_cache": output.padding_cache}
        for row in range(3):
            parts[row].append(take(output, row))
    assert caches["past_key_values"].num_frames == [30, 18, 20]
    for row, end in enumerate(ends):
        alone = model(features[row : row + 1, :end]).last_hidden_state[0]
        torch.testing.assert_close(torch.cat(parts[row]), alone, rtol=0, atol=1e-5)


def test_a_reset_row_begins_anew_and_leaves_the_others_alone():
    model = make_model()
    features = torch.randn(2, 100, 8)
    features[1, :50] = torch.nan  # a stream that went wrong
    first = model(features[:, :50], use_cache=True)
    caches = {"past_key_values": first.past_key_values, "padding_cache": first.padding_cache}
    for cache in caches.values():
        cache.reset([1])
    second = model(features[:, 50:], **caches, is_last=True)
    torch.testing.assert_close(
        torch.cat([take(first, 0), take(second, 0)]), model(features[:1]).last_hidden_state[0], rtol=0, atol=1e-5
    )
    alone = model(features[1:, 50:]).last_hidden_state[0]
    torch.testing.assert_close(take(second, 1), alone, rtol=0, atol=1e-5)


def test_rows_of_streams_can_be_reordered_repeated_and_left_out():
    model = make_model()
    features = torch.randn(3, 100, 8)
    first = model(features[:, :50], use_cache=True)
    caches = {"past_key_values": first.past_key_values, "padding_cache": first.padding_cache}
    for cache in caches.values():
        cache.batch_select_indices([2, 0, 2])
    second = model(features[[2, 0, 1], 50:], **caches, is_last=True)
    expected = model(torch.cat([features[[2, 0, 2], :50], features[[2, 0, 1], 50:]], 1)).last_hidden_state
    streamed = torch.cat([first.last_hidden_state[[2, 0, 2]], second.last_hidden_state], 1)
    torch.testing.assert_close(streamed, expected, rtol=0, atol=1e-5)


def test_a_cache_may_have_segments_of_its_own():
    model = make_model()
    features = torch.randn(1, 150, 8)
    streamed, _ = stream(model, features, [70], past_key_values=EmformerCache(model.config, segment_length=7))
    whole = model(features, segment_length=7).last_hidden_state
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-5)
    assert (streamed - model(features).last_hidden_state).abs().max() > 0.01


def test_a_stream_needs_no_more_memory_however_long_it_is():
    model = make_model()
    _, short = stream(model, torch.randn(1, 400, 8), range(16, 400, 16))
    _, long = stream(model, torch.randn(1, 6000, 8), range(160, 6000, 160))
    sizes = [
        (output.past_key_values.key_values.numel(), output.past_key_values.pending.untyped_storage().nbytes())
        for output in (short, long)
    ]
    assert sizes[0][0] == sizes[1][0] == 2 * (3 + 2 + 5 + 4) * 2 * 16  # layers, keys, keys and values
    assert sizes[1][1] < 3000


def test_an_utterance_does_not_depend_on_its_batch():
    model = make_model()
    lengths = [143, 57, 8, 4]
    features = torch.full((4, 143, 8), torch.nan)
    for row, length in enumerate(lengths):
        features[row, :length] = torch.randn(length, 8)
    output = model(features, torch.arange(143) < torch.tensor(lengths)[:, None])
    for row, length in enumerate(lengths):
        alone = model(features[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(take(output, row), alone, rtol=0, atol=1e-5)


def test_eager_attention_gives_what_sdpa_gives():
    model = make_model()
    features = torch.randn(2, 143, 8)
    outputs = []
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        streamed, _ = stream(model, features, [50])
        outputs.append((model(features).last_hidden_state, streamed))
    for sdpa, eager in zip(*outputs, strict=True):
        torch.testing.assert_close(sdpa, eager, rtol=0, atol=1e-5)
        assert not torch.equal(sdpa, eager)  # two ways of computing


def test_attention_grows_linearly_with_the_utterance(monkeypatch):
    model = make_model()
    sizes = []
    original = torch.nn.functional.scaled_dot_product_attention

    def count(query, key, *args, **kwargs):
        sizes[-1] += query.shape[0] * query.shape[2] * key.shape[2]
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    for num_frames in (2000, 4000):
        sizes.append(0)
        model(torch.zeros(1, num_frames, 8))
    assert 0 < sizes[0]
    assert sizes[1] < 2.1 * sizes[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = make_model().train()
    features, weights = torch.randn(2, 143, 8), torch.randn(2, 35, 16)
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        model.zero_grad()
        (model(features).last_hidden_state * weights).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-5)


def test_output_lengths_are_those_of_the_output():
    model = make_model()
    for num_frames in range(4, 30):
        expected = model(torch.zeros(1, num_frames, 8)).last_hidden_state.shape[1]
        assert model._get_feat_extract_output_lengths(torch.tensor([num_frames])).tolist() == [expected]
        mask = torch.arange(40) < num_frames
        assert model(torch.zeros(1, 40, 8), mask[None]).attention_mask.sum().item() == expected


def test_a_checkpoint_gives_the_same_outputs(tmp_path):
    model = make_model(model_class=EmformerForCTC)
    model.save_pretrained(tmp_path)
    features = torch.randn(1, 50, 8)
    whole = AutoModelForCTC.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(whole(features).logits, model(features).logits, rtol=0, atol=0)
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    expected = model.encoder(features).last_hidden_state
    torch.testing.assert_close(encoder(features).last_hidden_state, expected, rtol=0, atol=0)


def test_the_ctc_loss_is_the_mean_over_utterances_of_the_loss_a_label():
    model = make_model(model_class=EmformerForCTC, vocab_size=6)
    features = torch.randn(2, 60, 8)
    mask = torch.arange(60) < torch.tensor([[60], [41]])
    labels = torch.tensor([[1, 2, 2], [3, -100, -100]])
    output = model(features, mask, labels)
    losses = []
    for row, (length, targets) in enumerate(((15, [1, 2, 2]), (10, [3]))):
        log_probs = output.logits[row, :length].log_softmax(-1)
        loss = torch.nn.functional.ctc_loss(log_probs, torch.tensor(targets), [length], [len(targets)])
        losses.append(loss)
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    assert output.logits_lengths.tolist() == [15, 10]
    assert output.logits[1, 10:].argmax(-1).tolist() == [0] * 5


def test_a_bottleneck_between_layers_streams_as_it_encodes():
    model = make_model(model_class=EmformerForCTC)
    features = torch.randn(1, 143, 8)
    base = model(features).logits
    target = r"encoder\.layers\.\d+"
    model.add_adapter(SpeechAdapterConfig(kind="bottleneck", target_modules=target, hidden_sizes=[4]), "ann")
    assert torch.equal(model.eval()(features).logits, base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "speech_adapter" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted = model(features).logits
    assert (adapted - base).abs().max() > 0.01
    streamed, _ = stream(model, features, [30, 31, 90])
    torch.testing.assert_close(streamed, adapted, rtol=0, atol=1e-5)
    model.disable_adapters()
    assert torch.equal(model(features).logits, base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"right_context_length": 5}, r"`right_context_length` must be at most `segment_length` \(4\), got 5"),
        ({"segment_length": 0}, "`segment_length` must be at least 1, got 0"),
        ({"left_context_length": -1}, "`left_context_length` must be at least 0, got -1"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, got 0"),
        ({"num_attention_heads": 3}, r"`hidden_size` must be a multiple of `num_attention_heads` \(3\), got 256"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0"),
        ({"pad_token_id": 32}, r"`pad_token_id` must be a class below `vocab_size` \(32\), got 32"),
        ({"memory_type": "max"}, '`memory_type` must be "attention" or "mean", got \'max\''),
        ({"subsampling": "pool"}, '`subsampling` must be "conv" or "stack" or "none", got \'pool\''),
        ({"subsampling_factor": 6}, "`subsampling_factor` must be a power of two from 2 on for convolutions, got 6"),
        ({"subsampling_channels": 5}, "`subsampling_channels` must be even, got 5"),
        (
            {"subsampling": "stack", "subsampling_factor": 3},
            r"`hidden_size` must be a multiple of `subsampling_factor`",
        ),
        ({"subsampling": "none"}, r"`num_mel_bins` must be `hidden_size` \(256\) and `subsampling_factor` 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configurations_of_no_model_are_refused(settings, message):
    with pytest.raises(StrictDataclassError, match=message):
        EmformerConfig(**settings)


def test_inputs_that_do_not_fit_are_refused():
    model = make_model()
    features, mask = torch.zeros(2, 20, 8), torch.ones(2, 20)
    with pytest.raises(ValueError, match="`input_features` must be given, or `inputs_embeds` in their place"):
        model()
    with pytest.raises(ValueError, match=r"`input_features` must be \(batch, frames, 8\), got \(2, 20, 7\)"):
        model(features[:, :, :7])
    with pytest.raises(ValueError, match="`input_features` must have at least 4 frames an utterance, got 3"):
        model(features[:, :3])
    with pytest.raises(ValueError, match=r"`attention_mask` must be \(batch, frames\) \(2, 20\), got \(2, 19\)"):
        model(features, mask[:, 1:])
    with pytest.raises(ValueError, match="`attention_mask` must have its zeros on the right"):
        model(features, torch.arange(20).expand(2, -1) >= 2)
    with pytest.raises(ValueError, match="`right_context_length` must be at most `segment_length` .1., got 2"):
        model(features, segment_length=1)
    with pytest.raises(ValueError, match="`segment_length` must be at least 1, got 0"):
        model(features, segment_length=0)
    with pytest.raises(ValueError, match="`use_cache` must be True for streams, got False with a cache or `is_last`"):
        model(features, is_last=True)


def test_streams_that_do_not_fit_are_refused():
    model = make_model(model_class=EmformerForCTC)
    features = torch.zeros(2, 40, 8)
    output = model(features, use_cache=True, is_last=torch.tensor([False, True]))
    caches = {"past_key_values": output.past_key_values, "padding_cache": output.padding_cache}
    before = copy.deepcopy(vars(output.padding_cache))
    with pytest.raises(ValueError, match=r"for streams that are over, got some for rows \[1\]. Reset these rows"):
        model(features, **caches)
    with pytest.raises(ValueError, match="`past_key_values` must be of a batch of 1, got one of 2"):
        model(features[:1], **caches)
    assert vars(output.padding_cache)["num_remaining"] == before["num_remaining"]
    with pytest.raises(ValueError, match="`past_key_values` and `padding_cache` must come from the same call"):
        model(features, past_key_values=output.past_key_values)
    with pytest.raises(ValueError, match="`segment_length` must be the cache's for streams"):
        model(features, **caches, segment_length=4)
    with pytest.raises(ValueError, match="`labels` must be left out of streams"):
        model(features, use_cache=True, labels=torch.tensor([[1], [2]]))
    with pytest.raises(ValueError, match="`use_cache` must be False in training mode, got True"):
        model.train()(features, use_cache=True)
    with pytest.raises(ValueError, match=r"`labels` must fit the audio, got rows \[0, 1\]"):
        model(features, labels=torch.ones(2, 11, dtype=torch.long))
