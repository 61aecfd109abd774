"""The measurement of swaps: what it counts, and that real models come and go unfelt."""

from __future__ import annotations

import base64
from pathlib import Path
from statistics import median

import numpy as np
import orjson
import pytest

from tests.benchmarks.swaps import PAUSE_S, QUIET_S, draw, make_home, measure, summarise, write_table
from tests.bentos.traffic import Shot

VECTORS = {"ekiben:1-a": np.eye(2, dtype=np.float32), "ekiben:2-b": -np.eye(2, dtype=np.float32)}


def shoot(text: int, sent: float, seconds: float, model: str, of: str = "", *, status: int = 200) -> Shot:
    """An answer that says that it is of `model`, with the vector of the version `of`."""
    head = f"HTTP/1.1 {status} OK\r\nx-ekiben-model: {model}\r\n".encode()
    body = orjson.dumps({"embeddings": [base64.b64encode(VECTORS[of or model][text].tobytes()).decode()]})
    return Shot(text, sent, sent + seconds, head, body)


def test_failed_and_wrong_answers_are_counted_and_swaps_compared_with_the_quiet_before(tmp_path: Path) -> None:
    quiet = [shoot(number % 2, number / 100, 0.010, "ekiben:1-a") for number in range(1000)]
    during = [shoot(number % 2, 10 + number / 100, 0.015, "ekiben:2-b") for number in range(200)]
    bad = [
        shoot(0, 11.0, 0.015, "ekiben:2-b", "ekiben:1-a"),
        shoot(0, 11.0, 0.015, "ekiben:2-b", status=503),
        Shot(0, 11.0, 11.015, b"", b""),
    ]
    result = summarise(
        [*quiet, *during, *bad], VECTORS, 0.0, 12.0, (3.0, 10.0), [("alias", 2, 10.5, 12.0)], workers=1, memory=(9, 8)
    )
    assert (result.requests, result.failed, result.wrong) == (1203, 2, 1)
    assert result.by_version == {"ekiben:1-a": 1000, "ekiben:2-b": 201}
    assert result.ratios == [pytest.approx(1.5)]
    table = write_table([result])
    assert "| failed | 2 |" in table
    assert "| p99 before | 10.0 ms |" in table
    assert "| ... of the worst swap | 1.50 |" in table
    draw([result], tmp_path / "swap.png")
    assert (tmp_path / "swap.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("workers", [1, 2])
def test_real_models_come_and_go_unfelt_and_give_their_memory_back(workers: int, tmp_path: Path) -> None:
    home, tags = make_home(tmp_path)
    result = measure(home, tags, tmp_path, workers=workers, quiet_s=QUIET_S, pause_s=PAUSE_S)
    assert result.seconds > 60
    assert (result.failed, result.wrong) == (0, 0)
    assert min(result.by_version.values()) > 500
    assert result.memory_after_mb < result.memory_before_mb + 25 * workers, "a version takes more than 100 MB"
    assert median(result.ratios) <= 2, result.swaps
