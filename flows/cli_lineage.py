"""The commands that lead back: `ekiben explain` (where does a vector come from) and `ekiben reproduce` (is it so)."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from flows import screens
from flows.command import Options, command, output, print_json, terminal, where
from flows.core.checkout import Choice
from flows.core.explain import Chain, Link
from flows.core.explain import explain as explain_reference
from flows.core.provenance import LOCK_FILE
from flows.core.references import Places, find_local_box, find_subjects
from flows.core.reproduce import Comparison, compare, plan_rebuild, rebuild
from flows.core.tracking import RunRecord, Tracker, open_tracker
from flows.errors import InputError, NothingReleasedError
from flows.settings import DEFAULT_HOME, PROJECT_ROOT, FlowSettings

DEFAULT_MIN_COSINE = 0.999
SHOWN_PARAMS = ("loss", "learning_rate", "steps", "batch_size", "max_tokens", "layers", "dimensions", "seed")
MARKS = {"ok": "ok", "changed": "CHANGED", "missing": "MISSING", "unknown": "unknown"}
LINK_NAMES = {"base_model": "base model"}

Reference = Annotated[
    str, typer.Argument(help="X-Ekiben-Model header, Bento tag, space id, version, alias, or run (6 characters do).")
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Where relative data paths start; default: as recorded, then here, then the code.")
]
Repository = Annotated[Path | None, typer.Option(help="Clone that has the commit; default: the one of this code.")]


@command(Options)
def explain(options: Options, reference: Reference, data_root: DataRoot = None, repository: Repository = None) -> None:
    """Follow a vector back: Bento, version, space, run, gates, base model, data, commit, lock; and is it all here?"""
    settings = options.settings()
    places = _open_places(settings, data_root, repository)
    with terminal.status(f"looking for {reference}"):
        chains = explain_reference(reference, places)
    if len(chains) > 1:
        output.print(f"{reference} is shared by {len(chains)} versions", highlight=False, markup=False)
    for chain in chains:
        output.print(render_chain(chain, settings), soft_wrap=True)
    answer = [
        chain.as_json() | {"look": {link.name: _commands(chain, link, settings) for link in chain.links}}
        for chain in chains
    ]
    print_json(options, {"chains": answer, "no_registry": places.no_registry} | where(settings))


@command(Options)
def reproduce(
    options: Options,
    run: Annotated[str, typer.Argument(help="MLflow run, trial, version, alias or Bento tag to make again.")],
    min_cosine: Annotated[
        float,
        typer.Option(min=-1.0, max=1.0, help="Smallest cosine of an old and a new vector that counts as the same."),
    ] = DEFAULT_MIN_COSINE,
    env: Annotated[
        Choice,
        typer.Option(help="Packages: those here, a fresh `make setup` of the commit, or whichever its lock asks for."),
    ] = "auto",
    data_root: DataRoot = None,
    repository: Repository = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave checkout, home and log of the rebuild for a look.")
    ] = False,
) -> None:
    """Make a run again in a clean checkout of its commit, and measure how far the new vectors are. Exit 1: too far."""
    settings = options.settings()
    tracker = open_tracker(settings)
    places = _open_places(settings, data_root, repository, tracker=tracker)
    recorded = _find_run(run, places)
    plan = plan_rebuild(
        tracker,
        recorded,
        repository=places.repository,
        roots=places.roots,
        find_box=lambda tag: find_local_box(tag, places),
    )
    for note in plan.notes:
        _say(f"[reproduce] note: {note}")
    with _scratch(keep=keep) as scratch:
        rebuilt = rebuild(plan, scratch, environment=env, say=_say)
        with terminal.status("comparing"):
            result = compare(plan, tracker, rebuilt, scratch, wanted_cosine=min_cosine)
        kept = {"kept": str(scratch)} if keep else {}
    output.print(render_comparison(result), soft_wrap=True)
    print_json(options, result.as_json() | kept | where(settings))
    if not result.reproduced:
        raise typer.Exit(1)


def render_chain(chain: Chain, settings: FlowSettings) -> Text:
    """One chain, a link a paragraph: what it is, whether it is here, how to look at it."""
    told = {
        "registry": "",
        "run": " (a run that was not registered)",
        "box": " (from the lunchbox on this machine alone)",
    }
    lines = [f"Where {chain.reference} comes from{told[chain.source]}", ""]
    for link in chain.links:
        lines.append(f"  {LINK_NAMES.get(link.name, link.name):<11} {MARKS[link.state]:<8} {link.said}")
        lines += [f"{'':23}{detail}" for detail in _details(link)]
        lines += [f"{'':23}$ {shown}" for shown in _commands(chain, link, settings)]
    lines += [f"  contradiction: {note}" for note in chain.notes]
    return Text("\n".join(["", *lines, ""]))


def render_comparison(result: Comparison) -> Text:
    """How a rebuild came out: verdict, vectors, metrics, doubts."""
    verdict = "is reproduced" if result.reproduced else "is NOT reproduced"
    facts = {
        "commit": result.commit,
        "data": result.data,
        "environment": f"{result.environment}, code in {result.code}",
        "training": f"{result.seconds:.0f} s",
        "vectors": _vectors(result),
        "metrics": _metrics(result),
    }
    rows = [(name, f"{old:.6f}", f"{new:.6f}", f"{new - old:+.6f}") for name, (old, new) in moved(result).items()]
    lines = [f"Run {result.run_id} {verdict}", ""]
    lines += [f"  {name:<12} {value}" for name, value in facts.items()]
    if rows:
        table = [("metric", "recorded", "rebuilt", "difference"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        lines.append("")
        lines += ["  " + "  ".join(map(str.ljust, row, widths)) for row in table]
    lines += ["", *(f"  note: {note}" for note in result.notes)] if result.notes else []
    return Text("\n".join(["", *(line.rstrip() for line in lines), ""]))


def moved(result: Comparison) -> dict[str, tuple[float, float]]:
    """The metrics that came out otherwise: name -> (recorded, rebuilt)."""
    return {name: (old, new) for name, (old, new) in result.metrics.items() if new != old}


def _metrics(result: Comparison) -> str:
    if not result.metrics:
        return "none to compare"
    same = len(result.metrics) - len(moved(result))
    return f"{same} of {len(result.metrics)} are the same" + (", these are not:" if moved(result) else "")


def _vectors(result: Comparison) -> str:
    if result.min_cosine is None or result.mean_cosine is None or result.max_difference is None:
        return "none were kept: nothing to compare with"
    same = "the same numbers" if result.max_difference == 0 else f"largest difference {result.max_difference:.2e}"
    return (
        f"{result.texts} texts against {result.vectors_of}: cosine {result.min_cosine:.7f} at least, "
        f"{result.mean_cosine:.7f} on average ({same}); asked {result.wanted_cosine:g}"
    )


def _details(link: Link) -> Iterator[str]:
    facts = link.facts
    if link.name == "run" and facts.get("params"):
        params = {name.removeprefix("train."): value for name, value in facts["params"].items()}
        yield ", ".join(f"{name} {params[name]}" for name in SHOWN_PARAMS if params.get(name) not in (None, "null"))
    if link.name == "run" and facts.get("metrics"):
        yield _figures(facts["metrics"])
    if link.name == "version" and facts.get("aliases_here"):
        yield f"on this machine servers know it as {', '.join(facts['aliases_here'])}"


def _figures(metrics: dict[str, float]) -> str:
    """The test metric of base and tuned model, and the gain's interval; what there is of it."""
    name = next((name for name in ("spearman", "ndcg_at_10") if f"eval/{name}" in metrics), None)
    if name is None:
        dev = sorted((key, value) for key, value in metrics.items() if key.startswith("dev/"))
        return ", ".join(f"{key} {value:.4f}" for key, value in dev) or "no scores"
    base = f"base {metrics[f'base/{name}']:.4f}, " if f"base/{name}" in metrics else ""
    ends = [metrics.get(f"gain/{end}") for end in ("low", "high")]
    interval = f", gain {ends[0]:+.4f} to {ends[1]:+.4f}" if None not in ends else ""
    return f"test {name}: {base}tuned {metrics[f'eval/{name}']:.4f}{interval}"


