"""The rendered manifests, each overlay once a module."""

from __future__ import annotations

import pytest

from tests.deployments.k8s.manifests import Manifests, NoKustomizeError, render

OVERLAYS = ("small", "large")


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return rendered(request.param)


@pytest.fixture(scope="module")
def small() -> Manifests:
    return rendered("small")


@pytest.fixture(scope="module")
def large() -> Manifests:
    return rendered("large")


def rendered(overlay: str) -> Manifests:
    try:
        return render(overlay)
    except NoKustomizeError as error:
        pytest.skip(f"{error}: nothing renders the manifests here")
