"""Data at a git revision, from a real git and DVC repository with a folder as remote."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.core.dataset import prepare_dataset, read_data
from flows.core.files import md5_of
from flows.core.revisions import NotTrackedError, committed_at, read_at_revision, resolve_revision
from flows.errors import DataError
from flows.params import DataParams

DVC = (sys.executable, "-m", "dvc")


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def pairs_csv(word: str) -> str:
    return "text_a,text_b,score\n" + "".join(f"{word} {i},other {word} {i},{i % 5 / 4}\n" for i in range(120))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/cached.csv` in DVC's cache, `data/made.csv` (`cache: false`) in git; other content at v1 than at v2."""
    root = tmp_path_factory.mktemp("repository")
    remote = tmp_path_factory.mktemp("remote")
    (root / "data").mkdir()
    run(root, "git", "init", "--quiet", "--initial-branch", "main")
    run(root, "git", "config", "user.name", "Test")
    run(root, "git", "config", "user.email", "test@example.com")
    run(root, *DVC, "init", "--quiet")
    run(root, *DVC, "remote", "add", "--default", "store", str(remote))
    stage = {"cmd": "python make.py", "outs": [{"made.csv": {"cache": False}}]}
    (root / "data" / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"make": stage}}))
    for tag, word in (("v1", "old"), ("v2", "new")):
        for name in ("cached.csv", "made.csv"):
            (root / "data" / name).write_text(pairs_csv(word))
        run(root, *DVC, "add", "--quiet", "data/cached.csv")
        run(root, "git", "add", "--all")
        run(root, "git", "commit", "--quiet", "--message", tag)
        run(root, "git", "tag", tag)
        run(root, *DVC, "push", "--quiet")
    return root


@pytest.mark.parametrize("name", ["data/cached.csv", "data/made.csv"])
def test_a_file_is_read_as_it_was(repository: Path, name: str) -> None:
    for revision, word in (("v1", "old"), ("main~1", "old"), ("v2", "new"), ("HEAD", "new")):
        assert read_at_revision(Path(name), revision, root=repository) == pairs_csv(word).encode()
        assert read_at_revision(repository / name, revision, root=Path("/")) == pairs_csv(word).encode()
    assert (repository / name).read_text() == pairs_csv("new"), "the working tree stays as it is"


def test_content_comes_from_the_remote_when_the_cache_lacks_it(repository: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(repository), str(clone))
    assert not (clone / "data" / "cached.csv").exists()
    assert read_at_revision(Path("data/cached.csv"), "v1", root=clone) == pairs_csv("old").encode()


def test_content_that_nobody_holds_is_refused(repository: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(repository), str(clone))
    run(clone, *DVC, "remote", "modify", "--local", "store", "url", str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"neither the DVC cache nor a DVC remote holds its content.*dvc push"):
        read_at_revision(Path("data/cached.csv"), "v1", root=clone)


@pytest.mark.parametrize(
    ("name", "revision", "fragment"),
    [
        ("data/cached.csv", "v9", "there is no revision 'v9'"),
        ("data/cached.csv", "", "data revision is empty"),
        ("data/none.csv", "v1", "data/none.csv is not tracked at revision 'v1'"),
        ("data", "v1", "is a folder at revision 'v1'"),
        ("../outside.csv", "v1", "is not in a DVC repository"),
    ],
)
def test_what_has_no_such_revision_is_refused(repository: Path, name: str, revision: str, fragment: str) -> None:
    with pytest.raises(DataError, match=fragment) as refusal:
        read_at_revision(Path(name), revision, root=repository)
    assert "\n" not in str(refusal.value)
    assert isinstance(refusal.value, NotTrackedError) == ("not tracked" in fragment)


def test_a_short_name_resolves_to_the_commit(repository: Path) -> None:
    commit = run(repository, "git", "rev-parse", "v1^{commit}")
    for name in ("v1", "HEAD~1", commit[:8], commit):
        assert resolve_revision(Path("data/cached.csv"), name, root=repository) == commit


def test_our_md5_is_the_one_of_dvc(repository: Path) -> None:
    pointer = yaml.safe_load((repository / "data" / "cached.csv.dvc").read_text())
    assert md5_of((repository / "data" / "cached.csv").read_bytes()) == pointer["outs"][0]["md5"]


def test_a_dataset_carries_path_md5_and_commit(repository: Path) -> None:
    params = DataParams(pairs="data/cached.csv", test="data/made.csv", data_rev="v1", max_shared_pairs=1)
    raw = read_data(params.model_copy(update={"test": None}), root=repository)
    dataset = prepare_dataset(raw, params)
    assert dataset.train.pairs["text_a"].str.startswith("old").all()
    assert dataset.version.path == "data/cached.csv"
    assert dataset.version.md5 == md5_of(pairs_csv("old").encode())
    assert dataset.version.revision == run(repository, "git", "rev-parse", "v1^{commit}")
    assert read_data(params.model_copy(update={"data_rev": None}), root=repository).version.revision is None


def test_files_of_two_repositories_have_no_common_revision(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    run(other, "git", "commit", "--quiet", "--allow-empty", "--message", "three")
    params = DataParams(pairs="data/cached.csv", test=str(other / "data" / "made.csv"), data_rev="HEAD")
    with pytest.raises(DataError, match="revision 'HEAD' means 2 commits"):
        read_data(params, root=repository)


def test_a_retrieval_folder_at_a_revision_may_lack_dev_and_test(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    (other / "beir" / "qrels").mkdir(parents=True)
    (other / "beir" / "corpus.jsonl").write_text('{"_id": "d", "text": "t"}\n')
    (other / "beir" / "queries.jsonl").write_text('{"_id": "q", "text": "t"}\n')
    (other / "beir" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    run(other, "git", "add", "--all")
    run(other, "git", "commit", "--quiet", "--message", "beir")
    raw = read_data(DataParams(retrieval="beir", data_rev="HEAD"), root=other)
    assert raw.retrieval is not None
    assert list(raw.retrieval.qrels) == ["train"]
    with pytest.raises(
        DataError, match=r"beir/corpus.jsonl is not tracked at revision 'v1'.*retrieval data is a folder"
    ):
        read_data(DataParams(retrieval="beir", data_rev="v1"), root=other)


def test_a_file_is_as_old_as_the_commit_that_last_changed_it(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    (other / "README.md").write_text("another file")
    run(other, "git", "add", "--all")
    run(other, "git", "commit", "--quiet", "--message", "words only", "--date", "2030-01-01T00:00:00Z")
    for tag in ("v1", "v2"):
        expected = int(run(other, "git", "log", "-1", "--format=%ct", tag))
        for name in ("data/cached.csv", "data/made.csv"):
            found = committed_at(Path(name), tag, root=other)
            assert found is not None
            assert found.timestamp() == expected
    latest = int(run(other, "git", "log", "-1", "--format=%ct", "v2"))
    raw = read_data(DataParams(pairs="data/cached.csv", data_rev="main"), root=other)
    assert raw.modified_at is not None
    assert raw.modified_at.timestamp() == latest
    made_by_a_stage = committed_at(Path("data/unknown.csv"), "main", root=other)  # then it is the revision's own time
    assert made_by_a_stage is not None
    assert made_by_a_stage.timestamp() == int(run(other, "git", "log", "-1", "--format=%ct", "main"))
    with pytest.raises(DataError, match="no revision"):
        committed_at(Path("data/cached.csv"), "v9", root=other)
