# The study as a graph of notebooks. `make help` says what there is.
#
# Plain make on purpose: GNU make 3.81, which macOS ships, has no grouped targets, no .ONESHELL and
# no $(file). What make cannot do well (run, check and stamp a notebook) is bf_lib/execute.py.

PRESET ?= mini
SEED   ?= 0
PARAMS ?=
CONDA  := $(shell command -v micromamba || command -v mamba || command -v conda)
ENV    := .venv

# `make PY=python` uses an environment that is already active, instead of making one.
ifeq ($(origin PY),undefined)
PY    := $(ENV)/bin/python
READY := $(ENV)/.installed
endif

B     := build/$(PRESET)
LIB   := $(sort $(wildcard bf_lib/*.py bf_lib/*/*.py bf_lib/*.mplstyle))
DATA  := $(sort $(wildcard data/*.csv data/prompts/* data/mini/*.json data/mini/*/*))

# Notebooks from 90 up make what the study starts from, so `make reproduce` leaves them out.
STUDY := $(patsubst notebooks/%.ipynb,%,$(sort $(wildcard notebooks/[0-8][0-9]_*.ipynb)))
MINI  := 90_train_mini

TRAINED := build/train_mini/finished

# Float sums depend on the number of threads, so it is fixed here and not left to the machine.
export OMP_NUM_THREADS      := 1
export MKL_NUM_THREADS      := $(OMP_NUM_THREADS)
export OPENBLAS_NUM_THREADS := $(OMP_NUM_THREADS)
export PARAMS
export PYTHONHASHSEED       := 0
export PYTHONPATH           := $(CURDIR)
# The kernel of this environment, and not one of the same name that the user has elsewhere.
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help env mini card smoke reproduce ablation ablation-left figures verify speed sd15-shape
.PHONY: fuzz render site test lint clean FORCE
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:
	@echo 'make reproduce   run the study and draw every figure    (PRESET=mini, or smoke, or sd15)'
	@echo 'make test        lint, unit tests, and every notebook at PRESET=smoke'
	@echo 'make smoke       make reproduce PRESET=smoke: a first look, in minutes'
	@echo 'make ablation    teach and examine what is left of the ablation: a night, in any pieces'
	@echo 'make ablation-left  list what is done of it and what is left'
	@echo 'make figures     draw the committed figures again from the committed tables'
	@echo 'make verify      compare what make reproduce got with what is committed'
	@echo 'make speed       time the sweep beside a bare loop of UNet forwards'
	@echo 'make sd15-shape  pack Gaussian weights of the shapes of SD-v1.5, load them and time steps'
	@echo 'make fuzz        load ten thousand damaged checkpoints'
	@echo 'make render      make reproduce, and put the executed notebooks in notebooks/rendered'
	@echo 'make site        build/site: the rendered notebooks as web pages'
	@echo 'make mini        train the embedded model and its judges from nothing, and measure them (hours)'
	@echo 'make card        measure the embedded model as it is: notebook 90 and data/mini/README.md'
	@echo 'make env         the environment in $(ENV); the others make it when it is missing'
	@echo 'make lint        ruff'
	@echo 'make clean       remove stamps, logs and the site; a half-trained model stays'
	@echo
	@echo 'Options: PRESET=$(PRESET), SEED=$(SEED), PARAMS="03_sensitivity.guidance=1 ..." (parameters'
	@echo 'of single notebooks), PY=python (an environment that is active already), CONDA= (a venv,'
	@echo 'though there is conda), -j2 (two notebooks at once).'

# ---- environment -------------------------------------------------------------------------------

env: $(READY)

# The stamp comes last, so an environment that was interrupted is completed by the next command. A
# folder in which no new enough python has pip is half an environment, or one of another time: it
# is removed, if it is one at all. A conda that fails is no reason to fail.
FIT := import pip, ssl, sys; sys.exit(sys.version_info < (3, 11))

$(ENV)/.installed: pyproject.toml constraints.txt
	@$(ENV)/bin/python -c '$(FIT)' 2>/dev/null || { \
	    drop() { if [ -f $(ENV)/pyvenv.cfg ] || [ -d $(ENV)/conda-meta ]; then rm -rf $(ENV); fi; }; \
	    drop; \
	    if [ -n "$(CONDA)" ] && "$(CONDA)" env create --yes -p $(ENV) -f environment.yml; then exit; fi; \
	    drop; \
	    for base in python3.11 python3.12 python3.13 python3; do \
	        if $$base -c '$(FIT)' 2>/dev/null && $$base -m venv $(ENV); then exit; fi; \
	    done; \
	    echo 'needs conda, or Python 3.11 or later with venv (Debian: apt install python3-venv)'; exit 1; }
	$(ENV)/bin/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

