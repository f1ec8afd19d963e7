"""Training touches adapters alone, stops and goes on bit for bit, and means one loss however batches are cut."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers.trainer_pt_utils import LengthGroupedSampler

from data.collators import CTCCollator
from modeling import DeepSpeech2ForCTC, SpeechAdapterConfig, save_adapter
from modeling.adapters import ADAPTER_WEIGHTS_NAME, is_adapter_parameter
from training.adapter_dropout import seed_dropout
from training.personal import HIDDEN_SIZES
from training.trainer import (
    AdapterTrainer,
    RecipeTrainingArguments,
    check_trainable,
    set_frozen_modules_to_eval,
    tri_stage_factor,
)


class NoiseDataset(torch.utils.data.Dataset):
    """Eight utterances of 20 to 34 frames of 16 bins with three labels each."""

    lengths = list(range(20, 36, 2))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        features = torch.randn(self.lengths[index], 16, generator=generator)
        return {"input_features": features.numpy(), "labels": [3 + index, 4, 5]}


class UnreadableDataset(NoiseDataset):
    """Knows its lengths; none of its utterances may be read."""

    def __getitem__(self, index: int) -> dict:
        raise AssertionError(f"utterance {index} was read")


class EpochDataset(NoiseDataset):
    """Other utterances of other lengths in each epoch, as with augmentation."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def lengths(self) -> list[int]:
        return NoiseDataset.lengths[self.epoch :] + NoiseDataset.lengths[: self.epoch]

    def __getitem__(self, index: int) -> dict:
        example = super().__getitem__(index)
        return example | {"input_features": example["input_features"] + 0.1 * self.epoch}


class LoadedDataset(EpochDataset):
    """Read by processes that load data alone."""

    def __getitem__(self, index: int) -> dict:
        assert torch.utils.data.get_worker_info() is not None
        return super().__getitem__(index)


def make_trainer(model, folder: Path, processor, *, dataset=None, **settings) -> AdapterTrainer:
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.01, "seed": 1} | settings
    args = RecipeTrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **settings)
    dataset = dataset or NoiseDataset()
    return AdapterTrainer(
        model=model, args=args, train_dataset=dataset, eval_dataset=dataset, data_collator=CTCCollator(processor)
    )


def small(kind: str = "mlp", **settings) -> SpeechAdapterConfig:
    return SpeechAdapterConfig(kind=kind, hidden_sizes=[8], **settings)


def load_base(folder: str, *configs: object, seed: int = 5) -> DeepSpeech2ForCTC:
    """The tiny base with adapters `a`, `b`, ..., the same for a seed, all of them active and trainable."""
    model = DeepSpeech2ForCTC.from_pretrained(folder)
    torch.manual_seed(seed)
    names = ["a", "b"][: len(configs)]
    for name, config in zip(names, configs, strict=True):
        model.add_adapter(config, name)
    if configs:
        model.set_adapter(names)
    return model


def adapter_tensors(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if is_adapter_parameter(name)}


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys() != set()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert different == []


def assert_dropout_acts(model, processor) -> None:
    """Another seed of the adapters' dropout gives another loss, the same seed the same."""
    batch = CTCCollator(processor)([NoiseDataset()[index] for index in range(4)])
    model.train()
    set_frozen_modules_to_eval(model)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)  # LoRA's dropout draws from the global generator
        seed_dropout(model, seed)
        losses.append(model(**batch).loss.item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("kind", HIDDEN_SIZES)
def test_the_base_is_bit_equal_after_training(tiny_base, tiny_processor, tmp_path, kind):
    model = load_base(tiny_base, small(kind))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(model, tmp_path, tiny_processor).train()
    after = model.state_dict()

    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if is_adapter_parameter(name)}
    assert any("running_mean" in name for name in before)


def test_a_base_that_trains_moves_its_batch_norm(tiny_base, tiny_processor, tmp_path):
    model = load_base(tiny_base)
    mean = model.encoder.rnn_layers[0].batch_norm.running_mean.clone()
    make_trainer(model, tmp_path, tiny_processor, max_steps=1).train()

    assert not torch.equal(model.encoder.rnn_layers[0].batch_norm.running_mean, mean)
    assert "model.safetensors" in {path.name for path in (tmp_path / "checkpoint-1").iterdir()}


