"""What a new stack needs once, and a changed one again: MLflow's users, Prefect's pools, deployments and automations.

Each step finds what is there and changes only what differs, so it may be run at any time.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STEPS = (HERE / "mlflow_users.py", HERE / "prefect" / "setup.py")

if __name__ == "__main__":
    for step in STEPS:
        done = subprocess.run([sys.executable, str(step)], check=False)
        if done.returncode:
            sys.exit(done.returncode)
