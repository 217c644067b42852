# The trainer: `reposer-train`.  torch brings CUDA along from pip, so the base needs Python 3.12 and no more; the driver is
# the host's.  Not root; nothing is written but /tmp and the volumes.
# A mirror, an image with CUDA or a stand-in can take the base's place.
ARG BASE_IMAGE=python:3.12-slim

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
# Gigabytes, and none of them our code, which may change without them.
RUN --mount=type=secret,id=ca_bundle --mount=type=bind,from=cyclonedx,source=/opt/cyclonedx,target=/opt/cyclonedx \
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi; \
    python -m venv --without-pip .venv && mkdir service && touch README.md service/__init__.py \
    && pip --python .venv/bin/python install --no-cache-dir --quiet -c constraints.txt ".[cpu,train]" \
    && rm -r .venv/lib/python3*/site-packages/service \
    && /opt/cyclonedx/bin/cyclonedx-py environment --output-reproducible --no-validate -o sbom.json .venv/bin/python

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Reposer trainer" \
      org.opencontainers.image.description="Learns clothed human avatars from 3D scans with SMPL fits" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A new volume takes over what these folders hold, and who owns them.
RUN groupadd --system --gid 10001 reposer \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /tmp reposer \
    && install -d -o 10001 -g 10001 /opt/reposer/subjects /opt/reposer/runs
WORKDIR /opt/reposer
COPY --from=python /opt/reposer/.venv .venv
COPY --from=python /opt/reposer/sbom.json /usr/share/doc/reposer/
COPY LICENSE THIRD_PARTY.md ./
COPY --chown=10001:10001 avatars avatars
COPY service code/service
COPY model code/model
COPY training code/training
ENV PATH=/opt/reposer/.venv/bin:$PATH \
    PYTHONPATH=/opt/reposer/code \
    NUMBA_CACHE_DIR=/tmp/numba \
    MPLCONFIGDIR=/tmp/matplotlib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
ENTRYPOINT ["reposer-train"]
CMD ["--help"]
