"""A streaming recogniser is trained, personalised and hears recordings as they come, by the recipes that users run."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_clean_process import BLOCKER
from transformers import AutoModelForCTC, AutoProcessor

from data.audio import read_audio
from data.corpora import load_corpus
from inference.decoding import load_recognizer, transcribe_recordings
from inference.live_recognition import LiveRecognizer
from modeling import EmformerForCTC
from recipes.personalize import main as personalize_main
from recipes.train_ctc import main as train_main
from recipes.transcribe import main as transcribe_main

SIZES = ("--architecture", "emformer", "--num_mel_bins", 16, "--hidden_size", 16, "--num_hidden_layers", 2,
         "--segment_length", 4, "--right_context_length", 1)  # fmt: skip
AS_RECORDED = ("--pause_share", 0, "--room_share", 0, "--device_share", 0, "--save_strategy", "no")


@pytest.fixture(scope="module")
def base(run_recipe_main, small_corpus, tmp_path_factory):
    """Folder of a streaming recogniser that `train_ctc.py` made in some steps."""
    folder = tmp_path_factory.mktemp("emformer")
    run_recipe_main(train_main, "--dataset", small_corpus, *SIZES, "--max_steps", 40, "--learning_rate", 0.02,
                    *AS_RECORDED, "--output_dir", folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def recording(small_corpus):
    """Path of a recording."""
    return load_corpus(str(small_corpus), split="train")[0]["audio"]["path"]


def test_train_ctc_writes_an_emformer_that_the_auto_classes_load(base):
    model, processor = AutoModelForCTC.from_pretrained(base), AutoProcessor.from_pretrained(base)
    assert type(model) is EmformerForCTC
    assert (model.config.segment_length, model.config.right_context_length) == (4, 1)
    assert len(processor.feature_extractor.mean) == 16
    assert json.loads((base / "eval_results.json").read_text())["eval_wer"] > 0


def test_features_have_the_statistics_of_the_training_corpus(base, small_corpus):
    extractor = AutoProcessor.from_pretrained(base).feature_extractor
    rows = load_corpus(str(small_corpus), split="train")
    features = torch.cat([extractor.normalize(extractor.log_mel(read_audio(row["audio"]))) for row in rows])
    torch.testing.assert_close(features.mean(0), torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(features.std(0), torch.ones(16), rtol=0, atol=1e-2)


def test_a_live_recognizer_says_what_the_whole_recording_says(base, recording):
    model, processor = load_recognizer(base)
    samples = read_audio({"path": recording, "bytes": None})
    live, said = LiveRecognizer(model, processor), []
    for piece in np.array_split(samples, 37):
        said.append(live.add(piece))
    streamed = live.finish()
    (whole,) = transcribe_recordings(model, processor, [recording])
    assert streamed == whole
    assert whole.text
    # What has been said stays, but for the last word, which may grow.
    assert all(later.startswith(earlier.rpartition(" ")[0]) for earlier, later in zip(said, said[1:], strict=False))
    with pytest.raises(ValueError, match="`input_features` must have no frames for streams that are over"):
        live.add(samples)


def test_transcribe_streams_with_partial_results(base, recording, capsys):
    flags = ["--model_name_or_path", str(base), recording]
    assert transcribe_main([*flags, "--streaming"]) == 0
    streamed = capsys.readouterr()
    assert transcribe_main(flags) == 0
    assert streamed.out == capsys.readouterr().out
    partial = [line.split("\t") for line in streamed.err.splitlines() if re.match(r"\d+\.\d\d s\t", line)]
    assert partial[-1][1] == streamed.out.strip()
    assert float(partial[0][0].removesuffix(" s")) < float(partial[-1][0].removesuffix(" s")) + 1e-9


def test_personalize_puts_bottlenecks_between_the_layers(
    base, small_corpus, recording, run_recipe_main, tmp_path, capsys
):
    run_recipe_main(personalize_main, "--model_name_or_path", base, "--dataset", small_corpus, "--speaker_id", "ann",
             "--max_steps", 3, "--learning_rate", 0.05, *AS_RECORDED, "--output_dir", tmp_path / "ann")  # fmt: skip
    model, processor = load_recognizer(base, {"ann": str(tmp_path / "ann")})
    names = [name for name, _ in model.named_modules() if name.endswith("speech_adapter_blocks.ann")]
    assert names == [f"encoder.layers.{index}.speech_adapter_blocks.ann" for index in range(2)]
    capsys.readouterr()
    flags = ["--model_name_or_path", str(base), "--adapter", str(tmp_path / "ann"), recording]
    assert transcribe_main([*flags, "--streaming"]) == 0
    (whole,) = transcribe_recordings(model, processor, [recording])
    assert capsys.readouterr().out.strip() == whole.text


def test_a_recogniser_of_whole_recordings_does_not_stream(small_base, recording):
    with pytest.raises(ValueError, match="`streaming` must be false for this model, got true: DeepSpeech2ForCTC"):
        transcribe_main(["--model_name_or_path", str(small_base), "--streaming", recording])
    with pytest.raises(ValueError, match="`streaming` must be false for this model"):
        LiveRecognizer(*load_recognizer(small_base))


def test_a_search_over_words_does_not_stream(base, recording, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("one\n")
    with pytest.raises(ValueError, match="`word_list` and `ngram` must be left out with `streaming`"):
        transcribe_main(["--model_name_or_path", str(base), "--streaming", "--word_list", str(words), recording])


def test_a_streamed_corpus_cannot_give_its_mean(run_recipe_main, small_corpus, tmp_path):
    with pytest.raises(ValueError, match="`streaming` must be false for a fresh Emformer, got true"):
        run_recipe_main(train_main, "--dataset", small_corpus, *SIZES, "--streaming", "true", "--max_steps", 1,
                        *AS_RECORDED, "--output_dir", tmp_path / "out")  # fmt: skip


CLEAN = """
import sys
import torch
from transformers import AutoModelForCTC, AutoProcessor

remote = {"trust_remote_code": True}
model = AutoModelForCTC.from_pretrained(sys.argv[1], **remote).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], **remote)
features = torch.linspace(-1, 1, 40 * 16).view(1, 40, 16)
with torch.inference_mode():
    first = model(features[:, :21], use_cache=True)
    caches = {"past_key_values": first.past_key_values, "padding_cache": first.padding_cache}
    second = model(features[:, 21:], **caches, is_last=True)
logits = torch.cat([first.logits, second.logits], 1)
finish({"logits": logits.flatten().tolist(), "text": processor(text="two").labels})
"""


def test_a_pushed_emformer_streams_in_a_process_without_this_project(base, tmp_path):
    command = [sys.executable, "-I", "-c", BLOCKER + CLEAN, str(base)]
    environment = os.environ | {"HF_HOME": str(tmp_path)}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    features = torch.linspace(-1, 1, 40 * 16).view(1, 40, 16)
    expected = AutoModelForCTC.from_pretrained(base).eval()(features).logits.flatten()
    torch.testing.assert_close(torch.tensor(report["logits"]), expected, rtol=0, atol=1e-5)
    assert report["ours"] == []
    assert report["text"] == AutoProcessor.from_pretrained(base)(text="two").labels
