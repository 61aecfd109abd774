"""The `ekiben` command: the flows, on a terminal.

What people read goes to standard error; standard output holds the tables that were asked for, and with `--json` its
last line is one JSON object. Exit codes: 0 done, 1 failed, 2 bad input, 3 the release was refused, 4 another release
was at work or quicker, 130 interrupted.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import traceback
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

import flows.cli_lineage
import flows.cli_releases  # noqa: F401 - both bring commands
from bentos.errors import LunchboxError, NotReadyError, RegistryError
from flows import screens
from flows.command import (
    SAMPLE,
    Options,
    RunOptions,
    app,
    command,
    print_json,
    starting_prefect,
    terminal,
    where,
)
from flows.core.dataset import read_data
from flows.core.lineage import Lineage, trace_champion, trace_version
from flows.core.packing import bento_exists
from flows.core.serving import check_port, local_url, passing_signals, served_bento, wait_for_end, wait_ready
from flows.core.tracking import open_tracker
from flows.core.watchdog import end_children_with_this_process
from flows.errors import EkibenError, InputError, NothingReleasedError, ParamsError, hide_password
from flows.options import has_data
from flows.params import DATA_ADDRESSES
from flows.settings import PROJECT_ROOT, FlowSettings, load_settings

QUICK_PARAMS = PROJECT_ROOT / "deployments" / "params" / "quick.yaml"
CRASH_LOG = "crash.log"
INTERRUPTED = 130

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]


@command(RunOptions)
def up(
    options: RunOptions,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move the old state aside and start over.")] = False,
    serve: Annotated[bool, typer.Option(help="Serve when done, or stop before.")] = True,
    host: Host = "127.0.0.1",
    port: Port = 3000,
) -> None:
    """From data to a served API. What is already released is served at once; else tune, release, serve."""
    settings = options.settings()
    if serve:
        check_port(host, port)
    if fresh:
        _move_aside(settings)
    released = None if fresh else _already_released(options, settings)
    if released is None:
        version = _run_apart("pipeline", _or_sample(options))
        released = trace_version(open_tracker(settings), version)
    elif not bento_exists(released.bento_tag):  # the store was emptied, or is another one: build it again
        _run_apart("release", options, "--run", released.version)
    else:
        terminal.print(f"{released.bento_tag} is already released; --fresh starts over", highlight=False)
        terminal.print(screens.released(released, settings), soft_wrap=True)
    print_json(options, released.as_json())
    if serve:
        _serve(released, host, port, settings)


@command(RunOptions)
def train(options: RunOptions) -> None:
    """Fine-tune one candidate, score it, register it."""
    settings = options.settings()
    params = options.load_with_data()
    with starting_prefect():
        from flows.train import train as train_flow
    result = train_flow(data=params.data, train=params.train, evaluate=params.evaluate)
    terminal.print(screens.trained(result, settings), soft_wrap=True)
    print_json(options, result.model_dump() | where(settings))


@command(RunOptions)
def tune(options: RunOptions) -> None:
    """Search for the best parameters, register the winner, print them."""
    settings = options.settings()
    params = options.load_with_data()
    with starting_prefect():
        from flows.tune import tune as tune_flow
    result = tune_flow(
        data=params.data, train=params.train, evaluate=params.evaluate, tune=params.tune, release=params.release
    )
    terminal.print(screens.tuned(result, settings), soft_wrap=True)
    print_json(options, result.model_dump() | where(settings))


@command(RunOptions)
def pipeline(options: RunOptions) -> None:
    """Tune, then release the winner."""
    settings = options.settings()
    params = options.load_with_data()
    with starting_prefect():
        from flows.pipeline import pipeline as pipeline_flow
    result = pipeline_flow(
        data=params.data, train=params.train, evaluate=params.evaluate, tune=params.tune, release=params.release
    )
    released = trace_version(open_tracker(settings), result.release.version)
    terminal.print(screens.released(released, settings), soft_wrap=True)
    print_json(options, result.tune.model_dump() | result.release.model_dump() | released.as_json())


@command(Options)
def serve(
    options: Options,
    version: Annotated[str, typer.Option(help="Version, alias, run or Bento tag.")] = "champion",
    host: Host = "127.0.0.1",
    port: Port = 3000,
) -> None:
    """Serve a released version with `bentoml serve`."""
    settings = options.settings()
    check_port(host, port)
    released = trace_version(open_tracker(settings), version)
    if not released.bento_tag:
        raise NothingReleasedError(
            f"version {released.version} was not released yet; `ekiben release --run {released.version}` does it"
        )
    print_json(options, released.as_json())
    _serve(released, host, port, settings)


def main() -> None:
    """Run the command; turn every error into one line and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends it as tidily as Ctrl-C does
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False) or 0
        if code == INTERRUPTED:  # Typer turns a KeyboardInterrupt into this, and says nothing
            raise KeyboardInterrupt
    except EkibenError as error:
        code = _fail(str(error), error.exit_code, type(error).__name__)
    except TyperException as error:
        message = getattr(error, "format_message", error.__str__)  # it names the option, `str` does not
        code = _fail(f"{message()}; see 'ekiben COMMAND --help'", InputError.exit_code, "UsageError")
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted; run the same command again to go on", INTERRUPTED, "Interrupted")
    except (LunchboxError, RegistryError, NotReadyError) as error:  # a box or alias file that is not as it must be
        code = _fail(str(error), EkibenError.exit_code, type(error).__name__)
    except OSError as error:  # trouble with disk or network, after the retries that can help
        code = _fail(f"{error}; try again later, or see that the address can be reached", 1, type(error).__name__)
    except Exception as error:
        log = load_settings().home_path / CRASH_LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(hide_password(traceback.format_exc()), encoding="utf-8")
        code = _fail(f"unexpected {type(error).__name__}: {error} (details in {log})", 1, type(error).__name__)
    sys.exit(code)