def _commands(chain: Chain, link: Link, settings: FlowSettings) -> list[str]:
    """Commands that look at a link, as they can be typed here; none when there is nothing to look at."""
    facts = link.facts
    tag = chain.link("bento").facts.get("tag", "")
    box = chain.link("bento").facts.get("lunchbox", "")
    run_id = chain.link("run").facts.get("run_id", "")
    commit = chain.link("commit").facts.get("git_commit", "")
    repository = shlex.quote(str(chain.link("commit").facts.get("repository", "")))
    registry = link.state not in ("missing", "unknown")
    commands: dict[str, list[str]] = {
        "vectors": [_ekiben(settings, "serve", "--version", tag)]
        if registry and tag and chain.source == "registry"
        else [],
        "bento": [f"BENTOML_HOME={shlex.quote(str(facts.get('store')))} {screens.program('bentoml')} get {tag}"]
        if facts.get("built")
        else [],
        "version": [_ekiben(settings, "status", "--version", str(facts.get("version")))] if registry else [],
        "space": [f"cat {shlex.quote(str(Path(box) / 'manifest.json'))}"] if box else [],
        "run": [screens.mlflow_command(settings), _ekiben(settings, "reproduce", run_id)] if registry else [],
        "gates": [_mlflow_artifact(run_id, "release", settings)] if link.facts and run_id else [],
        "base_model": [f"cat {shlex.quote(str(Path(box) / 'MODEL_CARD.md'))}"] if box else [],
        "data": _data_commands(facts),
        "commit": [f"git -C {repository} show {commit}"] if facts.get("subject") is not None else [],
        "lock": [f"git -C {repository} show {commit}:{LOCK_FILE} | sha256sum"]
        if facts and chain.link("commit").facts.get("subject") is not None
        else [],
    }
    return commands[link.name]


