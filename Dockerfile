# All daemons and the command line in one image: docker build -t ambit .
# Which one runs is the manifest's choice (`python -m istiod_lite`, ztunnel, netconfig, waypoint).

# The data path as machine code (docs/decisions/0012-a-compiled-data-path.md).
FROM python:3.11-slim AS compiled
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/ambit
COPY requirements-dev.lock ./
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --require-hashes -r requirements-dev.lock
COPY pyproject.toml ./
COPY .ci/compile .ci/compile
COPY mesh mesh
COPY ztunnel ztunnel
COPY waypoint waypoint
RUN .ci/compile

FROM python:3.11-slim

# libnftables is how netconfig writes rules; nothing else of the system is used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends nftables \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/ambit
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements.lock

COPY pyproject.toml README.md LICENSE ./
COPY mesh mesh
COPY ztunnel ztunnel
COPY waypoint waypoint
COPY istiod_lite istiod_lite
COPY netconfig netconfig
COPY --from=compiled /opt/ambit/.compiled .compiled
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && python -m compileall -q mesh ztunnel waypoint istiod_lite netconfig

# ztunnel and netconfig are given root and the capabilities they need by their manifests.
USER 1337:1337
ENV PYTHONUNBUFFERED=1
CMD ["ambit", "version"]
