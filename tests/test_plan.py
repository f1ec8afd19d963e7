"""The command that says what a training will take, against hands, real steps and real files."""

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCTC, AutoProcessor, BitsAndBytesConfig, WhisperConfig
from transformers import WhisperForConditionalGeneration as Whisper

import recipes.plan
from data.audio import audio_seconds
from data.augmentation import Augmentation
from data.corpora import load_corpus
from modeling import DeepSpeech2Config, DeepSpeech2ForCTC, SpeechAdapterConfig
from recipes import train_ctc
from recipes.plan import Planner, find_available_bytes, find_recipe, list_recipes, main
from tests.translation_models import write_translation_corpus
from training.arguments import parse_arguments
from training.corpus_arguments import CorpusArguments
from training.frozen_part import CacheArguments, cache_frozen_part
from training.objectives.recognition import CTCObjective
from training.personal import PersonalArguments, SpeakerLoader
from training.planning import (
    OPTIMIZERS,
    CorpusSize,
    bytes_of,
    count_optimizer_bytes,
    count_steps,
    estimate_activations,
    measure_corpus,
    quantize_shapes,
)
from training.trainer import RecipeTrainingArguments, set_frozen_modules_to_eval
from training.trial import SavedBytes, draw_batch, run_trial

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
PLANNED = [config for config in CONFIGS if config.stem.startswith(tuple(list_recipes()))]
SMALL = {"num_mel_bins": 16, "conv_channels": 4, "hidden_size": 40, "num_hidden_layers": 2, "vocab_size": 30}
WHISPER = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 300,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


# The same speech in every epoch, so that the frozen part can be cached.
PLAIN = ("--pause_share", 0, "--room_share", 0, "--device_share", 0)


@pytest.fixture
def config_folder(tmp_path):
    """Folder of a small recogniser with nothing but its configuration."""
    DeepSpeech2Config(**SMALL).save_pretrained(tmp_path / "config_only")
    return tmp_path / "config_only"


@pytest.fixture
def plan(config_folder, small_corpus, tmp_path):
    """Plans the adaptation of the configuration alone to ann; returns the plan as its file has it."""

    def run(*flags: object, model: Path = config_folder, speakers: tuple = ("ann",), recipe: str = "personalize"):
        file = tmp_path / "plan.json"
        tokens = ["--recipe", recipe, "--model_name_or_path", model, "--speaker_id", *speakers]
        tokens += ["--dataset", small_corpus, "--output_dir", tmp_path / "out", "--output_file", file, *flags]
        main([str(token) for token in tokens])
        return json.loads(file.read_text())

    return run


@pytest.fixture
def whisper_folder(tmp_path):
    """Folder of a small Whisper with random weights."""
    Whisper(WhisperConfig(**WHISPER)).save_pretrained(tmp_path / "whisper")
    return tmp_path / "whisper"


def make_base() -> DeepSpeech2ForCTC:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DeepSpeech2ForCTC(DeepSpeech2Config(**SMALL))


def make_adapted(kind: str, **options) -> DeepSpeech2ForCTC:
    model = make_base()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_adapter(SpeechAdapterConfig(kind=kind, **options), "alice")
    return model


def measure_saved(objective: CTCObjective, batch: dict) -> int:
    """Bytes of the storages that autograd saves in a forward pass, parameters left out."""
    saved = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(**batch)["loss"].backward()
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def test_plan_counts_the_recogniser_of_29_million_parameters_and_its_adapter(plan, tmp_path, capsys):
    DeepSpeech2Config(num_mel_bins=256, hidden_size=512, num_hidden_layers=5, vocab_size=2000).save_pretrained(
        tmp_path / "large"
    )
    flags = ("--adapter_kind", "mlp", "--adapter_hidden_sizes", 512, 256, "--no_trial")
    planned = plan(*flags, model=tmp_path / "large")
    groups = planned["groups"]
    assert groups.pop("adapters") == {"parameters": 1_170_128, "trainable": 1_170_128, "bytes": 4_680_512}
    assert sum(group["parameters"] for group in groups.values()) == 29_082_848
    assert sum(group["bytes"] for group in groups.values()) == 116_331_392
    assert sum(group["trainable"] for group in groups.values()) == 0
    memory = planned["memory"]
    assert memory["weights"] == 116_331_392 + 4_680_512
    assert memory["gradients"] == 4_680_512
    assert memory["optimizer"] == 2 * 4_680_512 + 6 * 4  # three linear maps, a step counter a weight and a bias
    printed = capsys.readouterr().out
    assert "| adapters             | 1,170,128  | 1,170,128 | 100.0% | 4.7 MB" in printed
    assert "| all                  | 30,252,976 | 1,170,128 | 3.9%   | 121.0 MB |" in printed


