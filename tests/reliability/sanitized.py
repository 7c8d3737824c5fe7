"""What `.ci/sanitize` leaves behind: a build with sanitizers, and how its tests ended.

`python sanitized.py FOLDER` reads the tests' tests.xml in a folder and writes report.json beside.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitize"
LIBRARIES = "lib/dlmone_fast/_C*.so"


def sources_hash() -> str:
    """Of all that the library is built from."""
    found = hashlib.sha256()
    for path in sorted([ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*")]):
        if path.is_file():
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def library_hash(folder: Path) -> str:
    """Of the one library in the folder."""
    (library,) = folder.glob(LIBRARIES)
    return hashlib.sha256(library.read_bytes()).hexdigest()


def report(folder: Path) -> dict[str, object]:
    """Counts of the tests, and what they ran on. The first report of a sanitizer ends them all."""
    suite = ElementTree.parse(folder / "tests.xml").getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "sources": sources_hash(), "library": library_hash(folder)}


def read(folder: Path = FOLDER) -> dict[str, int]:
    """The counts, if they are of the present sources and of the library that is there."""
    again = "run .ci/sanitize again"
    path = folder / "report.json"
    assert path.exists(), f"{path} is not there; {again}"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found.pop("sources") == sources_hash(), f"{path} is of other sources; {again}"
    assert found.pop("library") == library_hash(folder), f"{path} is of another build; {again}"
    return dict(found)


if __name__ == "__main__":
    into = Path(sys.argv[1])
    (into / "report.json").write_text(json.dumps(report(into)) + "\n", encoding="utf-8")
