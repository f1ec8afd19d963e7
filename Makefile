PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test bench mutants nightly clean

demo: .venv/installed
	$(BIN)/python -m recipes.demo --output_dir outputs/demo

test: .venv/test-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(PYTEST_ARGS)

DATASET ?= fsdd

bench: .venv/installed
	$(BIN)/python -m benchmarks.features
	$(BIN)/python -m benchmarks.personal_training
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.personalization --dataset $(DATASET) --output_dir outputs/personalization
	$(BIN)/python -m benchmarks.robustness --dataset $(DATASET) --output_dir outputs/personalization
	$(BIN)/python -m benchmarks.cache_precision --dataset $(DATASET) --base outputs/personalization/base_without_theo
	$(BIN)/python -m benchmarks.domain_adapters --dataset $(DATASET) --output_dir outputs/domain --tables all

# Breaks the conditions of claims one by one: a test of each claim must notice.
mutants: .venv/test-tools
	$(BIN)/python tests/mutants.py

# What takes too long for every change.
nightly: mutants
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout 3600

# torch comes first: with the exact version in place, nothing asks the registry for a build with CUDA packages.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/test-tools: .venv/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv outputs
