"""A batch is its examples, padded, with a mask and with labels that the loss ignores."""

import numpy as np

from data.collators import CTCCollator


def test_examples_are_padded_on_the_right(tiny_processor):
    rows = [np.full((frames, 16), frames, dtype=np.float32) for frames in (3, 5)]
    batch = CTCCollator(tiny_processor)(
        [{"input_features": row, "labels": labels} for row, labels in zip(rows, ([7, 8, 9], [4]), strict=True)]
    )

    assert batch["input_features"].shape == (2, 5, 16)
    assert batch["input_features"][:, :, 0].tolist() == [[3, 3, 3, 0, 0], [5, 5, 5, 5, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[7, 8, 9], [4, -100, -100]]


def test_other_columns_are_left_out(tiny_processor):
    example = {"input_features": np.zeros((2, 16), dtype=np.float32), "labels": [1], "speaker_id": "ann"}
    assert set(CTCCollator(tiny_processor)([example])) == {"input_features", "attention_mask", "labels"}


def test_loss_of_a_batch_is_the_mean_of_its_examples_losses(tiny_model, tiny_processor):
    generator = np.random.default_rng(0)
    examples = [
        {"input_features": generator.standard_normal((frames, 16)).astype(np.float32), "labels": labels}
        for frames, labels in ((40, [3, 3, 4]), (13, [5]), (26, [6, 7]))
    ]
    collator = CTCCollator(tiny_processor)

    together = tiny_model(**collator(examples)).loss.item()
    alone = [tiny_model(**collator([example])).loss.item() for example in examples]
    assert abs(together - np.mean(alone)) < 1e-4
