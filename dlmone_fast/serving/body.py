"""A request's body as JSON; where it is none, a reason that names the header or the field."""

from __future__ import annotations

import email.message
import json
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import HTTPException, Request
from fastapi.routing import APIRoute

# More digits than any field has; Python refuses to read some thousand of them.
_MOST_DIGITS = 1000
_AS_JSON = "send JSON in UTF-8 with Content-Type: application/json"
_UTF_8 = ("utf-8", "utf8", "us-ascii", "ascii")


class JsonRoute(APIRoute):
    """A route whose requests are read here: FastAPI says no more than that there was an error."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """FastAPI's handler, given a request that reads itself."""
        answer = super().get_route_handler()

        async def handler(request: Request) -> Any:
            return await answer(_JsonRequest(request.scope, request.receive))

        return handler


class _JsonRequest(Request):
    async def body(self) -> bytes:
        content = await super().body()
        if content:
            _check_headers(self)
        return content

    async def json(self) -> Any:
        return read_json(await self.body())


def read_json(content: bytes) -> Any:
    """The value of a body.

    Raises:
        HTTPException: 400; it is no UTF-8, nested too deeply, or has a number that nothing reads.
        json.JSONDecodeError: it is no JSON otherwise.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_int=_whole)
    except UnicodeDecodeError as error:
        raise _bad(f"body: not UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise _bad("body: nested too deeply; expected an object of fields") from error
    for field, number in _too_long(value):
        raise _bad(f"{field}: expected a number that a field can have, got {number!r}")
    return value


class _LongNumber:
    def __init__(self, digits: int) -> None:
        self.digits = digits

    def __repr__(self) -> str:
        return f"a number of {self.digits:,} digits"


def _whole(text: str) -> int | _LongNumber:
    digits = len(text.removeprefix("-"))
    return _LongNumber(digits) if digits > _MOST_DIGITS else int(text)


def _too_long(value: Any) -> Iterator[tuple[str, _LongNumber]]:
    """Fields with numbers that are too long, of the fields' own values and of lists there."""
    for field, given in value.items() if isinstance(value, dict) else [("body", value)]:
        if isinstance(given, _LongNumber):
            yield printable(field), given
        elif isinstance(given, list):
            for place, part in enumerate(given):
                if isinstance(part, _LongNumber):
                    yield f"{printable(field)}[{place}]", part


def printable(name: str, most: int = 80) -> str:
    """A name from a request for a message: no longer than that, and text that UTF-8 can hold."""
    cut = name if len(name) <= most else f"{name[:most]}…"
    return cut.encode("utf-8", "backslashreplace").decode()


def _check_headers(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise _bad(
            f"Content-Encoding: expected none, for this server unpacks nothing, got {encoding!r}"
        )
    given = request.headers.get("content-type")
    if not given:
        raise _bad("Content-Type: expected application/json, and the header is missing")
    header = email.message.Message()
    header["content-type"] = given
    kind, subtype = header.get_content_maintype(), header.get_content_subtype()
    # As FastAPI tells what is JSON.
    if kind != "application" or not (subtype == "json" or subtype.endswith("+json")):
        raise _bad(f"Content-Type: expected application/json, got {given!r}")
    charset = header.get_content_charset("utf-8")
    if charset not in _UTF_8:
        raise _bad(f"Content-Type: expected the charset utf-8, got {charset!r}")


def _bad(what: str) -> HTTPException:
    return HTTPException(400, f"{what}; {_AS_JSON}")
