# The training line: Prefect server and worker, set-up, exporter and the `ekiben` command, in the versions of
# deployments/requirements.lock. Built from the project's folder: `build.py line`, or `docker build -f deployments/images/line.Dockerfile .`
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
ARG UV_VERSION=0.13.9
RUN python -m venv /opt/uv && /opt/uv/bin/pip install --quiet --no-cache-dir "uv==${UV_VERSION}"
# Which build of torch: `cpu`, or `cu130` and the like for a GPU; empty takes the one that the package index has.
ARG TORCH_BACKEND=cpu
# Wheels of your own: `build.py line -- --volume /my/wheels:/wheels:ro --build-arg UV_FIND_LINKS=/wheels` (podman).
ARG UV_FIND_LINKS
# What the work pools `docker` and `kubernetes` need besides; a worker could not install it in a read-only container.
ARG EXTRA_PACKAGES="prefect-docker prefect-kubernetes"
COPY deployments/requirements.lock /build/
COPY pyproject.toml /app/
# uv is among the packages because `bentoml build`, at the end of a release, asks for it, and would else want to install it.
# The project comes in editable, so that the code that runs is the one in /app, beside bentofile.yaml and the data; and before
# its code does, so that a change of the code leaves the one large layer as it is.
RUN python -m venv --without-pip /opt/ekiben \
    && /opt/uv/bin/uv pip install --quiet --python /opt/ekiben/bin/python --no-cache --compile-bytecode \
        ${TORCH_BACKEND:+--torch-backend ${TORCH_BACKEND}} \
        --requirement /app/pyproject.toml --extra train --constraint /build/requirements.lock \
        "uv==${UV_VERSION}" ${EXTRA_PACKAGES} \
    && cd /app && mkdir -p flows/core bentos && touch README.md LICENSE flows/__init__.py flows/core/__init__.py bentos/__init__.py \
    && /opt/uv/bin/uv pip install --quiet --python /opt/ekiben/bin/python --no-cache --no-deps --editable /app

FROM ${PYTHON_IMAGE} AS project
COPY . /app
RUN python -m compileall -q --invalidation-mode unchecked-hash /app/flows /app/bentos

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 ekiben \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /state --shell /usr/sbin/nologin ekiben \
    && install -d -o 10001 -g 10001 /state
COPY --from=packages /opt/ekiben /opt/ekiben
COPY --from=project /app /app
ARG REVISION=unknown
# There is no Git in here to ask which commit this is.
RUN echo "${REVISION}" > /app/REVISION
# Two places are written: /state (worth a volume) and /tmp.
ENV PATH=/opt/ekiben/bin:$PATH \
    HOME=/state \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    BENTOML_DO_NOT_TRACK=true \
    DO_NOT_TRACK=1 \
    EKIBEN_HOME=/state \
    MLFLOW_DISABLE_TELEMETRY=true \
    MPLBACKEND=Agg \
    PREFECT_HOME=/state/prefect \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_UI_STATIC_DIRECTORY=/tmp/prefect-ui
WORKDIR /app
USER 10001:10001
VOLUME ["/state"]
CMD ["ekiben", "--help"]

ARG VERSION=unknown
LABEL org.opencontainers.image.title="ekiben-line" \
      org.opencontainers.image.description="Trains, tunes and releases Ekiben's models under Prefect" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
