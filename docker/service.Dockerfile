# The service with its viewer and the bundled avatars.  No torch, not root, nothing is written but /tmp and the volumes.
#   --target cpu    ONNX Runtime on the CPU
#   --target gpu    ONNX Runtime on CUDA 13, whose libraries come from pip; the driver is the host's
# A mirror or a stand-in can take the place of either base image.
ARG BASE_IMAGE=python:3.12-slim
ARG NODE_IMAGE=node:22-slim

FROM ${NODE_IMAGE} AS viewer
WORKDIR /src
COPY package.json package-lock.json ./
COPY scripts/build-viewer scripts/
COPY clients/js clients/js
COPY viewer viewer
COPY assets assets
# The secret is for networks whose own certificates npm and pip must trust; without one, they trust their own.
RUN --mount=type=secret,id=ca_bundle \
    if [ -s /run/secrets/ca_bundle ]; then export NODE_EXTRA_CA_CERTS=/run/secrets/ca_bundle; fi; \
    scripts/build-viewer \
    && npm sbom --package-lock-only --omit=dev --sbom-format=cyclonedx >sbom.json

# Lists what lies in the .venv, as CycloneDX.  The tool itself does not get into the image.
FROM ${BASE_IMAGE} AS cyclonedx
WORKDIR /opt/reposer
COPY constraints.txt ./
RUN --mount=type=secret,id=ca_bundle \
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi; \
    python -m venv --without-pip /opt/cyclonedx \
    && pip --python /opt/cyclonedx/bin/python install --no-cache-dir --quiet -c constraints.txt cyclonedx-bom

FROM ${BASE_IMAGE} AS python
WORKDIR /opt/reposer
COPY pyproject.toml constraints.txt LICENSE THIRD_PARTY.md ./
# What the service needs lies in a layer of its own: a change of our code or words leaves it as it is.
RUN python -m venv --without-pip .venv && mkdir service && touch README.md service/__init__.py

FROM python AS python-cpu
RUN --mount=type=secret,id=ca_bundle \
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi; \
    pip --python .venv/bin/python install --no-cache-dir --quiet -c constraints.txt ".[cpu,tracing]" \
    && rm -r .venv/lib/python3*/site-packages/onnx/backend/test
COPY README.md ./
COPY service service
RUN --mount=type=secret,id=ca_bundle --mount=type=bind,from=cyclonedx,source=/opt/cyclonedx,target=/opt/cyclonedx \
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi; \
    pip --python .venv/bin/python install --no-cache-dir --quiet --no-deps --force-reinstall -c constraints.txt . \
    && /opt/cyclonedx/bin/cyclonedx-py environment --output-reproducible --no-validate -o sbom.json .venv/bin/python

FROM python AS python-gpu
COPY docker/cuda-constraints.txt ./
RUN --mount=type=secret,id=ca_bundle \
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi; \
    pip --python .venv/bin/python install --no-cache-dir --quiet -c constraints.txt -c cuda-constraints.txt \
       ".[gpu,tracing]" "onnxruntime-gpu[cuda,cudnn]" \
    && rm -r .venv/lib/python3*/site-packages/onnx/backend/test
COPY README.md ./
COPY service service
RUN --mount=type=secret,id=ca_bundle --mount=type=bind,from=cyclonedx,source=/opt/cyclonedx,target=/opt/cyclonedx \
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi; \
    pip --python .venv/bin/python install --no-cache-dir --quiet --no-deps --force-reinstall -c constraints.txt . \
    && /opt/cyclonedx/bin/cyclonedx-py environment --output-reproducible --no-validate -o sbom.json .venv/bin/python

FROM ${BASE_IMAGE} AS base
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Reposer" \
      org.opencontainers.image.description="Clothed human avatars, moved by SMPL poses, served over HTTP and WebSocket" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A new volume takes over what these folders hold, and who owns them.
RUN groupadd --system --gid 10001 reposer \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /tmp reposer \
    && install -d -o 10001 -g 10001 /opt/reposer /opt/reposer/avatars /var/lib/reposer/jobs /var/lib/reposer/keys
WORKDIR /opt/reposer
COPY LICENSE THIRD_PARTY.md ./
COPY --from=viewer /src/viewer/dist viewer/dist
COPY --from=viewer /src/sbom.json /usr/share/doc/reposer/sbom-viewer.json
COPY --chown=10001:10001 avatars avatars
ENV PATH=/opt/reposer/.venv/bin:$PATH \
    REPOSER_VIEWER_DIR=/opt/reposer/viewer/dist \
    REPOSER_JOBS_DIR=/var/lib/reposer/jobs
USER 10001:10001
EXPOSE 8000
# It loads the avatars within seconds; a probe is a real frame, at most one in five seconds.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["reposer", "serve", "--bundles", "avatars", "--host", "0.0.0.0", "--port", "8000"]

FROM base AS gpu
COPY --from=python-gpu /opt/reposer/.venv .venv
COPY --from=python-gpu /opt/reposer/sbom.json /usr/share/doc/reposer/
USER 0
RUN find /opt/reposer/.venv -type d -path '*/nvidia/*/lib' >/etc/ld.so.conf.d/cuda.conf && ldconfig
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    REPOSER_REQUIRE_GPU=1

FROM base AS cpu
COPY --from=python-cpu /opt/reposer/.venv .venv
COPY --from=python-cpu /opt/reposer/sbom.json /usr/share/doc/reposer/
