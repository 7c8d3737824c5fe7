"""The type of an option that may be given several times.

tyro takes a bare tuple's entries as text too, and checks its default without typeguard, whose
import is a quarter of what `--help` takes.
"""

from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    Strings = tuple[str, ...]
else:
    Strings = Annotated[tuple, tyro.conf.UseAppendAction]
