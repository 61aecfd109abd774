"""Where a vector comes from: header > Bento > version > space > run > gates > base model > data > commit > lock.

Core layer, knows nothing about Prefect. Gathers, and changes nothing. Each link says what is known, whether what it
names is still here and still the same, and in words what is missing; nothing is guessed. The registry is asked first;
what only the lunchbox knows, or what it knows alone when the registry is gone, comes from its manifest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bentos.aliases import read_aliases
from bentos.errors import LunchboxError, RegistryError
from bentos.manifest import DataVersion, verify_files
from flows.core.boxes import MANIFEST_TAG
from flows.core.files import local_path, md5_of, read_bytes
from flows.core.packing import hash_manifest
from flows.core.provenance import DIRTY, find_commit, lock_sha256
from flows.core.recorded import DataSight, is_local, look_for_data, read_json, read_recorded
from flows.core.references import Places, Subject, find_subjects
from flows.errors import DataError, InputError

State = Literal["ok", "changed", "missing", "unknown"]
Name = Literal[
    "vectors", "bento", "version", "space", "run", "gates", "base_model", "data", "commit", "lock"
]  # in the order of the chain
Source = Literal["registry", "run", "box"]  # who knew the reference
GATES_ARTIFACT = "release/gates.json"
NOT_RECORDED = "was not recorded"
NO_REGISTRY = "the registry cannot be asked"


@dataclass(frozen=True)
class Link:
    """One link of the chain."""

    name: Name
    state: State  # `ok`: it is here and as recorded, as far as that can be seen
    said: str  # for people, without a full stop
    facts: dict[str, Any] = field(default_factory=dict)  # for programs; only what is known


@dataclass(frozen=True)
class Chain:
    """Everything that one model goes back to."""

    reference: str  # as it was asked for
    source: Source
    links: tuple[Link, ...]
    notes: tuple[str, ...] = ()  # what contradicts itself, one sentence each

    def link(self, name: Name) -> Link:
        """One link by its name."""
        return next(link for link in self.links if link.name == name)

    def as_json(self) -> dict[str, Any]:
        """All of it, links by name, ready for `json.dumps`."""
        links: dict[str, Any] = {
            link.name: {"state": link.state, "said": link.said, "facts": link.facts} for link in self.links
        }
        return {"reference": self.reference, "source": self.source, "notes": list(self.notes)} | links


def explain(reference: str, places: Places) -> list[Chain]:
    """Follow a reference to where it comes from; several chains when several versions share a space.

    Args:
        reference: A header value or Bento tag (`ekiben:3-1f2e3d4c`), a space id, a version, an alias, a run id or its
            first 6 characters.
        places: Where to look.

    Raises:
        NothingReleasedError: nothing, or more than one run, is meant; says where was looked.
    """
    return [_follow(reference, subject, places) for subject in find_subjects(reference, places)]


def _follow(reference: str, subject: Subject, places: Places) -> Chain:
    links = (
        _vectors(subject, places),
        _bento(subject, places),
        _version(subject, places),
        _space(subject, places),
        _run(subject, places),
        _gates(subject, places),
        _base_model(subject),
        _data(subject, places),
        _commit(subject, places),
        _lock(subject, places),
    )
    source: Source = "registry" if subject.release else "run" if subject.manifest is None else "box"
    return Chain(reference, source, links, tuple(_contradictions(subject)))


def _vectors(subject: Subject, places: Places) -> Link:
    tag = subject.header(places.model_name)
    space = subject.fact("space_id", lambda manifest: manifest.space_id)
    if not space:
        return Link("vectors", "missing", "never released, so no server has given its vectors")
    facts: dict[str, Any] = {"X-Ekiben-Model": tag, "X-Ekiben-Space": space}
    if not subject.tags.get("bento_tag") and not _bento_file(tag, places).is_file():
        return Link(
            "vectors", "missing", f"packed as {tag}, but never released: no server has given its vectors", facts
        )
    dims = f", {subject.manifest.dim} dimensions" if subject.manifest else ""
    return Link("vectors", "ok", f"answers with X-Ekiben-Model: {tag}{dims}", facts)


def _bento_file(tag: str, places: Places) -> Path:
    name, _, version = tag.partition(":")
    return places.bento_home / "bentos" / name / version / "bento.yaml"


def _bento(subject: Subject, places: Places) -> Link:
    tag = subject.header(places.model_name)
    if not subject.fact("space_id", lambda manifest: manifest.space_id):
        return Link("bento", "missing", "was not built: not released")
    built = _bento_file(tag, places).is_file()
    facts: dict[str, Any] = {"tag": tag, "store": str(places.bento_home), "built": built}
    here = f"{tag} is {'' if built else 'not '}in {places.bento_home}"
    if subject.box is None or subject.manifest is None:
        return Link("bento", "missing", f"{here}, and its lunchbox is not on this machine", facts)
    facts |= {"lunchbox": str(subject.box), "created_at": subject.manifest.created_at}
    try:
        verify_files(subject.box, subject.manifest)
    except LunchboxError as error:
        return Link("bento", "changed", f"{here}; its lunchbox is not whole: {error}", facts | {"verified": False})
    released = subject.tags.get(MANIFEST_TAG, "")
    if released and hash_manifest(subject.box) != released:
        other = "its lunchbox was packed anew since, and is not the one that was released"
        return Link("bento", "changed", f"{here}; {other}", facts | {"verified": False, "released": released})
    whole = f"the {len(subject.manifest.files)} files of its lunchbox have the SHA-256 of the manifest"
    return Link("bento", "ok" if built else "missing", f"{here}; {whole}", facts | {"verified": True})


def _version(subject: Subject, places: Places) -> Link:
    release, manifest = subject.release, subject.manifest
    facts: dict[str, Any] = {}
    with suppress(RegistryError):
        pointers = read_aliases(places.bento_home, places.model_name)
        tag = subject.header(places.model_name)
        here = [alias for alias, item in pointers.items() if f"{places.model_name}:{item.bento_version}" == tag]
        facts = {"aliases_here": here} if here else {}
    if release is None:
        if manifest is None:
            return Link("version", "missing", "is not registered")
        facts |= {"version": manifest.version}
        if places.tracker is None:
            return Link("version", "unknown", f"{manifest.version} by its lunchbox; {NO_REGISTRY}", facts)
        why = "it is another registry's, or was deleted there"
        said = f"the lunchbox says {manifest.version}, which the registry lacks: {why}"
        return Link("version", "missing", said, facts)
    tags = release.tags
    facts |= {"version": release.version, "aliases": list(release.aliases), "created_at": release.created_at}
    facts |= {name: tags[name] for name in ("promoted_at", "verdict", "replaces", "run_id") if tags.get(name)}
    aliases = f" ({', '.join(release.aliases)})" if release.aliases else " (no alias)"
    replaced = f", replaced version {tags['replaces']}" if tags.get("replaces") else ""
    verdict = f", {tags['verdict']} by its gates" if tags.get("verdict") else ""
    promoted = f", promoted {tags['promoted_at']}" if tags.get("promoted_at") else ""
    return Link(
        "version", "ok", f"{release.version}{aliases}, made {release.created_at}{verdict}{promoted}{replaced}", facts
    )


def _space(subject: Subject, places: Places) -> Link:
    space = subject.fact("space_id", lambda manifest: manifest.space_id)
    if not space:
        return Link("space", "missing", "has no id before it is released")
    facts: dict[str, Any] = {"space_id": space}
    said = [space]
    own = subject.release.version if subject.release else ""
    sharing = [
        item.version
        for item in (places.tracker.versions() if places.tracker else [])
        if item.tags.get("space_id") == space and item.version != own
    ]
    if sharing:
        facts["shared_with_versions"] = sharing
        said.append(f"shared with version {', '.join(sharing)}")
    if subject.manifest is not None:
        relations = [relation.model_dump() for relation in subject.manifest.relations]
        facts |= {"relations": relations, "nested_dims": subject.manifest.nested_dims}
        said += [_relate(relation.kind, relation.tag, relation.figures) for relation in subject.manifest.relations]
        said += [] if relations else ["no champion before it"]
    elif kind := subject.tags.get("compat"):
        facts |= {"compat": kind, "compat_space_id": subject.tags.get("compat_space_id", "")}
        said.append(f"{kind} to the champion before it")
    else:
        said.append("how it relates to the champion before it is not recorded")
    return Link("space", "ok", "; ".join(said), facts)


def _relate(kind: str, tag: str, figures: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {value:.4f}" for name, value in list(figures.items())[:3])
    return f"{kind} to {tag}{f' ({shown})' if shown else ''}"


def _run(subject: Subject, places: Places) -> Link:
    run, manifest = subject.run, subject.manifest
    if run is None:
        run_id = subject.release.run_id if subject.release else manifest.run_id if manifest else ""
        facts: dict[str, Any] = {"run_id": run_id}
        if manifest is not None:
            facts |= {"params": dict(manifest.params), "metrics": manifest.metrics}
        if places.tracker is None:
            return Link("run", "unknown", f"{run_id} by its lunchbox; {NO_REGISTRY}", facts)
        return Link("run", "missing", f"{run_id or NOT_RECORDED}: this MLflow does not have it", facts)
    facts = {
        "run_id": run.run_id,
        "name": run.name,
        "status": run.status,
        "study_run_id": run.parent_run_id,
        "params": {name: value for name, value in sorted(run.params.items()) if name.startswith("train.")},
        "primary_metric": run.tags.get("primary_metric", ""),
        "metrics": run.metrics,
    }
    study = f", of the study {run.tags.get('study') or run.parent_run_id}" if run.parent_run_id else ""
    state: State = "ok" if run.status == "FINISHED" else "changed"
    return Link("run", state, f"{run.run_id}, {run.name or 'without a name'}{study}, {run.status.lower()}", facts)


def _gates(subject: Subject, places: Places) -> Link:
    report = read_json(places.tracker, subject.run.run_id, GATES_ARTIFACT) if places.tracker and subject.run else None
    if report is None or not isinstance(report.get("gates"), list):
        verdict = subject.tags.get("verdict")
        if verdict:
            return Link("gates", "unknown", f"{verdict}, but the report is not with the run", {"verdict": verdict})
        if places.tracker is None:
            return Link("gates", "unknown", f"see the model card; {NO_REGISTRY}")
        return Link("gates", "missing", "the run has no report" if subject.run else "the run had it")
    refused = [f"{row['gate']} ({row['reason']})" for row in report["gates"] if row.get("verdict") != "passed"]
    said = f"{report.get('verdict')}, {len(report['gates'])} asked" + (f": {'; '.join(refused)}" if refused else "")
    return Link("gates", "ok" if not refused else "changed", said, report)


def _base_model(subject: Subject) -> Link:
    name = (subject.run.params.get("train.base_model") if subject.run else "") or subject.fact(
        "base_model", lambda manifest: manifest.base_model
    )
    if not name:
        return Link("base_model", "missing", NOT_RECORDED)
    licence = subject.manifest.licence if subject.manifest else None
    facts: dict[str, Any] = {"base_model": name, "licence": licence, "anchor": subject.tags.get("anchor") or None}
    near = f", kept near {facts['anchor']}" if facts["anchor"] else ""
    said = f"{name}, {f'licence {licence}' if licence else 'its licence is not recorded'}{near}"
    return Link("base_model", "ok", said, facts)


def _data(subject: Subject, places: Places) -> Link:
    version = data_version(subject)
    if not version.md5:
        return Link("data", "missing", NOT_RECORDED)
    facts: dict[str, Any] = version.model_dump()
    said = f"{version.path} (md5 {version.md5}{f', revision {version.revision}' if version.revision else ''})"
    try:
        sights = _look_for_data(subject, version, places)
    except InputError as error:
        return Link("data", "unknown", f"{said}: not looked at, {error}", facts)
    facts["looked_at"] = [asdict(sight) | {"params": None, "found": sight.found} for sight in sights]
    for looked in facts["looked_at"]:
        looked.pop("params")
    last = sights[-1]
    if not last.found:
        problems = "; ".join(f"{sight.place}: {sight.problem}" for sight in sights)
        state: State = "changed" if any(sight.md5 for sight in sights) else "missing"
        return Link("data", state, f"{said} is not here: {problems}", facts)
    if last.params is not None and last.params.data_rev and not version.revision:
        return Link("data", "changed", f"{said}: changed since; as they were they are {last.place}", facts)
    return Link("data", "ok", f"{said}: the same here, {last.place}", facts)


def data_version(subject: Subject) -> DataVersion:
    """Which data a model was made of."""
    return DataVersion(
        path=subject.fact("data_path", lambda manifest: manifest.data.path),
        md5=subject.fact("data_md5", lambda manifest: manifest.data.md5),
        revision=subject.fact("data_rev", lambda manifest: manifest.data.revision) or None,
    )


def _look_for_data(subject: Subject, version: DataVersion, places: Places) -> list[DataSight]:
    """Compare the data that are here with the recorded ones; at least one sight.

    Raises:
        InputError: it cannot be told, or costs a download; the message is a clause.
    """
    commit = find_commit(places.repository, subject.fact("git_commit", lambda manifest: manifest.git_commit))
    if subject.run is not None and places.tracker is not None:
        recorded = read_recorded(places.tracker, subject.run, or_study=True)
        if not is_local(recorded):
            raise InputError("they are not on this machine")
        return list(look_for_data(recorded, version, roots=places.roots, commit=commit.sha if commit else ""))
    path = None if " " in version.path else local_path(version.path, root=Path())
    if path is None:
        raise InputError("they are several files or not on this machine, and without the run it is not known which")
    sights = []
    for root in dict.fromkeys(places.roots):
        place = str(root / path) + (f" at revision {version.revision}" if version.revision else "")
        try:
            found = md5_of(read_bytes(str(root / path), root=root, revision=version.revision))
        except (DataError, OSError) as error:
            sights.append(DataSight(place, None, "", str(error)))
            continue
        problem = "" if found == version.md5 else f"found md5 {found}, expected {version.md5}"
        sights.append(DataSight(place, None, found, problem))
        if not problem:
            break
    return sights


def _commit(subject: Subject, places: Places) -> Link:
    said = subject.fact("git_commit", lambda manifest: manifest.git_commit)
    if not said:
        return Link("commit", "missing", f"{NOT_RECORDED}: there was no git working tree, or git did not answer")
    sha, dirty = said.removesuffix(DIRTY), said.endswith(DIRTY)
    facts: dict[str, Any] = {"git_commit": sha, "dirty": dirty, "repository": str(places.repository)}
    commit = find_commit(places.repository, sha)
    changed = "; the working tree differed from it, and the difference is not known" if dirty else ""
    if commit is None:
        return Link("commit", "missing", f"{sha} is not in {places.repository}{changed}", facts)
    facts |= {"subject": commit.subject, "date": commit.date}
    return Link("commit", "changed" if dirty else "ok", f"{sha}, {commit.date}: {commit.subject}{changed}", facts)


def _lock(subject: Subject, places: Places) -> Link:
    recorded = subject.fact("lock_sha256", lambda manifest: manifest.lock_sha256)
    if not recorded:
        return Link("lock", "missing", NOT_RECORDED)
    here = lock_sha256(places.repository)
    facts: dict[str, Any] = {"lock_sha256": recorded, "here": here}
    if here is None:
        return Link("lock", "unknown", f"{recorded}: there is no lock in {places.repository} to compare with", facts)
    if here != recorded:
        return Link("lock", "changed", f"{recorded}: the lock here is another one, {here}", facts)
    return Link("lock", "ok", f"{recorded}, the same as here", facts)


def _contradictions(subject: Subject) -> Iterator[str]:
    """What registry and lunchbox say otherwise of the same thing."""
    manifest, tags = subject.manifest, subject.tags
    if manifest is None or not tags:
        return
    pairs = {
        "space": (tags.get("space_id"), manifest.space_id),
        "run": (subject.run.run_id if subject.run else None, manifest.run_id),
        "data md5": (tags.get("data_md5"), manifest.data.md5),
        "commit": (tags.get("git_commit"), manifest.git_commit),
        "lock": (tags.get("lock_sha256"), manifest.lock_sha256),
    }
    for name, (registry, box) in pairs.items():
        if registry and box and registry != box:
            yield f"{name}: the registry says {registry}, the lunchbox {box}"