def test_plan_loads_no_weights(plan, config_folder):
    files = sorted(config_folder.iterdir())
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForCTC.from_pretrained(config_folder)
    assert plan("--no_trial")["trial"] == "left out (`--no_trial`)"
    assert sorted(config_folder.iterdir()) == files


@pytest.mark.parametrize("config", PLANNED, ids=lambda path: path.stem)
def test_plan_runs_for_every_shipped_configuration(
    config, config_folder, whisper_folder, small_corpus, audio_lm_bases, few_words, tmp_path
):
    sides = ["--encoder", audio_lm_bases["whisper"], "--language_model", audio_lm_bases["llama"]]
    flags = {
        "personalize": ["--model_name_or_path", config_folder, "--speaker_id", "ann"],
        "train_ctc": [],
        "adapt_domain": ["--model_name_or_path", whisper_folder],
        "train_s2st": ["--dataset", write_translation_corpus(tmp_path / "es"), "--eval_split", "test"],
        "train_audio_lm": [*sides, "--dataset", few_words, "--transcripts", few_words / "words.jsonl"],
    }[find_recipe(None, str(config))]
    file = tmp_path / "plan.json"
    tokens = ["--config", config, "--dataset", small_corpus, "--no_trial", "--output_file", file, *flags]
    main([str(token) for token in tokens])
    planned = json.loads(file.read_text())
    assert planned["memory"]["weights"] == sum(group["bytes"] for group in planned["groups"].values())
    assert planned["num_steps"] > 0
    assert 0 < planned["peak_bytes"] < planned["available_bytes"]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_plan_counts_the_bytes_that_a_real_step_leaves(optim, tmp_path):
    model = make_adapted("mlp", hidden_sizes=[70, 9])  # one weight of more, and others of less than 4096 values
    counted = count_optimizer_bytes(model, optim)
    args = RecipeTrainingArguments(output_dir=str(tmp_path / "out"), optim=optim, use_cpu=True)
    batches = [draw_batch(model, num_rows=2, seconds=0.5, num_tokens=4)] * 2
    assert run_trial(CTCObjective(model), args, batches).optimizer_bytes == counted
    assert not (tmp_path / "out").exists()
    model(**batches[0]).loss.backward()
    gradients = sum(value.grad.nbytes for value in model.parameters() if value.grad is not None)
    assert gradients == sum(bytes_of(value) for value in model.parameters() if value.requires_grad)


@pytest.mark.parametrize("optim", ["sgd", "rmsprop"])
def test_plan_counts_the_momentum_that_optim_args_ask_for(optim, tmp_path):
    model = make_adapted("mlp", hidden_sizes=[8])
    options = {"optim": optim, "optim_args": "momentum=0.9"}
    args = RecipeTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
    batches = [draw_batch(model, num_rows=1, seconds=0.5, num_tokens=4)] * 2
    counted = count_optimizer_bytes(model, **options)
    assert counted > count_optimizer_bytes(model, optim)
    assert run_trial(CTCObjective(model), args, batches).optimizer_bytes == counted


def test_plan_keeps_32_bits_for_embeddings_under_8_bit_optimizers():
    embedding, linear = nn.Embedding(64, 128), nn.Linear(128, 64, bias=False)
    codes = 2 * 256 * 4
    assert count_optimizer_bytes(embedding, "adamw_8bit") == 2 * 4 * 8192 + codes
    assert count_optimizer_bytes(linear, "adamw_8bit") == 2 * (8192 + 4 * 32) + codes


def test_plan_refuses_an_optimizer_whose_states_it_does_not_know(plan):
    with pytest.raises(ValueError, match="`optim` must be one of adamw_torch, .*got 'apollo_adamw', whose states"):
        plan("--optim", "apollo_adamw", "--no_trial")


@pytest.mark.parametrize("compress", [True, False])
def test_bytes_of_a_4_bit_weight_are_the_same_before_and_after_it_is_quantised(compress):
    options = {"bias": False, "quant_type": "nf4", "compress_statistics": compress}
    with torch.device("meta"):
        planned = bitsandbytes.nn.Linear4bit(1000, 301, **options)
    loaded = bitsandbytes.nn.Linear4bit(1000, 301, **options).to("cpu").weight
    state = loaded.quant_state
    tensors = [loaded.data, *(value for value in vars(state).values() if torch.is_tensor(value))]
    tensors += [value for value in vars(state.state2 or state).values() if torch.is_tensor(value)] * compress
    assert bytes_of(planned.weight) == bytes_of(loaded) == sum(tensor.nbytes for tensor in tensors)


