#!/bin/sh
# Makes each service's user and database; PostgreSQL's image runs it once, when its volume is empty.
set -eu
psql --set=ON_ERROR_STOP=1 --no-psqlrc --quiet --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\getenv mlflow MLFLOW_DB_PASSWORD
\getenv prefect PREFECT_DB_PASSWORD
\getenv optuna OPTUNA_DB_PASSWORD
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE ROLE prefect LOGIN PASSWORD :'prefect';
CREATE ROLE optuna LOGIN PASSWORD :'optuna';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow;
CREATE DATABASE prefect OWNER prefect;
CREATE DATABASE optuna OWNER optuna;
REVOKE CONNECT ON DATABASE mlflow, mlflow_auth, prefect, optuna FROM PUBLIC;
SQL
