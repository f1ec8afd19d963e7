"""The processor of audio language models: placeholders, windows, templates, and labels by place."""

import numpy as np
import pytest
import soundfile
import torch
from audio_lm_models import RATE, join, make_clip, make_conversation, make_processor, make_tokenizer
from transformers import AutoFeatureExtractor, AutoProcessor, WhisperFeatureExtractor

from modeling import AudioLMProcessor
from modeling.audio_lm_sides import add_audio_token, load_tokenizer
from modeling.processing_audio_lm import FLATTEN_TEMPLATE, PLAIN_TEMPLATE

IGNORED = -100


@pytest.fixture(scope="module")
def processor(audio_lm_bases) -> AudioLMProcessor:
    return make_processor(join(audio_lm_bases))


@pytest.fixture(scope="module")
def wave_processor(audio_lm_bases) -> AudioLMProcessor:
    return make_processor(join(audio_lm_bases, "wav2vec2"))


def ask(messages: list[dict], processor: AudioLMProcessor):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)


def test_placeholders_are_as_many_as_the_clips_rows(processor):
    clips = [make_clip(0.5), make_clip(1.03, 1), make_clip(0.01, 2)]
    batch = processor(text=["a<|audio|>b<|audio|>", "<|audio|>"], audio=clips)
    # 50, 103 and 1 frames of features; half as many frames; a row for each four, rounded up
    counts = [7, 13, 1]
    is_audio = batch["input_ids"] == processor.audio_token_id
    assert is_audio.sum(1).tolist() == [counts[0] + counts[1], counts[2]]
    assert batch["input_features_mask"].sum(1).tolist() == [50, 103, 1]
    assert batch["input_features"].shape == (3, 16, 103)
    assert processor.decode(batch["input_ids"][0][~is_audio[0]]) == "ab"


def test_prompts_are_padded_on_the_left(processor):
    batch = processor(text=["a long question", "b"])
    assert batch["attention_mask"][1].tolist() == [0] * 14 + [1]
    assert "input_features" not in batch


def test_features_are_those_of_the_clip_followed_by_silence(processor):
    clip = make_clip(0.5)
    extractor: WhisperFeatureExtractor = processor.feature_extractor
    stock = extractor(clip, sampling_rate=RATE, return_tensors="pt").input_features[0]  # padded to 2 s
    torch.testing.assert_close(processor.extract(clip), stock[:, :50])


def test_a_long_clip_becomes_windows_one_after_the_other(processor):
    clip = make_clip(5.1)  # the encoder's positions last for 2 s
    windows = processor.split_clip(clip)
    assert [len(window) for window in windows] == [27_200] * 3
    assert np.array_equal(np.concatenate(windows), clip)
    batch = processor(text="<|audio|>?", audio=[clip])
    assert batch["input_features"].shape == (3, 16, 170)
    for row, window in enumerate(windows):
        assert torch.equal(batch["input_features"][row], processor.extract(window))
    assert (batch["input_ids"] == processor.audio_token_id).sum() == 3 * processor.count_tokens(170) == 3 * 22


@pytest.mark.parametrize("seconds", [2.0, 2.0001, 3.99, 4.0, 4.2])
def test_no_window_is_longer_than_the_encoder_takes(processor, seconds):
    windows = processor.split_clip(make_clip(seconds))
    assert max(map(len, windows)) <= 2 * RATE
    assert min(map(len, windows)) > 0.6 * RATE
    assert sum(map(len, windows)) == round(seconds * RATE)


def test_waves_are_normalised_by_themselves(wave_processor):
    batch = wave_processor(text=["<|audio|>"] * 2, audio=[make_clip(0.5), 7 * make_clip(0.2, 1) + 1])
    for row, length in enumerate((8000, 3200)):
        wave = batch["input_features"][row, :length]
        assert abs(float(wave.mean())) < 1e-4
        assert float(wave.std()) == pytest.approx(1, abs=1e-2)
    assert not batch["input_features"][1, 3200:].any()
    assert batch["input_features_mask"].sum(1).tolist() == [8000, 3200]


def test_the_template_puts_placeholders_where_the_audio_is(processor, tmp_path):
    soundfile.write(tmp_path / "clip.wav", make_clip(0.5), RATE)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "text", "text": "First "}, {"type": "audio", "path": str(tmp_path / "clip.wav")},
            {"type": "text", "text": " then "}, {"type": "audio", "audio": make_clip(0.2)},
        ]},
    ]  # fmt: skip
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nFirst <|audio|> then <|audio|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    batch = ask(messages, processor)
    assert batch["input_features_mask"].sum(1).tolist() == [50, 20]
    assert isinstance(messages[1]["content"], list)  # the user's own stays as it is


