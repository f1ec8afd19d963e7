"""Audio language models: lengths, placeholders, answers, and text alone as the base language model says it."""

from threading import Thread

import pytest
import torch
from audio_lm_models import ENCODERS, LANGUAGE_MODELS, join, make_clip, make_conversation, make_processor
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    PhiConfig,
    PhiForCausalLM,
    TextIteratorStreamer,
    WhisperConfig,
    WhisperForConditionalGeneration,
    pipeline,
)

from modeling import AudioLMConfig, AudioLMForConditionalGeneration, AudioLMModel, EmformerConfig, EmformerModel
from modeling.adapters import adapters_off
from modeling.audio_encoders import count_frames, find_frame_formula, find_max_inputs, load_encoder, run_encoder
from modeling.audio_lm_bundle import check_head
from modeling.audio_lm_modes import find_side

WHISPER_LAYERS = [(3, 1, 1), (3, 2, 1)]  # kernel, stride, padding
WAVE_LAYERS = [(10, 5, 0), *[(3, 2, 0)] * 4, *[(2, 2, 0)] * 2]


def count_by_hand(num_inputs: int, layers: list[tuple[int, int, int]]) -> int:
    """Outputs of convolutions, by listing the places where a kernel fits."""
    for kernel, stride, padding in layers:
        places = [place for place in range(0, num_inputs + 2 * padding, stride)]
        num_inputs = sum(place + kernel <= num_inputs + 2 * padding for place in places)
    return num_inputs


@pytest.fixture(scope="module")
def models(audio_lm_bases) -> dict[str, AudioLMForConditionalGeneration]:
    """A model of each encoder; the language models take turns."""
    pairs = zip(ENCODERS, (*LANGUAGE_MODELS, "llama"), strict=True)
    return {encoder: join(audio_lm_bases, encoder, llm) for encoder, llm in pairs}


@pytest.fixture(scope="module")
def model(models):
    return models["whisper"]


@pytest.fixture(scope="module")
def processor(model):
    return make_processor(model)


