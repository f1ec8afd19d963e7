"""Training audio language models: prompts, losses, stages, resuming, and a task learned from nothing."""

import json
from pathlib import Path

import pytest
import torch
from audio_lm_models import join, make_processor
from safetensors.torch import load_file
from spoken_words import WORDS
from transformers import AutoModelForMultimodalLM, AutoProcessor

from data.conversation_batches import (
    ClipWindows,
    ConversationCollator,
    ConversationDataset,
    TranscriptCollator,
    TranscriptDataset,
)
from data.instructions import Conversation, load_conversations, make_turn
from data.timed_transcripts import SILENCE, find_targets, load_timed_transcripts, tokenize_words
from inference.audio_answers import add_examples, answer_conversations, ask, check_hallucination, grade_answers
from modeling.audio_lm_modes import list_trainable, set_modes
from recipes import chat, evaluate_audio_lm, plan, train_audio_lm
from training.audio_lm_results import answer_split, set_planned_modes
from training.audio_lm_setup import AudioLMArguments, Stage, cache_encoder, list_stages
from training.audio_lm_trainer import AudioLMTrainingArguments, list_trained, load_trained, save_trained
from training.objectives.audio_lm import AlignObjective, AnswerObjective, project_windows
from training.planning import bytes_of

TASK = {"response_column": "slots", "response_format": "json", "instruction": "Which?"}
FLAGS = ("--response_column", "slots", "--response_format", "json", "--instruction", "Which?")


@pytest.fixture
def model(audio_lm_bases):
    return join(audio_lm_bases, projector={"window_frames": 4})


@pytest.fixture
def processor(model):
    return make_processor(model)


@pytest.fixture
def dataset(few_words, processor) -> ConversationDataset:
    conversations = load_conversations(str(few_words), split="train", system="Listen.", **TASK)
    return ConversationDataset(conversations, ClipWindows(conversations, processor), processor, max_answer_tokens=40)


@pytest.fixture
def transcripts(few_words, processor) -> TranscriptDataset:
    read = load_timed_transcripts(str(few_words / "words.jsonl"), split="train")
    return TranscriptDataset(read, ClipWindows(read, processor), processor)


def make_stage(**entries) -> Stage:
    stages = [json.dumps(entries)]
    arguments = AudioLMArguments(encoder="e", language_model="l", stages=stages)
    return list_stages(arguments, num_train_epochs=1, has_transcripts=True)[0]


def test_a_model_is_asked_with_the_very_tokens_it_was_trained_on(dataset, processor):
    for index, conversation in enumerate(dataset.conversations):
        ids, labels = dataset.sequences[index]
        (window,) = dataset.list_windows(index)
        inputs = processor(text=[ask(processor, conversation.prompt)], audio=[dataset.windows.read(window)])
        num_asked = inputs["input_ids"].shape[1]
        assert inputs["input_ids"][0].tolist() == ids[:num_asked].tolist()
        assert (labels[:num_asked] < 0).all()
        learned = processor.tokenizer.decode(ids[num_asked:])
        assert learned.strip() == f"{conversation.answer}<|im_end|>"
        assert labels[num_asked:].tolist() == ids[num_asked:].tolist()


def test_the_loss_of_a_packed_batch_is_that_of_its_conversations_one_by_one(model, dataset, processor):
    model.eval()
    items = [dataset[index] for index in range(5)]
    batch = ConversationCollator(processor)(items)
    objective = AnswerObjective(model)
    with torch.inference_mode():
        packed = objective(**batch)["loss"]
        total, num_tokens = 0.0, 0
        for item in items:
            ids, labels = item["sequence"]
            clips = processor.pad_features(item["features"])
            loss = model(input_ids=ids[None], labels=labels[None], **clips).loss
            count = int((labels >= 0).sum())
            total, num_tokens = total + loss * count, num_tokens + count
    torch.testing.assert_close(packed, total / num_tokens, atol=1e-5, rtol=1e-5)
    assert objective.count_items(batch)["tokens"] == num_tokens


