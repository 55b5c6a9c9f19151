"""Every refusal of the HTTP face: which fault is which status, kind and code of OpenAI's errors."""

from collections.abc import Sequence
from typing import Protocol

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from jaxsys.errors import RunError, UsageError
from jaxsys.serve.adapters import UnknownAdapter
from jaxsys.serve.engine import Overloaded
from jaxsys.serve.http.protocol import what_is_wrong
from jaxsys.serve.http.responses import NoSuchResponse
from jaxsys.serve.requests import ContextLengthExceeded, FieldRefused


class NotFinite(RunError):
    """The model computed NaN or infinity."""


class ModelNotFound(HTTPException):
    """Another model is asked for than is served."""

    def __init__(self, asked: str, served: Sequence[str]):
        said = ", ".join(repr(name) for name in served[:10])
        said += ", ..." if len(served) > 10 else ""
        super().__init__(404, f"model {asked[:200]!r} is not served; use {said}")


class Refuse(Protocol):
    """Makes an answer of 400 or above, and counts it."""

    def __call__(
        self,
        status: int,
        message: str,
        kind: str,
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> JSONResponse: ...


def refuse_all(app: fastapi.FastAPI, refuse: Refuse) -> None:
    """Has an app answer every fault with what it is."""

    @app.exception_handler(ContextLengthExceeded)
    async def refuse_length(request: fastapi.Request, error: ContextLengthExceeded) -> JSONResponse:
        path = request.url.path
        param = "messages" if path.startswith("/v1/chat") else "prompt"
        param = "input" if path.startswith(("/v1/responses", "/v1/embeddings")) else param
        code = "context_length_exceeded"
        return refuse(400, str(error), "invalid_request_error", param=param, code=code)

    @app.exception_handler(UnknownAdapter)
    async def refuse_adapter(request: fastapi.Request, error: UnknownAdapter) -> JSONResponse:
        code, kind = "model_not_found", "invalid_request_error"
        param = "lora_name" if request.url.path.endswith("lora_adapter") else "model"
        return refuse(404, str(error), kind, param=param, code=code)

    @app.exception_handler(FieldRefused)
    async def refuse_field(_: fastapi.Request, error: FieldRefused) -> JSONResponse:
        return refuse(400, str(error), "invalid_request_error", param=error.field)

    @app.exception_handler(UsageError)
    async def refuse_usage(_: fastapi.Request, error: UsageError) -> JSONResponse:
        return refuse(400, str(error), "invalid_request_error")

    @app.exception_handler(RecursionError)
    async def refuse_depth(_: fastapi.Request, error: RecursionError) -> JSONResponse:
        return refuse(400, "the body is nested too deep", "invalid_request_error")

    @app.exception_handler(Overloaded)
    async def refuse_load(_: fastapi.Request, error: Overloaded) -> JSONResponse:
        answer = refuse(429, str(error), "rate_limit_error", code="overloaded")
        answer.headers["Retry-After"] = str(error.retry_after_s)
        return answer

    @app.exception_handler(NotFinite)
    async def refuse_numbers(_: fastapi.Request, error: NotFinite) -> JSONResponse:
        return refuse(500, str(error), "server_error")

    @app.exception_handler(RunError)
    async def refuse_run(_: fastapi.Request, error: RunError) -> JSONResponse:
        return refuse(503, str(error), "server_error")

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        message, param = what_is_wrong(error.errors(), str(error.body))
        return refuse(400, message, "invalid_request_error", param=param)

    @app.exception_handler(NoSuchResponse)
    async def refuse_response(_: fastapi.Request, error: NoSuchResponse) -> JSONResponse:
        code = "not_found" if error.param is None else "previous_response_not_found"
        message, kind = str(error.detail), "invalid_request_error"
        return refuse(404, message, kind, param=error.param, code=code)

    @app.exception_handler(ModelNotFound)
    async def refuse_model(_: fastapi.Request, error: ModelNotFound) -> JSONResponse:
        message, code = str(error.detail), "model_not_found"
        return refuse(404, message, "invalid_request_error", param="model", code=code)

    @app.exception_handler(HTTPException)
    async def refuse_http(_: fastapi.Request, error: HTTPException) -> JSONResponse:
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        answer = refuse(error.status_code, str(error.detail), kind)
        answer.headers.update(error.headers or {})
        return answer
