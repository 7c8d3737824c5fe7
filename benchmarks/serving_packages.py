"""What a server brings along: packages and bytes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

_REQUIREMENTS = {"litserve": "litserve", "ray": "ray[serve]"}


def installed(server: str) -> dict[str, float]:
    """How many packages are installed for a server, itself included, and their MB on disk."""
    found: dict[str, float] = {}
    _walk(Requirement(_REQUIREMENTS[server]), found)
    return {"packages": len(found), "megabytes": sum(found.values()) / 1e6}


def _walk(wanted: Requirement, found: dict[str, float]) -> None:
    name = wanted.name.lower().replace("_", "-")
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return
    if name not in found:
        files = package.files or []
        found[name] = sum(file.size or 0 for file in files)
    elif not wanted.extras:
        return
    for text in package.requires or []:
        needed = Requirement(text)
        extras = wanted.extras or {""}
        if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
            known = needed.name.lower().replace("_", "-") in found
            if not known or needed.extras:
                _walk(needed, found)
