# `make train` and `make test` do all set-up themselves: a virtual environment with the tested versions of constraints.txt.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

# make train ALGO=mtsac ENV=MetaWorld-MT10-v3 STEPS=100000 TRAIN_ARGS="--vec-env subproc"
ALGO = pacosac
ENV = MetaWorld-Quickstart-v3
STEPS = 40000
SEED = 0
# Small networks gain nothing from a second thread, and lose much where something else runs.
TRAIN_ARGS = --num-threads 1 --eval-freq 20000 --eval-episodes 40 -params random_baseline:True

# Test processes at a time; each of them computes on one thread.
JOBS = 2
TEST_ARGS =

# make bench BENCH_ARGS='--only update --cores 1 --clock process_time'
BENCH_ARGS =

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install train test test-own test-sb3 test-zoo lint format type bench commit-checks clean

help:
	@echo 'make install        virtual environment in $(VENV) with everything that the targets below need (they do it themselves)'
	@echo 'make train          train on real Meta-World tasks through RL Zoo (ALGO, ENV, STEPS, SEED, TRAIN_ARGS)'
	@echo "make test           our tests, then SB3's and RL Zoo's own tests with our algorithms (JOBS, TEST_ARGS)"
	@echo 'make lint           ruff, without changing anything'
	@echo 'make format         ruff, sorting imports and formatting in place'
	@echo 'make type           mypy on the package'
	@echo 'make bench          speed measurements beside SB3 and SBX (BENCH_ARGS)'
	@echo 'make commit-checks  format, lint, type'
	@echo 'make clean          remove build outputs and caches, but neither $(VENV) nor logs'

install: $(STAMP)

# The start-up files are copied into the environment, also by an editable install.
$(STAMP): pyproject.toml constraints.txt sb3_mtrl/version.txt $(wildcard startup/*)
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 14); sys.exit(0 if ok else "Python 3.10 to 3.13 is needed, \
	$(PYTHON) is " + sys.version.split()[0] + ": name another one with PYTHON=...")'
	@echo 'Setting up $(VENV): this takes some minutes the first time'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first: the build that pip prefers here (CPU or CUDA) is then the one that the rest is installed around.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,onnx,plots,video,postgresql]'
	touch $@

train: $(STAMP)
	$(BIN)/python -m rl_zoo3.train --algo $(ALGO) --env $(ENV) -n $(STEPS) --seed $(SEED) -P $(TRAIN_ARGS)

test: test-own test-sb3 test-zoo

test-own: export OMP_NUM_THREADS = 1
test-own: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) $(TEST_ARGS)

test-sb3: export OMP_NUM_THREADS = 1
test-sb3: $(STAMP)
	$(BIN)/python -m tests.sb3_suite --algo MTSAC -q -n $(JOBS) $(TEST_ARGS)
	$(BIN)/python -m tests.sb3_suite --algo tests.sb3_suite.variants:PrioritizedMTSAC -q -n $(JOBS) $(TEST_ARGS)
	$(BIN)/python -m tests.sb3_suite --algo PaCoSAC -q -n $(JOBS) $(TEST_ARGS)
	$(BIN)/python -m tests.sb3_suite --algo CMTASAC -q -n $(JOBS) $(TEST_ARGS)
	$(BIN)/python -m tests.sb3_suite --algo tests.sb3_suite.variants:MemorylessCMTASAC -q -n $(JOBS) $(TEST_ARGS)
	$(BIN)/python -m tests.sb3_suite --algo TSACSAC -q -n $(JOBS) $(TEST_ARGS)
	$(BIN)/python -m tests.sb3_suite --algo STARSSAC -q -n $(JOBS) $(TEST_ARGS)

test-zoo: export OMP_NUM_THREADS = 1
test-zoo: $(STAMP)
	$(BIN)/python -m tests.zoo_suite --algo mtsac -q -n $(JOBS) $(TEST_ARGS)
	$(BIN)/python -m tests.zoo_suite --algo pacosac -q -n $(JOBS) $(TEST_ARGS)
	$(BIN)/python -m tests.zoo_suite --algo cmtasac -q -n $(JOBS) $(TEST_ARGS)
	$(BIN)/python -m tests.zoo_suite --algo tsacsac -q -n $(JOBS) $(TEST_ARGS)
	$(BIN)/python -m tests.zoo_suite --algo starssac -q -n $(JOBS) $(TEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

type: $(STAMP)
	$(BIN)/mypy

# SBX, one of the libraries to compare with, is installed below .cache; matplotlib draws the picture.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt matplotlib
	$(BIN)/python -m benchmarks.speed.run $(BENCH_ARGS)

commit-checks: $(STAMP)
	$(MAKE) format
	$(MAKE) lint
	$(MAKE) type

clean:
	rm -rf dist build .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find sb3_mtrl startup tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
