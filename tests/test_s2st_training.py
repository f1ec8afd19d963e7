"""The losses of speech translation in a training: by labels and not by batches, in stages, with rates of their own."""

import pytest
import torch
from transformers import TrainerCallback

from tests.translation_models import make_translation_batch, make_translation_model
from training.objectives.s2st import MisfitTally, S2STObjective
from training.s2st_training import S2STTrainer, S2STTrainingArguments, is_of_encoder, sum_losses


class Rows(torch.utils.data.Dataset):
    """The rows of the batch of all heads, each with its own length and labels."""

    def __init__(self):
        batch = make_translation_batch()
        self.names = ["ann", "ben", "cho"]
        self.rows = []
        for index in range(3):
            num_frames = int(batch["attention_mask"][index].sum())
            row = {"input_features": batch["input_features"][index, :num_frames], "index": index}
            for name in ("asr_labels", "target_labels", "unit_labels"):
                row[name] = [label for label in batch[name][index].tolist() if label >= 0]
            self.rows.append(row)
        self.rows.append(self.rows[0] | {"unit_labels": [5] * 200})  # too many for its frames
        self.names.append("dan")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index] | {"index": index}


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pads the rows."""
    pad = torch.nn.utils.rnn.pad_sequence
    features = [row["input_features"] for row in rows]
    longest = max(map(len, features))
    batch = {
        "input_features": pad(features, batch_first=True),
        "attention_mask": torch.stack([(torch.arange(longest) < len(row)).long() for row in features]),
        "index": torch.tensor([row["index"] for row in rows]),
    }
    for name in ("asr_labels", "target_labels", "unit_labels"):
        batch[name] = pad([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=-100)
    return batch


def make_objective(rows: Rows, *, segment_lengths: list[int] | None = None) -> S2STObjective:
    model = make_translation_model(encoder_fields={"dropout": 0.0}, dropout=0.0)
    return S2STObjective(model, segment_lengths=segment_lengths, names=rows.names)


def make_trainer(tmp_path, rows: Rows, callbacks=None, **settings) -> S2STTrainer:
    """A Trainer of two steps with plain gradient descent, without dropout and without an order of its own."""
    own = {name: settings.pop(name) for name in ("encoder_lr", "decoder_lr", "encoder_steps") if name in settings}
    defaults = {"max_steps": 2, "optim": "sgd", "learning_rate": 1e-2, "lr_scheduler_type": "constant",
                "warmup_steps": 0, "train_sampling_strategy": "sequential", "use_cpu": True,
                "per_device_train_batch_size": 4, "disable_tqdm": True}  # fmt: skip
    arguments = S2STTrainingArguments(output_dir=str(tmp_path), **{**defaults, **settings})
    return S2STTrainer(
        model=make_objective(rows), args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate,
        callbacks=callbacks, **own,
    )  # fmt: skip


def test_labels_are_counted_without_those_that_do_not_fit():
    rows = Rows()
    items = make_objective(rows).count_items(collate([rows[index] for index in range(4)]))
    assert {name: int(count) for name, count in items.items()} == {
        "asr_labels": 3 + 2 + 3 + 3,
        "st_labels": 4 + 2 + 1 + 4,
        "mt_labels": 5 + 3 + 2 + 5,  # with the end
        "unit_labels": 30 + 20 + 30,
    }


def test_a_step_of_four_batches_of_one_row_is_the_step_of_one_batch_of_four(tmp_path):
    trained = []
    for batch_size, steps in ((4, 1), (1, 4)):
        trainer = make_trainer(tmp_path / str(batch_size), Rows(), max_steps=1, max_grad_norm=0.0,
                               per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps)  # fmt: skip
        trainer.objective.double()
        trainer.objective.misfits.report = lambda: None  # one row of four does not fit, on purpose
        trainer.train()
        trained.append(trainer.objective.adapted_model.state_dict())
    start = make_objective(Rows()).adapted_model.double().state_dict()
    for name in start:
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=1e-5, atol=1e-6, msg=name)
    assert any((trained[0][name] - start[name]).abs().max() > 1e-3 for name in start)


def test_an_evaluation_does_not_depend_on_its_batches():
    rows = Rows()
    objective = make_objective(rows)
    first, second = (sum_losses(objective, rows, collate, batch_size=size) for size in (1, 4))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-4, msg=name)
    assert first["asr_loss"] > 0


def test_an_evaluation_gives_each_loss_and_the_health(tmp_path):
    metrics = make_trainer(tmp_path, Rows()).evaluate()
    weighted = 4 * metrics["eval_asr_loss"] + 4 * metrics["eval_st_loss"] + 8 * metrics["eval_mt_loss"]
    assert metrics["eval_loss"] == pytest.approx(weighted + metrics["eval_unit_loss"], rel=1e-5)
    assert metrics["eval_unit_infeasible_share"] == 0.25
    assert -1 <= metrics["eval_encoder_cosine"] <= 1


class Watch(TrainerCallback):
    """Keeps the weights before each step and after the last."""

    def __init__(self):
        self.states = []

    def on_step_begin(self, _args, _state, _control, *, model, **_kwargs):
        self.states.append({name: value.clone() for name, value in model.adapted_model.state_dict().items()})

    on_train_end = on_step_begin


def test_the_encoder_trains_alone_in_the_first_steps_of_a_transfer_and_all_of_it_then(tmp_path):
    watch = Watch()
    rows = Rows()
    rows.rows.pop()
    make_trainer(tmp_path, rows, [watch], encoder_steps=0.5, optim="adamw_torch", weight_decay=0.1).train()
    start, first, second = watch.states
    changed = [name for name in start if not torch.equal(start[name], first[name])]
    assert changed
    assert all(map(is_of_encoder, changed))
    later = {name for name in start if not torch.equal(first[name], second[name])}
    assert {"asr_ctc_decoder.weight", "mt_decoder.embed_tokens.weight"} <= later


def test_encoder_and_decoders_have_learning_rates_of_their_own(tmp_path):
    trainer = make_trainer(tmp_path, Rows(), encoder_lr=1e-2, decoder_lr=1e-5)
    optimizer = trainer.create_optimizer()
    names = {id(value): name for name, value in trainer.objective.adapted_model.named_parameters()}
    rates = {names[id(value)]: group["lr"] for group in optimizer.param_groups for value in group["params"]}
    assert rates.keys() == set(names.values())
    assert {rate for name, rate in rates.items() if is_of_encoder(name)} == {1e-2}
    assert {rate for name, rate in rates.items() if not is_of_encoder(name)} == {1e-5}


def test_a_step_draws_its_segment_by_seed_and_step_and_an_evaluation_draws_none():
    objective = make_objective(Rows(), segment_lengths=[4, 8, 0]).train()
    drawn = []
    for step in range(40):
        objective.step = step
        drawn.append(objective.draw_segment_length())
        assert objective.draw_segment_length() == drawn[-1]
    assert set(drawn) == {4, 8, 0}
    assert objective.eval().draw_segment_length() is None


def test_the_drawn_segment_reaches_the_encoder():
    rows = Rows()
    batch = collate([rows[0]])
    losses = []
    for length in (4, 50):
        objective = make_objective(rows, segment_lengths=[length]).train()
        losses.append(objective.measure(dict(batch))["asr_loss"])
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("lengths", [[], [-1], [8, -4]])
def test_segments_that_are_none_are_refused(lengths):
    with pytest.raises(ValueError, match="`segment_lengths` must be frames from 1 on, or 0 for the whole utterance"):
        make_objective(Rows(), segment_lengths=lengths)


def test_rows_that_do_not_fit_are_named_and_many_of_them_end_the_training(caplog):
    tally = MisfitTally(["ann", "ben"])
    flags = torch.zeros(40, dtype=torch.bool)
    flags[1] = True
    tally.add({"asr_misfits": flags, "unit_misfits": flags}, torch.arange(40) % 2)
    tally.report()
    assert "1 of 40 utterances have labels that do not fit their frames: ben (asr, unit)" in caplog.text
    tally.report()  # forgets
    tally.add({"unit_misfits": torch.ones(2, dtype=torch.bool)}, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"2 of 2 utterances .* ann \(unit\); ben \(unit\)\. Check them, or raise"):
        tally.report()


def test_a_training_ends_where_units_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"of 8 utterances have labels that do not fit their frames: dan \(unit\)"):
        make_trainer(tmp_path, Rows(), logging_steps=2).train()
