"""A cached result is found as long as the code that computes it is the same, and not after it has changed."""

import importlib
import sys

import datasets
import pytest
from datasets import Dataset

from data import code_digest
from data.code_digest import digest_code, map_versioned
from data.utterances import read_clip


@pytest.fixture
def simulator(tmp_path, monkeypatch):
    """Writes a package whose function `run` adds `gain`, found in another of its modules; returns `run`."""
    monkeypatch.setattr(code_digest, "PACKAGES", ("simulator",))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "simulator").mkdir()
    (tmp_path / "simulator" / "__init__.py").touch()

    def write(gain: int, remark: str = ""):
        lines = ["from .channel import GAIN", "def run(row, *, offset):", "    return {'y': row['x'] + offset + GAIN}"]
        (tmp_path / "simulator" / "main.py").write_text("\n".join(lines))
        (tmp_path / "simulator" / "channel.py").write_text(f"GAIN = {gain}  {remark}")
        for name in [name for name in sys.modules if name.startswith("simulator")]:
            del sys.modules[name]
        code_digest._digest_modules.cache_clear()
        return importlib.import_module("simulator.main").run

    yield write
    for name in [name for name in sys.modules if name.startswith("simulator")]:
        del sys.modules[name]
    code_digest._digest_modules.cache_clear()


def test_a_changed_module_below_the_mapped_one_gives_new_clips(simulator):
    table = Dataset.from_generator(lambda: iter([{"x": 1}, {"x": 2}]), fingerprint="two-rows")
    run = simulator(gain=0)
    plain, ours = table.map(run, fn_kwargs={"offset": 1}), map_versioned(table, run, fn_kwargs={"offset": 1})
    assert (plain["y"][:], ours["y"][:]) == ([2, 3], [2, 3])
    again = map_versioned(table, simulator(gain=0), fn_kwargs={"offset": 1})
    assert again.cache_files == ours.cache_files
    louder = simulator(gain=10)
    assert table.map(louder, fn_kwargs={"offset": 1})["y"][:] == [2, 3]  # what the library alone finds: stale
    assert map_versioned(table, louder, fn_kwargs={"offset": 1})["y"][:] == [12, 13]


def test_arguments_remain_part_of_the_key(simulator):
    table = Dataset.from_generator(lambda: iter([{"x": 1}]), fingerprint="one-row")
    run = simulator(gain=0)
    assert [map_versioned(table, run, fn_kwargs={"offset": offset})["y"][0] for offset in (1, 2)] == [2, 3]


def test_the_digest_follows_imports_of_this_project_and_versions_of_others(monkeypatch):
    before = digest_code(read_clip)
    monkeypatch.setattr("soundfile.__version__", "0.0")  # data.utterances imports data.audio, which imports soundfile
    code_digest._digest_modules.cache_clear()
    assert digest_code(read_clip) != before
    monkeypatch.undo()
    code_digest._digest_modules.cache_clear()
    assert digest_code(read_clip) == before
