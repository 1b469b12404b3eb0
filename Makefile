# make report   check, time and draw everything this machine can run: bench_reports/ (options: ARGS="--text FILE")
# make test     run the tests, two files at a time, then those that measure time (options: ARGS="-k mamba")
# make lint     ruff and mypy
#
# Needs python3 (3.11 or newer), pip and make. The first call creates .venv and installs what the three need, under
# constraints.txt; later calls reuse it until pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
RUN := $(VENV)/bin/python -m
PIP := $(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt
READY := $(VENV)/.installed

.PHONY: help report test lint

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

report: $(READY)
	$(RUN) scan_kernels report $(ARGS)

# Exit code 5: ARGS select no test of that kind; but of some kind they must.
test: $(READY)
	@$(RUN) pytest -n 2 --dist loadfile -m "not alone" $(ARGS); beside=$$?; $(RUN) pytest -m alone $(ARGS); \
	case $$beside$$? in 00|05|50) ;; *) exit 1 ;; esac

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

# torch comes first and alone: its version decides what else may come.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not " + sys.version)'
	@echo "installing into $(VENV); the first time takes minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@if nvidia-smi >/dev/null 2>&1; then cuda=,cuda13; fi; $(PIP) --editable ".[test,lint$$cuda]"
	@touch $@
