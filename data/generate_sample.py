"""Write the shipped sample: made-up developer profiles and role briefs with graded relevance (SYNTHETIC).

    python3 generate_sample.py [FOLDER]      # default: the folder `sample` beside this file

Needs nothing but Python >= 3.11 and writes the same bytes everywhere: of `random`, only `Random.random()` is used, the
one method whose sequence Python promises to keep. The words are in vocabulary.toml; README.md explains the formula.

Profiles and briefs come in pools: every brief of a pool is judged against every profile of that pool, and no text
stands in two pools. A split by groups therefore has as many groups to choose from as there are pools.
"""

from __future__ import annotations

import csv
import random
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 20_261_123
POOLS = 33
PROFILES_A_POOL = 12
BRIEFS_A_POOL = 8
DOMAINS_A_POOL = 3
PLAIN_WORDS = 0.7  # how often a brief names trade and skills as profiles do

WEIGHTS = {"skills": 0.50, "domain": 0.30, "level": 0.15, "industry": 0.05}
LEVEL_FIT = (1.0, 0.6, 0.2, 0.0)  # by distance in steps of seniority
FAMILY_FIT = 0.4  # what a skill of the same family is worth
NOISE = 0.08  # half-width of the noise, as two judges would differ over somebody who fits
STEP = 0.05  # relevance is rounded to it


@dataclass(frozen=True)
class Profile:
    """A developer as the formula sees one, and the row that is written."""

    domain: str
    level: int
    industry: str
    skills: tuple[str, ...]
    row: tuple[str, ...]


@dataclass(frozen=True)
class Brief:
    """A role as the formula sees one, and the text that is written."""

    domain: str
    level: int
    industry: str
    skills: tuple[str, ...]
    text: str


WORDS = tomllib.loads(Path(__file__).with_name("vocabulary.toml").read_text(encoding="utf-8"))
DOMAINS = WORDS["domains"]
LEVELS = WORDS["levels"]
INDUSTRIES = WORDS["industries"]
SKILLS = {skill: words for domain in DOMAINS.values() for skill, words in domain["skills"].items()}
NEAR = {frozenset((one, other)): share for one in DOMAINS for other, share in DOMAINS[one]["near"].items()}


