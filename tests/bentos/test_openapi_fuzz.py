"""schemathesis over the served OpenAPI document: no 5xx, no undocumented answer, no bad request that is accepted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bentos.manifest import Manifest
from tests.bentos.conftest import LIMITS
from tests.serving import Server, serve

FOLDER = Path(__file__).parent / "fuzz"
KEY = "a-key-for-the-fuzzer-0123"
CHECKS = (  # `all` may mean something else in another version
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)


@pytest.fixture(scope="module")
def guarded(built_home: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same Bento with a key, which is an admin's as well."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = {"EKIBEN_API_KEYS": KEY, "EKIBEN_ADMIN_KEYS": KEY}
    with serve(manifest.tag, built_home, folder, LIMITS | keys) as server:
        yield server


def fuzz(server: Server, folder: Path, *options: str) -> None:
    """Run schemathesis as its users do."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(FOLDER / "schemathesis.toml"), "run"]
    done = subprocess.run(
        [*command, f"{server.url}/docs.json", "--checks", ",".join(CHECKS), "--no-color", *options],
        cwd=folder,
        env=os.environ | {"FUZZ_HOOKS": str(FOLDER / "hooks.py")},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    report = done.stdout + done.stderr
    operations = re.search(r"Selected: (\d+)/(\d+)\s+Tested: (\d+)", report)
    assert operations, report
    assert len(set(operations.groups())) == 1, f"all operations are tested\n{report}"
    assert done.returncode == 0, report
    with server.client() as client:
        assert client.get("/readyz").status_code == 200, "and it is well afterwards"


def test_the_document_is_true(server: Server, tmp_path: Path) -> None:
    fuzz(server, tmp_path, "--max-examples", "60")


def test_the_document_is_true_with_keys(guarded: Server, tmp_path: Path) -> None:
    fuzz(guarded, tmp_path, "--max-examples", "20", "--header", f"Authorization: Bearer {KEY}")


@pytest.mark.slow
def test_the_document_is_true_for_minutes(guarded: Server, tmp_path: Path) -> None:
    fuzz(guarded, tmp_path, "--max-time", "150", "--header", f"Authorization: Bearer {KEY}")
