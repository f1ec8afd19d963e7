"""Recordings are transcribed where nothing of training is installed."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a training, a corpus, a score or a picture needs.
TRAINING_PACKAGES = ("audiomentations", "datasets", "espeakng_loader", "evaluate", "jiwer", "librosa", "matplotlib")
TRANSCRIBE = """
import sys

for name in {packages!r}:
    sys.modules[name] = None  # importing it fails as if it were not installed
from recipes.transcribe import main
print(main({tokens!r}))
print(sorted(name for name in sys.modules if name in ("training.trainer", "data.utterances", "data.corpora")))
"""


def test_transcribe_runs_without_the_packages_of_training(tiny_base, recordings):
    tokens = ["--model_name_or_path", tiny_base, "--format", "json", recordings["wav"]]
    code = TRANSCRIBE.format(packages=TRAINING_PACKAGES, tokens=tokens)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *answer, status, modules = done.stdout.strip().splitlines()
    assert json.loads("\n".join(answer))[0]["file"] == recordings["wav"]
    assert status == "0"
    assert modules == "[]"