@pytest.mark.parametrize("kind", ENCODERS)
def test_frames_are_counted_as_convolutions_make_them(models, kind):
    layers = WHISPER_LAYERS if kind == "whisper" else WAVE_LAYERS
    lengths = (
        [*range(1, 201)] if kind == "whisper" else [1, 399, 400, 401, 719, 720, 721, 1_039, 1_040, 16_000, 31_999]
    )
    tower = models[kind].model.audio_tower
    by_hand = [count_by_hand(length, layers) for length in lengths]
    assert count_frames(tower, torch.tensor(lengths)).tolist() == by_hand
    offset, stride = find_frame_formula(tower)
    assert [max(0, (length + offset) // stride) for length in lengths] == by_hand


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_clip_takes_as_many_placeholders_as_the_model_makes_rows(models, kind):
    model, processor = models[kind], make_processor(models[kind])
    for seconds in (0.1, 0.2513, 0.9, 1.23457):
        clip = make_clip(seconds)
        batch = processor(text="<|audio|>", audio=[clip])
        tower = model.model.audio_tower
        frames = run_encoder(tower, batch["input_features"])[0].last_hidden_state.shape[1]
        assert (batch["input_ids"] == model.config.audio_token_id).sum() == -(-frames // 4)
        assert len(model.get_audio_features(batch["input_features"]).pooler_output) == -(-frames // 4)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_clip_is_heard_the_same_beside_longer_ones(models, kind):
    model, processor = models[kind], make_processor(models[kind])
    rows = [processor.extract(make_clip(seconds, seed=seed)) for seed, seconds in enumerate((0.6, 1.0, 0.311))]
    batch = processor.pad_features(rows)
    with torch.no_grad():
        together, frames = run_encoder(model.model.audio_tower, **batch, output_hidden_states=True)
        for row, features in enumerate(rows):
            alone, count = run_encoder(model.model.audio_tower, features.unsqueeze(0), output_hidden_states=True)
            assert count == frames[row]
            assert len(alone.hidden_states) == 3
            for ours, theirs in zip(together.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(ours[row, : int(count)], theirs[0], atol=2e-5, rtol=1e-4)


def test_a_clip_of_full_length_is_heard_as_by_the_stock_encoder(model):
    features = torch.randn(2, 16, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, frames = run_encoder(model.model.audio_tower, features, output_hidden_states=True)
        stock = model.model.audio_tower(features, output_hidden_states=True)
    assert torch.equal(ours.last_hidden_state, stock.last_hidden_state)
    assert frames.tolist() == [100, 100]
    for left, right in zip(ours.hidden_states, stock.hidden_states, strict=True):
        torch.testing.assert_close(left, right)


def test_whisper_may_hear_silence_up_to_its_30_s_as_the_stock_route_does(audio_lm_bases):
    model = join(audio_lm_bases, projector={"min_input_frames": 200})
    processor = make_processor(model)
    clips = [make_clip(0.5), make_clip(1.3, 1)]
    stock = processor.feature_extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
    for row, length in enumerate((50, 130)):  # two frames have the clip's last samples in them
        stock[row, :, length : length + 2] = stock[row, :, -1:]
    batch = processor(text="<|audio|><|audio|>", audio=clips)
    with torch.no_grad():
        expected = model.model.audio_tower(stock).last_hidden_state
        output, frames = model.model.encode_audio(batch["input_features"], batch["input_features_mask"])
        plain = run_encoder(model.model.audio_tower, batch["input_features"], batch["input_features_mask"])[0]
    assert frames.tolist() == [25, 65]
    for row, count in enumerate(frames.tolist()):
        torch.testing.assert_close(output.pooler_output[row, :count], expected[row, :count], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(plain.last_hidden_state[row, :count], expected[row, :count], atol=1e-2)
    assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1]


def test_an_emformer_keeps_the_contract_of_encoders():
    config = EmformerConfig(num_mel_bins=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    emformer = EmformerModel(config).eval()
    offset, stride = find_frame_formula(emformer)
    assert (offset, stride) == (0, config.subsampling_factor)
    output, frames = run_encoder(emformer, torch.randn(2, 30, 8), torch.tensor([[1] * 30, [1] * 21 + [0] * 9]))
    assert frames.tolist() == [30 // stride, 21 // stride]
    assert output.last_hidden_state.shape[1] == 30 // stride


def test_an_encoder_that_does_not_say_its_length_is_refused(model):
    with pytest.raises(ValueError, match="`encoder` must say how many frames it makes .* got a LlamaModel"):
        count_frames(model.model.language_model, torch.tensor([4]))


def test_lengths_that_follow_no_formula_are_refused(model, monkeypatch):
    tower = model.model.audio_tower
    monkeypatch.setattr(tower, "_get_feat_extract_output_lengths", lambda lengths: lengths.float().sqrt().long())
    with pytest.raises(ValueError, match="`encoder` must make a frame of every so many inputs"):
        find_frame_formula(tower)


def test_clips_beyond_the_positions_and_below_a_frame_are_refused(models):
    with pytest.raises(ValueError, match="`input_features` must have at most 200 frames a clip, got 202"):
        run_encoder(models["whisper"].model.audio_tower, torch.zeros(1, 16, 202))
    assert find_max_inputs(models["whisper"].model.audio_tower) == 200
    assert find_max_inputs(models["hubert"].model.audio_tower) is None
    with pytest.raises(ValueError, match="`input_features` must be long enough for one frame .* clip of 399"):
        run_encoder(models["hubert"].model.audio_tower, torch.zeros(1, 399))


def test_a_checkpoint_without_an_encoder_is_refused(audio_lm_bases, tmp_path):
    base = WhisperForConditionalGeneration.from_pretrained(audio_lm_bases["whisper"])
    state = {name: value for name, value in base.state_dict().items() if "encoder.layers.1" not in name}
    base.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="`encoder` must name a checkpoint with all weights of its encoder"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("llm", LANGUAGE_MODELS)
def test_text_alone_with_adapters_off_equals_the_base_bit_for_bit(audio_lm_bases, llm):
    base = AutoModelForCausalLM.from_pretrained(audio_lm_bases[llm]).eval()
    model = join(audio_lm_bases, "whisper", llm, encoder_mode="lora", llm_mode="lora").eval()
    for layer in find_side(model, "language_model").modules():
        for part in getattr(layer, "lora_B", {}).values():
            torch.nn.init.normal_(part.weight)
    tokens = torch.randint(0, 250, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    with torch.no_grad():
        expected = base(tokens, attention_mask=mask).logits
        with adapters_off(model):
            assert torch.equal(model(tokens, attention_mask=mask).logits, expected)
        assert not torch.equal(model(tokens, attention_mask=mask).logits, expected)  # the adapters do act
        model.model.language_model.disable_adapters()
        assert torch.equal(model(tokens, attention_mask=mask).logits, expected)


def test_placeholders_and_rows_that_differ_in_number_are_refused(model, processor):
    batch = processor(text="<|audio|>?", audio=[make_clip(0.5)])
    number = int((batch["input_ids"] == processor.audio_token_id).sum())
    short = {**batch, "input_ids": batch["input_ids"][:, 1:], "attention_mask": batch["attention_mask"][:, 1:]}
    with pytest.raises(ValueError, match=f"got {number - 1} placeholders and {number} rows"):
        model(**short)
    with pytest.raises(ValueError, match=f"got {number} placeholders and 0 rows"):
        model(batch["input_ids"])
    rows = model.get_audio_features(batch["input_features"]).pooler_output
    with pytest.raises(ValueError, match=f"got {number - 1} placeholders and {number} rows"):
        model(short["input_ids"], audio_embeds=rows)


def test_a_clip_is_not_split_between_two_prompts(model, processor):
    batch = processor(text=["<|audio|>a", "<|audio|>b"], audio=[make_clip(0.5), make_clip(0.5, 1)])
    ids = batch["input_ids"].clone()
    is_audio = ids == processor.audio_token_id
    ids[0, is_audio[0].nonzero()[0]], ids[1, 0] = 5, 5
    ids[1] = torch.cat([ids[1, 1:], ids[1, :1]])
    ids[1, -2:] = processor.audio_token_id
    assert (ids == processor.audio_token_id).sum() != is_audio.sum() or not torch.equal(ids, batch["input_ids"])
    with pytest.raises(ValueError, match="prompt 0 ends within a clip"):
        model(**{**batch, "input_ids": ids})


def test_tokens_or_embeddings_are_needed_and_not_both(model, processor):
    with pytest.raises(ValueError, match="`input_ids` or `inputs_embeds` must be given"):
        model()
    batch = processor(text="<|audio|>?", audio=[make_clip(0.5)])
    embeds = torch.zeros(1, 3, 32)
    with pytest.raises(ValueError, match="`input_ids` must be given beside audio"):
        model(inputs_embeds=embeds, input_features=batch["input_features"])


def test_several_clips_a_prompt_are_heard_in_order(model, processor):
    clips = [make_clip(0.5, 0), make_clip(0.5, 1)]
    batch = processor(text="<|audio|> or <|audio|>?", audio=clips)
    swapped = processor(text="<|audio|> or <|audio|>?", audio=clips[::-1])
    with torch.no_grad():
        rows = [model.get_audio_features(processor.extract(clip).unsqueeze(0)).pooler_output for clip in clips]
        embeds = model.model.embed_tokens(batch["input_ids"])
        embeds[batch["input_ids"] == processor.audio_token_id] = torch.cat(rows)
        by_hand = model(inputs_embeds=embeds).logits
        torch.testing.assert_close(model(**batch).logits, by_hand, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(model(**swapped).logits, by_hand, atol=1e-2)


def test_states_from_a_cache_give_the_same_as_the_encoder(models):
    for kind in ENCODERS:
        model, processor = models[kind], make_processor(models[kind])
        batch = processor(text=["<|audio|>?", "So <|audio|>!"], audio=[make_clip(0.5), make_clip(0.81, 1)])
        with torch.no_grad():
            output, frames = model.model.encode_audio(batch["input_features"], batch["input_features_mask"])
            rows = model.model.project_audio(output.pooler_output, frames)
            cached = model(batch["input_ids"], attention_mask=batch["attention_mask"], audio_embeds=rows).logits
            assert torch.equal(model(**batch).logits, cached)


@pytest.mark.parametrize("layer", [0, 1, -1, "last", "mix"])
def test_the_projector_reads_the_layers_that_it_is_told(audio_lm_bases, layer):
    model = join(audio_lm_bases, projector={"encoder_layer": layer})
    features = torch.randn(1, 16, 50, generator=torch.Generator().manual_seed(0))
    states = run_encoder(model.model.audio_tower, features, output_hidden_states=True)[0].hidden_states
    chosen = {"last": states[-1], "mix": sum(states) / 3} | dict(
        zip((0, 1, -1), (*states[:2], states[-1]), strict=True)
    )
    expected = model.model.multi_modal_projector
    rows = model.get_audio_features(features, output_hidden_states=True)
    stacked = torch.nn.functional.pad(chosen[layer], (0, 0, 0, 3)).unflatten(1, (7, 4)).flatten(2)
    by_hand = expected.linear_2(expected.act(expected.linear_1(stacked)))[0]
    torch.testing.assert_close(rows.pooler_output, by_hand, atol=1e-5, rtol=1e-4)
    assert len(rows.hidden_states) == 3
    assert torch.equal(rows.hidden_states[1], states[1])


PROJECTORS = {
    "mlp": {"window_frames": 4},
    "linear": {"window_frames": 5},
    "stacked_swiglu": {"window_frames": 8},
    "qformer": {"window_frames": 15, "window_tokens": 3, "projector_heads": 2},
}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_projector_learns_and_gives_the_rows_it_says(audio_lm_bases, kind):
    model = join(audio_lm_bases, projector={"projector_type": kind, **PROJECTORS[kind]})
    processor = make_processor(model)
    size, tokens = PROJECTORS[kind]["window_frames"], PROJECTORS[kind].get("window_tokens", 1)
    rows = [processor.extract(make_clip(seconds, seed)) for seed, seconds in enumerate((0.5, 1.5))]
    batch = processor.pad_features(rows)
    counts = [-(-frames // size) * tokens for frames in (25, 75)]
    output = model.get_audio_features(**batch).pooler_output
    assert len(output) == sum(counts) == sum(processor.count_tokens(n) for n in (50, 150))
    alone = model.get_audio_features(rows[0].unsqueeze(0)).pooler_output
    torch.testing.assert_close(output[: counts[0]], alone, atol=1e-4, rtol=1e-4)
    training = processor.encode_conversations([make_conversation(make_clip(0.5))])
    model(**training).loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_answers_in_a_batch_are_those_alone(model, processor):
    clips = [make_clip(0.5, 0), make_clip(1.2, 1), make_clip(0.9, 2)]
    texts = ["<|audio|>a?", "Hear <|audio|> and <|audio|>?"]
    options = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(**processor(text=texts, audio=clips), **options)
    for row, (text, own) in enumerate(zip(texts, (clips[:1], clips[1:]), strict=True)):
        prompt = processor(text=text, audio=own)
        alone = model.generate(**prompt, **options)
        assert torch.equal(alone[0, prompt["input_ids"].shape[1] :], together[row, -6:][: len(alone[0])])


def test_beams_of_prompts_with_several_clips_are_those_alone(model, processor):
    clips = [make_clip(0.5, 0), make_clip(0.5, 1), make_clip(0.5, 2)]
    texts = ["Hear <|audio|> and <|audio|>?", "<|audio|>...........?"]
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    together = model.generate(**processor(text=texts, audio=clips), **options)[:, -5:]
    first = model.generate(**processor(text=texts[0], audio=clips[:2]), **options)[:, -5:]
    second = model.generate(**processor(text=texts[1], audio=clips[2:]), **options)[:, -5:]
    assert torch.equal(together, torch.cat([first, second]))
    wrong = model.generate(**processor(text=texts[0], audio=[clips[0], clips[0]]), **options)[:, -5:]
    assert not torch.equal(wrong, first)  # the second clip matters


def test_the_tower_hears_once_however_many_answers_there_are(model, processor, monkeypatch):
    heard = []
    encode = AudioLMModel.encode_audio
    monkeypatch.setattr(
        AudioLMModel, "encode_audio", lambda *args, **kwargs: heard.append(1) or encode(*args, **kwargs)
    )
    batch = processor(text="<|audio|>?", audio=[make_clip(0.5)])
    torch.manual_seed(0)
    output = model.generate(**batch, do_sample=True, num_return_sequences=3, max_new_tokens=4)
    assert len(output) == 3
    assert heard == [1]
    assert len({tuple(row.tolist()) for row in output}) > 1


def test_processors_that_look_at_the_prompt_know_the_placeholder(model, processor):
    assert model.config.audio_token_id == model.config.text_config.vocab_size  # beyond every score
    batch = processor(text="<|audio|>?", audio=[make_clip(0.5)])
    output = model.generate(
        **batch, max_new_tokens=12, do_sample=False, repetition_penalty=5.0, no_repeat_ngram_size=2
    )
    said = output[0, batch["input_ids"].shape[1] :].tolist()
    assert len(said) == len(set(said))
    assert processor.audio_token_id not in said


def test_answers_are_the_same_without_keys_and_values(model, processor):
    batch = processor(text=["<|audio|>?", "b<|audio|>"], audio=[make_clip(0.5), make_clip(0.7, 1)])
    options = {"max_new_tokens": 4, "do_sample": False}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))


def test_text_streams_token_by_token(model, processor):
    batch = processor(text="<|audio|>?", audio=[make_clip(0.5)])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    options = {**batch, "max_new_tokens": 5, "do_sample": False}
    thread = Thread(target=model.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    whole = processor.decode(model.generate(**options)[0, batch["input_ids"].shape[1] :])
    assert "".join(pieces) == whole
    assert len(pieces) > 1


def test_the_any_to_any_pipeline_answers(model, processor, caplog):
    pipe = pipeline("any-to-any", model=model, processor=processor)
    messages = make_conversation(make_clip(0.5), answer=None)
    options = {"max_new_tokens": 4, "return_full_text": False, "generate_kwargs": {"do_sample": False}}
    answer = pipe(text=messages, **options)[0]["generated_text"]
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert answer == processor.decode(tokens, skip_special_tokens=True)
    assert answer
    assert "is not supported" not in caplog.text


def test_the_loss_is_that_of_the_answer_alone(model, processor):
    batch = processor.encode_conversations([make_conversation(make_clip(0.5)), make_conversation(None, "Hi", "hello")])
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    places = (batch["labels"][:, 1:] != -100).nonzero()
    losses = [-logits[row, place].log_softmax(-1)[batch["labels"][row, place + 1]] for row, place in places]
    assert len(places) == len("ok") + 1 + len("hello") + 1
    torch.testing.assert_close(model(**batch).loss, torch.stack(losses).mean())


def test_auto_classes_know_the_model():
    config = AudioLMConfig(
        audio_config=WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2),
        text_config=LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20),
        audio_token_id=3,
    )
    model = AutoModel.from_config(config)
    assert isinstance(model, AudioLMModel)
    names = [name for name, _ in model.named_children()]
    assert names == ["audio_tower", "multi_modal_projector", "language_model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_type": "cnn"}, "`projector_type` must be one of mlp, stacked_swiglu, qformer, linear, got 'cnn'"),
        ({"window_frames": 0}, "`window_frames` must be at least 1, got 0"),
        ({"window_tokens": 2}, "`window_tokens` must be 1 with a projector that stacks frames, got 2 with 'mlp'"),
        ({"projector_type": "qformer", "projector_heads": 3}, "`projector_heads` must divide the projector's width"),
        ({"encoder_layer": 9}, "`encoder_layer` must be last, mix or an index below 5, got 9"),
        ({"encoder_layer": "first"}, "`encoder_layer` must be last, mix or an index below 5, got 'first'"),
        ({"min_input_frames": 3001}, "`min_input_frames` must be 0 to 3000, got 3001"),
        ({"audio_token_id": -1}, "`audio_token_id` must be a token's number, got -1"),
    ],
)
def test_configurations_that_make_no_model_are_refused(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        AudioLMConfig(audio_config=WhisperConfig(), text_config=LlamaConfig(hidden_size=64), **options)


def test_language_models_with_another_head_are_refused():
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=2.0)).eval()
    for causal_lm in (gemma, PhiForCausalLM(PhiConfig(**sizes)).eval()):
        with pytest.raises(ValueError, match="`language_model` must make its logits with one linear layer .* got a"):
            check_head(causal_lm)
