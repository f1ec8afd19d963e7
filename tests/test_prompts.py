"""What a model is asked is the same in training and in inference, and only answers have labels."""

import numpy as np
import pytest
import torch

from data.prompts import DEFAULT_INSTRUCTION, ChatPrompt, WhisperPrompt, check_placeholders, make_prompt
from tests.speech_models import make_chat_processor, make_whisper_processor

IGNORED = -100
QUESTION = "Who speaks?"


@pytest.fixture(scope="module")
def whisper() -> WhisperPrompt:
    return make_prompt(make_whisper_processor())


@pytest.fixture(scope="module")
def chat() -> ChatPrompt:
    return make_prompt(make_chat_processor())


def noise(*num_samples: int) -> list[np.ndarray]:
    return [np.random.default_rng(count).normal(0, 0.1, count).astype(np.float32) for count in num_samples]


def test_whisper_learns_the_transcript_and_its_end_and_is_given_its_prompt(whisper):
    tokenizer = whisper.tokenizer
    batch = whisper.pad_training([whisper.ask(None, [5])] * 2, [whisper.answer("one"), whisper.answer(" three ")])
    assert tokenizer.decode(batch["decoder_input_ids"][1]) == "<|startoftranscript|><|notimestamps|> three"
    assert batch["labels"][1].tolist() == [IGNORED, *tokenizer(" three", add_special_tokens=False).input_ids, 256]
    assert tokenizer.decode(batch["labels"][0][1:6]) == " one<|endoftext|>"
    assert batch["labels"][0].tolist()[6:] == [IGNORED, IGNORED]


def test_a_chat_has_labels_on_the_answer_alone(chat):
    prompts = [chat.ask(QUESTION, [3]), chat.ask(QUESTION, [7])]
    batch = chat.pad_training(prompts, [chat.answer("ann"), chat.answer("ben and ann")])
    for row, answer in enumerate(("ann<|im_end|>", "ben and ann<|im_end|>")):
        is_answer = batch["labels"][row] != IGNORED
        assert chat.tokenizer.decode(batch["labels"][row][is_answer]) == answer
        assert torch.equal(batch["labels"][row][is_answer], batch["input_ids"][row][is_answer])
        assert batch["attention_mask"][row].sum() == len(prompts[row]) + len(chat.answer(answer[:-10]))
    assert torch.equal(batch["labels"][0, : len(prompts[0])], torch.full((len(prompts[0]),), IGNORED))


def test_a_chat_without_a_question_asks_for_the_words(chat):
    assert DEFAULT_INSTRUCTION in chat.tokenizer.decode(chat.ask(None, [3]))
    assert DEFAULT_INSTRUCTION not in chat.tokenizer.decode(chat.ask(QUESTION, [3]))


@pytest.mark.parametrize("family", ["whisper", "chat"])
def test_training_begins_with_the_tokens_that_inference_is_given(whisper, chat, family):
    prompt, name, words = {
        "whisper": (whisper, "decoder_input_ids", None),
        "chat": (chat, "input_ids", QUESTION),
    }[family]
    asked = prompt.ask(words, [6])
    training = prompt.pad_training([asked], [prompt.answer("one")])[name][0]
    assert torch.equal(training[: len(asked)], prompt.pad_asking([asked])[name][0])


