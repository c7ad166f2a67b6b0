# Each target sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo test slow soak bench lint clean

help:
	@echo "make setup   install what is needed into .venv"
	@echo "make demo    train on drawings of lesions and show what comes out, minutes on two cores"
	@echo "make test    run the tests, a few minutes on two cores"
	@echo "make slow    run the tests that take longer"
	@echo "make soak    kill a training run a hundred times, and compare its end with an unbroken one"
	@echo "make bench   measure speeds"
	@echo "make lint    check the style"

setup: $(READY)

$(READY): requirements.txt requirements-offline.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit("Python %d.%d found; 3.11 or later is needed: make PYTHON=/path/to/python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m scripts.demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

soak: $(READY)
	$(BIN)/python -m tests.soak $(ARGS)

bench: $(READY)
	for subject in ops allocator dataset_tool metrics generate projector train; do $(BIN)/python -m tests.bench_$$subject || exit 1; done

lint: $(READY)
	$(BIN)/python -m ruff check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache
