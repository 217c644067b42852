# The image of the head and the workers of a Ray cluster: the service's image with Ray in it.
#   docker build -f deploy/ray.Dockerfile -t reposer-ray:0.1.0 --build-arg SERVICE_IMAGE=reposer-service:0.1.0 .
ARG SERVICE_IMAGE=reposer-service:0.1.0-gpu
FROM ${SERVICE_IMAGE}
USER 0
# KubeRay's probes are made of it.
# hadolint ignore=DL3008
RUN apt-get update -qq && apt-get install -qq -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/reposer
COPY constraints.txt ./
RUN --mount=type=secret,id=ca_bundle \
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi; \
    pip --python .venv/bin/python install --no-cache-dir --quiet -c constraints.txt "ray[serve]"
USER 10001:10001
