# make demo   install, run the main job on the embedded model, say where the pictures are
# make test   install with the test extras, then ruff, mypy and the suite
# make test-slow   the long proofs that the suite leaves out; docs/testing.md says what proves their claims in the suite
# make test-lowest   the demo's command, shrunk, and some tests with the lowest versions that pyproject.toml allows
PYTHON ?= python3
PYTHON_LOWEST ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOWEST := build/lowest

.PHONY: demo test test-slow test-lowest emoji-world reward-hacking comparison gpu-check bench clean house snippets

demo: $(VENV)/.installed
	$(BIN)/python -m alignlab.train algo=draftp kl_coeff=0.25 output_dir=runs/demo
	@echo "pictures, before and after: runs/demo/samples/"

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# In a venv of its own. Python 3.11, for the lowest versions of some packages have no wheels for later ones.
LOWEST_TESTS := tests/test_lowest.py tests/test_assets.py tests/engine/test_samplers.py tests/engine/test_policy.py tests/test_export.py \
	tests/models/test_folders.py tests/rewards/test_saved_by_transformers_5.py

test-lowest: $(LOWEST)/.installed
	rm -rf $(LOWEST)/demo
	$(LOWEST)/venv/bin/python -m alignlab.train algo=draftp kl_coeff=0.25 quick=true output_dir=$(LOWEST)/demo
	ALIGNLAB_LOWEST=1 $(LOWEST)/venv/bin/python -m pytest -p no:cacheprovider $(LOWEST_TESTS)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON_LOWEST) -m venv $(LOWEST)/venv
	$(LOWEST)/venv/bin/python -m pip install --quiet -c constraints-lowest.txt -e . pytest
	@touch $@

# Builds an embedded world from nothing; needs the Debian package fonts-noto-color-emoji. Goes on where it was stopped.
emoji-world: $(VENV)/.installed
	$(BIN)/python scripts/emoji_world/build.py

# The runs behind results/reward_hacking.
reward-hacking: $(VENV)/.installed
	$(BIN)/python scripts/reward_hacking.py

# The runs behind results/comparison, their evaluation and their page; goes on where it was stopped.
comparison: $(VENV)/.installed
	$(BIN)/python scripts/comparison.py

# What a CUDA GPU makes of Stable Diffusion 1.5 and XL, into results/gpu; goes on where it was stopped. docs/gpu.md
gpu-check: $(VENV)/.installed
	$(BIN)/python scripts/gpu_check.py

# Ratios against a peer and against the limit, and growth, into results/benchmarks.md; an hour, goes on where it was stopped.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

# The functions that documentation pages show, from the code into the pages.
snippets: $(VENV)/.installed
	$(BIN)/python scripts/snippets.py

# How the house reads, beside another commit: make house BESIDE=COMMIT
house: $(VENV)/.installed
	$(BIN)/python scripts/house.py $(BESIDE)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
