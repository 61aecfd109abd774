"""README and docs cannot rot: what they link to exists, what they call exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from flows import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_shown_exists_with_its_options(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    helps: dict[str, str] = {}
    for line in re.findall(r"(?:^|`|bin/)ekiben ([a-z][^`\n#]*)", page.read_text(encoding="utf-8"), re.MULTILINE):
        command = line.split()[0]
        if command not in helps:
            monkeypatch.setattr(sys, "argv", ["ekiben", command, "--help"])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == 0, f"{page.name}: ekiben {line}"
            helps[command] = capsys.readouterr().out
        for option in re.findall(r"(--[a-z-]+)", line):
            assert option in helps[command], f"{page.name}: ekiben {line}"


def test_the_readme_holds_no_placeholder() -> None:
    assert re.findall(r"STS_|TODO|XXX|\b0{8}\b|<[a-z ]+>", (ROOT / "README.md").read_text(encoding="utf-8")) == []


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES[1:] if not re.search(rf"\]\(docs/{re.escape(page.name)}[)#]", readme)]
    assert missing == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_make_target_that_is_shown_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)(?:UV_TORCH_BACKEND=cpu )?make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = [*(ROOT / "flows").rglob("*.py"), *(ROOT / "bentos").glob("*.py")]
    missing = [str(path.relative_to(ROOT)) for path in modules if path.name != "__init__.py" and path.name not in page]
    assert missing == []


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    assert "bash .ci/run" in commands
