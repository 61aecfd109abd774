"""What the commands of `ekiben` share: the program, its options, its two outputs."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from flows import screens
from flows.core.watchdog import end_children_with_this_process
from flows.errors import ParamsError
from flows.options import has_data, load_params
from flows.params import DATA_ADDRESSES, Params
from flows.settings import PROJECT_ROOT, FlowSettings, export_environment, load_settings

SAMPLE = {
    "profiles": PROJECT_ROOT / "data" / "sample" / "profiles.csv",
    "judgements": PROJECT_ROOT / "data" / "sample" / "judgements.csv",
}

app = typer.Typer(
    name="ekiben",
    help="From labelled text pairs to a fast, versioned embedding API.",
    add_completion=False,
    rich_markup_mode=None,
)
terminal = Console(stderr=True)
output = Console()


@dataclass(frozen=True)
class Options:
    """The options that every command takes."""

    home: Annotated[Path | None, typer.Option(help="Folder of all local state; default .ekiben, or EKIBEN_HOME.")] = (
        None
    )
    json: Annotated[bool, typer.Option("--json", help="The last line on standard output is one JSON object.")] = False

    def settings(self) -> FlowSettings:
        """Read the settings and tell the other tools about them; call it before a flow is imported."""
        settings = load_settings(self.home)
        export_environment(settings, terminal=True)
        return settings


@dataclass(frozen=True)
class RunOptions(Options):
    """The options of the commands that train: which data, which parameters."""

    pairs: Annotated[str | None, typer.Option(help="Scored pairs: text_a, text_b, score (CSV, Parquet, JSONL).")] = None
    dev: Annotated[str | None, typer.Option(help="Pairs for model choice; default: split off.")] = None
    test: Annotated[str | None, typer.Option(help="Held-out pairs; default: split off.")] = None
    retrieval: Annotated[str | None, typer.Option(help="Folder in BEIR layout.")] = None
    profiles: Annotated[str | None, typer.Option(help="Table of profiles: id and text columns.")] = None
    judgements: Annotated[str | None, typer.Option(help="Table: query, profile_id, relevance.")] = None
    data_rev: Annotated[str | None, typer.Option(help="Git revision to read DVC data at.")] = None
    params: Annotated[Path | None, typer.Option(help="YAML file, see deployments/params/.")] = None
    set: Annotated[list[str] | None, typer.Option(help="section.key=value, e.g. train.steps=120; repeatable.")] = None

    def load(self) -> Params:
        """Merge file, assignments and data options."""
        data = {name: getattr(self, name) for name in DATA_ADDRESSES}
        return load_params(self.params, self.set or [], data)

    def load_with_data(self) -> Params:
        """Like `load`, but some data must have been named."""
        params = self.load()
        if not has_data(params.data):
            raise ParamsError(
                "no data given: use --pairs FILE, --retrieval FOLDER, or --profiles FILE --judgements FILE; "
                "for the sample: " + " ".join(f"--{name} {screens.short_path(path)}" for name, path in SAMPLE.items())
            )
        return params


def command(options_class: type[Options]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that takes the fields of `options_class` as options, gathered into its argument `options`."""
    hints = get_type_hints(options_class, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(options_class)
    ]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        parameters = [p for name, p in signature.parameters.items() if name != "options"] + shared

        def run(**given: Any) -> None:
            options = options_class(**{parameter.name: given.pop(parameter.name) for parameter in shared})
            function(options=options, **given)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return app.command()(run)

    return decorate


@contextmanager
def starting_prefect() -> Iterator[None]:
    """Import Prefect behind a sign of life, and let its flows speak to this terminal."""
    with terminal.status("starting Prefect"):
        from flows.prefect_server import open_server
        from flows.progress import use_terminal

        end_children_with_this_process()
        open_server()
        yield
    use_terminal(terminal)


def print_json(options: Options, values: dict[str, Any]) -> None:
    """Print the one object of `--json`."""
    if options.json:
        sys.stdout.write(json.dumps(values, default=str) + "\n")
        sys.stdout.flush()


def where(settings: FlowSettings) -> dict[str, str]:
    """Where things are kept, for `--json`; without passwords."""
    return {"mlflow_uri": settings.shown_mlflow_uri, "home": str(settings.home_path)}
