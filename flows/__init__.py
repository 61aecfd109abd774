"""The railway: one Prefect flow a file (`train`, `tune`, `release`, `pipeline`) and the `ekiben` command.

This package imports nothing by itself, so that `ekiben --help` and `prefect deploy` stay quick.
"""
