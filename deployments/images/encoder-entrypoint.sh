#!/bin/sh
# Serve the Bento as process 1, so that signals reach it. Options are those of `bentoml serve`, whose word may come first:
# manifests that were written for an image of `bentoml containerize` fit.
set -eu
case "${1-}" in serve | serve-http) shift ;; esac
exec /opt/ekiben/bin/python -m bentoml serve /app/bento "$@"
