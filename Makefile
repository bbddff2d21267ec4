# make quickstart   everything on generated clips: prepare, train, figure, convert
# make test         the tests
# make test-all     the slow ones too
# make lint         ruff: format and lint
# make venv         only the set-up, which the others do by themselves when it is missing
#
# make test PYTHON=python3.12   the same on another Python, in an environment of its own, .venv-3.12.
# Each Python that is tested has a file of pinned versions: requirements-test.txt is that of 3.11.

# python3.11 if it runs, else python3.
DEFAULT := $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
PYTHON ?= $(DEFAULT)
version_of = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VERSION := $(call version_of,$(PYTHON))
ifeq ($(VERSION),)
$(error $(PYTHON) does not run; say make PYTHON=... with a Python from 3.11 on)
endif

# An environment for each Python, so that none is used with another.
VENV := $(if $(filter $(VERSION),$(call version_of,$(DEFAULT))),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PINNED := $(if $(filter 3.11,$(VERSION)),requirements-test.txt,$(wildcard requirements-test-$(VERSION).txt))
RUN := runs/quickstart
CLIP := $(RUN)/clips/val/drifting/drifting_0051.mp4

# The stamp is written last, so a set-up that was interrupted is done again.
STAMP := $(VENV)/installed-$(VERSION)

.PHONY: venv quickstart test test-all lint clean

venv: $(STAMP)
	@echo "$(VENV) is ready: source $(BIN)/activate"

$(STAMP): setup.py $(PINNED)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say make PYTHON=...")'
	@test ! -e $(BIN)/python || test "$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = $(VERSION) || \
	  { echo "$(VENV) is of another Python than $(PYTHON), which is $(VERSION); remove it first"; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifneq ($(PINNED),)
	$(PIP) -r $(PINNED)
	$(PIP) --no-deps --editable .
else
	@echo "no versions are pinned for Python $(VERSION): it gets the newest that setup.py allows"
	$(PIP) --editable '.[dev]'
endif
	touch $(STAMP)

quickstart: $(STAMP)
	@echo "using $(VENV) (remove it to install anew) and what $(RUN) holds already"
	@mkdir -p $(RUN)
	$(BIN)/python -m dropmae_jax.data.synthetic_clips --output=$(RUN)/clips
	$(BIN)/python -m tfds_kinetics --config=folder --videos=$(RUN)/clips --data_dir=$(RUN)/data
	$(BIN)/python -m dropmae_jax.main --config=configs/quickstart.py --workdir=$(RUN)
	$(BIN)/python -m dropmae_jax.evaluation.reconstruction --checkpoint=$(RUN) --video=$(CLIP) --output=$(RUN)/reconstruction.png --frames 0 4
	$(BIN)/python convert_to_torch.py --checkpoint=$(RUN) \
	  --output=$(RUN)/dropmae.$$($(BIN)/python -c 'import torch' 2>/dev/null && echo pth || echo safetensors)
	@echo
	@echo "Done. In $(RUN):"
	@echo "  clips/                videos as Kinetics lays them out, and their true masks in davis/"
	@echo "  data/                 their frames as a TFDS dataset"
	@echo "  checkpoints/          the trained model; metrics.jsonl, log.txt, tensorboard/: its curves"
	@echo "  reconstruction.png    what it makes of masked frames it has not been trained on"
	@echo "  dropmae.pth           its weights for PyTorch; beside it a sha256 and a card (.json)"
	@echo "                        (dropmae.safetensors where PyTorch is not installed)"
	@echo "Next, with your own videos (see README.md):"
	@echo "  source $(BIN)/activate"
	@echo "  python -m tfds_kinetics --config=folder --videos=VIDEOS --data_dir=data"
	@echo "  python -m dropmae_jax.main --config=configs/video_folder.py --workdir=runs/mine"

test: $(STAMP)
	@echo "using $(VENV) (remove it to install anew)"
	$(BIN)/python -m pytest

test-all: $(STAMP)
	@echo "using $(VENV) (remove it to install anew)"
	$(BIN)/python -m pytest -m 'slow or not slow'

lint: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-* runs/quickstart
