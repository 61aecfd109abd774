# The encoder: one Bento, the locked packages, and nothing that builds. Its folder is prepared by `build.py`, which exports the
# Bento with its model: bento/, constraints.txt (the versions of deployments/requirements.lock) and the two scripts beside this file.
#
# `bentoml containerize` makes an image of the same Bento, with compilers in it, of about three times the size. A
# `dockerfile_template` in bentofile.yaml would not do: it turns every Bento into BentoML's old format, also those that never
# become an image, and neither the locked versions nor the labels reach it.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
ARG UV_VERSION=0.13.9
RUN python -m venv /opt/uv && /opt/uv/bin/pip install --quiet --no-cache-dir "uv==${UV_VERSION}"
COPY bento/env/python/requirements.txt constraints.txt /build/
# Such as opentelemetry-exporter-otlp-proto-http, for EKIBEN_TRACING=otlp.
ARG EXTRA_PACKAGES=""
# Compiled here, because a read-only container could not keep what Python compiles. Tornado's tests bring a private key along,
# which every scanner of images reports.
RUN python -m venv --without-pip /opt/ekiben \
    && /opt/uv/bin/uv pip install --quiet --python /opt/ekiben/bin/python --no-cache --compile-bytecode \
        --requirement /build/requirements.txt --constraint /build/constraints.txt ${EXTRA_PACKAGES} \
    && rm -rf /opt/ekiben/lib/python3*/site-packages/tornado/test
COPY bento/src /app/bento/src
RUN /opt/ekiben/bin/python -m compileall -q --invalidation-mode unchecked-hash /app/bento/src

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 ekiben \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin ekiben \
    && install -d -o 10001 -g 10001 /state
COPY --from=packages /opt/ekiben /opt/ekiben
COPY encoder-entrypoint.sh encoder-health.py /app/
# What changes least comes first: a release that only changes code keeps the model's layer.
COPY bento/models /app/bento/models
COPY bento/bento.yaml bento/README.md /app/bento/
COPY bento/apis /app/bento/apis
COPY bento/env /app/bento/env
COPY --from=packages /app/bento/src /app/bento/src

# Two places are written: /tmp (BentoML's home, where the workers' metrics come together; lost with the container) and /state
# (fetched versions, worth a volume when EKIBEN_FOLLOW is set).
ENV PATH=/opt/ekiben/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    BENTOML_CONTAINERIZED=true \
    BENTOML_DO_NOT_TRACK=true \
    BENTOML_HOME=/tmp/bentoml \
    BENTOML_HOST=0.0.0.0 \
    BENTOML_PORT=3000 \
    EKIBEN_SHELF_FOLDER=/state
WORKDIR /app
USER 10001:10001
VOLUME ["/state"]
EXPOSE 3000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["/opt/ekiben/bin/python", "-I", "/app/encoder-health.py"]
ENTRYPOINT ["/app/encoder-entrypoint.sh"]

ARG TITLE=ekiben-encoder
ARG VERSION=unknown
ARG REVISION=unknown
ARG SPACE=unknown
ARG RUN_ID=unknown
ARG DATA_MD5=unknown
LABEL org.opencontainers.image.title="${TITLE}" \
      org.opencontainers.image.description="Texts in, vectors out: a model of your own texts behind an HTTP API" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      ekiben.space="${SPACE}" \
      ekiben.run="${RUN_ID}" \
      ekiben.data="${DATA_MD5}"
