"""What a speech translation model says of a corpus, from each of its heads, and how right it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutput

from data.metrics import score_by_speaker
from data.text import find_language, find_normalizer
from data.translation_metrics import score_bleu, unit_error_rate
from data.translation_utterances import TranslationCollator, TranslationUtterances
from inference.decoding import load_adapter
from modeling.whole_models import load_whole

MODEL_TYPE = "echostream"


@dataclass(frozen=True)
class Translation:
    """
    What the heads say of an utterance.

    Args:
        transcript: Of the transcript's CTC.
        st_text: The translation of its CTC.
        mt_text: The translation of the decoder.
        units: Of the decoder's translation.
    """

    transcript: str
    st_text: str
    mt_text: str
    units: list[int]


def load_translator(
    model_name_or_path: str, adapters: Mapping[str, str] | None = None, *, allow_base_mismatch: bool = False
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    Returns an EchoStream with adapters, in evaluation mode on this process's device, and its processor.

    Args:
        model_name_or_path: Folder or Hub name.
        adapters: Name to folder or Hub name; the last one is active.
        allow_base_mismatch: Take adapters that were made for another base.

    Raises:
        ValueError: The model does not exist, does not load or is of another kind, or an adapter does not fit it.
    """
    try:
        model = load_whole(AutoModelForSpeechSeq2Seq, model_name_or_path)
        processor = AutoProcessor.from_pretrained(model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model_name_or_path` must be an EchoStream with its processor, got {model_name_or_path!r} ({error})."
        ) from error
    if model.config.model_type != MODEL_TYPE:
        raise ValueError(
            f"`model_name_or_path` must be an EchoStream, got {model_name_or_path!r}, a {model.config.model_type}. "
            "Name another one."
        )
    for name, path in (adapters or {}).items():
        load_adapter(model, str(path), name, allow_base_mismatch=allow_base_mismatch, processor=processor)
    return model.eval().to(PartialState().device), processor


@torch.no_grad()
def translate_dataset(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: TranslationUtterances,
    *,
    batch_size: int = 16,
    num_beams: int = 1,
    num_unit_beams: int = 1,
    observe: Callable | None = None,
) -> list[Translation]:
    """
    Returns what the model says of every utterance, in the dataset's order.

    Args:
        model: EchoStream; it is left in evaluation or training mode as it was.
        processor: Its processor.
        dataset: The utterances, without augmentation.
        batch_size: Utterances translated together, sorted by duration.
        num_beams: Beams of the decoder's search; 1 is greedy.
        num_unit_beams: Beams of the search over units.
        observe: Called with the model, its output for a batch with labels, and the batch, such as a health meter's
            `update`.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    lengths, collate = dataset.lengths, TranslationCollator(processor)
    order = sorted(range(len(dataset)), key=lengths.__getitem__)
    translations: list[Translation | None] = [None] * len(dataset)
    beams = {"num_beams": num_beams, "num_unit_beams": num_unit_beams}
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc="translating", unit="batch", disable=None):
        rows = order[start : start + batch_size]
        batch = collate([dataset[row] for row in rows])
        batch = {name: value.to(model.device) for name, value in batch.items() if name != "index"}
        for row, translation in zip(rows, _translate_batch(model, processor, batch, observe, beams), strict=True):
            translations[row] = translation
    model.train(was_training)
    return translations


def _translate_batch(
    model: PreTrainedModel, processor: ProcessorMixin, batch: dict, observe: Callable | None, beams: dict[str, int]
) -> list[Translation]:
    inputs = {name: batch[name] for name in ("input_features", "attention_mask")}
    output = model(**(batch if observe else inputs))
    if observe:
        observe(model, output, batch)
    encoded = BaseModelOutput(last_hidden_state=output.encoder_out)
    generated = model.generate(
        encoder_outputs=encoded, attention_mask=inputs["attention_mask"], return_units=True, **beams
    )
    columns = (
        processor.decode_source(model.collapse(output.asr_logits, output.encoder_lengths)),
        processor.batch_decode(model.collapse(output.st_logits, output.encoder_lengths)),
        processor.batch_decode(generated.sequences),
        generated.units,
    )
    return [Translation(*row) for row in zip(*columns, strict=True)]


def score_translations(
    translations: list[Translation], dataset: TranslationUtterances, processor: ProcessorMixin, *, unit_offset: int
) -> dict[str, float]:
    """
    Returns how right translations are.

    Args:
        translations: From [`translate_dataset`].
        dataset: What they are of.
        processor: Its tokenizers say how texts are normalised, as the references are.
        unit_offset: Class of unit 0 among the labels.

    Returns:
        `wer` and `cer` of the transcripts, `st_bleu`, `st_chrf`, `mt_bleu` and `mt_chrf` of the translations (0 to
        100), and `unit_error_rate` where the corpus has units.
    """
    normalize = find_normalizer(processor.tokenizer)
    transcripts = [normalize(translation.transcript) for translation in translations]
    speakers, language = [""] * len(translations), find_language(processor.tokenizer)
    overall = score_by_speaker(transcripts, dataset.references, speakers, language=language)["overall"]
    scores = {name: overall[name] for name in ("wer", "cer")}
    normalize, language = find_normalizer(processor.target_tokenizer), find_language(processor.target_tokenizer)
    for head in ("st", "mt"):
        texts = [normalize(getattr(translation, f"{head}_text")) for translation in translations]
        of_texts = score_bleu(texts, dataset.target_references, language=language)
        scores |= {f"{head}_{name}": of_texts[name] for name in ("bleu", "chrf")}
    labels = dataset.labels.get("unit_labels")
    if labels is not None:
        pairs = [
            (translation.units, [label - unit_offset for label in row])
            for translation, row in zip(translations, labels, strict=True)
            if len(row)
        ]
        if pairs:
            scores["unit_error_rate"] = unit_error_rate(*zip(*pairs, strict=True))
    return scores


def evaluate_translations(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: TranslationUtterances,
    *,
    batch_size: int = 16,
    num_beams: int = 1,
) -> dict[str, float]:
    """Returns the scores of [`score_translations`] for a dataset; see [`translate_dataset`]."""
    translations = translate_dataset(model, processor, dataset, batch_size=batch_size, num_beams=num_beams)
    return score_translations(translations, dataset, processor, unit_offset=model.config.unit_offset)