def test_frozen_modules_evaluate_while_recurrent_layers_and_adapters_train(tiny_base):
    model = load_base(tiny_base, small("bottleneck"))
    model.train()
    set_frozen_modules_to_eval(model)
    modes = {name: module.training for name, module in model.named_modules()}

    assert modes["encoder.rnn_layers.0.base_layer.rnn"]
    assert modes["encoder.rnn_layers.0.speech_adapter_blocks.a.3"]
    assert not modes["encoder.rnn_layers.0.base_layer.batch_norm"]
    assert not modes["encoder.conv.base_layer.layers.1"]
    assert not modes["classifier"]


def test_checkpoints_hold_the_adapter_alone(tiny_base, tiny_processor, tmp_path):
    model = load_base(tiny_base, small())
    make_trainer(model, tmp_path, tiny_processor).train()

    assert sorted(path.name for path in (tmp_path / "checkpoint-3").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.bin",
    ]
    fresh = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    fresh.load_adapter(str(tmp_path / "checkpoint-3"), "a")
    assert_same(adapter_tensors(fresh), adapter_tensors(model))


ADAPTERS = {
    "mlp": [small("mlp", dropout=0.3)],
    "bottleneck": [small("bottleneck", dropout=0.3)],
    "two": [small("bottleneck", dropout=0.3), small("mlp", dropout=0.3)],
    "lora under mlp": [LoraConfig(target_modules=["classifier.1"], r=2, lora_dropout=0.3), small("mlp")],
}


@pytest.mark.parametrize("configs", ADAPTERS.values(), ids=ADAPTERS)
def test_a_resumed_run_equals_the_uninterrupted_one(tiny_base, tiny_processor, tmp_path, trained_steps, configs):
    settings = {"max_steps": 6, "save_steps": 3, "save_total_limit": None, "save_strategy": "steps"}
    straight = load_base(tiny_base, *configs)
    make_trainer(straight, tmp_path / "straight", tiny_processor, **settings).train()
    assert_dropout_acts(straight, tiny_processor)
    resumed = load_base(tiny_base, *configs, seed=6)  # what it starts with comes from the checkpoint
    trainer = make_trainer(resumed, tmp_path / "resumed", tiny_processor, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))

    assert trained_steps == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert_same(adapter_tensors(resumed), adapter_tensors(straight))
    optimizers = [
        torch.load(tmp_path / run / "checkpoint-6" / "optimizer.pt")["state"] for run in ("straight", "resumed")
    ]
    assert optimizers[0].keys() == optimizers[1].keys() != set()
    for parameter in optimizers[0]:
        assert_same(optimizers[0][parameter], optimizers[1][parameter])


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("stopped_at", [4, 6])
def test_a_run_resumed_in_a_later_epoch_sees_what_the_uninterrupted_one_saw(
    tiny_base, tiny_processor, tmp_path, trained_steps, strategy, stopped_at
):
    settings = {"max_steps": 10, "save_steps": stopped_at, "save_total_limit": None}  # an epoch has 4 steps
    settings |= {"train_sampling_strategy": strategy, "save_strategy": "steps"}
    runs = []
    for name, checkpoint in (("straight", None), ("resumed", str(tmp_path / "straight" / f"checkpoint-{stopped_at}"))):
        model = load_base(tiny_base, small(dropout=0.3))
        trainer = make_trainer(model, tmp_path / name, tiny_processor, dataset=EpochDataset(), **settings)
        torch.rand(len(name))  # what a process drew before the training must not matter
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(adapter_tensors(model))
    assert_dropout_acts(model, tiny_processor)

    assert trained_steps == [*range(10), *range(stopped_at, 10)]
    assert_same(*runs)


def test_several_active_adapters_are_saved_in_folders_of_their_names(tiny_base, tiny_processor, tmp_path):
    model = load_base(tiny_base, small("bottleneck"), small("mlp"))
    trainer = make_trainer(model, tmp_path, tiny_processor)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))

    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == ["a", "b", "training_args.bin"]
    fresh = DeepSpeech2ForCTC.from_pretrained(tiny_base)
    for name in ("a", "b"):
        fresh.load_adapter(str(tmp_path / "final" / name), name)
    assert_same(adapter_tensors(fresh), adapter_tensors(model))