@pytest.mark.parametrize("layer", ["last", "mix", 1])
def test_cached_states_give_the_loss_of_the_features(audio_lm_bases, few_words, tmp_path, layer):
    model = join(audio_lm_bases, projector={"window_frames": 4, "encoder_layer": layer}).eval()
    processor = make_processor(model)
    conversations = load_conversations(str(few_words), split="train", **TASK)
    windows = ClipWindows(conversations, processor)
    dataset = ConversationDataset(conversations, windows, processor, max_answer_tokens=40)
    collate, objective = ConversationCollator(processor), AnswerObjective(model)
    with torch.inference_mode():
        heard = objective(**collate([dataset[0], dataset[1]]))["loss"]
        dataset.states = cache_encoder(model, windows, processor, folder=tmp_path, dtype="float32", batch_size=3)
        batch = collate([dataset[0], dataset[1]])
        cached = objective(**batch)["loss"]
    assert "input_features" not in batch
    torch.testing.assert_close(cached, heard, atol=1e-5, rtol=1e-5)


def test_a_cache_belongs_to_the_encoders_weights(model, dataset, processor, tmp_path):
    options = {"folder": tmp_path, "dtype": "float32", "batch_size": 8}
    first = cache_encoder(model, dataset.windows, processor, **options)
    assert cache_encoder(model, dataset.windows, processor, **options).path == first.path
    # A bundle's processor, which says where its code is, hears the same.
    processor.save_pretrained(tmp_path / "processor")
    saved = AutoProcessor.from_pretrained(tmp_path / "processor")
    assert cache_encoder(model, dataset.windows, saved, **options).path == first.path
    model.model.audio_tower.layer_norm.weight.data[0] += 1
    assert cache_encoder(model, dataset.windows, processor, **options).path != first.path


def test_rows_of_padding_are_at_most_a_tenth_of_what_the_recipe_trains_on(dataset, processor):
    collator = ConversationCollator(processor)
    for start in range(0, len(dataset), 3):
        collator([dataset[index] for index in range(start, min(start + 3, len(dataset)))])
    assert 0 < collator.num_tokens <= collator.num_cells
    assert collator.padding <= 0.1


def test_answers_over_the_limit_are_counted_and_named(few_words, processor):
    conversations = load_conversations(str(few_words), split="train", **TASK)
    windows = ClipWindows(conversations, processor)
    with pytest.raises(
        ValueError, match=r"12 of 12 conversations .* over the limit of 3 tokens: .*wav has answers of \d\d"
    ):
        ConversationDataset(conversations, windows, processor, max_answer_tokens=3)


