"""Rows of several sequences: little padding, and each sequence as if it were alone."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from data.collators import IGNORED_LABEL
from data.packing import MAX_PADDING, pack_sequences, plan_rows

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"intermediate_size": 32, "vocab_size": 50, "initializer_range": 0.3}


def make_sequences(lengths: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 50, (length,), generator=generator) for length in lengths]
    return [(ids, ids.clone()) for ids in tokens]


@pytest.mark.parametrize("seed", range(20))
def test_rows_have_at_most_a_tenth_of_padding_whatever_the_lengths(seed):
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.normal(4.5, 0.8, size=generator.integers(1, 17))).astype(int).clip(2).tolist()
    batch, order = pack_sequences(make_sequences(lengths), pad_token_id=0)
    assert sorted(order) == list(range(len(lengths)))
    assert int((batch["input_ids"] > 0).sum()) == sum(lengths)
    assert 1 - sum(lengths) / batch["input_ids"].numel() <= MAX_PADDING


def test_sequences_of_one_length_stay_in_rows_of_their_own():
    assert plan_rows([5, 5, 5]) == [[0], [1], [2]]


def test_one_long_sequence_shares_its_batch_with_a_row_of_short_ones():
    assert plan_rows([1000, 500, 480]) == [[0], [1, 2]]


def test_a_packed_batch_is_laid_out_as_documented():
    sequences = [([1, 2], [1, 2]), ([3, 4, 5, 6], [-100, -100, 5, 6]), ([7, 8], [-100, 8])]
    batch, order = pack_sequences(sequences, pad_token_id=0)
    assert order == [1, 0, 2]
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6], [1, 2, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 5, 6], [-100, 2, -100, 8]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("config_class", "model_class"), [(LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)]
)
def test_a_packed_sequence_has_the_logits_that_it_has_alone(config_class, model_class, attention):
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, attn_implementation=attention)).eval()
    sequences = make_sequences([9, 4, 6, 3, 11])
    batch, order = pack_sequences(sequences, pad_token_id=0)
    assert batch["input_ids"].shape[0] < len(sequences)  # some do share a row
    with torch.inference_mode():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        unmasked = model(input_ids=batch["input_ids"], use_cache=False).logits
        alone = [model(input_ids=sequences[index][0][None]).logits[0] for index in order]
    together = packed[batch["input_ids"] > 0]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    # The witness: without the positions sequences would see their neighbours.
    assert (unmasked[batch["input_ids"] > 0] - torch.cat(alone)).abs().max() > 0.01


def test_what_comes_first_in_a_sequence_is_never_learned_from_its_neighbour():
    batch, _ = pack_sequences(make_sequences([6, 2, 4]), pad_token_id=0)
    assert (batch["labels"][batch["position_ids"] == 0] == IGNORED_LABEL).all()
