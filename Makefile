# make demo   train MT-UNet on synthetic streets, from nothing to a table and a picture
# make test   run the tests, three files at a time: those of Slurm mostly wait
# make lint   ruff and mypy
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint format clean

install: .venv/installed

.venv/installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; say make PYTHON=..."'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,deepspeed,tune]'
	touch $@

demo: .venv/installed
	$(BIN)/mtunet synthesize data/streets_source --test 0
	$(BIN)/mtunet prepare cityscapes data/streets_source data/streets --size 64x128
	$(BIN)/python launch/local.py configs/demo.yaml
	$(BIN)/mtunet evaluate runs/demo
	@echo
	@echo "pictures:    runs/demo/pictures/latest.png"
	@echo "curves:      $(BIN)/tensorboard --logdir runs"
	@echo "once more:   the same command resumes, or finds its work done; rm -r runs/demo starts anew"

test: .venv/installed
	$(BIN)/pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info
