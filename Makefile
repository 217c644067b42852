# Two commands do everything: `make demo` and `make test`.  CUDA is used where a GPU is there, the CPU where not.
VENV := .venv
PYTHON ?= python3
RUNTIME := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
BIN := $(VENV)/bin

VIEWER := viewer/dist/index.html
PORT := 8000

.PHONY: demo serve test bench avatar browser redis clean

demo: $(VENV)/.service   ## start the service, post a motion through its API, write out/demo.glb and out/demo.png
	$(BIN)/python -m service.demo assets/demo-motion.npz

serve: $(VENV)/.service  ## the service with the bundled avatars and the viewer, until Ctrl-C
	$(MAKE) $(VIEWER) || echo "the service runs without its viewer" >&2
	$(BIN)/reposer serve --port $(PORT)

test: $(VENV)/.develop $(VIEWER) browser redis   ## everything that CI runs
	scripts/check

# Else the threads of NumPy's OpenBLAS spin on into the run of whatever is measured next.
bench: export OPENBLAS_THREAD_TIMEOUT = 4
bench: $(VENV)/.develop redis  ## the benchmarks, two to three hours; writes out/bench/<name>.json
	$(BIN)/python -m training.bench_repose
	$(BIN)/python -m service.bench_service
	$(BIN)/python -m service.bench_exports
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

$(VIEWER): package-lock.json $(shell find viewer clients/js assets -type f -not -path '*/dist/*' -not -path '*/build/*') | $(VENV)/.service
	scripts/build-viewer
	touch $@

# The viewer's tests drive Debian's own browser.
browser:
	@command -v chromium >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium >/dev/null; } \
		|| { echo "install chromium, which the viewer's tests drive (Debian: apt-get install chromium)" >&2; exit 1; }

# The tests of the cache and of jobs, and the benchmark of the service, start a Redis of their own, and kill it.
redis:
	@command -v redis-server >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y redis-server >/dev/null; } \
		|| { echo "install redis-server, which the tests start (Debian: apt-get install redis-server)" >&2; exit 1; }

clean:
	rm -rf $(VENV) out node_modules viewer/dist clients/js/dist clients/js/build