def test_plain_text_reads_as_in_the_language_models_own_template(processor):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    own = make_tokenizer().apply_chat_template(messages, tokenize=False)
    assert processor.apply_chat_template(messages) == own
    plain = AudioLMProcessor(processor.feature_extractor, processor.tokenizer, FLATTEN_TEMPLATE + PLAIN_TEMPLATE)
    assert plain.apply_chat_template(messages) == "User:\nHi\nAssistant:\nHello<|im_end|>\n"


def test_labels_are_the_answers_and_their_ends_alone(processor):
    conversation = [
        *make_conversation(make_clip(0.5), "One?", "yes"),
        *make_conversation(make_clip(0.3, 1), "Two?", "no"),
    ]
    batch = processor.encode_conversations([conversation, make_conversation(None, "Hi", "hello")])
    learned = [row[row != IGNORED] for row in batch["labels"]]
    assert [processor.decode(row) for row in learned] == ["yes<|im_end|>no<|im_end|>", "hello<|im_end|>"]
    is_learned = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][is_learned], batch["input_ids"][is_learned])
    assert not is_learned[batch["attention_mask"] == 0].any()
    assert not is_learned[batch["input_ids"] == processor.audio_token_id].any()


def test_an_end_token_that_pads_too_is_learned(processor):
    """Masked by its number, as elsewhere, the end of every answer would be lost and no answer would end."""
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id
    labels = processor.encode_conversations([make_conversation(None), make_conversation(None, answer="longer")])[
        "labels"
    ]
    ends = [row[row != IGNORED][-1] for row in labels]
    assert ends == [processor.tokenizer.eos_token_id] * 2


def test_a_model_is_asked_with_the_very_prompt_that_it_learned(processor):
    for clip in (make_clip(0.5), None):
        messages = make_conversation(clip, "What is said?", "nothing")
        training = processor.encode_conversations([messages])
        prompt = ask(messages[:-1], processor)["input_ids"][0]
        first = int((training["labels"][0] != IGNORED).nonzero()[0])
        assert torch.equal(training["input_ids"][0, :first], prompt)


def test_lengths_from_a_cache_take_the_place_of_clips(processor):
    conversations = [make_conversation(make_clip(0.5)), make_conversation(make_clip(0.9, 1))]
    whole = processor.encode_conversations(conversations)
    cached = processor.encode_conversations(conversations, num_audio_tokens=[7, 12])
    assert "input_features" not in cached
    assert all(torch.equal(cached[name], whole[name]) for name in ("input_ids", "attention_mask", "labels"))


