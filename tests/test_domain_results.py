"""Error rates of what a model says about whole clips, parts and questions, each as if it were asked alone."""

import numpy as np
import pytest
from datasets import Dataset

from data.domain_utterances import DomainUtterances
from data.metrics import score_by_speaker
from data.text import normalize_text
from inference.answering import answer, load_chat
from inference.scoring import score_answers
from tests.speech_models import save_base


@pytest.mark.parametrize("batch_size", [1, 4])
def test_parts_of_a_long_clip_are_answered_one_by_one_and_joined(tmp_path, batch_size):
    model, prompt = load_chat(str(save_base("qwen2_audio", tmp_path)))
    sizes = [30_000, 9_000, 16_000, 12_000]
    parts = [np.random.default_rng(size).normal(0, 0.1, size).astype(np.float32) for size in sizes]
    columns = {
        "name": ["a", "b", "b", "c"],
        "text": ["first", "second one", "second one", "third"],
        "instruction": ["Who?", "", "", "What was said?"],
        "speaker_id": [""] * 4,
        "samples": parts,
        "num_samples": sizes,
        "utterance": [0, 1, 1, 2],
        "num_parts": [1, 2, 2, 1],
    }
    dataset = DomainUtterances(Dataset.from_dict(columns), max_samples=prompt.max_samples)
    options = {"batch_size": batch_size, "max_new_tokens": 5}
    rates = score_answers(model, prompt, dataset, normalize=normalize_text, **options)["overall"]

    words = ["Who?", None, None, "What was said?"]
    said = [
        answer(model, prompt, [(question, [part])], max_new_tokens=5)[0]
        for question, part in zip(words, parts, strict=True)
    ]
    said = [normalize_text(text) for text in said]
    hypotheses = [said[0], f"{said[1]} {said[2]}".strip(), said[3]]
    assert rates == score_by_speaker(hypotheses, ["first", "second one", "third"], [""] * 3)["overall"]
    assert rates["words"] == 4
