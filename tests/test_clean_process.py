"""What was pushed comes back with `from_pretrained` in processes that cannot import this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from minihub import MiniHub
from safetensors.torch import load_file, save_file
from test_hub import connect, push_stock_model, train_and_push
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq
from tree import PACKAGES

ROOT = Path(__file__).parents[1]

# Refuses this project's packages, wherever an editable install may have put them.
BLOCKER = f"""
import json, re, sys, time

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {(*PACKAGES, "tests")!r}:
            raise ImportError(f"{{name}} must not be importable here")

sys.meta_path.insert(0, Blocker())
ROOT = {str(ROOT)!r}

def attempt(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]

def finish(report):
    import_error = attempt(lambda: __import__("modeling"))[0]
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    ours = [file for file in files if file.startswith(ROOT) and "/site-packages/" not in file]
    print(json.dumps(report | {{"import": import_error, "ours": ours}}))
"""

LOADING = """
import io
from contextlib import redirect_stdout
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

remote = {"trust_remote_code": True}
report, logits, inputs = {}, {}, load_file("inputs.safetensors")
for token in ("hf_wrong", False):  # before the right one fills the cache
    report[str(token)] = attempt(lambda: AutoModelForCTC.from_pretrained("me/secret", token=token, **remote))
report["untrusted"] = attempt(lambda: AutoModelForCTC.from_pretrained("me/base", trust_remote_code=False))

with torch.inference_mode():
    model = AutoModelForCTC.from_pretrained("me/base", **remote).eval()
    logits["base"] = model(inputs["features"]).logits
    model.load_adapter("me/ann")
    logits["load_adapter"] = model(inputs["features"]).logits
    model.disable_adapters()
    logits["off"] = model(inputs["features"]).logits
    model = AutoModelForCTC.from_pretrained("me/ann", **remote).eval()
    logits["adapter_repository"] = model(inputs["features"]).logits
    model = AutoModelForCTC.from_pretrained("me/secret", **remote).eval()
    logits["private"] = model(inputs["features"]).logits
    model = AutoModelForCTC.from_pretrained("me/base", revision="zeros", **remote).eval()
    logits["revision"] = model(inputs["features"]).logits

    get_class_from_dynamic_module("adapters.SpeechAdapterConfig", "me/stock-adapter")
    model = AutoModelForSpeechSeq2Seq.from_pretrained("me/stock-adapter").eval()
    tokens = torch.tensor([[1, 2, 3]])
    logits["stock"] = model(inputs["whisper_features"], decoder_input_ids=tokens).logits

processor = AutoProcessor.from_pretrained("me/base", **remote)
report["text"] = processor.decode(processor(text="two one").labels, group_tokens=False)
sound = processor(inputs["sound"].numpy(), sampling_rate=16_000, return_tensors="pt")
logits["sound"] = sound["input_features"]
for name in ("me/ann", "me/base"):
    card = open(hf_hub_download(name, "README.md"), encoding="utf-8").read()
    examples = re.findall(r"```python\\n(.*?)```", card, re.DOTALL)
    output = io.StringIO()
    with redirect_stdout(output):
        exec("\\n".join(examples), {})
    report[f"examples of {name}"] = [len(examples), output.getvalue()]
save_file({name: value.contiguous() for name, value in logits.items()}, "logits.safetensors")
finish(report)
"""

HUB_IS_DOWN = """
time.sleep = lambda seconds: None  # the client's own waiting, 23 s a file, before it tries again
from transformers import AutoModelForCTC, AutoProcessor
remote = {"trust_remote_code": True}
report = {"model": attempt(lambda: AutoModelForCTC.from_pretrained("me/base", **remote))}
report["adapter"] = attempt(lambda: AutoModelForCTC.from_pretrained("me/ann", **remote))
report["processor"] = attempt(lambda: AutoProcessor.from_pretrained("me/base", **remote))
finish(report)
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory, small_base, small_corpus):
    """A Hub with a base (and a branch of it), an adapter, a private copy of the adapter, and a stock pair."""
    with MiniHub() as hub, pytest.MonkeyPatch.context() as patch:
        connect(patch, hub)
        folder = tmp_path_factory.mktemp("published")
        adapter = train_and_push(patch, small_base, small_corpus, folder / "ann")
        stock = push_stock_model(folder)
        yield {"hub": hub, "adapter": adapter, "stock": stock}