def test_a_template_with_assistant_marks_gives_the_same_places(processor):
    marked = processor.chat_template.replace(
        "{{ message.content }}<|im_end|>",
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>{% endif %}",
    )
    assert marked != processor.chat_template
    messages = make_conversation(make_clip(0.5), "One?", "yes")
    stock = processor.apply_chat_template(
        messages, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = processor.encode_conversations([messages])["labels"][0]
    learned = torch.as_tensor(stock["assistant_masks"])[0].bool()
    assert torch.equal(stock["input_ids"][0][learned], ours[ours != IGNORED])


def test_requests_for_transcription_ask_once_a_clip(processor, tmp_path):
    soundfile.write(tmp_path / "clip.wav", make_clip(0.5), RATE)
    texts = processor.apply_transcription_request(
        [str(tmp_path / "clip.wav")] * 2, prompt=[None, "Write in English."], tokenize=False
    )
    assert ["<|audio|>Transcribe the speech." in texts[0], "<|audio|>Write in English." in texts[1]] == [True, True]
    batch = processor.apply_transcription_request(str(tmp_path / "clip.wav"))
    assert (batch["input_ids"] == processor.audio_token_id).sum() == 7
    assert torch.equal(batch["input_ids"], processor.apply_transcription_request(make_clip(0.5))["input_ids"])
    with pytest.raises(ValueError, match="`prompt` must be one for all clips or one a clip, got 1 prompts and 2"):
        processor.apply_transcription_request([make_clip(0.5)] * 2, prompt=["a"])


def test_a_saved_processor_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, AudioLMProcessor)
    messages = make_conversation(make_clip(3.3), answer=None)
    ours, theirs = ask(messages, processor), ask(messages, loaded)
    assert ours.keys() == theirs.keys() == {"input_ids", "attention_mask", "input_features", "input_features_mask"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert set(ours) <= set(loaded.model_input_names)


@pytest.mark.parametrize(("text", "num_clips"), [("no audio", 1), ("<|audio|> <|audio|>", 1), ("<|audio|>", 0)])
def test_placeholders_and_clips_that_differ_in_number_are_refused(processor, text, num_clips):
    clips = [make_clip(0.2)] * num_clips
    count = text.count("<|audio|>")
    message = (
        f"`text` must have a placeholder <.audio.> for each clip, got {count} placeholders .* and {num_clips} clips"
    )
    with pytest.raises(ValueError, match=message):
        processor(text=text, audio=clips or None)
    conversation = [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
    with pytest.raises(ValueError, match=message):
        processor.encode_conversations([conversation], audio=clips)
    with pytest.raises(ValueError, match=message):
        processor.encode_conversations([conversation], num_audio_tokens=[3] * num_clips)


def test_files_that_are_not_there_are_refused(processor):
    with pytest.raises(ValueError, match="`audio` must be a file that is there, got 'gone.wav'. Check the path"):
        processor(text="<|audio|>", audio=["gone.wav"])
    messages = [{"role": "user", "content": [{"type": "audio", "path": "gone.wav"}]}]
    with pytest.raises(ValueError, match="`audio` must be a file that is there, got 'gone.wav'"):
        ask(messages, processor)
    with pytest.raises(ValueError, match="`audio` must be a file that is there, got 'gone.wav'"):
        processor.apply_transcription_request("gone.wav")


@pytest.mark.parametrize("clip", [np.zeros(0), np.zeros((2, 800)), np.array([0.1, np.nan]), np.array([np.inf] * 900)])
def test_clips_that_are_no_sound_are_refused(processor, clip):
    with pytest.raises(ValueError, match="`audio` must be one channel of finite samples, got an array"):
        processor.split_clip(clip.astype(np.float32))


def test_clips_too_short_for_a_frame_are_refused(wave_processor):
    assert wave_processor.extract(make_clip(400 / RATE)).shape == (400,)
    with pytest.raises(ValueError, match="`audio` must be long enough for one frame .* got a clip of 399 samples"):
        wave_processor.extract(make_clip(399 / RATE))


def test_audio_of_another_rate_is_refused(processor):
    with pytest.raises(ValueError, match="sampling rate"):
        processor(text="<|audio|>", audio=[make_clip(0.5)], sampling_rate=8_000)


def test_labels_of_a_text_without_turns_are_refused(processor):
    """transformers' own processors learn the prompt then."""
    with pytest.raises(ValueError, match="`output_labels` must be left out, got True: a text does not say where"):
        processor(text="<|audio|>What? ok", audio=[make_clip(0.5)], output_labels=True)


def test_conversations_that_cannot_be_learned_are_refused(processor):
    with pytest.raises(ValueError, match="`conversations` must each have an answer .* got roles .'user'"):
        processor.encode_conversations([make_conversation(None, answer=None)])
    moody = "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    odd = AudioLMProcessor(processor.feature_extractor, processor.tokenizer, FLATTEN_TEMPLATE + moody)
    with pytest.raises(ValueError, match="`chat_template` must put an answer behind its prompt"):
        odd.encode_conversations([make_conversation(None)])


def test_an_answer_that_shares_a_token_with_its_prompt_is_refused(processor, monkeypatch):
    text = processor.apply_chat_template(make_conversation(None))
    offsets = [(begin, begin + 2) for begin in range(0, len(text), 2)]
    output = {"input_ids": [1] * len(offsets), "offset_mapping": offsets}
    begin = text.index("assistant\n") + len("assistant\n")
    assert begin % 2 == 1
    monkeypatch.setattr(type(processor.tokenizer), "__call__", lambda *_args, **_kwargs: output)
    with pytest.raises(ValueError, match="`chat_template` must let an answer begin with a token of its own"):
        processor.encode_conversations([make_conversation(None)])


def test_tokenizers_without_padding_or_placeholder_are_refused(audio_lm_bases, tmp_path):
    extractor = AutoFeatureExtractor.from_pretrained(audio_lm_bases["whisper"])
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="`tokenizer` must have the token '<.audio.>', got none. Call `add_audio"):
        AudioLMProcessor(extractor, tokenizer)
    tokens = len(tokenizer)
    assert add_audio_token(tokenizer) == tokens
    assert add_audio_token(tokenizer) == tokens
    assert "<|im_start|>" in tokenizer.all_special_tokens
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="`tokenizer` must have a pad token, got none"):
        AudioLMProcessor(extractor, tokenizer)
    tokenizer.save_pretrained(tmp_path / "end")
    assert load_tokenizer(str(tmp_path / "end")).pad_token == "<|im_end|>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="`language_model` must have a tokenizer with a pad token or an end token"):
        load_tokenizer(str(tmp_path / "none"))
