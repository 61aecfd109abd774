"""The commands about releases: `release`, `rollback`, `status`, `history`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows import screens
from flows.command import Options, RunOptions, command, output, print_json, starting_prefect, terminal, where
from flows.core.history import read_history, was_done
from flows.core.lineage import trace_all, trace_version
from flows.core.packing import bento_exists
from flows.core.promotion import find_differences
from flows.core.registry import Registry
from flows.core.release_lock import list_holders
from flows.core.tracking import open_tracker
from flows.errors import ParamsError


@command(RunOptions)
def release(
    options: RunOptions,
    run: Annotated[
        str | None, typer.Option(help="MLflow run or version to release; default: the best on its data.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask all gates and leave nothing behind.")] = False,
) -> None:
    """Put a trained model through the gates and into a Bento, and make it the champion."""
    settings = options.settings()
    params = options.load()
    with starting_prefect():
        from flows.release import release as release_flow
    result = release_flow(run=run, release=params.release, dry_run=dry_run)
    found = trace_version(open_tracker(settings), result.version)
    screen = screens.would_release(result, settings) if dry_run else screens.released(found, settings)
    terminal.print(screen, soft_wrap=True)
    print_json(options, found.as_json() | result.model_dump())


@command(Options)
def rollback(
    options: Options,
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "",
    to: Annotated[
        str | None, typer.Option(help="Version, run or Bento tag; default: the one that the champion has replaced.")
    ] = None,
    server: Annotated[
        list[str] | None, typer.Option(help="Address of a running server that is to change over now; repeatable.")
    ] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="File with the key for --server; default: EKIBEN_ADMIN_KEY.")
    ] = None,
) -> None:
    """Make an earlier version the champion again: alias, Bento and running servers."""
    settings = options.settings()
    if not reason.strip():  # told before Prefect is started
        raise ParamsError("a rollback needs a reason: --reason 'wrong answers to short queries'")
    with starting_prefect():
        from flows.rollback import rollback as rollback_flow
    result = rollback_flow(reason=reason, to=to, servers=server, admin_key_file=admin_key_file)
    terminal.print(screens.rolled_back(result, settings), soft_wrap=True)
    print_json(options, result.model_dump() | where(settings))


@command(Options)
def status(
    options: Options,
    version: Annotated[
        str | None,
        typer.Option(help="Version, alias, run, Bento tag or X-Ekiben-Model header: its way back to data and code."),
    ] = None,
) -> None:
    """Show what is released, whether a release is at work, and where a version comes from."""
    settings = options.settings()
    tracker = open_tracker(settings)
    if version is not None:
        found = trace_version(tracker, version)
        output.print(screens.lineage(found, settings), soft_wrap=True)
        print_json(options, found.as_json())
        return
    versions = trace_all(tracker)
    holders = [str(holder) for holder in list_holders(tracker)]
    warnings = find_differences(tracker, settings.bento_store_path)
    champion = next((found for found in versions if found.is_champion), None)
    if champion is not None and champion.bento_tag and not bento_exists(champion.bento_tag):
        warnings.append(f"{champion.bento_tag} is not in the Bento store {settings.bento_store_path}")
    output.print(screens.status(versions, holders, warnings, settings), soft_wrap=True)
    content: dict[str, Any] = {
        "versions": [found.as_json() for found in versions],
        "aliases": {alias: found.version for found in versions for alias in found.aliases},
        "at_work": holders,
        "warnings": warnings,
    }
    print_json(options, content | where(settings))


@command(Options)
def history(options: Options) -> None:
    """Show what was released, refused and rolled back: when, by whom and why."""
    settings = options.settings()
    acts = _read_acts(open_tracker(settings))
    output.print(screens.history(acts, settings), soft_wrap=True)
    print_json(options, {"history": acts} | where(settings))


def _read_acts(registry: Registry) -> list[dict[str, Any]]:
    """Every act, the newest first, with whether it was carried through."""
    acts = read_history(registry)
    champion = registry.champion()
    done = was_done(acts, "" if champion is None else champion.version)
    return [act.model_dump() | {"time": act.time, "done": done.get(act.at, True)} for act in reversed(acts)]