def run_clean(code: str, hub: MiniHub, folder: Path) -> dict:
    """Runs `code` in a process without this project and returns its report."""
    command = [sys.executable, "-I", "-c", BLOCKER + code]
    environment = os.environ | hub.environment(folder / "home")
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def loaded(published, tmp_path_factory):
    """What a clean process reports, and the tensors that went in and came out."""
    folder = tmp_path_factory.mktemp("clean")
    generator = torch.Generator().manual_seed(0)
    shapes = {"features": (2, 40, 16), "sound": (16_000,), "whisper_features": (1, 8, 20)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(inputs, folder / "inputs.safetensors")
    report = run_clean(LOADING, published["hub"], folder)
    return report, inputs, load_file(folder / "logits.safetensors")


@torch.inference_mode()
def test_base_adapter_and_both_in_one_come_back_with_the_same_logits(published, loaded, small_base):
    _, inputs, logits = loaded
    model = AutoModelForCTC.from_pretrained(small_base).eval()
    expected = {"base": model(inputs["features"]).logits}
    model.load_adapter(str(published["adapter"]))
    expected["adapter"] = model(inputs["features"]).logits
    assert not torch.allclose(expected["base"], expected["adapter"], atol=1e-3)
    for name in ("base", "off"):
        torch.testing.assert_close(logits[name], expected["base"], atol=1e-6, rtol=0)
    for name in ("load_adapter", "adapter_repository", "private"):
        torch.testing.assert_close(logits[name], expected["adapter"], atol=1e-6, rtol=0)
    assert torch.equal(logits["base"], logits["off"])


@torch.inference_mode()
def test_an_adapter_of_a_stock_model_comes_back_with_its_code(published, loaded):
    _, inputs, logits = loaded
    base, adapter = published["stock"]
    model = AutoModelForSpeechSeq2Seq.from_pretrained(base).eval()
    tokens = torch.tensor([[1, 2, 3]])
    off = model(inputs["whisper_features"], decoder_input_ids=tokens).logits
    model.load_adapter(str(adapter))
    on = model(inputs["whisper_features"], decoder_input_ids=tokens).logits
    torch.testing.assert_close(logits["stock"], on, atol=1e-6, rtol=0)
    assert not torch.allclose(on, off, atol=1e-3)


def test_revisions_are_told_apart(loaded):
    _, _, logits = loaded
    # The branch's classifier is zero, so every class has the same score.
    assert logits["revision"].std() == 0
    assert logits["base"].std() > 0


def test_processor_comes_back_with_its_vocabulary_and_features(loaded, small_base):
    from transformers import AutoProcessor

    report, inputs, logits = loaded
    processor = AutoProcessor.from_pretrained(small_base)
    sound = processor(inputs["sound"].numpy(), sampling_rate=16_000, return_tensors="pt")
    torch.testing.assert_close(logits["sound"], sound["input_features"], atol=1e-6, rtol=0)
    assert report["text"] == "two one"


def test_examples_of_the_cards_run(loaded):
    report, _, _ = loaded
    for name, number in (("me/ann", 2), ("me/base", 1)):
        found, output = report[f"examples of {name}"]
        assert found == number
        assert output.startswith("[")


def test_nothing_of_this_project_was_imported(loaded):
    report, _, _ = loaded
    assert (report["import"], report["ours"]) == ("ImportError", [])


def test_private_repository_is_closed_to_a_wrong_token_and_to_none(loaded):
    report, _, _ = loaded
    for token in ("hf_wrong", "False"):
        error, message = report[token]
        assert error == "OSError"
        assert "me/secret" in message


def test_code_of_the_hub_runs_only_when_trusted(loaded):
    error, message = loaded[0]["untrusted"]
    assert error == "ValueError"
    assert "trust_remote_code" in message


def test_models_of_a_hub_that_is_not_there_are_named(tmp_path):
    with MiniHub() as hub:
        pass  # its port is closed again
    report = run_clean(HUB_IS_DOWN, hub, tmp_path)
    for part in ("model", "adapter", "processor"):
        error, message = report[part]
        assert error == "OSError"
        assert f"couldn't connect to '{hub.url}'" in message
