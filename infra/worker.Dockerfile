# syntax=docker/dockerfile:1
# The worker. TORCH_INDEX chooses the build of torch: .../whl/cpu, or .../whl/cu130 for NVIDIA GPUs, whose
# wheels bring CUDA along; the host needs the driver and the NVIDIA Container Toolkit only.

FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# Torch alone first: it is large, changes rarely, and must come from its own index.
COPY constraints.txt ./
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY api api
COPY noisemill noisemill
COPY shared shared
COPY worker worker
RUN pip install --constraint constraints.txt ".[worker]"

FROM python:3.12-slim
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# The folder's owner becomes the volume's owner.
RUN useradd --uid 10001 --user-group --create-home noisemill && install --directory --owner=10001 --group=10001 /cache
USER 10001:10001
WORKDIR /home/noisemill
COPY --from=build /opt/venv /opt/venv
CMD ["python", "-m", "celery", "-A", "worker.app", "worker", "-Q", "train,generate,ingest", "-n", "worker@%h"]