def test_bytes_of_an_8_bit_weight_are_a_byte_a_value_and_a_scale_a_row():
    loaded = bitsandbytes.nn.Linear8bitLt(100, 30, bias=False, has_fp16_weights=False).to("cpu").weight
    assert bytes_of(loaded) == loaded.data.nbytes + loaded.SCB.nbytes == 3000 + 120


def test_shapes_quantised_without_memory_take_the_bytes_of_the_loaded_model(whisper_folder):
    with torch.device("meta"):
        planned = Whisper(WhisperConfig(**WHISPER))
    quantize_shapes(planned)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    loaded = Whisper.from_pretrained(whisper_folder, quantization_config=config, device_map={"": "cpu"})
    sizes = [{name: bytes_of(value) for name, value in model.named_parameters()} for model in (planned, loaded)]
    assert sizes[0] == sizes[1]
    assert {value.dtype for value in loaded.parameters()} >= {torch.uint8}


def test_saved_bytes_are_the_inputs_of_linear_maps_and_the_output_of_relu():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    counter = SavedBytes(list(model.parameters()))
    for _ in range(2):  # what a step has kept is gone before the next
        with counter.counting():
            model(torch.ones(7, 3)).sum().backward()
    assert counter.peak == 4 * (7 * 3 + 7 * 5)


@pytest.mark.parametrize("kind", ["mlp", "bottleneck", "replacement"])
def test_trial_measures_the_tensors_that_a_real_step_saves(kind, tmp_path):
    model = make_adapted(kind, dropout=0.0)
    batch = draw_batch(model, num_rows=3, seconds=1.0, num_tokens=5)
    args = RecipeTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    objective = CTCObjective(model)
    trial = run_trial(objective, args, [batch, batch])
    objective.train()
    set_frozen_modules_to_eval(objective)
    saved = measure_saved(objective, objective.run_frozen(batch))
    assert trial.activation_bytes == saved + 4  # the Trainer weighs the loss by the tokens of the step
    assert trial.step_seconds > 0
    assert trial.frozen_seconds > 0


@pytest.mark.parametrize("kind", ["mlp", "bottleneck", "replacement"])
def test_activations_estimated_behind_a_frozen_part_are_about_those_of_a_step(kind):
    model = make_adapted(kind)
    objective = CTCObjective(model).train()
    set_frozen_modules_to_eval(objective)
    batch = objective.run_frozen(draw_batch(model, num_rows=3, seconds=2.0, num_tokens=20))
    estimated = estimate_activations(model, num_frames=int(batch["logits_lengths"].sum()), is_packed=True)
    assert estimated == pytest.approx(measure_saved(objective, batch), rel=0.25)


def test_activations_estimated_of_a_whole_model_are_about_those_of_a_step():
    model = make_base().train()
    batch = draw_batch(model, num_rows=3, seconds=2.0, num_tokens=20)
    lengths = model.get_logits_lengths(batch["input_features"], batch["attention_mask"])
    estimated = estimate_activations(model, num_frames=int(lengths.sum()), is_packed=False)
    assert estimated == pytest.approx(measure_saved(CTCObjective(model), batch), rel=0.25)


@pytest.mark.parametrize("kind", ["mlp", "bottleneck"])
def test_plan_tells_the_size_of_the_cache_that_the_recipe_builds(plan, small_base, small_corpus, tmp_path, kind):
    planned = plan("--no_trial", *PLAIN, "--adapter_kind", kind, "--cache_dtype", "bfloat16", model=small_base)
    model, processor = AutoModelForCTC.from_pretrained(small_base), AutoProcessor.from_pretrained(small_base)
    model.add_adapter(SpeechAdapterConfig(kind=kind))
    options = {"samples_per_logit": model.config.inputs_to_logits_ratio, "seed": 0}
    personal, corpus = PersonalArguments(str(small_base), ["ann"]), CorpusArguments(str(small_corpus))
    data = SpeakerLoader(personal, corpus, Augmentation(), processor, **options).load("ann")
    arguments = CacheArguments(cache_dtype="bfloat16", cache_dir=str(tmp_path))
    cached = cache_frozen_part(data.train, CTCObjective(model).prefix, processor, arguments, batch_size=4)
    built = sum(state.nbytes for index in range(len(cached)) for state in cached[index]["states"].values())
    assert planned["cache"]["bytes"] == pytest.approx(built, rel=0.01)
    assert planned["cache"]["variants"] == 1


