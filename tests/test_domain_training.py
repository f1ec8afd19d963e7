"""What a domain adaptation minimises, with which learning rates, and that settings that must not matter do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from data.domain_utterances import DomainCollator, DomainUtterances, PairedUtterances
from data.prompts import make_prompt
from inference.audio_models import load_model
from modeling import SpeechAdapterConfig
from modeling.adapters import is_adapter_parameter
from tests.speech_models import make_whisper_processor, save_base
from training.audio_tower import add_adapter, find_tower_block, load_tower_alone
from training.domain_training import DomainTrainer, DomainTrainingArguments, cache_tower
from training.objectives.domain import DISTANCES, DomainObjective, evaluate_distances, measure_distances

ROOT = Path(__file__).parents[1]
PROMPT = make_prompt(make_whisper_processor())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Whisper."""
    return str(save_base("whisper", tmp_path_factory.mktemp("whisper")))


@pytest.fixture
def pairs() -> PairedUtterances:
    """Eight utterances of noise, twice, of which some say much more than others."""
    return make_pairs()


def make_pairs() -> PairedUtterances:
    domains = []
    for seed in range(2):
        generator = np.random.default_rng(seed)
        sizes = [16_000 - 500 * row for row in range(8)]
        columns = {
            "name": [f"{row}.wav" for row in range(8)],
            "text": ["one two six ten one two six ten", "two", "six", "ten"] * 2,
            "instruction": [""] * 8,
            "speaker_id": [""] * 8,
            "samples": [generator.normal(0, 0.1, size).astype(np.float32) for size in sizes],
            "num_samples": sizes,
            "utterance": list(range(8)),
            "num_parts": [1] * 8,
        }
        domains.append(DomainUtterances(Dataset.from_dict(columns), max_samples=PROMPT.max_samples))
    return PairedUtterances(*domains)


def make_objective(base: str, objective: str, **options) -> DomainObjective:
    """A transformer adapter on a tiny Whisper that already changes something."""
    torch.manual_seed(0)
    model = load_tower_alone(base) if objective == "distill" else load_model(base)
    config = SpeechAdapterConfig(kind="transformer", num_layers=1, num_heads=2, ffn_size=8, dropout=0.0)
    add_adapter(model, config, "domain")
    block = find_tower_block(model, "domain")
    torch.nn.init.normal_(block.output_norm.weight, std=0.3)
    return DomainObjective(model, objective, speech_adapter_block=block, **options).eval()


def make_batch(pairs: PairedUtterances, *, has_answers: bool) -> dict[str, torch.Tensor]:
    return DomainCollator(PROMPT, has_answers=has_answers)([pairs[row] for row in range(4)])


def test_distances_of_equal_features_are_zero_whatever_the_padding():
    features = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    padded = features.clone()
    padded[1, 2:] = 100
    distances = measure_distances(padded, features, torch.tensor([5, 2]))
    assert distances["l2_distance"] == 0
    assert distances["cosine_distance"].abs() < 1e-6


def test_features_twice_as_long_differ_in_length_and_not_in_direction():
    distances = measure_distances(torch.full((1, 2, 4), 2.0), torch.ones(1, 2, 4), torch.tensor([2]))
    assert distances["l2_distance"] == 1.0
    assert distances["cosine_distance"].abs() < 1e-6


@pytest.mark.parametrize("objective", ["task", "distill", "both"])
def test_every_objective_gives_a_gradient_to_the_adapter_alone(base, pairs, objective):
    model = make_objective(base, objective)
    model(**make_batch(pairs, has_answers=objective != "distill"))["loss"].backward()
    parameters = dict(model.adapted_model.named_parameters())
    with_gradient = {name for name, value in parameters.items() if value.grad is not None and value.grad.any()}
    assert with_gradient == {name for name in parameters if is_adapter_parameter(name)}


def test_both_is_the_sum_of_task_and_weighted_distances(base, pairs):
    batch = make_batch(pairs, has_answers=True)
    outputs = {
        name: make_objective(base, name, distill_weight=0.3)(**dict(batch)) for name in ("task", "distill", "both")
    }
    expected = outputs["task"]["loss"] + 0.3 * outputs["distill"]["loss"]
    torch.testing.assert_close(outputs["both"]["loss"], expected, atol=1e-5, rtol=0)
    distill = outputs["distill"]
    torch.testing.assert_close(distill["loss"], distill["cosine_distance"] + distill["l2_distance"])
    assert outputs["task"].keys() == {"loss"}


@pytest.mark.parametrize("objective", ["task", "distill", "both"])
def test_cached_features_give_the_loss_of_the_samples(base, pairs, tmp_path, objective):
    model = make_objective(base, objective)
    collator = DomainCollator(PROMPT, has_answers=objective != "distill")
    options = {"folder": tmp_path, "dtype": "float32", "batch_size": 3}
    cached = cache_tower(model.adapted_model, PROMPT.processor, [pairs], collator, **options)
    rows = (1, 5, 6)
    losses = [model(**collator([data[row] for row in rows]))["loss"] for data in (pairs, cached)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
    assert len(list(Path(tmp_path).rglob("*.safetensors"))) == 1


def test_a_cache_of_pairs_for_distillation_keeps_no_padding(base, pairs, tmp_path):
    model = make_objective(base, "distill")
    options = {"folder": tmp_path, "dtype": "bfloat16", "batch_size": 3}
    collator = DomainCollator(PROMPT, has_answers=False)
    cached = cache_tower(model.adapted_model, PROMPT.processor, [pairs], collator, **options)
    assert [len(cached[row]["states"]) for row in range(8)] == [PROMPT.count_frames(size) for size in pairs.lengths]
    assert cached[0]["source_states"].dtype == torch.bfloat16


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_distances_of_a_corpus_do_not_depend_on_the_batches(base, pairs, batch_size):
    model, collator = make_objective(base, "distill"), DomainCollator(PROMPT, has_answers=False)
    measured = evaluate_distances(model, pairs, collator, batch_size=batch_size)
    with torch.no_grad():
        expected = model(**collator([pairs[row] for row in range(8)]))
    assert measured == pytest.approx({name: expected[name].item() for name in DISTANCES}, abs=1e-6)
    assert 0 < measured["cosine_distance"] < 2


def make_trainer(
    base: str, pairs: PairedUtterances, folder: Path, objective: str = "both", **settings
) -> DomainTrainer:
    settings = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True, "seed": 1} | settings
    return DomainTrainer(
        model=make_objective(base, objective),
        args=DomainTrainingArguments(output_dir=str(folder), **settings),
        train_dataset=pairs,
        eval_dataset=pairs,
        data_collator=DomainCollator(PROMPT, has_answers=objective != "distill"),
        processing_class=PROMPT.processor,
    )


