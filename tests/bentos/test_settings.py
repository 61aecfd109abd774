"""Settings of the server: from the environment, bounded, and told apart from the flows' own."""

from __future__ import annotations

import os

import pytest
from pydantic import ValidationError

from bentos.settings import ServeSettings


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EKIBEN_MAX_TEXTS", "7")
    monkeypatch.setenv("EKIBEN_MODEL_TAG", "ekiben-model:3-1f2e3d4c")
    settings = ServeSettings()
    assert (settings.max_texts, settings.model_tag) == (7, "ekiben-model:3-1f2e3d4c")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("THREADS", "-1"),
        ("BATCH_TOKENS", "0"),
        ("QUEUE_TOKENS_BULK", "many"),
        ("PRECISION", "int4"),
        ("TIMEOUT_S", "0"),
        ("MAX_BODY_BYTES", "12"),
        ("MAX_CHARS", "0"),
        ("MODEL_TAG", ""),
        ("ALLOW_TRUNCATED_DIMENSIONS", "perhaps"),
        ("PROTECT_METRICS", "perhaps"),
        ("CORS_ORIGINS", "app.example.com"),
        ("LOG_LEVEL", "loud"),
        ("TRACING", "on"),
        ("MAX_CONNECTIONS", "0"),
        ("MAX_HEADER_BYTES", "10"),
        ("HEADER_TIMEOUT_S", "0"),
        ("BODY_TIMEOUT_S", "-1"),
        ("SEND_TIMEOUT_S", "0"),
        ("KEEP_ALIVE_S", "never"),
    ],
)
def test_a_setting_out_of_bounds_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"EKIBEN_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        ServeSettings()


def test_the_variables_of_the_flows_do_not_disturb_the_server() -> None:
    assert "EKIBEN_HOME" in os.environ
    ServeSettings()
