"""Cores are counted as the container allows; memory that is free goes back."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import psutil
import pytest

from bentos.machine import count_cores, settle_memory

ALLOWED = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", ALLOWED)])
def test_a_quota_of_version_2_counts(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    assert count_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("100000", 1), ("-1", ALLOWED), ("150000", min(2, ALLOWED))])
def test_a_quota_of_version_1_counts(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert count_cores(tmp_path) == cores


def test_without_a_quota_the_affinity_counts(tmp_path: Path) -> None:
    assert count_cores(tmp_path) == ALLOWED


def test_what_loading_took_goes_back() -> None:
    process = psutil.Process()
    blocks = [bytes(200_000) for _ in range(500)]  # too small to be mapped one by one
    kept = blocks[-1]
    peak = process.memory_info().rss
    del blocks
    settle_memory()
    assert process.memory_info().rss < peak - 50_000_000
    assert len(kept) == 200_000
    gc.unfreeze()
