# Two commands do everything: `make demo` and `make test`.  CUDA is used where a GPU is there, the CPU where not.
VENV := .venv
PYTHON ?= python3
RUNTIME := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
BIN := $(VENV)/bin

.PHONY: demo serve test bench avatar clean

demo: $(VENV)/.service   ## start the service, post a motion through its API, write out/demo.glb and out/demo.png
	$(BIN)/python -m service.demo assets/demo-motion.npz

serve: $(VENV)/.service  ## the service with the bundled avatars, until Ctrl-C
	$(BIN)/reposer serve

test: $(VENV)/.develop   ## everything that CI runs
	scripts/check

bench: $(VENV)/.develop  ## the benchmarks, two to three hours; writes out/bench/<name>.json
	$(BIN)/python -m service.bench
	$(BIN)/python -m training.bench

avatar: $(VENV)/.develop ## make the open subject and train the bundled avatar on it, from nothing
	test -d subjects/open || $(BIN)/reposer-train demo-data subjects/open
	$(BIN)/reposer-train train subjects/open --bundle avatars/open

# Without torch: this is all that serving needs.
$(VENV)/.service: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(RUNTIME)]"
	touch $@

$(VENV)/.develop: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(RUNTIME),train,dev]"
	touch $@ $(VENV)/.service

clean:
	rm -rf $(VENV) out
