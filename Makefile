# Everything from a clean clone, with Debian's or Ubuntu's python3 (3.10 to 3.12) and make.
#
#   PYTHON=…   the Python to make the environment with (default: an active environment's, else the first that fits)
#   VENV=…     the environment's folder (default: .venv); VENV26=… that of the contest platform's pairing
#   PADDLE=…   auto: the Paddle of PYTHON as it is, or the CPU wheel where it has none (default); none; or a wheel's
#              path or a requirement. A Paddle that the environment has is never replaced.

SHELL := /bin/sh
VENV ?= .venv
VENV26 ?= .venv-paddle26
PADDLE ?= auto

fits := -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
PYTHON ?= $(shell for p in $${VIRTUAL_ENV:+python} $${CONDA_PREFIX:+python} python3 python3.12 python3.11 python3.10; do \
	"$$p" $(fits) 2>/dev/null && { echo "$$p"; break; }; done)
RUN := "$(VENV)/bin/python"
READY := $(VENV)/.ready
READY26 := $(VENV26)/.ready
PINNED := requirements.txt $(wildcard requirements/*.txt) tools/make_venv.py

# Each file of tests goes to one process of several.
PYTEST := pytest -n auto --maxprocesses 4 --dist loadfile

# What test-paddle26 leaves out: tests that import no Paddle. A new file is run on both until it is named here.
NO_PADDLE := tests/metrics tests/test_house.py tests/test_run_sh.py tests/tools/test_make_venv.py tests/utils/test_cli.py \
	tests/utils/test_files.py tests/inference/test_shards.py tests/inference/test_boxes.py tests/datasets/test_tsv.py \
	tests/datasets/test_json_index.py tests/processors/test_postprocess.py tests/processors/test_metadata.py

.PHONY: help venv venv-paddle26 demo test test-paddle26 fuzz bench bench-large lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    draw ads, train a tiny model on them, caption held-out ones: the whole pipeline on the CPU"
	@echo "make test    all tests, with coverage of paddlemix/; PYTEST_ARGS=tests/test_run_sh.py: only those"
	@echo "make test-paddle26   those that have to do with Paddle, on the contest platform's Paddle 2.6.2 and PaddleNLP 2.8.1"
	@echo "                     (CPU wheel; PADDLE=paddlepaddle-gpu==2.6.2, as in .ci/run, tests the GPU's kernels too)"
	@echo "make fuzz    broken weights, configurations, rows and images, FUZZ_EXAMPLES new ones of each kind (10000)"
	@echo "make bench   the benchmarks, into benchmarks/RESULTS.md; bench-large: those with gigabytes of input"
	@echo "make lint    ruff over the Python, vermin for what Python 3.8 lacks, shellcheck over the shell scripts"
	@echo "make venv    only make the environment ($(VENV)); the others do so when it is missing; venv-paddle26: ($(VENV26))"
	@echo "make clean   remove what demo and test have written; the environment stays"

venv: $(READY)

venv-paddle26: $(READY26)

# $(call make_venv,FOLDER,LOCK): made anew whenever a pinned file changes; pip leaves alone what already fits.
define make_venv
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10, 3.11 or 3.12 found; say make PYTHON=/path/to/python" >&2; exit 2; }
	"$(PYTHON)" tools/make_venv.py --venv "$(1)" --lock "$(2)" --paddle "$(PADDLE)"
	@touch "$(1)/.ready"
endef

$(READY): $(PINNED)
	$(call make_venv,$(VENV),requirements/lock.txt)

$(READY26): $(PINNED)
	$(call make_venv,$(VENV26),requirements/lock-paddle26.txt)

demo: $(READY)
	$(RUN) tools/demo.py

test: $(READY)
	rm -f .coverage .coverage.*
	$(RUN) -m $(PYTEST) --cov --cov-report=term $(if $(PYTEST_ARGS),,--cov-fail-under=90) $(PYTEST_ARGS)

# Beside the main environment, if that is there, each reads what the other has written (tests/test_two_paddles.py).
test-paddle26: $(READY26)
	MGEN_OTHER_PYTHON="$(wildcard $(VENV)/bin/python)" "$(VENV26)/bin/python" -m $(PYTEST) $(NO_PADDLE:%=--ignore=%) $(PYTEST_ARGS)

fuzz: $(READY)
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-10000} $(RUN) -m pytest tests/fuzz --timeout=0 $(PYTEST_ARGS)

bench: $(READY)
	$(RUN) benchmarks/run_all.py

bench-large: $(READY)
	$(RUN) benchmarks/run_all.py --large

# vermin takes the field of a tuple for the `file` of Python 2, and would pass over its module.
lint: $(READY)
	$(RUN) -m ruff check .
	"$(VENV)/bin/vermin" --target=3.8- --violations --no-tips --quiet --exclude file paddlemix tools *.py
	"$(VENV)/bin/shellcheck" run.sh .ci/run

clean:
	rm -rf demo .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -not -path "./$(VENV26)/*" -prune -exec rm -rf {} +
