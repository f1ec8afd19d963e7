"""Vocabularies of sentencepiece: the same pieces for every text, numbered as fairseq does."""

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from data.parallel_sentences import choose_sentences, write_transcript
from data.sentencepiece_models import read_sentencepiece
from data.text import find_language
from training.start import StartArguments, choose_tokenizers


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [write_transcript(words.es) for words in choose_sentences("test", 600, seed=0)]


def train(folder, texts, model_type: str) -> str:
    prefix = str(folder / model_type)
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=prefix, vocab_size=200, model_type=model_type,
        minloglevel=2, num_threads=1, character_coverage=1.0,
    )  # fmt: skip
    return f"{prefix}.model"


@pytest.fixture(scope="module")
def model(tmp_path_factory, texts) -> str:
    return train(tmp_path_factory.mktemp("sentencepiece"), texts, "unigram")


def test_texts_are_cut_as_sentencepiece_cuts_them(model, texts):
    tokenizer, processor = read_sentencepiece(model, language="es"), SentencePieceProcessor(model_file=model)
    for text in texts[500:]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == processor.encode(text, out_type=str)
        assert tokenizer.decode(ids) == text


def test_subwords_are_numbered_as_fairseq_does(model):
    tokenizer, processor = read_sentencepiece(model), SentencePieceProcessor(model_file=model)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<s>", "<pad>", "</s>", "<unk>", processor.id_to_piece(3)]
    assert len(tokenizer) == 200 - 3 + 4  # the model's own special tokens are three
    assert tokenizer("x₿", add_special_tokens=False).input_ids[-1] == 3


def test_the_tokenizer_is_a_stock_one_that_keeps_its_language(model, tmp_path, texts):
    read_sentencepiece(model, language="es").save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(texts[0]).input_ids == read_sentencepiece(model)(texts[0]).input_ids
    assert find_language(loaded) == "es"


def test_a_training_takes_a_model_for_its_vocabulary(model, texts):
    arguments = StartArguments(start="scratch", source_tokenizer=model, vocab_size=60)
    sides = {"source": texts[:20], "target": ["press one"]}
    source, _, excluded = choose_tokenizers(arguments, None, sides, ["es", "en"])
    assert source.get_vocab() == read_sentencepiece(model).get_vocab()
    assert find_language(source) == "es"
    assert excluded == {}


def test_a_model_of_another_kind_is_refused(tmp_path, texts):
    with pytest.raises(ValueError, match="must be a unigram model of sentencepiece, got one that cuts"):
        read_sentencepiece(train(tmp_path, texts, "bpe"))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "text.model").write_text("hola")
    for name in ("text.model", "none.model"):
        with pytest.raises(ValueError, match=f"{name}` must be a model of sentencepiece, got"):
            read_sentencepiece(tmp_path / name)
