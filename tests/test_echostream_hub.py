"""An EchoStream that its recipe pushed comes back in a process that cannot import this project."""

import sys

import pytest
import torch
from minihub import MiniHub
from safetensors.torch import load_file, save_file
from test_clean_process import run_clean
from test_hub import connect
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from recipes.train_s2st import main
from tests.translation_models import TINY_FIELDS, make_translation_batch, write_translation_corpus

LOADING = r"""
import io
from contextlib import redirect_stdout
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

remote = {"trust_remote_code": True}
model = AutoModelForSpeechSeq2Seq.from_pretrained("me/echo", **remote).eval()
processor = AutoProcessor.from_pretrained("me/echo", **remote)
inputs = load_file("inputs.safetensors")
with torch.inference_mode():
    output = model(inputs["features"], inputs["mask"], target_labels=inputs["labels"])
logits = {name: output[name] for name in ("asr_logits", "st_logits", "logits", "unit_logits")}
logits["sound"] = processor(inputs["sound"].numpy(), sampling_rate=16_000, return_tensors="pt")["input_features"]
model.load_adapter("me/accent", "accent")
with torch.inference_mode():
    logits["adapted"] = model(inputs["features"], inputs["mask"], target_labels=inputs["labels"]).asr_logits
model.disable_adapters()
save_file({name: value.contiguous() for name, value in logits.items()}, "logits.safetensors")
card = open(hf_hub_download("me/echo", "README.md"), encoding="utf-8").read()
said = io.StringIO()
with redirect_stdout(said):
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
text = processor.batch_decode(processor(target_text=["press two"]).target_labels)
finish({"said": said.getvalue(), "text": text, "tokens": model.generate(inputs["features"], inputs["mask"]).tolist()})
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub with a model and an adapter of it, and the model's folder."""
    folder = tmp_path_factory.mktemp("echo")
    corpus = write_translation_corpus(folder / "es")
    with MiniHub() as hub, pytest.MonkeyPatch.context() as patch:
        connect(patch, hub)
        flags = ["--dataset", corpus, "--max_steps", 1, "--disable_tqdm", "true", "--push_to_hub"]
        base = ["--model_fields", *TINY_FIELDS, "--vocab_size", 60, "--hub_model_id", "me/echo"]
        adapter = ["--start", "transfer", "--checkpoint", folder / "out", "--adapter_kind", "lora",
                   "--warmup_steps", 0, "--hub_model_id", "me/accent", "--hub_base_model_id", "me/echo"]  # fmt: skip
        for own, name in ((base, "out"), (adapter, "accent")):
            tokens = map(str, ["recipes/train_s2st.py", *flags, *own, "--output_dir", folder / name])
            with patch.context() as context:
                context.setattr(sys, "argv", list(tokens))
                main()
        yield hub, folder


@pytest.fixture(scope="module")
def loaded(published, tmp_path_factory):
    """What a clean process reports, and the tensors that went in and came out."""
    folder = tmp_path_factory.mktemp("clean")
    batch = make_translation_batch()
    inputs = {"features": batch["input_features"], "mask": batch["attention_mask"]}
    inputs |= {"labels": batch["target_labels"], "sound": torch.randn(16_000)}
    save_file(inputs, folder / "inputs.safetensors")
    report = run_clean(LOADING, published[0], folder)
    return report, inputs, load_file(folder / "logits.safetensors")


@torch.inference_mode()
def test_a_pushed_model_says_the_same_in_a_process_without_this_project(published, loaded):
    report, inputs, logits = loaded
    model = AutoModelForSpeechSeq2Seq.from_pretrained(published[1] / "out").eval()
    output = model(inputs["features"], inputs["mask"], target_labels=inputs["labels"])
    for name in ("asr_logits", "st_logits", "logits", "unit_logits"):
        torch.testing.assert_close(logits[name], output[name], msg=name)
    assert report["tokens"] == model.generate(inputs["features"], inputs["mask"]).tolist()
    assert (report["import"], report["ours"]) == ("ImportError", [])


def test_a_pushed_processor_hears_and_writes_the_same(published, loaded):
    report, inputs, logits = loaded
    processor = AutoProcessor.from_pretrained(published[1] / "out")
    sound = processor(inputs["sound"].numpy(), sampling_rate=16_000, return_tensors="pt")["input_features"]
    assert torch.equal(sound, logits["sound"])
    assert report["text"] == ["press two"]


def test_the_card_s_example_runs_where_the_project_is_not(loaded):
    assert loaded[0]["said"].startswith("[")


@torch.inference_mode()
def test_a_pushed_adapter_loads_on_its_pushed_base(published, loaded):
    _, inputs, logits = loaded
    model = AutoModelForSpeechSeq2Seq.from_pretrained(published[1] / "out").eval()
    model.load_adapter(str(published[1] / "accent"), "accent")
    adapted = model(inputs["features"], inputs["mask"], target_labels=inputs["labels"]).asr_logits
    torch.testing.assert_close(logits["adapted"], adapted)
    assert (logits["adapted"] - logits["asr_logits"]).abs().max() > 1e-6