# ---- notebooks ---------------------------------------------------------------------------------

reproduce: $(STUDY:%=$(B)/%.done)

# Two notebooks at once, unless another number is asked for.
smoke: $(READY)
	@$(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,-j2) PRESET=smoke reproduce

mini card: $(B)/$(MINI).done

$(STUDY:%=$(B)/%.done): $(B)/%.done: notebooks/%.ipynb $(DATA) $(LIB) $(B)/settings | $(READY)
	@$(PY) -m bf_lib.execute $< $(B) preset=$(PRESET) seed=$(SEED) $(PARAMS)

# The shipped model and its judges are measured and shown by a notebook, which `make mini` runs when
# it has trained them, and `make card` at once. It writes the model card, which is not of $(DATA).
$(B)/$(MINI).done: notebooks/$(MINI).ipynb $(DATA) $(LIB) $(B)/settings | $(READY)
	@$(PY) -m bf_lib.execute $< $(B) preset=$(PRESET) seed=$(SEED) $(PARAMS)

# Trainings that are finished are not repeated, whatever changed in the library but themselves.
$(TRAINED): $(LIB) | $(READY)
	@$(PY) -m bf_lib.make_mini
	@touch $@

# A notebook that reads what another one wrote comes after it.
$(B)/04_metric_correlation.done: $(B)/03_sensitivity.done
$(B)/06_bit_allocation.done: $(B)/03_sensitivity.done
$(B)/07_packed_checkpoint.done: $(B)/06_bit_allocation.done
$(B)/08_stage1_distillation.done: $(B)/03_sensitivity.done $(B)/06_bit_allocation.done
$(B)/09_stage2_finetuning.done: $(B)/08_stage1_distillation.done

# This one shows the claims of all others, and finished rows of the ablation (`make ablation`).
$(B)/10_ablation.done: $(patsubst %,$(B)/%.done,$(filter-out 10_%,$(STUDY)))
$(B)/10_ablation.done: $(wildcard data/ablation/*.json data/ablation/*/*.json)

# Goals that are given together take turns where one writes what the other reads: the study runs
# again after a new model, and pages and figures are made of what was just run.
ifneq ($(filter mini,$(MAKECMDGOALS)),)
$(B)/$(MINI).done $(STUDY:%=$(B)/%.done): $(TRAINED)
endif
site: | $(filter render,$(MAKECMDGOALS))
figures: | $(filter reproduce render,$(MAKECMDGOALS))
smoke: | $(filter test,$(MAKECMDGOALS))

# Rewritten only when it changes: other parameters, threads or versions, or a file less.
$(B)/settings: FORCE
	@mkdir -p $(B)
	@{ echo "seed=$(SEED) $$PARAMS threads=$(OMP_NUM_THREADS)"; \
	   cksum < constraints.txt; echo $(LIB) $(DATA); } > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

render: reproduce
	@[ $(PRESET) = mini ] || { echo 'notebooks/rendered holds the copies of PRESET=mini'; exit 1; }
	@mkdir -p notebooks/rendered
	cp $(STUDY:%=$(B)/rendered/%.ipynb) notebooks/rendered/
	@if [ -e $(B)/$(MINI).done ]; then cp $(B)/rendered/$(MINI).ipynb notebooks/rendered/; fi

site: $(READY)
	@$(PY) -m bf_lib.site notebooks/rendered build/site

# ---- results -----------------------------------------------------------------------------------

figures: $(READY)
	@$(PY) -m bf_lib.figures $(PRESET)

verify: reproduce
	@$(PY) -m bf_lib.verify $(PRESET)

speed: $(READY)
	@$(PY) -m bf_lib.speed --preset $(PRESET)

ablation: $(READY)
	@$(PY) -m bf_lib.ablation --rows result
	@$(PY) -m bf_lib.ablation --rows mini

ablation-left: $(READY)
	@$(PY) -m bf_lib.ablation --rows result --list
	@$(PY) -m bf_lib.ablation --rows mini --list

sd15-shape: $(READY)
	@$(PY) -m bf_lib.packed_study build/sd15_shape

fuzz: $(READY)
	@$(PY) tests/fuzz_checkpoint.py

# ---- checks ------------------------------------------------------------------------------------

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Tests take one thread each, so that two processes halve the time; a file stays in one of them,
# which then loads what its tests share once. Files come in the order of their names, the longest
# first: by numbers of tests it would be the last, with one process waiting for the other.
test: lint
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
	@$(MAKE) --no-print-directory smoke

clean:
	rm -rf build/smoke build/mini build/sd15 build/site
