# Everything from a clean clone, on a Debian or Ubuntu with make, python3 (3.10 to 3.12), python3-venv and libgomp1.
#
#   PYTHON=…   the Python to make the environment with (default: an active environment's, else the first that fits)
#   VENV=…     the environment's folder (default: .venv); VENV26=… that of the contest platform's pairing
#   PADDLE=…   what pip installs where PYTHON has no Paddle, for PADDLE26=… likewise: a requirement, a wheel's path, or
#              none. A Paddle of PYTHON, or of an environment that is there, is used as it is and never replaced.

SHELL := /bin/sh
VENV ?= .venv
VENV26 ?= .venv-paddle26
PADDLE ?= paddlepaddle
PADDLE26 ?= paddlepaddle

fits := -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
PYTHON ?= $(shell for p in $${VIRTUAL_ENV:+python} $${CONDA_PREFIX:+python} python3 python3.12 python3.11 python3.10; do \
	"$$p" $(fits) 2>/dev/null && { echo "$$p"; break; }; done)
RUN := "$(VENV)/bin/python"
READY := $(VENV)/.ready
READY26 := $(VENV26)/.ready
PINNED := requirements.txt $(wildcard requirements/*.txt)
PROGRAM := requirements/build.txt requirements.txt requirements/demo.txt requirements/test.txt

# Each file of tests goes to one process of several.
PYTEST := pytest -n auto --maxprocesses 4 --dist loadfile
# Tests that take minutes; `make test QUICK=` runs them too.
QUICK := -m "not slow"

# What test-paddle26 leaves out: tests that import no Paddle. A new file is run on both until it is named here.
NO_PADDLE := tests/metrics tests/test_house.py tests/test_run_sh.py tests/test_make_venv.py tests/utils/test_cli.py \
	tests/utils/test_files.py tests/inference/test_row_shards.py tests/inference/test_boxes.py tests/datasets/test_tsv.py \
	tests/datasets/test_json_index.py tests/processors/test_postprocess.py tests/processors/test_metadata.py

.PHONY: help venv venv-paddle26 demo demo-data test test-paddle26 test-all fuzz bench bench-large lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    draw ads, train a tiny model on them, caption held-out ones: the complete pipeline on the CPU"
	@echo "make demo-data    after it: plant faults among the ads, find them, tune with and without them"
	@echo "make test    run the tests, with coverage of paddlemix/; PYTEST_ARGS=tests/test_run_sh.py: only some"
	@echo "make test-paddle26   those that involve Paddle, on the contest platform's Paddle 2.6.2 and PaddleNLP 2.8.1"
	@echo "                     (CPU wheel; PADDLE26=paddlepaddle-gpu==2.6.2, as in .ci/run, also checks the GPU kernels)"
	@echo "make test-all    both, with the slow tests"
	@echo "make fuzz    damaged weights, configs, rows and images; FUZZ_EXAMPLES new ones of each kind (10000)"
	@echo "make bench   the benchmarks, into benchmarks/RESULTS.md; bench-large: those with gigabytes of input"
	@echo "make lint    ruff, vermin (compatibility with Python 3.8) and shellcheck"
	@echo "make venv    create the environment ($(VENV)), as the others do if it is missing; venv-paddle26: $(VENV26)"
	@echo "make clean   remove what demo and test have written, but not the environment"

venv: $(READY)

venv-paddle26: $(READY26)

# Asked of a Python: its Paddle (paddlepaddle-gpu==3.3.1, or nothing), and its folders of packages.
paddle_of := -c 'import importlib.metadata as m; print(*sorted({d.name + "==" + d.version for d in m.distributions() \
	if (d.name or "").startswith("paddlepaddle")}))'
packages_of := -c 'import sys; print(*[path for path in sys.path if path.endswith("-packages")], sep="\n")'

# $(call make_venv,FOLDER,LOCK,MAJOR,PADDLE): made anew whenever a pinned file changes; pip leaves alone what fits.
# MAJOR: the first number of the Paddle that the lock is for; a build of the development branch calls itself 0.0.0.
# The link to PYTHON's Paddle comes behind the environment's own packages. --system-site-packages would do for a Python
# that is no environment itself. The pins are given as a variable, which holds in what pip builds, too.
define make_venv
	@"$(PYTHON)" $(fits) 2>/dev/null || { \
		echo "error: '$(PYTHON)' is not a Python 3.10, 3.11 or 3.12: make PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c 'import ctypes, ensurepip; ctypes.CDLL("libgomp.so.1")' 2>/dev/null || { \
		echo "error: no ensurepip or no OpenMP: apt-get install python3-venv libgomp1" >&2; exit 2; }
	@found=$$("$(PYTHON)" $(paddle_of)); case "$$found" in "" | *==$(3).* | *==0.*) ;; *) \
		echo "error: $(PYTHON) has $$found, and $(2) is for Paddle $(3): make PYTHON=/path/to/another" >&2; exit 2;; esac
	"$(1)/bin/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv "$(1)"
	@test -n "$$("$(1)/bin/python" $(paddle_of))" || test -z "$$("$(PYTHON)" $(paddle_of))" || \
		"$(PYTHON)" $(packages_of) > "$$("$(1)/bin/python" $(packages_of))/paddle-of-python.pth"
	@export PIP_CONSTRAINT="file://$$(pwd | sed 's/ /%20/g')/$(2)" PIP_USE_PEP517=1 PIP_QUIET=1; \
	echo "installing into $(1): 2 GB if nothing is there yet, a few minutes …"; \
	"$(1)/bin/python" -m pip install -r requirements/build.txt && \
	set -- "$(4)" && found=$$("$(1)/bin/python" $(paddle_of)) && \
	case "$$found,$(4)" in paddlepaddle* | ,none) set -- ;; esac && \
	"$(1)/bin/python" -m pip install "$$@" $(PROGRAM:%=-r %) && \
	{ test "$$found,$(4)" = ,none || "$(1)/bin/python" -c \
		'import paddle; print("ready: $(1) with Paddle", paddle.__version__, "in", paddle.__path__[0])'; }
	@touch "$(1)/.ready"
endef

$(READY): $(PINNED)
	$(call make_venv,$(VENV),requirements/lock.txt,3,$(PADDLE))

$(READY26): $(PINNED)
	$(call make_venv,$(VENV26),requirements/lock-paddle26.txt,2,$(PADDLE26))

demo: $(READY)
	$(RUN) tools/demo.py

demo-data: $(READY)
	$(RUN) tools/demo_data.py

test: $(READY)
	rm -f .coverage .coverage.*
	$(RUN) -m $(PYTEST) $(QUICK) --cov --cov-report=term $(if $(PYTEST_ARGS),,--cov-fail-under=90) $(PYTEST_ARGS)

# Beside the main environment, if that is there, each reads what the other has written (tests/test_two_paddles.py).
test-paddle26: $(READY26)
	MGEN_OTHER_PYTHON="$(wildcard $(VENV)/bin/python)" "$(VENV26)/bin/python" -m $(PYTEST) $(QUICK) $(NO_PADDLE:%=--ignore=%) $(PYTEST_ARGS)

test-all:
	$(MAKE) test QUICK=
	$(MAKE) test-paddle26 QUICK=

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
