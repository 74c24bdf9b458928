# Everything runs from .venv, which the first target that needs it sets up. All targets are safe to repeat.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
NOTEBOOKS := $(sort $(wildcard nbs/*.ipynb)) $(sort $(wildcard tutorials/*.ipynb))

.PHONY: help demo test export notebooks
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "  Another interpreter: make demo PYTHON=python3.12"

demo: $(READY) ## Set up .venv, then train tiny-janus with GRPO and report before/after
	$(BIN)/unify_rl train grpo run_dir=runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(READY) ## Set up .venv, then run every lesson and every default test
	@# a fresh process for each lesson, two at a time: what one sets (a default dtype, say) must not reach the next
	OMP_NUM_THREADS=1 $(BIN)/python tests/run_notebooks.py nbs/*.ipynb
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

export: $(READY) ## Clean the notebooks and write the modules from them
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

notebooks: $(READY) ## Run every notebook from the start and store its outputs, then clean and export
	set -e; for notebook in $(NOTEBOOKS); do \
	  $(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace "$$notebook"; done
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-clean --fname tutorials
	$(BIN)/nbdev-export

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) was not found. Install Python 3.10 or later, or name yours: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$$($(PYTHON) --version) is too old: unify_rl needs 3.10 or later. Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -e '.[dev]'
	@touch $@
