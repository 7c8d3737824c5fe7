"""Measured sections of hand-written pages, between marks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def replace_section(page: Path, name: str, section: str) -> None:
    """Put a section between a page's marks `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    begin, end = (f"<!-- {name}: {mark} -->" for mark in ("begin", "end"))
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{section}\n{end}{after}", encoding="utf-8")


def where_measured(environment: Mapping[str, Any]) -> str:
    """Date, machine, versions and commit of a measurement, in one sentence."""
    changes = " with uncommitted changes" if environment["uncommitted_changes"] else ""
    return (
        f"{environment['date'][:10]}, {environment['cores']} cores of {environment['cpu']}, Python "
        f"{environment['python']}, torch {environment['torch']}, commit "
        f"{(environment['commit'] or 'unknown')[:10]}{changes}."
    )
