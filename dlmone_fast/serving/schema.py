"""Requests and answers as JSON: their bounds, and what OpenAPI says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    create_model,
    model_validator,
)

from dlmone_fast.checks import is_whole
from dlmone_fast.config.section import shown
from dlmone_fast.serving.body import printable
from dlmone_fast.serving.options import ServeOptions

# Those of dlmone_fast.runtime.options, which would load torch.
MAX_SEED = (1 << 64) - 1
_MAX_STEPS = 100_000
_MAX_TEMPERATURE = 10.0
_SEED = {"type": "integer", "minimum": 0, "maximum": MAX_SEED}
_NEXT = "correct the request; GET /docs describes it"


class GenerateResponse(BaseModel):
    """The answer to POST /generate."""

    texts: list[str] | list[list[str]] = Field(
        description="One text a prompt, in order; where several candidates were asked for and "
        '`select` is "none", a list of them a prompt.',
        examples=[["the artist paints the gate"]],
    )


class ErrorResponse(BaseModel):
    """Why there is no answer."""

    detail: str = Field(description="What is wrong, where, and the way out.")


def request_model(options: ServeOptions, own_steps: Callable[[], int]) -> type[BaseModel]:
    """The body of POST /generate, within the bounds of this server.

    Args:
        options: the bounds.
        own_steps: the model's own steps, asked for with each request: the model may come later.
    """
    fields: dict[str, Any] = {
        "prompts": (_prompts(options), Field(description="A source text, or a list of them.")),
        "seed": (
            Annotated[Any, PlainValidator(_seed), _schema_of_seed()],
            Field(
                0,
                description="One for all prompts, a list with one a prompt, or null: fresh ones.",
            ),
        ),
        "steps": (
            int | None,
            Field(None, ge=1, le=_MAX_STEPS, description="Network calls; null: the model's own."),
        ),
        "temperature": (
            float | None,
            Field(
                None,
                ge=0,
                le=_MAX_TEMPERATURE,
                allow_inf_nan=False,
                description="Factor of all noise: below 1 texts are likelier and less diverse; "
                "null: the model's own.",
            ),
        ),
        "num_candidates": (
            int,
            Field(1, ge=1, le=options.max_candidates, description="Candidates a prompt."),
        ),
        "select": (
            Literal["none", "mbr"],
            Field("none", description='"mbr": the candidate that agrees most with the others.'),
        ),
        "on_overflow": (
            Literal["error", "truncate"],
            Field("error", description="What becomes of prompts that are too long for the model."),
        ),
    }
    consistent: Any = model_validator(mode="after")(_consistent(options, own_steps))
    model: type[BaseModel] = create_model(
        "GenerateRequest",
        __config__=ConfigDict(strict=True, extra="forbid"),
        __doc__="Prompts, and how to answer them: arguments of `Generator.generate`.",
        __validators__={"consistent": consistent},
        **fields,
    )
    return model


def reason(errors: Sequence[Any]) -> str:
    """pydantic's errors as one message: where, what was expected and what came, the way out."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"body: not JSON ({first['ctx']['error']}); {_NEXT}"
    where = "".join(
        f"[{part}]" if isinstance(part, int) else printable(str(part)) for part in first["loc"][1:]
    )
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        # One of ours, which says where and what came.
        return f"{said}{more}; {_NEXT}"
    got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
    return f"{where or 'body'}: {said}{got}{more}; {_NEXT}"


def _prompts(options: ServeOptions) -> Any:
    text = {"type": "string", "maxLength": options.max_prompt_chars}
    several = {"type": "array", "items": text, "maxItems": options.max_prompts}
    # A list alone, so that an error tells of its place there and not of both kinds.
    return Annotated[
        list[Annotated[str, Field(max_length=options.max_prompt_chars)]],
        Field(max_length=options.max_prompts),
        BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
        WithJsonSchema({"anyOf": [text, several], "examples": [["the painter sells the gate"]]}),
    ]


def _schema_of_seed() -> WithJsonSchema:
    several = {"type": "array", "items": _SEED}
    return WithJsonSchema({"anyOf": [_SEED, several, {"type": "null"}], "examples": [7]})


def _seed(given: Any) -> int | list[int] | None:
    if given is None:
        return None
    if isinstance(given, list):
        return [_whole(f"seed[{i}]", value) for i, value in enumerate(given)]
    return _whole("seed", given)


def _whole(name: str, value: Any) -> int:
    if not is_whole(value, 0, MAX_SEED):
        raise ValueError(f"{name} must be a whole number from 0 to {MAX_SEED}, got {shown(value)}")
    return value


def _consistent(options: ServeOptions, own_steps: Callable[[], int]) -> Callable[[Any], Any]:
    def check(request: Any) -> Any:
        prompts, seed = len(request.prompts), request.seed
        if isinstance(seed, list) and len(seed) != prompts:
            raise ValueError(f"seed holds {len(seed)} seeds, expected one a prompt ({prompts})")
        if request.select == "mbr" and request.num_candidates < 2:
            raise ValueError(
                'select "mbr" needs candidates to choose from, expected num_candidates of 2 or '
                f"more, got {request.num_candidates}"
            )
        steps = request.steps or own_steps()
        rows = prompts * request.num_candidates * steps
        if rows > options.max_rows:
            own = steps > 1 and not request.steps
            whose = f" (with the model's own {steps} steps)" if own else ""
            raise ValueError(
                f"prompts × num_candidates × steps is {rows}{whose}, expected at most "
                f"{options.max_rows}, the server's --max-rows"
            )
        return request

    return check