def test_a_chat_and_its_answer_are_what_the_processor_s_template_makes_of_the_conversation(chat):
    conversation = [
        {"role": "user", "content": [{"type": "audio", "audio": "a"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": "ann"},
    ]
    whole = chat.processor.apply_chat_template(conversation, tokenize=False)
    made = chat.tokenizer.decode([*chat.ask(QUESTION, [1]), *chat.answer("ann")])
    assert f"{made}\n" == whole


def test_a_chat_is_tokenized_as_the_processor_does_with_the_audio_itself(chat):
    clips = noise(16_000, 9_001)
    content = [{"type": "audio", "audio": "a"}, {"type": "audio", "audio": "b"}, {"type": "text", "text": QUESTION}]
    text = chat.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    theirs = chat.processor(text=text, audio=clips, sampling_rate=16_000, return_tensors="pt")
    assert theirs.input_ids[0].tolist() == chat.ask(QUESTION, [chat.count_frames(len(clip)) for clip in clips])
    ours = chat.extract(clips)
    assert torch.equal(ours["input_features"], theirs.input_features)
    assert torch.equal(ours["feature_attention_mask"], theirs.feature_attention_mask)


@pytest.mark.parametrize(
    ("seconds", "whisper_frames", "chat_frames"), [(30, 1500, 750), (7.5, 375, 187), (0.03, 2, 1)]
)
def test_frames_are_those_of_the_published_towers(seconds, whisper_frames, chat_frames):
    layout = {"num_mel_bins": 128, "chunk_seconds": 30}
    num_samples = round(16_000 * seconds)
    assert make_prompt(make_whisper_processor(**layout)).count_frames(num_samples) == whisper_frames
    assert make_prompt(make_chat_processor(**layout)).count_frames(num_samples) == chat_frames


def test_the_mask_of_features_is_the_extractor_s_own(whisper):
    clips = noise(16_000, 15_999, 161, 32_000)
    theirs = whisper.extractor(clips, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
    assert torch.equal(whisper.extract(clips)["attention_mask"], theirs.attention_mask.long())


def test_questions_are_padded_on_the_left_and_read_behind_the_padding(chat):
    prompts = [chat.ask("a", [2]), chat.ask("a longer one", [9])]
    batch = chat.pad_asking(prompts)
    padding = len(prompts[1]) - len(prompts[0])
    assert batch["attention_mask"][0].tolist() == [0] * padding + [1] * len(prompts[0])
    answers = torch.tensor([chat.answer("yes"), chat.answer("not")])
    tokens = torch.cat([batch["input_ids"], answers], dim=1)
    assert chat.read(tokens, batch["input_ids"].shape[1]) == ["yes", "not"]


def test_whisper_reads_with_or_without_its_prompt(whisper):
    asked, answered = whisper.ask(None, [4]), whisper.answer("two")
    assert whisper.read(torch.tensor([[*asked, *answered]]), 2) == whisper.read(torch.tensor([answered]), 2) == ["two"]


def test_a_language_becomes_part_of_whisper_s_prompt():
    prompt = make_prompt(make_whisper_processor(), language="en")
    assert prompt.tokenizer.decode(prompt.ask(None, [1])) == (
        "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
    )


def test_a_language_without_a_token_is_refused():
    with pytest.raises(ValueError, match="`language` must be one of the model's, got 'ko'"):
        make_prompt(make_whisper_processor(), language="ko")


@pytest.mark.parametrize(("question", "num_clips"), [(QUESTION, 1), (None, 2)])
def test_whisper_takes_no_question_and_one_clip(whisper, question, num_clips):
    with pytest.raises(ValueError, match="Whisper transcribes one clip and takes no question"):
        whisper.ask(question, [3] * num_clips)


def test_a_placeholder_in_the_question_is_refused(chat):
    with pytest.raises(ValueError, match=r"one placeholder <\|AUDIO\|> a clip, got 2 for 1 clips. Take it out"):
        chat.ask("What is <|AUDIO|>?", [3])


def test_placeholders_that_do_not_match_the_audio_are_counted(chat):
    batch = chat.pad_asking([chat.ask(None, [3])])
    check_placeholders(batch, audio_token_id=chat.processor.audio_token_id, num_frames=[3])
    with pytest.raises(ValueError, match="got 3 placeholders for 4 frames"):
        check_placeholders(batch, audio_token_id=chat.processor.audio_token_id, num_frames=[4])


def test_a_clip_longer_than_the_window_is_refused_and_never_cut(chat):
    with pytest.raises(ValueError, match=r"A clip must be at most 2 s long, got 2.5 s. Split it"):
        chat.extract(noise(40_000))


def test_another_processor_is_refused(tiny_processor):
    with pytest.raises(
        ValueError, match="must be a Whisper or a Qwen2-Audio, got a model with a DeepSpeech2Processor"
    ):
        make_prompt(tiny_processor)