def test_plan_multiplies_the_cache_by_its_variants_and_has_none_where_every_epoch_is_new(plan):
    whole = plan("--no_trial", *PLAIN)["cache"]["bytes"]
    assert plan("--no_trial", *PLAIN, "--max_speed", 1.1, "--cache_variants", 3)["cache"]["bytes"] == 3 * whole
    assert plan("--no_trial", *PLAIN, "--max_speed", 1.1)["cache"] is None
    assert plan("--no_trial", *PLAIN, "--unfreeze_base")["cache"] is None


def test_plan_adds_the_time_of_a_cached_training_up(plan):
    planned = plan(*PLAIN, "--num_train_epochs", 3, "--per_device_train_batch_size", 2)
    time = planned["time"]
    assert planned["num_steps"] == 3 * 3  # six clips of ann
    heard = planned["trial"]["frozen_seconds"] / (2 * planned["typical_seconds"])
    assert time["frozen_pass"] == pytest.approx(heard * 6 * planned["typical_seconds"])
    assert time["training"] == pytest.approx(9 * time["step"] + time["frozen_pass"])
    assert planned["memory"]["activations"] == planned["trial"]["activation_bytes"]


def test_plan_adds_the_frozen_part_to_every_step_that_runs_it(plan):
    planned = plan("--num_train_epochs", 2, "--num_time_masks", 1, "--gradient_accumulation_steps", 2)
    assert planned["num_steps"] == 2
    assert planned["time"]["frozen_pass"] == pytest.approx(2 * 2 * planned["trial"]["frozen_seconds"])
    assert planned["time"]["training"] == pytest.approx(
        2 * 2 * (planned["time"]["step"] + planned["trial"]["frozen_seconds"])
    )


@pytest.mark.parametrize("speakers", [("ann", "ben"), ("all",)])
def test_plan_counts_the_adapters_of_all_speakers_that_train_together(plan, speakers):
    alone = plan("--no_trial")
    together = plan("--speakers_per_stack", 5, speakers=speakers)
    assert together["groups"]["adapters"]["trainable"] == 2 * alone["groups"]["adapters"]["trainable"]
    assert together["num_rows"] == 2 * alone["num_rows"]
    assert together["num_steps"] == alone["num_steps"]
    assert together["memory"]["optimizer"] == 2 * alone["memory"]["optimizer"]
    assert together["trial"]["optimizer_bytes"] == together["memory"]["optimizer"]


def test_plan_starts_from_the_sizes_of_another_adapter(plan, tiny_base, tiny_adapters):
    planned = plan("--init_adapter", tiny_adapters["bob"], "--no_trial", model=tiny_base)
    model = AutoModelForCTC.from_pretrained(tiny_base)
    model.load_adapter(tiny_adapters["bob"], "bob")
    assert planned["groups"]["adapters"]["trainable"] == model.count_parameters()["adapter"]


def test_plan_of_a_training_from_a_checkpoint_reads_its_configuration_alone(config_folder, small_corpus):
    tokens = ["--model_name_or_path", str(config_folder), "--dataset", str(small_corpus)]
    planner = Planner(train_ctc, parse_arguments(*train_ctc.ARGUMENTS, argv=tokens))
    assert {parameter.device.type for parameter in planner.model.parameters()} == {"meta"}
    total = DeepSpeech2ForCTC(DeepSpeech2Config(**SMALL)).count_parameters()["total"]
    assert sum(parameter.numel() for parameter in planner.model.parameters() if parameter.requires_grad) == total


def test_plan_of_a_stream_takes_its_steps_from_the_command_line(config_folder, small_corpus):
    tokens = ["--model_name_or_path", str(config_folder), "--dataset", str(small_corpus), "--streaming"]
    tokens += ["--max_steps", "7", "--per_device_train_batch_size", "1"]
    planner = Planner(train_ctc, parse_arguments(*train_ctc.ARGUMENTS, argv=tokens))
    planned = planner.make_plan()
    assert (planned.num_steps, planned.typical_seconds) == (7, 10.0)
    planner.try_out(planned)
    assert planned.time["training"] == pytest.approx(7 * planned.time["step"])


def test_plan_does_not_try_what_does_not_fit_into_memory(config_folder, small_corpus):
    tokens = ["--model_name_or_path", str(config_folder), "--dataset", str(small_corpus)]
    planner = Planner(train_ctc, parse_arguments(*train_ctc.ARGUMENTS, argv=tokens))
    planned = planner.make_plan()
    planned.available_bytes = planned.peak_bytes - 1
    planner.try_out(planned)
    assert planned.trial == "left out: it would not fit into memory"


