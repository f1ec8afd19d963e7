"""Scores of translations: right ones score full marks, wrong ones what a hand can count, batches change nothing."""

import numpy as np
import pytest
import sacrebleu
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.parallel_synthesis import TARGET_VOICE
from data.synthesis import synthesize
from data.translation_metrics import choose_tokenizer, score_bleu, unit_error_rate
from data.translation_utterances import TranslationUtterances
from inference.translation_scoring import (
    Translation,
    evaluate_translations,
    load_translator,
    score_translations,
    translate_dataset,
)
from modeling import (
    EchoStreamConfig,
    EchoStreamFeatureExtractor,
    EchoStreamForSpeechToSpeechTranslation,
    EchoStreamProcessor,
)

PAIRS = {"marque uno": "press one now to go on", "espere": "hold", "marque dos": "press two"}
UNITS = ([1, 2, 3, 4], [5], [1, 2, 6])


def make_tokenizer(texts) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, its special tokens in EchoStream's order."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def processor() -> EchoStreamProcessor:
    extractor = EchoStreamFeatureExtractor()
    extractor.set_statistics(*extractor.measure(synthesize(text, TARGET_VOICE) for text in PAIRS.values()))
    return EchoStreamProcessor(extractor, make_tokenizer(PAIRS), make_tokenizer(PAIRS.values()))


@pytest.fixture(scope="module")
def model(processor) -> EchoStreamForSpeechToSpeechTranslation:
    encoder = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "subsampling_channels": 16}
    sizes = {"decoder_hidden_size": 16, "decoder_intermediate_size": 16, "num_mt_layers": 1, "unit_vocab_size": 15}
    vocabularies = {
        "source_vocab_size": len(processor.tokenizer),
        "vocab_size": len(processor.target_tokenizer),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = EchoStreamConfig.from_size("mini", encoder=encoder, **sizes, **vocabularies)
        return EchoStreamForSpeechToSpeechTranslation(config).eval()


@pytest.fixture(scope="module")
def dataset(processor) -> TranslationUtterances:
    samples = [synthesize(text, TARGET_VOICE) for text in PAIRS]
    clips = Dataset.from_dict(
        {
            "name": list(PAIRS),
            "samples": samples,
            "num_samples": list(map(len, samples)),
            "text": list(PAIRS),
            "target_text": list(PAIRS.values()),
            "asr_labels": processor.tokenizer(list(PAIRS), add_special_tokens=False).input_ids,
            "target_labels": processor.target_tokenizer(list(PAIRS.values()), add_special_tokens=False).input_ids,
            "unit_labels": [[unit + 4 for unit in units] for units in UNITS],
        }
    )
    return TranslationUtterances(clips, processor)


def test_right_translations_score_full_marks(dataset, processor):
    right = [
        Translation(text, target, target, units) for (text, target), units in zip(PAIRS.items(), UNITS, strict=True)
    ]
    scores = score_translations(right, dataset, processor, unit_offset=4)
    assert (scores["wer"], scores["cer"], scores["unit_error_rate"]) == (0, 0, 0)
    assert (
        scores["mt_bleu"]
        == scores["st_bleu"]
        == sacrebleu.corpus_bleu(list(PAIRS.values()), [list(PAIRS.values())]).score
    )
    assert scores["mt_chrf"] == scores["st_chrf"] == pytest.approx(100)


def test_each_head_is_scored_by_what_it_says(dataset, processor):
    wrong = [
        Translation("marque dos", "press one now to go on", "hold", [1, 2, 3]),
        Translation("espere", "hold", "press", [5, 5]),
        Translation("", "press two", "two", []),
    ]
    scores = score_translations(wrong, dataset, processor, unit_offset=4)
    assert scores["wer"] == pytest.approx(3 / 5)  # one word wrong, two missing
    assert scores["unit_error_rate"] == pytest.approx(5 / 8)  # one missing, one too many, three missing
    assert scores["st_bleu"] > 40 > scores["mt_bleu"]
    assert scores["mt_chrf"] == sacrebleu.corpus_chrf(["hold", "press", "two"], [list(PAIRS.values())]).score


def test_scores_are_those_of_the_models_own_words(dataset, processor, model):
    translations = translate_dataset(model, processor, dataset, batch_size=2)
    expected = score_translations(translations, dataset, processor, unit_offset=4)
    assert evaluate_translations(model, processor, dataset, batch_size=3) == pytest.approx(expected)
    for row, translation in enumerate(translations):
        features = dataset[row]["input_features"].unsqueeze(0)
        output = model.generate(features, return_units=True)
        assert translation.mt_text == processor.batch_decode(output.sequences)[0]
        assert translation.units == output.units[0]
        heads = model(features)
        said = processor.decode_source(model.collapse(heads.asr_logits, heads.encoder_lengths))[0]
        assert translation.transcript == said


def test_translations_keep_the_datasets_order_and_the_models_mode(dataset, processor, model):
    model.train()
    together = translate_dataset(model, processor, dataset, batch_size=3)
    assert model.training
    model.eval()
    assert translate_dataset(model, processor, dataset, batch_size=1) == together
    assert len({translation.transcript for translation in together}) > 1


def test_an_observer_sees_every_row_with_its_labels(dataset, processor, model):
    rows = []
    translate_dataset(
        model,
        processor,
        dataset,
        batch_size=2,
        observe=lambda _, output, batch: rows.append((len(output.asr_misfits), batch["asr_labels"].shape[0])),
    )
    assert rows == [(2, 2), (1, 1)]


def test_a_batch_below_one_is_refused(dataset, processor, model):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        translate_dataset(model, processor, dataset, batch_size=0)


def test_load_translator_gives_the_model_that_was_saved(processor, model, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, its_processor = load_translator(str(tmp_path))
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 90, 80), dtype=np.float32))
    assert torch.equal(loaded(features).asr_logits, model(features).asr_logits)
    assert its_processor.feature_extractor.mean == processor.feature_extractor.mean


def test_load_translator_refuses_what_is_no_translation_model(tiny_base, tmp_path):
    with pytest.raises(ValueError, match="`model_name_or_path` must be an EchoStream with its processor, got"):
        load_translator(tiny_base)
    with pytest.raises(ValueError, match="`model_name_or_path` must be an EchoStream with its processor, got"):
        load_translator(str(tmp_path))


def test_bleu_is_sacrebleus_and_says_how_it_was_computed():
    hypotheses, references = ["the bus leaves at two", "press one"], ["the bus leaves at ten", "press one"]
    scores = score_bleu(hypotheses, references)
    assert scores["bleu"] == sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert "tok:13a" in scores["bleu_signature"]
    assert scores["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0")


def test_text_without_spaces_is_cut_into_characters():
    assert choose_tokenizer(["電気をつけて"], "ja") == "char"
    assert choose_tokenizer(["시에 깨워 주세요", "문을 닫아"]) == "13a"
    assert score_bleu(["電気をつけて"], ["電気をつけて"], language="ja")["bleu"] == pytest.approx(100)


def test_bleu_of_unequal_or_empty_references_is_refused():
    with pytest.raises(ValueError, match="`hypotheses` and `references` must be as many, got 1 and 2"):
        score_bleu(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="`references` must have a word in some row, got 2 empty ones"):
        score_bleu(["a", "b"], ["", " "])


def test_unit_error_rate_counts_edits_over_the_references():
    assert unit_error_rate([[1, 2], []], [[1, 3, 2], [4]]) == pytest.approx(2 / 4)
    with pytest.raises(ValueError, match="`references` must be units, one list a hypothesis, got 1 hypotheses and 0"):
        unit_error_rate([[1]], [[]])
