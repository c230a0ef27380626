# syntax=docker/dockerfile:1
# Two images from one build: the API (with the set-up command), and Flower. Neither holds torch.

FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY api api
COPY noisemill noisemill
COPY shared shared
COPY worker worker

FROM build AS build-api
RUN pip install --constraint constraints.txt ".[api]"

FROM build AS build-flower
RUN pip install --constraint constraints.txt ".[server]" flower

FROM python:3.12-slim AS run
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid 10001 --user-group --create-home noisemill
USER 10001:10001
WORKDIR /home/noisemill

FROM run AS flower
COPY --from=build-flower /opt/venv /opt/venv
CMD ["python", "-m", "celery", "-A", "worker.app", "flower", "--address=0.0.0.0", "--port=5555", "--read-only"]

FROM run AS api
COPY --from=build-api /opt/venv /opt/venv
CMD ["python", "-m", "uvicorn", "api.app:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000", "--no-access-log", "--timeout-graceful-shutdown", "5"]
