from __future__ import annotations

from bentos.settings import ServeSettings
from flows.options import parameter_names
from flows.reference import stale_pages, write_configuration, write_env_example
from flows.settings import FlowSettings


def test_the_generated_pages_are_current() -> None:
    assert stale_pages() == [], "run `make docs`"


def test_the_page_names_every_parameter_and_setting() -> None:
    page, env = write_configuration(), write_env_example()
    for name in parameter_names():
        assert f"`{name}`" in page
    for settings in (FlowSettings, ServeSettings):
        for field in settings.model_fields.values():
            assert field.description
            assert field.description in page
            assert field.description in env