def test_plan_says_what_it_does_not_know_of_other_models(whisper_folder, small_corpus, tmp_path, capsys):
    file = tmp_path / "plan.json"
    tokens = ["--recipe", "adapt_domain", "--model_name_or_path", whisper_folder, "--dataset", small_corpus]
    main([str(token) for token in [*tokens, "--method", "lora_llm", "--load_in_4bit", "--output_file", file]])
    planned = json.loads(file.read_text())
    assert planned["trial"] == "not possible: the batches of this kind of model are not known here"
    assert planned["memory"]["activations"] is None
    assert planned["groups"]["adapters"]["trainable"] == 2 * 2 * 8 * 64  # query and value, down and up, rank 8
    assert "| activations     | not known | left out of the peak" in capsys.readouterr().out


def test_plan_of_a_distillation_counts_the_tower_alone(whisper_folder, small_corpus, tmp_path):
    file = tmp_path / "plan.json"
    tokens = ["--recipe", "adapt_domain", "--model_name_or_path", whisper_folder, "--dataset", small_corpus]
    main([str(token) for token in [*tokens, "--objective", "distill", "--no_trial", "--output_file", file]])
    groups = json.loads(file.read_text())["groups"]
    encoder = Whisper.from_pretrained(whisper_folder).model.encoder
    assert groups.keys() == {"tower", "adapters"}
    assert groups["tower"]["parameters"] == sum(parameter.numel() for parameter in encoder.parameters())


def test_corpus_is_measured_by_its_headers(small_corpus):
    flags = {"dataset": str(small_corpus), "train_split": "train", "speaker_id": ["ann"]}
    rows = load_corpus(str(small_corpus), split="train").filter(lambda row: row["speaker_id"] == "ann")
    seconds = [audio_seconds(row["audio"]) for row in rows]
    size = measure_corpus(flags)
    assert size.num_utterances == 6
    assert size.seconds == pytest.approx(sum(seconds))
    assert size.longest_seconds == max(seconds)
    assert size.characters_per_second == pytest.approx(2 * (3 + 3 + 5) / sum(seconds))
    joined = measure_corpus(flags | {"concatenate_min": 1, "concatenate_max": 3, "min_speed": 0.5})
    assert joined.num_utterances == 3
    assert joined.longest_seconds == pytest.approx(6 * max(seconds))
    assert measure_corpus(flags | {"max_train_seconds": 1.0}).seconds == pytest.approx(1.0, abs=sum(seconds) / 12)
    assert measure_corpus({**flags, "speaker_id": ["all"]}).num_speakers == 2
    assert measure_corpus({**flags, "speaker_id": None, "exclude_speakers": ["ben"]}) == size


def test_steps_count_the_stacks_of_speakers():
    corpus = CorpusSize(60, seconds=60.0, longest_seconds=1.0, characters_per_second=10.0, num_speakers=5)
    options = {"batch_size": 8, "num_epochs": 10, "max_steps": -1}
    assert count_steps(corpus, **options) == 5 * 10 * 2
    assert count_steps(corpus, **options, num_together=2) == 3 * 10 * 2
    assert count_steps(None, **options) is None


def test_recipe_must_be_one_that_can_be_planned():
    assert find_recipe("train_ctc", None) == "train_ctc"
    with pytest.raises(ValueError, match="`recipe` must be one of adapt_domain, personalize, .*train_s2st, got demo"):
        find_recipe("demo", None)
    with pytest.raises(ValueError, match="`recipe` must be one of .*, got None. Or give its `--config`"):
        find_recipe(None, None)
    with pytest.raises(ValueError, match="`config` must be named <recipe>_<data>.yaml, .*got mine.yaml. Give `--rec"):
        find_recipe(None, "configs/mine.yaml")


def test_available_memory_is_no_more_than_the_limit_of_a_container(tmp_path, monkeypatch):
    (tmp_path / "max").write_text("500000000\n")
    (tmp_path / "current").write_text("400000000\n")
    monkeypatch.setattr(recipes.plan, "MEMORY_LIMIT", tmp_path / "max")
    monkeypatch.setattr(recipes.plan, "MEMORY_USED", tmp_path / "current")
    monkeypatch.setattr(recipes.plan.psutil.Process, "memory_info", lambda _self: type("Info", (), {"rss": 7}))
    assert find_available_bytes(torch.device("cpu")) == 100_000_007
