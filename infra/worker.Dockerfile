# syntax=docker/dockerfile:1
# The worker. TORCH_INDEX chooses the build of torch: an index of PyTorch's own (its install page lists one per
# platform; the CPU's is by far the smallest), or pip's usual one when empty. The wheels for NVIDIA GPUs bring CUDA
# along; the host needs the driver and the NVIDIA Container Toolkit only.

FROM python:3.12-slim AS build
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# Torch alone first: it is large, changes rarely, and must come from its own index.
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
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
CMD ["python", "-m", "worker", "-Q", "train,generate,ingest", "-n", "worker@%h"]
