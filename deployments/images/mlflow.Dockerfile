# MLflow's tracking server and registry with users, PostgreSQL and S3, in the versions of deployments/requirements.lock.
# Built from the project's folder: `build.py mlflow`, or `docker build -f deployments/images/mlflow.Dockerfile .`
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
ARG UV_VERSION=0.13.9
RUN python -m venv /opt/uv && /opt/uv/bin/pip install --quiet --no-cache-dir "uv==${UV_VERSION}"
COPY deployments/requirements.lock /build/
RUN python -m venv --without-pip /opt/mlflow \
    && /opt/uv/bin/uv pip install --quiet --python /opt/mlflow/bin/python --no-cache --compile-bytecode \
        --constraint /build/requirements.lock "mlflow[auth]" psycopg2-binary boto3

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 mlflow \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin mlflow
COPY --from=packages /opt/mlflow /opt/mlflow
COPY deployments/images/mlflow-entrypoint.py /app/
# Only /tmp is written: the file of the first user's name and password, and files on their way to S3.
ENV PATH=/opt/mlflow/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_HOST=0.0.0.0 \
    MLFLOW_PORT=5000
WORKDIR /tmp
USER 10001:10001
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["/opt/mlflow/bin/python", "-I", "-c", \
    "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('MLFLOW_PORT', '5000')}/health\", timeout=4)"]
ENTRYPOINT ["/opt/mlflow/bin/python", "/app/mlflow-entrypoint.py"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ekiben-mlflow" \
      org.opencontainers.image.description="MLflow with users, PostgreSQL and S3, as Ekiben was tested with" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
