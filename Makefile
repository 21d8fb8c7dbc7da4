# Every target works from a bare clone with python3 (3.10 or newer), a C++20 compiler and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc metal -name '*.cpp' -o -name '*.h' -o -name '*.metal')

.PHONY: demo test families ranks schedules agx air attacks fuzz test-clients bench lint format clean wheel-macos wheel-linux test-aarch64 evidence

# A changed kernel, binding or dependency reinstalls the package; Python files are used in place.
# It is built with the tools and the MLX of the same environment: without one of its own for each
# build, which takes half a minute, and whose new path would compile everything anew. Python
# compiles the files that it imports: doing it for all of them takes ten seconds.
#
# The demo needs only the kernels of this processor; tests and wheels have those of all.
$(VENV)/.native: NATIVE := ON
$(VENV)/.built: NATIVE := OFF
$(VENV)/.native $(VENV)/.built: pyproject.toml CMakeLists.txt cmake/embed_metal.cmake $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "optiq needs Python 3.10 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "optiq needs a C++20 compiler; on Debian: apt-get install g++"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet --no-compile --group build
	$(BIN)/pip install --quiet --no-compile --no-build-isolation --editable . --config-settings=editable.mode=redirect \
	  --config-settings=cmake.define.OPTIQ_NATIVE=$(NATIVE)
	@touch $(VENV)/.native $@

$(VENV)/.installed: $(VENV)/.built
	$(BIN)/pip install --quiet --group test --group lint --group bench
	@touch $@

demo: $(VENV)/.native
	$(BIN)/optiq demo

# A file of tests at a time in each process; `python -m pytest tests/planning` needs none of this.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# A tiny model of every model file of mlx-lm; writes docs/families.md. Where torch is installed, saved
# configs are also compared with the models of transformers.
families: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m families tests

# Servers of two and three ranks, of which one is stuck; ranks that are lost in other jobs.
ranks: $(VENV)/.installed
	$(BIN)/python -m pytest -m ranks tests/serve tests/distributed

# Mesa's compiler for Apple's M1 and M2 GPUs, from Debian's source package, for python -m bench.agx.
agx:
	@test "$$(id -u)" = 0 && command -v apt-get >/dev/null || \
	  { echo "make agx needs root and apt-get (Debian): it makes a Debian tree in build/agx"; exit 1; }
	sh bench/agx/build.sh build/agx

# MLX's kernels as Apple's compiler made them, from its wheel for macOS, on the emulator.
AIR := build/air
air: $(VENV)/.installed
	test -f $(AIR)/mlx/lib/mlx.metallib || { \
	  mlx=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("mlx"))') && \
	  $(BIN)/pip download --quiet --no-deps --only-binary=:all: --platform macosx_14_0_arm64 \
	    --dest $(AIR)/wheel "mlx-metal==$$mlx" && \
	  $(BIN)/python -m zipfile -e $(AIR)/wheel/mlx_metal-*.whl $(AIR) && rm -r $(AIR)/wheel; }
	$(BIN)/python -m pytest -m air tests/msl

# The Metal kernels in 16 orders of execution, each on an emulated chip of its own, all faults planted
# in their encoder, and more launches that fail in the middle of an answer.
schedules: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m schedules tests/metal tests/encoder \
	  tests/runtime

# The long part of the attacks on the sandbox, from a seed of its own: make attacks SEED=7.
attacks: $(VENV)/.installed
	OPTIQ_ATTACK_SEED=$(or $(SEED),1000) $(BIN)/python -m pytest -m attacks tests/sandbox

# Real coding agents and libraries on our server, where nothing but loopback can be reached:
# docs/agents.md. 2.3 GB from npm and PyPI. CLIENTS=FOLDER uses one that has them.
CLIENTS := build/clients
AGENTS := @openai/codex@0.171.0 opencode-ai@1.18.33 @mariozechner/pi-coding-agent@0.73.1 \
  @qwen-code/qwen-code@0.15.10 @anthropic-ai/claude-code@2.1.332 ai@6.0.326 @ai-sdk/openai@3 \
  @ai-sdk/anthropic@3 @ai-sdk/openai-compatible@2 zod@4
LIBRARIES := 'pydantic-ai-slim[openai,anthropic]==2.68.0' langchain==1.5.2 langchain-openai==1.7.4 \
  langchain-anthropic==1.7.10 llm==0.36 'smolagents[openai]==1.26.0' openai-agents==0.24.0
test-clients: $(VENV)/.installed
	@command -v npm >/dev/null && command -v unshare >/dev/null || \
	  { echo "test-clients needs npm (Node 20) and unshare (Linux)"; exit 1; }
	npm install --prefix $(CLIENTS) --no-audit --no-fund --ignore-scripts --silent $(AGENTS)
	test -x $(CLIENTS)/venv/bin/python || $(PYTHON) -m venv $(CLIENTS)/venv
	$(CLIENTS)/venv/bin/pip install --quiet $(LIBRARIES)
	test -x $(CLIENTS)/aider/bin/python || $(PYTHON) -m venv $(CLIENTS)/aider
	$(CLIENTS)/aider/bin/pip install --quiet aider-chat==0.86.2
	OPTIQ_CLIENTS=$(CLIENTS) unshare -rn sh -c \
	  'ip link set lo up && exec $(BIN)/python -m pytest -m clients tests/clients'

bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-only

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# Wheels for other machines and a check of the NEON kernels; see cross/README.md. What they need
# beside python3 they fetch into build/cross, or name the apt-get command.
wheel-macos wheel-linux test-aarch64 evidence:
	@PYTHON="$(PYTHON)" bash cross/$(subst -,_,$@).sh

# The bindings with random input, built with sanitizers in an environment of its own.
FUZZ := build/fuzz
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -g1
fuzz:
	test -x $(FUZZ)/bin/python || $(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/pip install --quiet --upgrade 'pip>=25.1'
	$(FUZZ)/bin/pip install --quiet --group test
	$(FUZZ)/bin/pip install --quiet . --config-settings=build-dir=build/sanitized \
	  --config-settings=cmake.define.CMAKE_CXX_FLAGS="$(SANITIZE)"
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 OPTIQ_FUZZ_CASES=10000 \
	  $(FUZZ)/bin/python -m pytest tests/ops/test_fuzz.py

clean:
	rm -rf $(VENV) build dist demo
