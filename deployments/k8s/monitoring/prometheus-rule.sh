#!/bin/sh
# Print deployments/prometheus/rules.yml as a PrometheusRule: kustomize cannot put a file into the middle of a resource, and a copy
# would go its own way.   deployments/k8s/monitoring/prometheus-rule.sh | kubectl apply -n ekiben -f -
set -eu
rules=$(dirname "$0")/../../prometheus/rules.yml
test -s "$rules"
cat <<HEAD
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ekiben
  labels:
    app.kubernetes.io/part-of: ekiben
spec:
HEAD
sed 's/^/  /' "$rules"