def test_the_scale_has_a_learning_rate_of_its_own_and_everything_trains_once(base, pairs, tmp_path):
    trainer = make_trainer(base, pairs, tmp_path, scale_lr=0.5, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    block = trainer.model.speech_adapter_block
    by_rate = {lr: [p for group in groups if group["lr"] == lr for p in group["params"]] for lr in (0.5, 1e-2)}
    assert [id(value) for value in by_rate[0.5]] == [id(block.scale)]
    trained = sorted(id(value) for group in groups for value in group["params"])
    assert trained == sorted(map(id, block.parameters()))
    decayed = {id(value) for group in groups if group["weight_decay"] for value in group["params"]}
    assert id(block.output.weight) in decayed
    assert id(block.output_norm.bias) not in decayed


def test_the_rates_of_both_groups_follow_the_schedule(base, pairs, tmp_path):
    trainer = make_trainer(
        base, pairs, tmp_path, scale_lr=0.5, max_steps=4, warmup_steps=0, lr_scheduler_type="linear"
    )
    trainer.create_optimizer_and_scheduler(4)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    rates = sorted(group["lr"] for group in trainer.optimizer.param_groups)
    assert rates == pytest.approx([0.0075] * (len(rates) - 1) + [0.375])


def take_step(base: str, pairs: PairedUtterances, folder: Path, objective: str, **settings) -> dict[str, float]:
    """What is logged of the first step: loss, its parts, and the norm of the gradient."""
    trainer = make_trainer(base, pairs, folder, objective, max_steps=1, **settings)
    trainer.train()
    first = trainer.state.log_history[0]
    return {name: first[name] for name in ("loss", "grad_norm", *DISTANCES) if name in first}


@pytest.mark.parametrize("objective", ["task", "distill", "both"])
@pytest.mark.parametrize("sizes", [(1, 8), (3, 3)])
def test_accumulated_batches_train_as_one_batch_does(base, pairs, tmp_path, objective, sizes):
    together, apart = (
        take_step(
            base, pairs, tmp_path, objective, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        for size, steps in ((8, 1), sizes)
    )
    assert together.keys() >= {"loss", "grad_norm"}
    assert apart == pytest.approx(together, rel=1e-4)


def test_two_processes_train_as_one_does(base, pairs, tmp_path):
    together = take_step(base, pairs, tmp_path, "both", per_device_train_batch_size=8)
    script = tmp_path / "two.py"
    script.write_text(
        """
import json, sys
from pathlib import Path
from training.processes import choose_device, join_processes
choose_device()
assert join_processes().num_processes == 2
from tests.test_domain_training import make_pairs, take_step
step = take_step(sys.argv[1], make_pairs(), Path(sys.argv[2]), "both", per_device_train_batch_size=2,
                 gradient_accumulation_steps=2)
if join_processes().is_main_process:
    print(json.dumps(step))
"""
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_configs/multi_cpu.yaml",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, script, base, tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-2000:]
    apart = json.loads(next(line for line in run.stdout.splitlines() if line.startswith('{"loss"')))
    assert apart == pytest.approx(together, rel=1e-4)


@pytest.mark.parametrize("objective", ["task", "both"])
def test_the_loss_of_an_evaluation_does_not_depend_on_its_batches(base, pairs, tmp_path, objective):
    losses = [
        make_trainer(base, pairs, tmp_path, objective, per_device_eval_batch_size=size).evaluate()["eval_loss"]
        for size in (1, 3)
    ]
    with torch.no_grad():
        expected = make_objective(base, objective)(
            **DomainCollator(PROMPT, has_answers=True)([pairs[row] for row in range(8)])
        )["loss"].item()
    assert losses == pytest.approx([expected] * 2, rel=1e-5)


def test_distances_are_logged_and_evaluations_have_a_loss(base, pairs, tmp_path):
    trainer = make_trainer(base, pairs, tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert all(0 < row[name] < 2 for row in logged for name in ("cosine_distance", "l2_distance"))
    assert logged[0]["loss"] > logged[0]["cosine_distance"] + logged[0]["l2_distance"]
    assert any("eval_loss" in row for row in trainer.state.log_history)


def test_a_resumed_distillation_equals_the_uninterrupted_one(base, pairs, trained_steps, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 5}
    settings |= {"per_device_train_batch_size": 2}
    whole = make_trainer(base, pairs, tmp_path / "whole", "distill", **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {"adapter_model.safetensors"}
    resumed = make_trainer(base, pairs, tmp_path / "resumed", "distill", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert trained_steps == [0, 1, 2, 3, 2, 3]
    expected = whole.model.speech_adapter_block.state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in resumed.model.speech_adapter_block.state_dict().items()
    )
