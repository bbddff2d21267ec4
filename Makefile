# make quickstart   everything on generated clips: prepare, train, figure, convert
# make test         the tests
# make test-all     the slow ones too
# make lint         ruff: format and lint
# make venv         only the set-up, which the others do by themselves when it is missing

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
CLIP := $(RUN)/clips/val/drifting/drifting_0051.mp4

# The stamp is written last, so a set-up that was interrupted is done again.
STAMP := $(VENV)/installed

.PHONY: venv quickstart test test-all lint clean

venv: $(STAMP)
	@echo "$(VENV) is ready: source $(BIN)/activate"

$(STAMP): setup.py requirements-test.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(STAMP)

quickstart: $(STAMP)
	@echo "using $(VENV) (remove it to install anew) and what $(RUN) holds already"
	@mkdir -p $(RUN)
	$(BIN)/python -m dropmae_jax.synthetic_clips --output=$(RUN)/clips
	$(BIN)/python -m tfds_kinetics --config=folder --videos=$(RUN)/clips --data_dir=$(RUN)/data
	$(BIN)/python -m dropmae_jax.main --config=configs/quickstart.py --workdir=$(RUN)
	$(BIN)/python -m dropmae_jax.figures --checkpoint=$(RUN) --video=$(CLIP) --output=$(RUN)/reconstruction.png --frames 0 4
	$(BIN)/python convert_to_torch.py --checkpoint=$(RUN) --output=$(RUN)/dropmae.pth
	@echo
	@echo "Done. In $(RUN):"
	@echo "  clips/                videos as Kinetics lays them out, and their true masks in davis/"
	@echo "  data/                 their frames as a TFDS dataset"
	@echo "  checkpoints/          the trained model; metrics.jsonl, log.txt, tensorboard/: its curves"
	@echo "  reconstruction.png    what it makes of masked frames it has not been trained on"
	@echo "  dropmae.pth           its weights for PyTorch; beside it a sha256 and a card (.json)"
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
	rm -rf $(VENV) runs/quickstart
