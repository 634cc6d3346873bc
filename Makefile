# make demo: train and sample on the built-in phantom.  make test: lint and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

demo: $(VENV)/.installed
	$(BIN)/python train.py --mode vq_vae
	$(BIN)/python train.py --mode pixelcnn
	$(BIN)/python predict.py

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

figures: $(VENV)/.installed
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/figures.py --run_dir runs/demo
	$(BIN)/python benchmarks/temperature.py --run_dir runs/demo
ifdef BRAIN
	$(BIN)/python benchmarks/demo.py --data $(BRAIN) --out brain
	$(BIN)/python benchmarks/classes.py --run_dir runs/brain
	$(BIN)/python benchmarks/ablation.py --data $(BRAIN) --seconds 60 --out collapse \
		--picture collapse --rows demo "no k-means, no revival"
endif

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed; make PYTHON=python3.12 demo"; exit 2; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "error: no venv module; on Debian or Ubuntu: apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs

.PHONY: demo test figures install clean
