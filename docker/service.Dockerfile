# The service with the bundled avatars, on the CPU.  No torch, not root.
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}
WORKDIR /opt/reposer
COPY pyproject.toml constraints.txt README.md LICENSE THIRD_PARTY.md ./
COPY service service
COPY model model
COPY training training
# The secret is for networks whose own certificates pip must trust; without one, pip trusts its own.
RUN --mount=type=secret,id=ca_bundle \
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi; \
    python -m venv .venv && .venv/bin/pip install --no-cache-dir --quiet -c constraints.txt ".[cpu]"
COPY avatars avatars
RUN useradd --system reposer
USER reposer
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD [".venv/bin/python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD [".venv/bin/reposer", "serve", "--bundles", "avatars", "--host", "0.0.0.0", "--port", "8000"]