def test_a_clip_that_cannot_be_read_is_named(processor, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    turns = (make_turn("user", "Which?", num_clips=1), make_turn("assistant", "{}"))
    broken = Conversation("broken", turns, ({"path": str(tmp_path / "broken.wav"), "bytes": None},))
    with pytest.raises(ValueError, match=r"1 of 1 recordings cannot be used: .*broken.wav"):
        ClipWindows([broken], processor)


def test_long_clips_become_windows_and_text_alone_needs_none(few_words, processor):
    (first, *_) = load_conversations(str(few_words), split="train", **TASK)
    text = Conversation("text", (make_turn("user", "Hi"), make_turn("assistant", "Ho")), ())
    processor.max_seconds = 0.2
    windows = ClipWindows([first, text], processor)
    dataset = ConversationDataset([first, text], windows, processor, max_answer_tokens=40)
    assert len(windows) > 1
    assert dataset.list_windows(0) == list(range(len(windows)))
    assert dataset.list_windows(1) == []
    placeholders = int((dataset.sequences[0][0] == processor.audio_token_id).sum())
    assert placeholders == sum(windows.num_tokens)
    alone = ConversationDataset([text], ClipWindows([text], processor), processor, max_answer_tokens=40)
    assert set(ConversationCollator(processor)([alone[0]])) == {"input_ids", "position_ids", "labels"}


def test_targets_say_what_each_row_hears():
    class Letters:
        def __call__(self, text, **_options):
            return type("Tokens", (), {"input_ids": [ord(letter) for letter in text.strip()]})

    # The first word begins at the end of its time, the last one ends soon; a word of two letters is shared by them.
    words = [("A", 0.0, 2.0), (" bc,", 2.0, 2.4), (" D", 2.4, 9.0)]
    tokens = tokenize_words(words, Letters(), max_word_seconds=0.4)
    assert [(chr(token), round(start, 6), round(end, 6)) for token, start, end in tokens] == [
        ("a", 1.6, 2.0), ("b", 2.0, 2.2), ("c", 2.2, 2.4), ("d", 2.4, 2.8),
    ]  # fmt: skip
    targets = find_targets(tokens, num_rows=20, row_seconds=0.2).tolist()
    assert targets == [SILENCE] * 8 + [97, 97, 98, 99, 100, 100] + [SILENCE] * 6
    # A token shorter than a row is said all the same.
    assert find_targets([(5, 0.11, 0.12)], num_rows=2, row_seconds=0.2).tolist() == [5, SILENCE]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 1 of words.jsonl must be a JSON object"),
        ("{", "line 1 of words.jsonl must be JSON"),
        ('{"audio": "none.wav", "chunks": []}', "`audio` of line 1 of words.jsonl must be an existing file"),
        ('{"audio": "a.wav"}', "`chunks` of line 1 of words.jsonl must be a list, got None"),
        ('{"audio": "a.wav", "chunks": [{"text": "x"}]}', "must have `text` and `timestamp`"),
        (
            '{"audio": "a.wav", "chunks": [{"text": "x", "timestamp": [1, 2]}, {"text": "y", "timestamp": [0, 1]}]}',
            "`timestamp` of the chunks of line 1 of words.jsonl must not go back",
        ),
    ],
)
def test_transcripts_without_times_are_named(few_words, tmp_path, line, message):
    (tmp_path / "a.wav").write_bytes((few_words / "f1_left_140.wav").read_bytes())
    (tmp_path / "words.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        load_timed_transcripts(str(tmp_path / "words.jsonl"), split="train")


def test_transcripts_must_be_a_file_with_lines_of_the_split(few_words):
    with pytest.raises(ValueError, match="`transcripts` must be a file of JSON lines, got nowhere"):
        load_timed_transcripts("nowhere", split="train")
    with pytest.raises(ValueError, match="`transcripts` must have lines of split 'dev', got none"):
        load_timed_transcripts(str(few_words / "words.jsonl"), split="dev")


def test_alignment_trains_the_projector_alone_until_it_says_the_words(model, transcripts, processor):
    set_modes(model)
    objective = AlignObjective(model, transcripts.vocabulary)
    batch = TranscriptCollator(processor)([transcripts[index] for index in range(len(transcripts))])
    before = [value.clone() for value in model.model.language_model.parameters()]
    optimizer = torch.optim.Adam([value for value in objective.parameters() if value.requires_grad], 1e-2)
    losses = []
    for _ in range(60):
        loss = objective(**batch)["loss"]
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(map(torch.equal, before, model.model.language_model.parameters()))
    rows = project_windows(model, batch)
    objective.match_length(rows)
    lengths = project_windows(model, batch).norm(dim=-1).mean()
    torch.testing.assert_close(lengths, model.get_input_embeddings()(transcripts.vocabulary).norm(dim=-1).mean())
    said = objective.read_tokens(project_windows(model, batch), [len(batch["targets"])])
    assert set(said[0]) <= set(transcripts.vocabulary.tolist())


def test_windows_begin_elsewhere_in_each_epoch_once_states_are_cached(model, transcripts, processor, tmp_path):
    states = cache_encoder(model, transcripts.windows, processor, folder=tmp_path, dtype="float32", batch_size=8)
    whole = transcripts[0]["targets"]
    transcripts.states = states
    sizes = set()
    for epoch in range(8):
        transcripts.set_epoch(epoch)
        item = transcripts[0]
        skipped = len(states[0]["states"]) - len(item["states"][0])
        assert len(item["targets"]) == -(-len(item["states"][0]) // 4)
        sizes.add(skipped)
    assert sizes <= {0, 1, 2, 3}
    assert len(sizes) > 1
    transcripts.skipped[0] = 0
    assert torch.equal(transcripts[0]["targets"], whole)


def test_alignment_without_words_is_refused(model):
    with pytest.raises(ValueError, match="`vocabulary` must hold the tokens of the transcripts, got none"):
        AlignObjective(model, torch.tensor([], dtype=torch.long))


def test_stages_take_what_they_leave_out_from_the_flags():
    arguments = AudioLMArguments(
        encoder="e", language_model="l", encoder_mode="lora", llm_mode="lora", projector_lr=3e-4,
        stages=['{"objective": "align"}', '{"llm_mode": "full", "num_train_epochs": 2}'],
    )  # fmt: skip
    first, second = list_stages(arguments, num_train_epochs=7, has_transcripts=True)
    assert (first.encoder_mode, first.llm_mode, first.num_train_epochs) == ("frozen", "frozen", 7)
    assert (second.encoder_mode, second.llm_mode, second.num_train_epochs) == ("lora", "full", 2)
    assert second.learning_rates == {"projector": 3e-4, "encoder": 1e-4, "language_model": 5e-5}
    assert make_stage(llm_last_layers=1).learning_rates["language_model"] == 5e-5


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("align", "`stages` must be JSON objects, got 'align' as stage 1"),
        ('{"epochs": 3}', r"`epochs` is not an entry of a stage \(stage 1\)"),
        ('{"num_train_epochs": "3"}', "`num_train_epochs` of stage 1 must be a number, got '3'"),
        ('{"objective": "ctc"}', "`objective` of a stage must be one of answer, align, got 'ctc'"),
        ('{"objective": "align", "llm_mode": "lora"}', "A stage of `align` must train the projector alone"),
        ('{"objective": "align"}', "`transcripts` must name a file for stage 1, got none"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stage, message):
    arguments = AudioLMArguments(encoder="e", language_model="l", stages=[stage])
    with pytest.raises(ValueError, match=message):
        list_stages(arguments, num_train_epochs=1, has_transcripts=False)


@pytest.mark.parametrize(
    "parts",
    [{}, {"encoder": "e"}, {"encoder": "e", "language_model": "l", "model_name_or_path": "b"}],
)
def test_a_run_names_both_sides_or_a_bundle(parts):
    with pytest.raises(ValueError, match="`encoder` and `language_model` must both be given, or"):
        AudioLMArguments(**parts)


def test_one_learning_rate_for_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`learning_rate` must be left out, got 0.1. Give `projector_lr`"):
        AudioLMTrainingArguments(output_dir=str(tmp_path), learning_rate=0.1)


def test_what_trained_comes_back_and_fits_its_modes_alone(model, tmp_path):
    set_modes(model, llm_mode="lora")
    objective = AnswerObjective(model)
    save_trained(objective, tmp_path)
    before = {name: value.clone() for name, value in list_trained(objective).items()}
    with torch.no_grad():
        for value in list_trained(objective).values():
            value.add_(1)
    load_trained(objective, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in list_trained(objective).items())
    set_modes(model, llm_mode="frozen")
    with pytest.raises(ValueError, match="must fit what trains, got unknown or missing"):
        load_trained(AnswerObjective(model), tmp_path)


def test_examples_stand_before_the_question_and_one_system_turn_before_all():
    system = make_turn("system", "Listen.")
    turns = (make_turn("user", "Which?", num_clips=1), make_turn("assistant", "a"))
    example = Conversation("x", (system, *turns), ({},))
    prompt = add_examples((system, make_turn("user", "Which?", num_clips=1)), [example, example])
    assert [turn["role"] for turn in prompt] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_examples_are_heard_before_the_clip_that_is_asked_about(model, dataset, processor, tmp_path):
    model.eval()
    options = {"batch_size": 3, "max_new_tokens": 4}
    test, examples = dataset.conversations[:2], (dataset.conversations, dataset.windows, [3, 4])
    windows = ClipWindows(test, processor)
    heard = answer_split(model, processor, test, windows, examples=examples, **options)
    clips = [dataset.windows.read(dataset.list_windows(index)[0]) for index in (3, 4, 0)]
    prompt = add_examples(test[0].prompt, [dataset.conversations[3], dataset.conversations[4]])
    by_hand = answer_conversations(model, processor, [prompt], [clips], **options)
    assert heard[0][1] == by_hand[0]
    cache = {"folder": tmp_path, "dtype": "float32", "batch_size": 3}
    assert answer_split(model, processor, test, windows, examples=examples, cache=cache, **options) == heard


def test_texts_are_scored_by_words_and_as_wholes():
    scores = grade_answers(["One two.", "three"], ["one two", "four"], is_json=False)
    assert (scores["wer"], scores["exact_match"], scores["answers"]) == (1 / 3, 1 / 2, 2)
    assert scores["cer"] == 5 / 11  # three and four share no place of their five letters


@pytest.mark.parametrize(("is_json", "nothing", "word"), [(True, "{}", '{"a": 1}'), (False, " .", "hello")])
def test_answers_to_silence_are_counted(is_json, nothing, word):
    heard = []

    def listen(clips):
        heard.extend(clips)
        return [nothing, word, nothing, nothing]

    result = check_hallucination(listen, sampling_rate=16_000, is_json=is_json)
    assert result["hallucinated"] == 1 / 4
    assert result["heard"]["silence, 5 s"] == word
    assert [len(clip) for clip in heard] == [16_000, 80_000, 16_000, 80_000]
    assert heard[0].std() == 0
    assert 0.009 < heard[3].std() < 0.011


def run_recipe(run_recipe_main, bases, corpus, output, *flags) -> dict:
    run_recipe_main(
        train_audio_lm.main, "--encoder", bases["whisper"], "--language_model", bases["llama"], "--dataset", corpus,
        *FLAGS, "--max_answer_tokens", 30, "--window_frames", 4, "--cache_dir", output.parent / "cache",
        "--output_dir", output, "--disable_tqdm", "true", *flags,
    )  # fmt: skip
    return json.loads((output / "eval_results.json").read_text())


def test_a_spoken_task_is_learned_from_nothing(run_recipe_main, audio_lm_bases, spoken_words, tmp_path):
    modes = ("--encoder_mode", "full", "--llm_mode", "full")
    rates = ("--encoder_lr", 3e-3, "--llm_lr", 3e-3, "--projector_lr", 3e-3)
    results = run_recipe(
        run_recipe_main, audio_lm_bases, spoken_words, tmp_path / "out", *modes, *rates, "--num_train_epochs", 24,
        "--per_device_train_batch_size", 16,
    )  # fmt: skip
    assert results["eval_answers"] == 8 * len(WORDS)
    assert results["eval_exact_match"] > 0.9
    assert results["stages"][0]["padding"] <= 0.1


STAGES = (
    "--stages", '{"objective": "align", "num_train_epochs": 2}',
    '{"llm_mode": "lora", "encoder_mode": "lora", "num_train_epochs": 2}',
)  # fmt: skip


@pytest.fixture(scope="module")
def staged(tmp_path_factory, audio_lm_bases, few_words):
    """Folder of a bundle that went through two stages, with a checkpoint of every epoch."""
    from unittest.mock import patch

    folder = tmp_path_factory.mktemp("staged")

    def run(main, *tokens):
        with patch("sys.argv", ["recipe.py", *map(str, tokens)]):
            main()

    transcripts = ("--transcripts", few_words / "words.jsonl", "--save_strategy", "epoch", "--save_total_limit", 5)
    run_recipe(run, audio_lm_bases, few_words, folder / "out", *STAGES, *transcripts)
    return folder / "out"


def test_stages_train_what_they_say_and_the_bundle_has_it_all(staged, few_words):
    results = json.loads((staged / "eval_results.json").read_text())
    first, second = results["stages"]
    assert first["trainable"]["encoder"] == first["trainable"]["language_model"] == 0
    assert min(second["trainable"].values()) > 0
    assert results["trainable_parameters"] == sum(second["trainable"].values())
    assert {"encoder_adapter", "language_model_adapter"} <= {path.name for path in staged.iterdir()}
    model = AutoModelForMultimodalLM.from_pretrained(staged).eval()
    processor = AutoProcessor.from_pretrained(staged)
    clip = few_words / results["eval_answers_read"][0]["name"]
    question = [{"type": "audio", "path": str(clip)}, {"type": "text", "text": "Which?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    num_asked = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_length=num_asked + 30, do_sample=False)
    answer = processor.batch_decode(tokens[:, num_asked:], skip_special_tokens=True)[0].strip()
    assert answer == results["eval_answers_read"][0]["answer"]


def test_a_resumed_run_goes_on_where_it_was_killed(
    staged, run_recipe_main, audio_lm_bases, few_words, tmp_path, trained_steps
):
    import shutil

    out = Path(shutil.copytree(staged, tmp_path / "out"))
    for path in out.iterdir():  # as if it had been killed after the second stage's first epoch
        if not path.name.startswith("stage-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (out / "stage-2").iterdir():
        if path.name != "checkpoint-2":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    flags = (*STAGES, "--transcripts", few_words / "words.jsonl", "--save_strategy", "epoch", "--save_total_limit", 5)
    run_recipe(run_recipe_main, audio_lm_bases, few_words, out, *flags, "--resume_from_checkpoint", "true")
    assert trained_steps == [2, 3]
    for name in ("model.safetensors", "encoder_adapter/adapter_model.safetensors"):
        resumed, whole = load_file(out / name), load_file(staged / name)
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_bundle_is_evaluated_trained_on_and_talked_to(staged, run_recipe_main, few_words, tmp_path, capsys):
    scores = tmp_path / "scores.json"
    common = ("--dataset", few_words, *FLAGS)
    run_recipe_main(
        evaluate_audio_lm.main, "--model_name_or_path", staged, *common, "--max_new_tokens", 30, "--output_file",
        scores, "--batch_size", 16,
    )  # fmt: skip
    trained = json.loads((staged / "eval_results.json").read_text())
    found = json.loads(scores.read_text())
    assert [row["answer"] for row in found["rows"]] == [row["answer"] for row in trained["eval_answers_read"]]
    assert found["slot_f1"] == trained["eval_slot_f1"]
    run_recipe_main(
        evaluate_audio_lm.main, "--model_name_or_path", staged, *common, "--max_new_tokens", 4, "--output_file",
        scores, "--shots", 2, "--check_silence", "false",
    )  # fmt: skip
    assert json.loads(scores.read_text())["shots"] == 2
    capsys.readouterr()
    clip = few_words / "f1_left_165.wav"
    chat.main(["--model_name_or_path", str(staged), "--audio", str(clip), "--max_new_tokens", "30", "Which?"])
    answers = {row["name"]: row["answer"] for row in found["rows"]}
    assert capsys.readouterr().out.strip() == answers[clip.name].strip()
    with pytest.raises(ValueError, match="`adapter` must be left out for a bundle, got x"):
        chat.main(["--model_name_or_path", str(staged), "--adapter", "x", "--audio", str(clip), "Which?"])
    run_recipe_main(
        train_audio_lm.main, "--model_name_or_path", staged, *common, "--llm_mode", "lora", "--max_steps", 1,
        "--max_answer_tokens", 30, "--eval_split", "", "--output_dir", tmp_path / "more", "--cache_dir", tmp_path,
    )  # fmt: skip
    results = json.loads((tmp_path / "more" / "eval_results.json").read_text())
    assert results["trainable_by_part"]["encoder"] == 0


def test_a_plan_knows_memory_and_time_by_mode(audio_lm_bases, few_words, tmp_path):
    model, optimizer = join(audio_lm_bases, projector={"window_frames": 8}), []
    for encoder_mode, llm_mode in (("frozen", "frozen"), ("frozen", "lora"), ("lora", "full")):
        file = tmp_path / f"{llm_mode}.json"
        plan.main(
            ["--recipe", "train_audio_lm", "--encoder", audio_lm_bases["whisper"],
             "--language_model", audio_lm_bases["llama"], "--dataset", str(few_words), *FLAGS,
             "--encoder_mode", encoder_mode, "--llm_mode", llm_mode, "--num_train_epochs", "3",
             "--output_dir", str(tmp_path / "out"), "--output_file", str(file)]
        )  # fmt: skip
        told = json.loads(file.read_text())
        set_modes(model, llm_mode=llm_mode, encoder_mode=encoder_mode)
        trainable = sum(group["trainable"] for group in told["groups"].values())
        assert trainable == sum(list_trainable(model).values())
        assert told["memory"]["gradients"] == 4 * trainable
        assert told["memory"]["activations"] > 0
        assert told["num_steps"] == 6
        assert told["time"]["training"] > 0
        optimizer.append(told["memory"]["optimizer"])
    assert optimizer == sorted(set(optimizer))


def test_fewer_shots_than_none_are_refused():
    with pytest.raises(ValueError, match="`shots` must be at least 0, got -1"):
        evaluate_audio_lm.EvaluateAudioLMArguments(model_name_or_path="x", shots=-1)


def test_a_plan_of_qlora_counts_weights_in_4_bits_and_the_same_lora(audio_lm_bases):
    config = join(audio_lm_bases, projector={"window_frames": 4}).config
    with torch.device("meta"):
        half = set_planned_modes(config, torch.float32, llm_mode="lora", encoder_mode="lora")
        small = set_planned_modes(config, torch.float32, llm_mode="qlora", encoder_mode="qlora")
    assert list_trainable(small) == list_trainable(half)
    linear = "model.language_model.layers.0.mlp.up_proj.base_layer.weight"
    sizes = [bytes_of(dict(model.named_parameters())[linear]) for model in (half, small)]
    assert sizes[0] == 4 * 64 * 32
    assert sizes[1] < sizes[0] / 3  # half a byte a value, and what so small a matrix needs beside