# peft 0.21 reads a property that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("as_peft_model", [False, True])
def test_the_best_adapter_comes_back_at_the_end(tiny_base, tiny_processor, tmp_path, as_peft_model):
    model = load_base(tiny_base) if as_peft_model else load_base(tiny_base, small())
    model = get_peft_model(model, small(), adapter_name="a") if as_peft_model else model
    trainer = make_trainer(
        model,
        tmp_path,
        tiny_processor,
        greater_is_better=True,  # the loss falls, so the worst one is not the last
        metric_for_best_model="loss",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=None,
        load_best_model_at_end=True,
    )
    trainer.train()

    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert best < 3
    save_adapter(model, tmp_path / "end", "a")
    names = (f"checkpoint-{best}", "checkpoint-3", "end")
    best_weights, last_weights, end = (load_file(tmp_path / name / ADAPTER_WEIGHTS_NAME) for name in names)
    assert_same(end, best_weights)
    assert any(not torch.equal(end[name], last_weights[name]) for name in end)


def test_a_checkpoint_of_other_adapters_is_refused(tiny_base, tiny_processor, tmp_path):
    make_trainer(load_base(tiny_base, small("mlp")), tmp_path, tiny_processor, max_steps=1).train()
    checkpoint = str(tmp_path / "checkpoint-1")

    trainer = make_trainer(load_base(tiny_base, small("bottleneck")), tmp_path, tiny_processor)
    with pytest.raises(ValueError, match="must fit adapter 'a', got unknown or missing .'base_model.model.classifier"):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer = make_trainer(load_base(tiny_base, small("bottleneck"), small("mlp")), tmp_path, tiny_processor)
    with pytest.raises(ValueError, match="must be a whole checkpoint, got .*weights are missing.*1/a/adapter_model"):
        trainer.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("sizes", [(2, 4), (3, 3)])
def test_one_batch_of_eight_equals_accumulated_smaller_batches(tiny_base, tiny_processor, tmp_path, sizes):
    results = []
    for batch_size, accumulation in ((8, 1), sizes):
        model = load_base(tiny_base, small(dropout=0.0))
        trainer = make_trainer(
            model,
            tmp_path,
            tiny_processor,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            logging_steps=1,
        )
        loss = trainer.train().training_loss
        results.append((loss, adapter_tensors(model)))

    (loss, tensors), (other_loss, other_tensors) = results
    assert loss == pytest.approx(other_loss, abs=1e-5)
    start = adapter_tensors(load_base(tiny_base, small(dropout=0.0)))
    assert max((tensors[name] - start[name]).abs().max() for name in tensors) > 1e-3
    for name in tensors:
        torch.testing.assert_close(tensors[name], other_tensors[name], atol=1e-6, rtol=0)


def test_batches_of_similar_length_do_not_read_the_dataset(tiny_base, tiny_processor, tmp_path):
    trainer = make_trainer(
        load_base(tiny_base, small()),
        tmp_path,
        tiny_processor,
        dataset=UnreadableDataset(),
        train_sampling_strategy="group_by_length",
        gradient_accumulation_steps=2,
    )
    sampler = trainer._get_train_sampler()

    assert isinstance(sampler, LengthGroupedSampler)
    order = list(sampler)
    assert order == list(sampler)
    assert sorted(order) == list(range(8))
    assert order[0] == 7
    groups = [[UnreadableDataset.lengths[index] for index in order[start : start + 4]] for start in (0, 4)]
    assert groups == [sorted(group, reverse=True) for group in groups]


def test_batches_are_shuffled_unless_grouping_is_asked_for(tiny_base, tiny_processor, tmp_path):
    trainer = make_trainer(load_base(tiny_base, small()), tmp_path, tiny_processor, dataset=UnreadableDataset())
    sampler = trainer._get_train_sampler()
    first, again = list(sampler), list(sampler)
    trainer.state.epoch = 1.0
    assert first == again
    assert sorted(first) == list(range(8)) != first
    assert list(sampler) != first


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.1), (1, 0.55), (2, 1.0), (3, 1.0), (4, 1.0), (6, 0.1), (8, 0.01), (9, 0.01)],
)
def test_tri_stage_warms_up_holds_and_decays(step, factor):
    stages = {"num_warmup": 2, "num_hold": 2, "num_steps": 8, "initial": 0.1, "final": 0.01}
    assert tri_stage_factor(step, **stages) == pytest.approx(factor)


