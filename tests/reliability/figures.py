"""What a test of the campaign says that it has measured."""

from __future__ import annotations

from collections.abc import Callable

Figure = Callable[[str, str, str, str], None]
"""Takes number, subject, target and what was measured."""