class Dice:
    """Choices made with `Random.random()` alone."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def pick(self, options: Sequence[str] | str) -> str:
        """One of `options`: a sequence, or a text with the alternatives separated by `|`."""
        choices = options.split("|") if isinstance(options, str) else options
        return choices[int(self.random() * len(choices))]

    def sample(self, options: Sequence[str], count: int) -> list[str]:
        """`count` different ones of `options`, in random order."""
        left = list(options)
        return [left.pop(int(self.random() * len(left))) for _ in range(count)]

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self.random() * (high - low + 1))

    def skills_of(self, domain: str, own: int, foreign: int) -> list[str]:
        """`own` skills of the domain and `foreign` ones of a neighbouring domain, the own ones first."""
        neighbours = [other for other in DOMAINS if frozenset((domain, other)) in NEAR]
        elsewhere = list(DOMAINS[self.pick(neighbours)]["skills"])
        return self.sample(list(DOMAINS[domain]["skills"]), own) + self.sample(elsewhere, foreign)


def capitalise(text: str) -> str:
    """Upper-case the first letter and leave the rest, unlike `str.capitalize`."""
    return text[:1].upper() + text[1:]


def make_profile(dice: Dice, number: int, domain: str) -> Profile:
    """Make up one developer of a domain."""
    level = dice.between(0, len(LEVELS) - 1)
    industry = dice.pick(list(INDUSTRIES))
    skills = dice.skills_of(domain, own=3, foreign=dice.between(0, 2))
    title = f"{dice.pick(LEVELS[level]['title'])} {dice.pick(DOMAINS[domain]['titles'])}".strip()
    summary = dice.pick(WORDS["profile_patterns"]).format(
        level=dice.pick(LEVELS[level]["profile"]),
        work=dice.pick(DOMAINS[domain]["work"]),
        industry=dice.pick(INDUSTRIES[industry][0]),
        extra=dice.pick(WORDS["extras"]),
    )
    words = ", ".join(dice.pick(SKILLS[skill][0]) for skill in dice.sample(skills, len(skills)))
    years = str(dice.between(*LEVELS[level]["years"]))
    row = (f"P{number:04d}", title, capitalise(summary), words, years, dice.pick(WORDS["cities"]))
    return Profile(domain, level, industry, tuple(skills), row)


def name_in_brief(dice: Dice, skill: str) -> str:
    """What a brief calls a skill: now and then as profiles do, otherwise in other words."""
    in_profiles, in_briefs, _ = SKILLS[skill]
    return dice.pick(in_profiles if dice.random() < PLAIN_WORDS else in_briefs)


def make_brief(dice: Dice, domain: str) -> Brief:
    """Make up one role of a domain."""
    level = dice.between(0, len(LEVELS) - 1)
    industry = dice.pick(list(INDUSTRIES))
    skills = dice.skills_of(domain, own=2, foreign=dice.between(0, 1))
    who = dice.pick(DOMAINS[domain]["titles"]) if dice.random() < PLAIN_WORDS else dice.pick(WORDS["people"])
    text = dice.pick(WORDS["brief_patterns"]).format(
        who=who,
        employer=dice.pick(INDUSTRIES[industry][1]),
        mission=dice.pick(DOMAINS[domain]["missions"]),
        skills=", ".join(name_in_brief(dice, skill) for skill in skills),
        level=dice.pick(LEVELS[level]["brief"]),
    )
    return Brief(domain, level, industry, tuple(skills), capitalise(text))


def cover(wanted: Sequence[str], skills: Sequence[str]) -> float:
    """Share of the wanted skills that are there; a skill of the same family counts for `FAMILY_FIT`."""
    families = {SKILLS[skill][2] for skill in skills}
    found = [1.0 if skill in skills else FAMILY_FIT if SKILLS[skill][2] in families else 0.0 for skill in wanted]
    return sum(found) / len(found)


def judge(dice: Dice, brief: Brief, profile: Profile) -> float:
    """Relevance of a profile for a brief, 0..1: the weighted sum that README.md explains, plus a little noise."""
    same = brief.domain == profile.domain
    domain = 1.0 if same else NEAR.get(frozenset((brief.domain, profile.domain)), 0.0)
    skills = cover(brief.skills, profile.skills)
    fit = max(domain, skills)  # seniority and industry help only who can do the work
    value = (
        WEIGHTS["skills"] * skills
        + WEIGHTS["domain"] * domain
        + WEIGHTS["level"] * fit * LEVEL_FIT[abs(brief.level - profile.level)]
        + WEIGHTS["industry"] * fit * (brief.industry == profile.industry)
        + NOISE * fit * (2 * dice.random() - 1)
    )
    return min(1.0, max(0.0, round(value / STEP) * STEP))


def make_sample(seed: int = SEED) -> tuple[list[Profile], list[tuple[str, str, float]]]:
    """All profiles, and all judgements as (brief text, profile id, relevance).

    Raises:
        ValueError: when two briefs or two profiles came out with the same words; another seed helps.
    """
    dice = Dice(seed)
    profiles: list[Profile] = []
    judgements: list[tuple[str, str, float]] = []
    briefs: list[Brief] = []
    for _ in range(POOLS):
        domains = dice.sample(list(DOMAINS), DOMAINS_A_POOL)
        pool = [make_profile(dice, len(profiles) + i + 1, domains[i % DOMAINS_A_POOL]) for i in range(PROFILES_A_POOL)]
        roles = [make_brief(dice, domains[i % DOMAINS_A_POOL]) for i in range(BRIEFS_A_POOL)]
        judgements += [(role.text, who.row[0], judge(dice, role, who)) for role in roles for who in pool]
        profiles += pool
        briefs += roles
    texts = [profile.row[1:] for profile in profiles] + [(brief.text,) for brief in briefs]
    if len(set(texts)) != len(texts):
        raise ValueError(f"seed {seed} makes two equal texts, which would tie two pools together: take another seed")
    return profiles, judgements


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a CSV file with the same bytes on every system."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main(folder: Path) -> None:
    """Write `profiles.csv` and `judgements.csv` into `folder`."""
    profiles, judgements = make_sample()
    folder.mkdir(parents=True, exist_ok=True)
    header = ("id", "title", "summary", "skills", "years", "location")
    write_table(folder / "profiles.csv", header, [profile.row for profile in profiles])
    rows = [(brief, profile_id, f"{relevance:.2f}") for brief, profile_id, relevance in judgements]
    write_table(folder / "judgements.csv", ("query", "profile_id", "relevance"), rows)
    print(f"{len(profiles)} profiles, {len(rows)} judgements -> {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "sample")
