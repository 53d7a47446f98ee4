# Every target sets up what it needs; nothing is installed outside .venv.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: install demo test check fix bench docs

install: .venv/.installed

# The constraints pin the tested versions; pyproject's ranges stay wide, so that nobody's torch is ever replaced.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/nybble demo

test: install
	$(BIN)/python -m pytest -q

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/arch/budgets.py
	$(BIN)/python docs/generate.py --check

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The measurements on real models need a folder with models/ and rows/: make bench DATA=FOLDER
bench: install
	$(BIN)/python bench/seven_b.py
	$(BIN)/python bench/loading.py
	$(if $(DATA),$(BIN)/python bench/real_rows.py --data $(DATA))

docs: install
	$(BIN)/python docs/generate.py
