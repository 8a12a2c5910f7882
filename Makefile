# Every target below sets up .venv by itself. `make` alone explains them.

# What to train on, where the run goes, how large, and on how many GPUs (empty: the program decides).
DATA   = demo
PRESET = demo
RUN    = runs/$(PRESET)
override RUN := $(RUN:~/%=$(HOME)/%)
GPUS   =
# More parameters for the two notebooks, as papermill takes them: make run TRAIN='-p max_steps 100'
TRAIN    =
# Networks trained with the answers, to compare with, take as long as the run itself: EVALUATE= includes them.
EVALUATE = -p supervised 0
export DATA PRESET RUN GPUS OLD NEW

# The first of these that is Python 3.10 or newer makes .venv.
PYTHON = python3 python3.13 python3.12 python3.11 python3.10 python

BIN   := .venv/bin
READY := .venv/.ready
# .venv is whole if it says so itself, stands where it was made, and its Python still runs.
ifneq "$(shell $(BIN)/python -c '' 2>/dev/null && cat $(READY) 2>/dev/null)" "$(CURDIR)"
STALE := stale
endif

# papermill, but Ctrl-C lets training save its last step.
PAPERMILL := $(BIN)/python -m cpc_nb.headless --no-progress-bar --log-level WARNING --stdout-file - --stderr-file -

.DEFAULT_GOAL := help
.PHONY: help run test test-notebooks test-package docs lab trust bench bench-compare ablate recipes export notebooks readme results clean stale

help:  ## list the targets
	@echo "cpc_nb: Contrastive Predictive Coding for speech, told in notebooks"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "make run takes DATA= (a folder, demo, librispeech:train-clean-100), RUN= (the run folder),"
	@echo "PRESET= (demo, samples, minimal, paper, modern) and GPUS= (0: CPU), and for the notebooks' other parameters"
	@echo "TRAIN= and EVALUATE=, for example TRAIN='-p max_steps 100 -p batch_size 32'."
	@echo "make ablate takes DATA=, PRESET=, and ABLATE=, for example ABLATE='--max_steps 2000 --seeds [0]'."

run: $(READY)  ## train and evaluate, end to end (by default on the demo corpus)
	@mkdir -p "$$RUN/evaluation"
	@echo "Training in $$RUN"
	@$(PAPERMILL) nbs/04_train.ipynb "$$RUN/04_train.ipynb" \
		-r data "$$DATA" -r run_dir "$$RUN" -r preset "$$PRESET" $(if $(GPUS),-p n_gpus "$$GPUS") $(TRAIN)
	@echo "Evaluating $$RUN"
	@$(PAPERMILL) nbs/05_evaluate.ipynb "$$RUN/evaluation/05_evaluate.ipynb" -r run_dir "$$RUN" $(EVALUATE)
	@echo
	@echo "Next: open file://`cd "$$RUN" && pwd`/evaluation/report.html in a browser;"
	@echo "make lab opens the notebooks that tell what happened, 00_cpc first;"
	@echo "make run DATA=/path/to/speech RUN=runs/mine trains on speech of your own."

# Some tests wait for processes that they start; meanwhile the notebooks have the cores.
test: $(READY)  ## run the notebooks' own examples and the tests
	@$(MAKE) --no-print-directory -j 2 test-notebooks test-package

test-notebooks: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 1

test-package: $(READY)
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder -rs --durations 10

docs: $(READY)  ## render the notebooks and the API into _docs/
	$(BIN)/python nbs/_sphinx/build.py _docs

lab: $(READY)  ## open JupyterLab at the index; notebooks are cleaned as they are saved
	@test -e .venv/.trusted || echo "Sound that is stored in the notebooks plays once you trust them: make trust"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb \
		--config nbs/_sphinx/lab_config.py $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