def test_tri_stage_without_warm_up_or_decay_stays_at_the_peak_to_the_end():
    stages = {"num_warmup": 0, "num_hold": 4, "num_steps": 4, "initial": 0.0, "final": 0.01}
    assert [tri_stage_factor(step, **stages) for step in range(5)] == [1.0] * 5


def test_the_trainer_follows_the_tri_stage_schedule(tiny_base, tiny_processor, tmp_path):
    trainer = make_trainer(
        load_base(tiny_base, small()),
        tmp_path,
        tiny_processor,
        max_steps=8,
        logging_steps=1,
        learning_rate=1e-2,
        tri_stage=True,
        warmup_steps=0.25,
        hold_steps=2,
        initial_lr=1e-3,
        final_lr=1e-4,
    )
    trainer.train()

    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    decay = [1e-2 * 0.01 ** (step / 4) for step in range(5)]
    assert rates == pytest.approx([1e-3, 5.5e-3, 1e-2, 1e-2, *decay[:4]])


@pytest.mark.parametrize("final_lr", [0.0, 0.02])
def test_tri_stage_refuses_a_final_rate_that_it_cannot_reach(tmp_path, final_lr):
    with pytest.raises(ValueError, match=r"`final_lr` must be above 0 and at most `learning_rate` \(0.01\), got"):
        RecipeTrainingArguments(str(tmp_path), learning_rate=0.01, tri_stage=True, final_lr=final_lr)


@pytest.mark.parametrize(
    ("given", "meant"), [("true", True), ("False", False), ("out/checkpoint-3", "out/checkpoint-3")]
)
def test_resuming_can_be_asked_for_by_word_or_by_folder(tmp_path, given, meant):
    assert RecipeTrainingArguments(str(tmp_path), resume_from_checkpoint=given).resume_from_checkpoint == meant


def test_check_trainable_refuses_a_model_that_cannot_learn(tiny_model):
    tiny_model.requires_grad_(False)
    with pytest.raises(ValueError, match="must have trainable parameters, got 0. Add an adapter or unfreeze"):
        check_trainable(tiny_model, max_share=1.0)


def test_check_trainable_refuses_a_base_that_would_train(tiny_model):
    tiny_model.add_adapter(small(), "alice")
    check_trainable(tiny_model, max_share=0.2)
    tiny_model.unfreeze_base_model()
    message = r"At most 20.0% .* may train here, got 100.0% \([\d,]+ of [\d,]+; outside adapters: .'encoder.conv"
    with pytest.raises(ValueError, match=message):
        check_trainable(tiny_model, max_share=0.2)
    check_trainable(tiny_model, max_share=1.0)


def test_check_trainable_names_adapters_that_are_too_large(tiny_model):
    tiny_model.add_adapter(SpeechAdapterConfig(hidden_sizes=[512]), "alice")
    with pytest.raises(ValueError, match="outside adapters: none"):
        check_trainable(tiny_model, max_share=0.2)


def test_saved_state_names_the_adapter_s_base(tiny_base, tiny_processor, tmp_path):
    trainer = make_trainer(load_base(tiny_base, small()), tmp_path, tiny_processor, max_steps=1)
    trainer.save_model()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["inference_mode"]) == (tiny_base, True)


def test_workers_that_persist_see_the_epoch_that_begins(tiny_base, tiny_processor, tmp_path):
    states = []
    persistent = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    for dataset, workers in ((EpochDataset(), {}), (LoadedDataset(), persistent)):
        model = load_base(tiny_base, small())
        settings = {"max_steps": 8, "optim": "sgd"} | workers
        trainer = make_trainer(model, tmp_path, tiny_processor, dataset=dataset, **settings)
        trainer.train()
        states.append(adapter_tensors(model))
    assert trainer.train_dataset.dataset.epoch == 1
    assert_same(*states)
