# Every target sets up what it needs; nothing is installed outside .venv.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: install demo test check fix bench bench-step chaos faults fuzz docs

install: .venv/.installed

# The constraints pin the tested versions; pyproject's ranges stay wide, so that nobody's torch is ever replaced.
# Installation compiles the loops of the CPU path, if there is a C compiler.
.venv/.installed: pyproject.toml constraints.txt $(wildcard src/nybble/kernels/native*.[ch])
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
	$(BIN)/python bench/engine.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/attention.py
	$(BIN)/python bench/kernel_code.py
	$(BIN)/python bench/doctor_tolerances.py
	$(BIN)/python bench/seven_b.py
	$(BIN)/python bench/loading.py
	$(BIN)/python bench/generate.py
	$(BIN)/python bench/saving.py
	$(BIN)/python bench/merge_memory.py
	$(BIN)/python bench/distributed.py held
	$(BIN)/python bench/distributed.py live
	$(BIN)/python bench/distributed.py table
	$(if $(DATA),$(BIN)/python bench/distributed.py --data $(DATA) killed)
	$(if $(DATA),$(BIN)/python bench/distributed.py --data $(DATA) learning)
	$(if $(DATA),$(BIN)/python bench/merging.py --data $(DATA))
	$(if $(DATA),$(BIN)/python bench/curve.py --data $(DATA))
	$(if $(DATA),$(BIN)/python bench/real_rows.py --data $(DATA))
	$(if $(DATA),$(BIN)/python bench/comparison.py --data $(DATA))
	$(if $(DATA),$(BIN)/python bench/encoders.py --data $(DATA) damage)
	$(if $(DATA),$(BIN)/python bench/rows.py --data $(DATA) large)
	$(if $(DATA),$(BIN)/python bench/rows.py --data $(DATA) trl)

# Against the stacks people use, about ten minutes: make bench-step DATA=FOLDER
bench-step: install
	$(BIN)/python bench/step.py --data $(DATA)

# A training killed 200 times and more, about half an hour; every writing call refused, about an hour
chaos: install
	$(BIN)/python bench/chaos.py --runs 200

faults: install
	$(BIN)/python bench/faults.py

# Every reader of files by others, fed with what is nearly right: more than a million inputs, about an hour
fuzz: install
	$(BIN)/python bench/fuzz.py

docs: install
	$(BIN)/python docs/generate.py
