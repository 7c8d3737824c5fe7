"""The routes, as OpenAPI describes them."""

# Without postponed annotations: FastAPI reads the request's model, which options make, from them.

from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

import dlmone_fast
from dlmone_fast.serving.body import JsonRoute
from dlmone_fast.serving.front import Front
from dlmone_fast.serving.schema import ErrorResponse, GenerateResponse, reason, request_model
from dlmone_fast.serving.spec import PATH

_ABOUT = """One-step text generation. Prompts of different requests share network calls; a text
depends on its prompt, seed and settings alone, and is the one that `generate` of the library gives.
"""
_STATUSES = {
    400: "The body is not JSON in UTF-8, or a header says that it is something else.",
    413: "The body is larger than the server accepts.",
    422: "A value is out of its bounds, or the model cannot read a prompt.",
    429: "As many requests are under way as the server accepts.",
    500: "The model failed; the server's log says why.",
    503: "No worker process is ready, or the one that had the request ended.",
    504: "The time of the request is over.",
}


def add_routes(app: FastAPI, front: Front) -> None:
    """Add what LitServe does not have, and describe it."""
    app.title, app.version = "dlmone_fast", dlmone_fast.__version__
    app.description = _ABOUT
    body = request_model(front.options, lambda: front.workers.own_steps)

    async def generate(request: body) -> JSONResponse:  # type: ignore[valid-type]
        """Generate a text for each prompt."""
        answer = await front.ask(request.model_dump())  # type: ignore[attr-defined]
        if answer["status"] != 200:
            raise HTTPException(answer["status"], answer["detail"], _headers(answer["status"]))
        return JSONResponse({"texts": answer["texts"]})

    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(front.metrics.text(), media_type="text/plain; version=0.0.4")

    app.router.add_api_route(
        PATH, generate, methods=["POST"], response_model=GenerateResponse,
        route_class_override=JsonRoute,
        responses={s: {"model": ErrorResponse, "description": d} for s, d in _STATUSES.items()},
    )  # fmt: skip
    app.add_api_route("/metrics", metrics, response_class=Response)
    app.add_exception_handler(RequestValidationError, _unprocessable)


async def _unprocessable(_: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": reason(error.errors())}, 422)


def _headers(status: int) -> dict[str, str] | None:
    return {"Retry-After": "1"} if status == 503 else None
