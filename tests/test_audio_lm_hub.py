"""Bundles of audio language models on the Hub: pushed whole, loaded in a process that has nothing of this project."""

import json

import pytest
import torch
from audio_lm_models import join, make_clip, make_conversation, make_processor
from minihub import MiniHub
from safetensors.torch import load_file, save_file
from test_audio_lm_bundle import say, train_a_step
from test_clean_process import run_clean
from test_hub import connect, read_repository

from publishing.hub import HubTarget, collect_files, push_folder

NAMES = {"encoder": "me/hubert", "language_model": "me/llama"}
LOADING = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

remote = {"trust_remote_code": True}
model = AutoModelForMultimodalLM.from_pretrained("me/bundle", **remote)
processor = AutoProcessor.from_pretrained("me/bundle", **remote)
batch = processor(text="<|audio|> What?", audio=[load_file("inputs.safetensors")["clip"].numpy()])
with torch.no_grad():
    save_file({"logits": model(**batch).logits}, "logits.safetensors")
pipe = pipeline("any-to-any", model="me/bundle", **remote)
messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
answer = pipe(text=messages, max_new_tokens=3, return_full_text=False, generate_kwargs={"do_sample": False})
finish({"class": type(model).__name__, "answer": answer[0]["generated_text"]})
"""


@pytest.fixture(scope="module")
def bundle(audio_lm_bases, tmp_path_factory):
    """A bundle with LoRA on both sides, and its model."""
    model = join(audio_lm_bases, "hubert", "llama", encoder_mode="lora", llm_mode="lora")
    train_a_step(model)
    folder = tmp_path_factory.mktemp("bundle")
    model.save_pretrained(folder)
    make_processor(model).save_pretrained(folder)
    return folder, model


def test_a_bundle_goes_to_the_hub_with_its_adapters_code_and_the_names_of_its_bases(bundle):
    files = collect_files(bundle[0], HubTarget("me/bundle", bundle_bases=NAMES))
    assert files.keys() >= {
        "audio_lm.json", "config.json", "model.safetensors", "modeling_audio_lm.py", "audio_encoders.py",
        "processing_audio_lm.py", "processor_config.json", "chat_template.jinja", "tokenizer.json",
        "encoder_adapter/adapter_config.json", "encoder_adapter/adapter_model.safetensors",
        "language_model_adapter/adapter_config.json", "language_model_adapter/adapter_model.safetensors",
    }  # fmt: skip
    manifest = json.loads(files["audio_lm.json"])
    assert {side: base["name_or_path"] for side, base in manifest["bases"].items()} == NAMES
    config = json.loads(files["language_model_adapter/adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/llama"


def test_a_bundle_on_folders_of_this_machine_is_not_pushed(bundle):
    with pytest.raises(ValueError, match="`folder` must be a bundle on bases of the Hub, got '/.*hubert' as its"):
        collect_files(bundle[0], HubTarget("me/bundle"))
    with pytest.raises(ValueError, match="`bundle_bases` must be a name on the Hub such as me/model, got '/tmp/x'"):
        collect_files(bundle[0], HubTarget("me/bundle", bundle_bases={"encoder": "/tmp/x"}))


@pytest.mark.slow
def test_a_bundle_loads_in_a_clean_process(bundle, audio_lm_bases, tmp_path):
    folder, model = bundle
    with MiniHub() as hub, pytest.MonkeyPatch.context() as patch:
        connect(patch, hub)
        for side, kind in (("encoder", "hubert"), ("language_model", "llama")):
            push_folder(audio_lm_bases[kind], HubTarget(NAMES[side]))
        push_folder(folder, HubTarget("me/bundle", bundle_bases=NAMES))
        save_file({"clip": torch.from_numpy(make_clip(0.5))}, tmp_path / "inputs.safetensors")
        report = run_clean(LOADING, hub, tmp_path)
        names = read_repository(hub, "me/bundle").keys()
    assert (report["class"], report["import"], report["ours"]) == (
        "AudioLMForConditionalGeneration", "ImportError", []
    )  # fmt: skip
    processor = make_processor(model)
    batch = processor(text="<|audio|> What?", audio=[make_clip(0.5)])
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], say(model, batch))
    messages = make_conversation(None, "Hi", answer=None)
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    tokens = model.generate(**batch, max_new_tokens=3, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert report["answer"] == processor.decode(tokens, skip_special_tokens=True)
    assert "encoder_adapter/adapter_model.safetensors" in names
