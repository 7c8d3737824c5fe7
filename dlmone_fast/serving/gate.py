"""What a request passes before it is read: readiness, a full server, its size, its time."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlmone_fast.serving.front import Front
from dlmone_fast.serving.spec import PATH

_RETRY_SECONDS = "1"


class Gate:
    """ASGI middleware around POST /generate, and around the life of the HTTP process.

    Args:
        app: what it leads to.
        front: counts and limits.
    """

    def __init__(self, app: ASGIApp, front: Front) -> None:
        self.app, self.front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the process from its start to its end."""
        if scope["type"] == "lifespan":
            async with self.front.watching():
                await self.app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "POST":
            await self._counted(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "HEAD":
            # What GET answers, without its body.
            await self.app({**scope, "method": "GET"}, receive, _without_body(send))
        else:
            await self.app(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self.front.refusal() or self._too_large(scope)
            if refusal:
                await _refuse(*refusal)(scope, receive, noting)
            else:
                await self._admitted(scope, receive, noting)
        finally:
            self.front.metrics.answered(status, time.perf_counter() - started)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit, begun = self.front.options.timeout_s, False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        self.front.in_flight += 1
        try:
            async with asyncio.timeout(limit):
                await self.app(scope, self._measured(receive), noting)
        except TimeoutError:
            # An answer that has begun cannot become another; uvicorn closes the connection.
            if not begun:
                detail = f"not answered within {limit:g} s; try again later, or with fewer prompts"
                await _refuse(504, detail)(scope, receive, send)
        finally:
            self.front.in_flight -= 1

    def _too_large(self, scope: Scope) -> tuple[int, str] | None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        limit = self.front.options.max_body
        return self._oversized() if length.isdigit() and int(length) > limit else None

    def _measured(self, receive: Receive) -> Receive:
        """The body as it comes, refused as soon as it is too large: it may not say its length."""
        size = 0

        async def measured() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.front.options.max_body:
                status, detail = self._oversized()
                raise HTTPException(status, detail, {"Connection": "close"})
            return message

        return measured

    def _oversized(self) -> tuple[int, str]:
        limit = self.front.options.max_body
        return 413, f"body: expected at most {limit} bytes, got more; send fewer prompts a request"


def _without_body(send: Send) -> Send:
    async def sending(message: Message) -> None:
        await send({**message, "body": b""} if "body" in message else message)

    return sending


def _refuse(status: int, detail: str) -> JSONResponse:
    headers: dict[str, Any] = {}
    if status in (429, 503):
        headers["Retry-After"] = _RETRY_SECONDS
    if status == 413:
        # What is left of the body is not read.
        headers["Connection"] = "close"
    return JSONResponse({"detail": detail}, status, headers)