# Jupyter runs no HTML of notebooks that came from elsewhere, players included, until their owner trusts them.
trust: $(READY)  ## trust the notebooks as they are, so that their stored sound plays; PULLS=1: also what a pull brings
	$(BIN)/python -m jupyter trust nbs/*.ipynb >/dev/null
	@touch .venv/.trusted
	$(if $(PULLS),@hook="`git rev-parse --git-path hooks`/post-merge"; \
	if [ -e "$$hook" ] && ! grep -qs 'by make trust' "$$hook"; then \
		echo "$$hook exists already: add there: make trust"; exit 1; fi; \
	mkdir -p "`dirname "$$hook"`"; \
	printf '#!/bin/sh\n# by make trust PULLS=1; remove this file to undo it\nmake --no-print-directory trust\n' > "$$hook"; \
	chmod +x "$$hook")

bench: $(READY)  ## measure throughput on this machine; BENCH='--out FILE' keeps the figures
	$(BIN)/python -m cpc_nb.benchmark $(BENCH)

bench-compare: $(READY)  ## figures kept in OLD=FILE beside those in NEW=FILE, or beside what is measured now
	$(BIN)/python -m cpc_nb.benchmark --old "$$OLD" $(if $(NEW),--new "$$NEW") $(BENCH)

ablate: $(READY)  ## train and evaluate the runs behind the paper's tables, on DATA=; an interrupted sweep goes on
	$(BIN)/python -m cpc_nb.paper --data "$$DATA" --preset "$$PRESET" $(ABLATE)

recipes: $(READY)  ## search for the best recipe on DATA= (RECIPES='--minutes 1'); an interrupted search goes on
	$(BIN)/python -m cpc_nb.recipes --data "$$DATA" $(RECIPES)

export: $(READY)  ## notebooks -> package: export, clean, render README.md
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/_sphinx/readme.py

# Of 04_train and 05_evaluate, which are a run and its evaluation, the outputs are those that `make run` left.
notebooks: $(READY)  ## run the notebooks anew and store their outputs (after make run); NOTEBOOKS= for some of them
	$(BIN)/python nbs/_sphinx/execute.py $(NOTEBOOKS)
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/_sphinx/readme.py

readme: $(READY)  ## render README.md from nbs/index.ipynb
	$(BIN)/python nbs/_sphinx/readme.py

# Runs evaluated on this machine, for the tables of the README: make results NAME=demo HARDWARE='two cores of …' RUNS='runs/a runs/b'
results: $(READY)
	$(BIN)/python nbs/_sphinx/results.py "$(NAME)" "$(HARDWARE)" $(RUNS)

clean:  ## remove what the targets build, but neither .venv nor runs/
	rm -rf _docs _proc build dist *.egg-info .pytest_cache nbs/.last_checked
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

# A .venv without the mark was left by an interrupted installation: it is made anew.
$(READY): settings.ini setup.py pyproject.toml constraints.txt $(STALE)
	@set -eu; \
	if [ -n "$(STALE)" ]; then \
		python=; \
		for candidate in $(PYTHON); do \
			if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; \
			then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "No Python 3.10 or newer on the PATH: install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; fi; \
		if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
			echo "$$python cannot make virtual environments: install its venv module" \
				"(on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; fi; \
		echo "Setting up .venv with `$$python --version`"; \
		rm -rf .venv; \
		"$$python" -m venv .venv; \
	fi; \
	rm -f $(READY); \
	echo "Installing the packages: a few minutes and several GB the first time"; \
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	$(BIN)/python -m ipykernel install --sys-prefix --name cpc_nb --display-name cpc_nb >/dev/null; \
	mkdir -p .venv/etc/ipython; \
	echo '{"IPKernelApp": {"log_level": "ERROR"}}' > .venv/etc/ipython/ipython_kernel_config.json; \
	$(MAKE) --no-print-directory hooks; \
	pwd -P > $(READY)

# What nbdev_install_hooks sets up, for this checkout only (it would also edit ~/.jupyter), working
# in worktrees and whether or not .venv is activated. `.gitattributes` names the merge driver. The hook that earlier
# versions set up trusted whatever was pulled: it goes.
.PHONY: hooks
hooks:
	@if [ "`git rev-parse --show-toplevel 2>/dev/null`" = "`pwd -P`" ]; then \
		git config merge.nbdev-merge.name "merge notebooks cell by cell" && \
		git config merge.nbdev-merge.driver 'PATH=".venv/bin:$$PATH"; if command -v nbdev_merge >/dev/null; then nbdev_merge %O %A %B %P; else git merge-file %A %O %B; fi' && \
		hook="`git rev-parse --git-path hooks`/post-merge" && \
		if grep -qsx 'command -v nbdev_trust >/dev/null && nbdev_trust' "$$hook"; then rm "$$hook"; fi; \
	fi || echo "The git hooks for notebooks could not be set up; all else works." >&2
