"""The command `python -m dlmone_fast.serve`: a model behind HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from dlmone_fast.cli import parse, run_command
from dlmone_fast.serving.options import ServeOptions

DESCRIPTION = """Serve a model over HTTP with LitServe (pip install 'dlmone_fast[serve]').

POST /generate answers prompts, which share network calls with those of other requests; steps and
temperature are fields of a request (default: the model's own), beside seed, num_candidates, select
and on_overflow. GET /health tells whether the model answers, /metrics speaks Prometheus, /docs and
/openapi.json describe it all. SIGTERM or Ctrl-C: requests that were accepted are answered, then it
ends. Exit codes: 0 stopped, 2 usage, 4 model files, 7 one of its processes ended by itself.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code or raises a `DlmOneError` that carries it."""
    options = parse(
        ServeOptions, prog="python -m dlmone_fast.serve", description=DESCRIPTION, args=argv
    )
    options.check()
    from dlmone_fast.serving.server import serve

    serve(options)
    return 0


if __name__ == "__main__":
    run_command(main)