def _fail(message: str, code: int, kind: str) -> int:
    message = hide_password(message)
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": {"type": kind, "message": message}, "exit_code": code}) + "\n")
    return code


def _run_apart(verb: str, options: RunOptions, *more: str) -> str:
    """Run `ekiben VERB` in a process of its own and return the version that it released.

    What trains and packs needs a gigabyte and a Prefect server; what serves for days needs neither.
    """
    arguments = [verb, "--json", *more]
    for field in fields(RunOptions):
        value = getattr(options, field.name)
        if field.name != "json" and value is not None:
            for item in value if isinstance(value, list) else [value]:
                arguments += [f"--{field.name.replace('_', '-')}", str(item)]
    command = [sys.executable, "-P", "-m", "flows", *arguments]  # -P: not a `flows` of the working directory
    end_children_with_this_process()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with passing_signals(process):
        answer, _ = process.communicate()
    if process.returncode:  # it has said why on standard error
        if options.json:
            sys.stdout.write(answer)
        sys.exit(process.returncode)
    return str(json.loads(answer.splitlines()[-1])["version"])


def _already_released(options: RunOptions, settings: FlowSettings) -> Lineage | None:
    """The champion, when it answers what is asked: no data named, or data that are the same byte for byte."""
    if options.params is not None or options.set:
        return None  # somebody wants something particular: let the pipeline look at it
    champion = trace_champion(open_tracker(settings))
    if champion is None:
        return None
    data = (_or_sample(options) if options.data_rev else options).load().data
    same = not has_data(data) or read_data(data, root=Path.cwd()).version.md5 == champion.data_md5
    return champion if same else None


def _or_sample(options: RunOptions) -> RunOptions:
    """The sample data and the quick parameters, unless data or parameters are named."""
    if any(getattr(options, name) for name in DATA_ADDRESSES if name != "data_rev") or options.params is not None:
        options.load_with_data()  # bad input is told before any work
        return options
    profiles, judgements = (screens.short_path(SAMPLE[name]) for name in ("profiles", "judgements"))
    return replace(options, params=QUICK_PARAMS, profiles=profiles, judgements=judgements)


def _serve(released: Lineage, host: str, port: int, settings: FlowSettings) -> None:
    log = settings.home_path / "serve.log"
    with served_bento(released.bento_tag, host=host, port=port, log=log) as process:
        with terminal.status(f"starting {released.bento_tag}"):
            wait_ready(process, local_url(host, port), log)
        terminal.print(screens.serving(released, settings, host, port, log), soft_wrap=True)
        code = wait_for_end(process)
    if code:
        raise EkibenError(f"the server ended with exit code {code}; its log is {log}")


def _move_aside(settings: FlowSettings) -> None:
    """Start over without losing anything: the old home folder gets a dated name."""
    home = settings.home_path
    if any(folder.is_relative_to(home) for folder in (Path.cwd(), PROJECT_ROOT)):
        raise ParamsError(f"--fresh would move {home} aside, with the folder you are in: give --home one of its own")
    aside = home.with_name(f"{home.name}.{datetime.now():%Y%m%d-%H%M%S}")
    home.rename(aside)
    home.mkdir()
    terminal.print(f"the old state is now in {aside}", highlight=False)
