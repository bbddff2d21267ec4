# make quickstart   all steps on generated clips: dataset, training, figure, export
# make test         the tests
# make test-all     all tests, with the slow ones
# make lint         ruff: format and lint
# make venv         only the environment, which the other targets make when it is missing
#
# make test PYTHON=python3.12 uses another Python, in an environment of its own (.venv-3.12).
# Each tested Python has a file of pinned versions; requirements-test.txt is the one for 3.11.

# python3.11 if it runs, else python3.
DEFAULT := $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
PYTHON ?= $(DEFAULT)
version_of = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VERSION := $(call version_of,$(PYTHON))
ifeq ($(VERSION),)
$(error $(PYTHON) does not run; give make PYTHON=... with Python 3.11 or newer)
endif

# One environment per Python version, so that no environment is used with another Python.
VENV := $(if $(filter $(VERSION),$(call version_of,$(DEFAULT))),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PINNED := $(if $(filter 3.11,$(VERSION)),requirements-test.txt,$(wildcard requirements-test-$(VERSION).txt))
RUN := runs/quickstart
CLIP := $(RUN)/clips/val/drifting/drifting_0051.mp4

# The stamp is written last, so an interrupted set-up is repeated.
STAMP := $(VENV)/installed-$(VERSION)

.PHONY: venv quickstart test test-all lint clean

venv: $(STAMP)
	@echo "$(VENV) is ready: source $(BIN)/activate"

$(STAMP): setup.py $(PINNED)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give make PYTHON=...")'
	@test ! -e $(BIN)/python || test "$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = $(VERSION) || \
	  { echo "$(VENV) was made by another Python than $(PYTHON) ($(VERSION)); remove it first"; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifneq ($(PINNED),)
	$(PIP) -r $(PINNED)
	$(PIP) --no-deps --editable .
else
	@echo "no versions are pinned for Python $(VERSION); installing the newest that setup.py allows"
	$(PIP) --editable '.[dev]'
endif
	touch $(STAMP)

quickstart: $(STAMP)
	@echo "using $(VENV) (remove it to reinstall) and what is already in $(RUN)"
	@mkdir -p $(RUN)
	$(BIN)/dropmae-clips --output=$(RUN)/clips
	$(BIN)/dropmae-build --config=folder --videos=$(RUN)/clips --data_dir=$(RUN)/data
	$(BIN)/dropmae-train --config=quickstart --workdir=$(RUN)
	$(BIN)/dropmae-figures --checkpoint=$(RUN) --video=$(CLIP) --output=$(RUN)/reconstruction.png --frames 0 4
	$(BIN)/dropmae-convert --checkpoint=$(RUN) \
	  --output=$(RUN)/dropmae.$$($(BIN)/python -c 'import torch' 2>/dev/null && echo pth || echo safetensors)
	@echo
	@echo "Done. In $(RUN):"
	@echo "  clips/                videos in Kinetics layout; their true masks in DAVIS layout (davis/)"
	@echo "  data/                 the TFDS dataset of their frames"
	@echo "  checkpoints/          the trained model; curves are in metrics.jsonl and tensorboard/"
	@echo "  reconstruction.png    its reconstruction of two frames that it was not trained on"
	@echo "  dropmae.pth           its weights for PyTorch, with a sha256 and a card (.json)"
	@echo "                        (dropmae.safetensors where PyTorch is not installed)"
	@echo "Next, with your own videos (see README.md):"
	@echo "  source $(BIN)/activate"
	@echo "  dropmae-build --config=folder --videos=VIDEOS --data_dir=data"
	@echo "  dropmae-train --config=video_folder --workdir=runs/mine"

test: $(STAMP)
	@echo "using $(VENV) (remove it to reinstall)"
	$(BIN)/python -m pytest

test-all: $(STAMP)
	@echo "using $(VENV) (remove it to reinstall)"
	$(BIN)/python -m pytest -m 'slow or not slow'

lint: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-* runs/quickstart
