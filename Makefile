# Every target sets up what it needs; nothing is installed outside .venv.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

# Processes that tests run in: of the machine's cores, at most 8.
WORKERS ?= logical
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: install demo test test-all check fix bench bench-step chaos faults fuzz docs

install: .venv/.installed

# The constraints pin the tested versions; pyproject's ranges stay wide, so that nobody's torch is ever replaced.
# Installation compiles the loops of the CPU path, if there is a C compiler.
.venv/.installed: pyproject.toml constraints.txt $(wildcard src/nybble/kernels/native*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/nybble demo

# What protects a change
test: install
	$(PYTEST)

# And the long matrix: compilation for every target, kills, refused writes, launchers
test-all: install
	$(PYTEST) --all

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
	$(BIN)/python -m bench.speed.engine
	$(BIN)/python -m bench.memory.live_step
	$(BIN)/python -m bench.speed.attention
	$(BIN)/python -m tools.kernel_code.listing
	$(BIN)/python -m bench.quality.doctor_tolerances
	$(BIN)/python -m bench.memory.seven_b
	$(BIN)/python -m bench.speed.loading
	$(BIN)/python -m bench.speed.generate
	$(BIN)/python -m bench.speed.saving
	$(BIN)/python -m bench.memory.merge_memory
	$(BIN)/python -m bench.quality.distributed held
	$(BIN)/python -m bench.quality.distributed live
	$(BIN)/python -m bench.quality.distributed table
	$(if $(DATA),$(BIN)/python -m bench.quality.distributed --data $(DATA) killed)
	$(if $(DATA),$(BIN)/python -m bench.quality.distributed --data $(DATA) learning)
	$(if $(DATA),$(BIN)/python -m bench.quality.merging --data $(DATA))
	$(if $(DATA),$(BIN)/python -m bench.quality.curve --data $(DATA))
	$(if $(DATA),$(BIN)/python -m bench.quality.real_rows --data $(DATA))
	$(if $(DATA),$(BIN)/python -m bench.quality.comparison --data $(DATA))
	$(if $(DATA),$(BIN)/python -m bench.quality.encoders --data $(DATA) damage)
	$(if $(DATA),$(BIN)/python -m bench.speed.rows --data $(DATA) large)
	$(if $(DATA),$(BIN)/python -m bench.speed.rows --data $(DATA) trl)

# Against the stacks people use, about ten minutes: make bench-step DATA=FOLDER
bench-step: install
	$(BIN)/python -m bench.speed.step --data $(DATA)

# A training killed 200 times and more, about half an hour; every writing call refused, about an hour
chaos: install
	$(BIN)/python -m tools.chaos.run --runs 200

faults: install
	$(BIN)/python -m tools.faults.run

# Every reader of files by others, fed with what is nearly right: more than a million inputs, about an hour
fuzz: install
	$(BIN)/python -m tools.fuzz.run

docs: install
	$(BIN)/python docs/generate.py