def _ekiben(settings: FlowSettings, *words: str) -> str:
    """A command of ours, as it finds the same home."""
    home = ["--home", shlex.quote(screens.short_path(settings.home_path))] if settings.home != DEFAULT_HOME else []
    return " ".join([screens.program("ekiben"), *words, *home])


def _mlflow_artifact(run_id: str, path: str, settings: FlowSettings) -> str:
    mlflow = f"MLFLOW_TRACKING_URI={screens.quote_mlflow_uri(settings)} {screens.program('mlflow')}"
    return f"{mlflow} artifacts download --run-id {run_id} --artifact-path {path}"


def _data_commands(facts: dict[str, Any]) -> list[str]:
    places = facts.get("looked_at") or []
    if not places:
        return []
    if facts.get("revision"):
        return [f"git log -1 {shlex.quote(facts['revision'])}"]
    return [f"md5sum {shlex.quote(places[-1]['place'].partition(' at revision ')[0])}"]


def _open_places(
    settings: FlowSettings, data_root: Path | None, repository: Path | None, *, tracker: Tracker | None = None
) -> Places:
    """Where to look; a registry that cannot be had is no end: the lunchbox knows its own way back."""
    problem = ""
    if tracker is None:
        try:
            tracker = open_tracker(settings)
        except InputError as error:
            problem = str(error)
            terminal.print(f"without the registry: {problem}", highlight=False, markup=False, soft_wrap=True)
    given = [] if data_root is None else [data_root.resolve()]
    return Places(
        tracker=tracker,
        no_registry=problem,
        bento_home=settings.bento_store_path,
        lunchboxes=settings.lunchboxes_path,
        repository=PROJECT_ROOT if repository is None else repository.resolve(),
        roots=(*given, Path.cwd(), PROJECT_ROOT),
        model_name=settings.model_name,
    )


def _find_run(reference: str, places: Places) -> RunRecord:
    subjects = find_subjects(reference, places)
    if len(subjects) > 1:
        versions = ", ".join(subject.release.version for subject in subjects if subject.release)
        raise InputError(f"{reference} is shared by versions {versions}: name one of them")
    if subjects[0].run is None:
        run_id = subjects[0].manifest.run_id if subjects[0].manifest else "unknown"
        raise NothingReleasedError(
            f"the run of {reference} ({run_id}) is not in this MLflow, and only it knows all parameters: set "
            "MLFLOW_TRACKING_URI to the one that it was made with"
        )
    return subjects[0].run


@contextmanager
def _scratch(*, keep: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ekiben-reproduce-"))
    try:
        yield folder
    finally:
        if keep:
            _say(f"[reproduce] kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _say(line: str) -> None:
    terminal.print(line, highlight=False, markup=False, soft_wrap=True)
