"""Word and character error rates of a recogniser over a corpus."""

from collections.abc import Callable

from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from data.collators import CTCCollator
from data.domain_utterances import DomainUtterances
from data.metrics import score_by_speaker
from data.prompts import Prompt
from data.text import find_language
from data.utterances import UtteranceDataset
from inference.answering import answer
from inference.beam_search import BeamDecoder, clean_text
from inference.decoding import recognize_batch


def evaluate_dataset(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: UtteranceDataset,
    *,
    adapter_name: str | None = None,
    batch_size: int = 16,
    decoder: BeamDecoder | None = None,
) -> dict[str, dict]:
    """
    Recognises every utterance with an adapter, if any, and scores the texts.

    Args:
        model: CTC model; it is left in evaluation or training mode as it was.
        processor: Its processor.
        dataset: The utterances, without augmentation.
        adapter_name: The adapter. Default: the active one.
        batch_size: Utterances recognised together, sorted by duration.
        decoder: Beam search; greedy by default.

    Returns:
        As [`score_by_speaker`].

    Raises:
        ValueError: `batch_size` is below 1, or the references of a speaker are empty.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    lengths, collate = dataset.lengths, CTCCollator(processor)
    order = sorted(range(len(dataset)), key=lengths.__getitem__)
    hypotheses = [""] * len(dataset)
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc="evaluating", unit="batch", disable=None):
        rows = order[start : start + batch_size]
        names = None if adapter_name is None else [adapter_name] * len(rows)
        batch = collate([dataset[row] for row in rows])
        frames = recognize_batch(model, batch, adapter_names=names, as_log_probs=decoder is not None)
        texts = [decoder.decode(row) for row in frames] if decoder else processor.batch_decode(frames)
        for row, text in zip(rows, texts, strict=True):
            hypotheses[row] = clean_text(text)
    model.train(was_training)
    language = find_language(processor.tokenizer)
    return score_by_speaker(hypotheses, dataset.references, dataset.speakers, language=language)


def score_answers(
    model: PreTrainedModel,
    prompt: Prompt,
    dataset: DomainUtterances,
    *,
    normalize: Callable[[str], str],
    batch_size: int,
    max_new_tokens: int,
    language: str | None = None,
) -> dict[str, dict]:
    """
    Scores what a model says about recordings, such as a Whisper's transcripts.

    Args:
        model: Whisper or Qwen2-Audio; it is left in evaluation or training mode as it was.
        prompt: What asks it.
        dataset: The utterances; parts of a long clip are answered one by one and joined.
        normalize: Makes reference and answer comparable.
        batch_size: Clips answered together, sorted by duration.
        max_new_tokens: Most tokens of an answer.
        language: Code of the speech's language.

    Returns:
        As [`score_by_speaker`].
    """
    lengths = dataset.lengths
    order = sorted(range(len(dataset)), key=lengths.__getitem__)
    answers = [""] * len(dataset)
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc="evaluating", unit="batch", disable=None):
        rows = order[start : start + batch_size]
        items = [dataset[row] for row in rows]
        chats = [(item["instruction"], [item["samples"]]) for item in items]
        for row, text in zip(rows, answer(model, prompt, chats, max_new_tokens=max_new_tokens), strict=True):
            answers[row] = text
    model.train(was_training)
    references = [normalize(text) for text in dataset.references]
    hypotheses = [""] * len(references)
    for row, utterance in enumerate(dataset.utterances):
        hypotheses[utterance] = f"{hypotheses[utterance]} {normalize(answers[row])}".strip()
    return score_by_speaker(hypotheses, references, dataset.speakers, language=language)
