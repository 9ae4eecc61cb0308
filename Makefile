# Everything happens inside .venv; both commands work from a fresh clone and again afterwards.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-all test-compat test-versions sanitize lint docs wheel install clean

train: install
	$(BIN)/twins-fast train --recipe mini

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# With the long proofs, which take some minutes more.
test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow or not slow"

# The adapters and the attack libraries' tests with the originals themselves, from PyPI, in an environment of their own.
test-compat: install runs/compat-env/installed
	OMP_NUM_THREADS=1 runs/compat-env/bin/python -m pytest -q tests/compat tests/attacks/test_libraries.py

runs/compat-env/installed: tests/compat/originals/requirements.txt
	rm -f $@
	$(BIN)/python -m bench.environments compat-env --requirement $<

# The C++ kernels with g++'s sanitizers in them. Compiling and running them takes long.
sanitize: install
	OMP_NUM_THREADS=2 $(BIN)/python -m tests.sanitizers.run

# With each line of tests/versions.txt, from the oldest PyTorch to the newest, in environments of their own.
test-versions:
	$(PYTHON) -m tests.versions

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/. The package is installed already, so that pip only brings what the extra asks for.
docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'twins-fast[docs]'
	$(BIN)/mkdocs build --strict

# A wheel for each Python here and the source distribution, into dist/; each wheel is tried where there is no compiler.
wheel: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'twins-fast[wheel]'
	$(BIN)/python -m tests.wheels

install: .venv/installed

# pip install -e compiles csrc/; it is run again whenever what it builds from is newer.
.venv/installed: pyproject.toml setup.py tests/libraries.txt $(wildcard csrc/* csrc/*/* kernels/*.py)
	@echo "Fetching PyTorch and compiling csrc/ takes some minutes the first time, most of them without a word."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/libraries.txt
	$(BIN)/twins-fast info
	touch $@

clean:
	rm -rf .venv build *.egg-info twins_fast/_C*.so
