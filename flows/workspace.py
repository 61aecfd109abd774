"""A pull step for Prefect deployments: go to the project's folder, wherever it is on the machine that does the run.

A worker of type process starts each run in an empty folder, so a relative folder in prefect.yaml would mean that one,
and an absolute one the machine that deploys.
"""

from __future__ import annotations

import os

from flows.settings import PROJECT_ROOT


def enter_project() -> dict[str, str]:
    """Make the folder that this code comes from the working directory: relative addresses of data start there."""
    os.chdir(PROJECT_ROOT)
    return {"directory": str(PROJECT_ROOT)}
