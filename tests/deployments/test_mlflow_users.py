"""MLflow's users: what is missing or refused is said in one line. tests/stack makes them on a real server."""

from __future__ import annotations

import httpx
import pytest

from deployments.mlflow_users import main, set_user


def test_what_is_not_set_is_named() -> None:
    with pytest.raises(SystemExit, match=r"^MLFLOW_ADMIN_PASSWORD, MLFLOW_ENCODER_PASSWORD must be set"):
        main({"MLFLOW_TRACKING_URI": "http://x", "MLFLOW_ADMIN_USERNAME": "a", "MLFLOW_TRACKING_PASSWORD": "b"})


@pytest.mark.parametrize("method", ["GET", "POST"], ids=["asked", "made"])
def test_a_refusal_gives_the_servers_reason_and_no_password(method: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == method:
            return httpx.Response(400, json={"message": "too short"})
        return httpx.Response(404)

    with (
        httpx.Client(base_url="http://mlflow", transport=httpx.MockTransport(answer)) as client,
        pytest.raises(SystemExit, match=r"refused its user line: 400.*too short") as caught,
    ):
        set_user(client, "line", "the-password")
    assert "the-password" not in str(caught.value)
