# Every target sets up what it needs; nothing is installed outside .venv.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

# Processes that tests run in: of the machine's cores, at most 8.
WORKERS ?= logical
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: install demo test test-all test-oldest check check-c sanitize fix bench bench-step chaos faults disturbed planted fuzz \
	kernel-code docs

install: .venv/.installed

# The constraints pin the tested versions; pyproject's ranges stay wide, so that nobody's torch is ever replaced.
# Installation compiles the loops of the CPU path, if there is a C compiler.
.venv/.installed: pyproject.toml constraints.txt $(wildcard csrc/*.[ch])
	@echo "Installing into .venv: torch, transformers and what else pyproject.toml names, with the tools of the tests, about"
	@echo "3 GB on disk. It takes as long as the download, and a minute. Nothing outside .venv is changed."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/nybble demo

# What protects a change
test: install
	$(PYTEST)

# And the long matrix: compilation for every target, kills, refused writes, launchers
test-all: install
	$(PYTEST) --all

# The seams to other libraries on the oldest versions that pyproject.toml allows, in an environment of its own
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal tests/contract

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt $(wildcard csrc/*.[ch])
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[dev]'
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/arch/budgets.py
	$(BIN)/python docs/generate.py --check
	$(MAKE) --no-print-directory check-c

# Warnings are errors here and not in a user's build, whose compiler may be newer and know more of them.
CC ?= cc
C_FLAGS := -std=c11 -ffp-contract=off -fno-math-errno -fvisibility=hidden
C_SOURCES := $(wildcard csrc/*.c)

check-c:
	@if command -v $(CC) >/dev/null; then $(CC) $(C_FLAGS) -Wall -Wextra -Werror -O0 -fsyntax-only $(C_SOURCES); \
	else echo "there is no C compiler: csrc is not checked"; fi

# The loops under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package beside the real one.
sanitize: install
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r src/nybble build/sanitize/
	rm -f build/sanitize/nybble/kernels/_native*
	$(CC) $(C_FLAGS) -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -shared -fPIC \
		-o build/sanitize/nybble/kernels/_native$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))") \
		$(C_SOURCES)
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize NYBBLE_SANITIZED=1 \
		$(BIN)/python -m pytest -q -x -p no:cacheprovider tests/reference/test_cpu_path.py tests/reference/test_attention.py \
		tests/reference/test_pointwise.py -k "not triton and not schema"

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Everything that is measured, in hours: bench/harness.py says how. Those on real models need a folder with models/ and
# rows/: make bench DATA=FOLDER. TINY=1 takes the smallest sizes, which only shows that all of it runs.
MEASURED := speed.engine speed.attention speed.trees speed.row_operators speed.generate speed.loading speed.saving \
	speed.plan_depths speed.plan_seconds memory.live_step memory.plan memory.seven_b memory.merge_memory \
	"memory.distributed held" "memory.distributed live" "memory.distributed table" quality.doctor_tolerances
ON_DATA := speed.step "speed.rows large" "speed.rows trl" "quality.distributed killed" "quality.distributed learning" \
	quality.curve quality.real_rows "quality.encoders damage" "quality.encoders finetune" quality.comparison \
	quality.merging quality.merging_4bit

bench: install
	set -e; for what in $(MEASURED); do $(BIN)/python -m bench.$$what $(if $(TINY),--tiny,--save); done
	$(if $(DATA),set -e; for what in $(ON_DATA); do $(BIN)/python -m bench.$$what --data $(DATA) $(if $(TINY),--tiny,--save); done)

# The training step against the stacks people use, about ten minutes: make bench-step DATA=FOLDER [OTHER=CHECKOUT]
bench-step: install
	$(BIN)/python -m bench.speed.step --data $(DATA) $(if $(OTHER),--other $(OTHER))

# What the Triton kernels compile to, without a GPU; a minute or two
kernel-code: install
	$(BIN)/python -m tools.kernel_code.listing

# A training killed 200 times and more, about half an hour; every writing call refused, about an hour
chaos: install
	$(BIN)/python -m tools.chaos.run --runs 200

faults: install
	$(BIN)/python -m tools.faults.run

# What a closed terminal, a pause, a full disk and other events of a day cost a training, in steps
disturbed: install
	$(BIN)/python -m tools.disturbed.run

# Whether the tests notice a fault, planted in each area; a quarter of an hour
planted: install
	$(BIN)/python -m tools.planted.run

# Every reader of files by others, fed with what is nearly right: more than a million inputs, about an hour
fuzz: install
	$(BIN)/python -m tools.fuzz.run

docs: install
	$(BIN)/python docs/generate.py
