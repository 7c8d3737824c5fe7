"""From files of sentence pairs to batches of ids: rows, layout, token cache, batches.

Only the layout is exported here; `dlmone_fast.data.batches` imports torch and is named by those
who need it.
"""

from __future__ import annotations

from dlmone_fast.data.layouts import layout, layout_source

__all__ = ["layout", "layout_source"]
