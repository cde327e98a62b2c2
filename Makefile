# Everything from a clean clone, with Debian's or Ubuntu's python3 (3.10 to 3.12) and make.
#
#   PYTHON=…   the Python to make the environment with (default: an active environment's, else the first that fits)
#   VENV=…     the environment's folder (default: .venv)
#   PADDLE=…   auto: the Paddle of PYTHON as it is, or the CPU wheel where it has none (default); none; or a wheel's
#              path or a requirement. A Paddle that the environment has is never replaced.

SHELL := /bin/sh
VENV ?= .venv
PADDLE ?= auto

fits := -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
PYTHON ?= $(shell for p in $${VIRTUAL_ENV:+python} $${CONDA_PREFIX:+python} python3 python3.12 python3.11 python3.10; do \
	"$$p" $(fits) 2>/dev/null && { echo "$$p"; break; }; done)
RUN := "$(VENV)/bin/python"
READY := $(VENV)/.ready

.PHONY: help venv demo test bench bench-large lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    draw ads, train a tiny model on them, caption held-out ones: the whole pipeline on the CPU"
	@echo "make test    all tests, with coverage of paddlemix/"
	@echo "make bench   the benchmarks, into benchmarks/RESULTS.md; bench-large: those with gigabytes of input"
	@echo "make lint    ruff over the Python, shellcheck over the shell scripts"
	@echo "make venv    only make the environment ($(VENV)); the others do so when it is missing"
	@echo "make clean   remove what demo and test have written; the environment stays"

venv: $(READY)

# Made anew whenever a pinned file changes; pip leaves alone what already fits.
$(READY): requirements.txt $(wildcard requirements/*.txt) tools/make_venv.py
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10, 3.11 or 3.12 found; say make PYTHON=/path/to/python" >&2; exit 2; }
	"$(PYTHON)" tools/make_venv.py --venv "$(VENV)" --paddle "$(PADDLE)"
	@touch "$@"

demo: $(READY)
	$(RUN) tools/demo.py

test: $(READY)
	rm -f .coverage .coverage.*
	$(RUN) -m pytest --cov --cov-report=term --cov-fail-under=90 $(PYTEST_ARGS)

bench: $(READY)
	$(RUN) benchmarks/run_all.py

bench-large: $(READY)
	$(RUN) benchmarks/run_all.py --large

lint: $(READY)
	$(RUN) -m ruff check .
	"$(VENV)/bin/shellcheck" run.sh .ci/run

clean:
	rm -rf demo .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
