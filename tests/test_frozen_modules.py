"""A frozen base is still while its adapters train: no dropout, no SpecAugment, and gradient checkpointing goes on."""

import pytest
import torch
from peft import LoraConfig
from stock_models import FRAMES, make_batch, make_whisper
from torch import nn
from torch.utils.data import Dataset

from modeling import SpeechAdapterConfig
from modeling.adapters import is_adapter_parameter
from training.audio_tower import run_tower
from training.trainer import AdapterTrainer, RecipeTrainingArguments, set_frozen_modules_to_eval

LABELS = torch.tensor([[9, 11]] * 3)
CONFIGS = {
    "bottleneck": SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[4], dropout=0.0),
    "inside": SpeechAdapterConfig(kind="bottleneck", hidden_sizes=[4], dropout=0.0, target_modules=["layers.0.fc2"]),
    "lora": LoraConfig(target_modules=["q_proj"], r=2),
}


def make_noisy(config: object | None = None):
    """Whisper that drops and masks half of everything in training mode, with a trained adapter."""
    model = make_whisper()
    for part in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.5)
    settings = {"apply_spec_augment": True, "mask_time_prob": 0.5, "mask_time_length": 2, "mask_time_min_masks": 4}
    for name, value in settings.items():
        setattr(model.config, name, value)
    if config is not None:
        torch.manual_seed(0)
        model.add_adapter(config, "ldv")
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name):
                nn.init.normal_(parameter)
    return model


def find_loss_and_gradients(model) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**make_batch(model), labels=LABELS).loss
    loss.backward()
    return loss.item(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def count_calls(model) -> dict[str, int]:
    """The calls of each attention, to be counted."""
    calls = {}
    for name, part in model.named_modules():
        if name.endswith("self_attn"):
            calls[name] = 0
            part.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    return calls


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_frozen_base_is_still_with_and_without_checkpointing(config, use_reentrant):
    model = make_noisy(config)
    still, expected = find_loss_and_gradients(model.eval())
    noisy = {model.train()(**make_batch(model), labels=LABELS).loss.item() for _ in range(3)}
    assert len(noisy | {still}) == 4
    if use_reentrant is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    calls = count_calls(model)

    model.train()
    set_frozen_modules_to_eval(model)
    loss, gradients = find_loss_and_gradients(model)

    assert loss == pytest.approx(still, rel=1e-6)
    assert gradients.keys() == expected.keys() != set()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    assert calls["model.decoder.layers.0.self_attn"] == (1 if use_reentrant is None else 2)


def test_the_trainer_checkpoints_frozen_layers(tmp_path):
    class Clips(Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict:
            batch = make_batch(make_whisper()) | {"labels": LABELS}
            return {name: value[index] for name, value in batch.items()}

    calls = {}
    for is_on in (False, True):
        model = make_noisy(CONFIGS["bottleneck"])
        calls[is_on] = count_calls(model)
        args = RecipeTrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=3, use_cpu=True, disable_tqdm=True,
            save_strategy="no", activation_checkpointing=is_on,
        )  # fmt: skip
        AdapterTrainer(model=model, args=args, train_dataset=Clips()).train()
    assert calls[False]["model.decoder.layers.0.self_attn"] == 1
    assert calls[True]["model.decoder.layers.0.self_attn"] == 2


def test_parts_that_train_drop_as_before():
    model = make_noisy()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".decoder." in name)
    model.train()
    set_frozen_modules_to_eval(model)
    modes = {name: part.training for name, part in model.named_modules()}
    assert modes["model.decoder"]
    assert modes["model.decoder.layers.0"]
    assert not modes["model.encoder"]
    assert not modes["model.encoder.layers.0"]
    assert modes["model"]  # holds the decoder, and so its SpecAugment acts
    model.activation_checkpointing_enable()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    set_frozen_modules_to_eval(model)  # and back: layers that train again drop again, checkpointed or not
    model.requires_grad_(True).train()
    assert len({model(**make_batch(model), labels=LABELS).loss.item() for _ in range(3)}) == 3


def test_running_the_tower_alone_leaves_all_modes_as_they_are():
    model = make_noisy(CONFIGS["bottleneck"]).train()
    set_frozen_modules_to_eval(model)
    before = {name: part.training for name, part in model.named_modules()}
    batch = {"input_features": torch.zeros(1, 8, FRAMES), "attention_mask": torch.ones(1, FRAMES, dtype=torch.long)}
    run_tower(model, batch)
    assert {name: part.training for name, part in model.named_modules()} == before
    assert set(before.values()) == {False, True}
