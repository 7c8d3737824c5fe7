"""Tests of optional libraries."""

from __future__ import annotations

import importlib.util

import pytest


def skip_without(library: str) -> None:
    """Skip where a library is not installed, without importing it as pytest's importorskip does:
    OpenVINO and nncf would report that to their makers, and Ray opens a socket."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed", allow_module_level=True)
