"""The page's server as a FastAPI application: routes, limits of a request, errors in one line.

FastAPI is optional: `pip install ".[serve]"`.
"""

import functools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pipeline.serve.service import TOO_LARGE, Refusal, Service

STATIC = Path(__file__).parent / "static"


def create_app(service: Service) -> Any:
    """The application, which `pipeline.serve.guard.Guard` has yet to wrap.

    Raises:
        ValueError: FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI, Request, Response
        from fastapi.concurrency import run_in_threadpool
        from fastapi.exceptions import RequestValidationError
        from fastapi.staticfiles import StaticFiles
        from starlette.exceptions import HTTPException
    except ImportError:
        raise ValueError("the page needs FastAPI: pip install fastapi uvicorn") from None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.worker.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service

    def route(method: str, path: str, answer: Callable) -> None:
        """Has a method of the service answer, by JSON or, where it gives bytes, a JPEG."""

        @functools.wraps(answer)
        def respond(*args: Any, **kwargs: Any) -> Response:
            content = answer(*args, **kwargs)
            if isinstance(content, bytes):
                return Response(content, media_type="image/jpeg")
            return as_json(content)

        app.add_api_route(path, respond, methods=[method], response_model=None)

    def as_json(content: Any, status: int = 200) -> Response:
        body = json.dumps(content, separators=(",", ":"), allow_nan=False)
        return Response(body, status, media_type="application/json")

    async def read_body(request: Request) -> bytes:
        """The body, as far as it is not too large."""
        too_large = Refusal(TOO_LARGE, f"larger than {service.max_bytes:,} bytes (--max-bytes)")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > service.max_bytes:
            raise too_large
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > service.max_bytes:
                raise too_large
        return bytes(body)

    for error, describe in (
        (Refusal, lambda error: (error.status, str(error))),
        (ValueError, lambda error: (422, str(error))),
        (HTTPException, lambda error: (error.status_code, error.detail)),
        (RequestValidationError, lambda error: (422, _describe_argument(error.errors()[0]))),
    ):

        def handle(_: Request, error: Exception, describe: Callable = describe) -> Response:
            status, message = describe(error)
            return as_json({"error": " ".join(message.split())}, status)

        app.add_exception_handler(error, handle)

    route("GET", "/api/settings", service.settings)
    route("GET", "/api/files", service.list_files)
    route("GET", "/api/files/thumbnail", service.thumbnail)
    route("POST", "/api/files/open", service.open_file)
    route("GET", "/api/images/{image_id}", service.status)
    route("GET", "/api/images/{image_id}/picture", service.picture)
    route("GET", "/api/images/{image_id}/masks", service.masks)
    route("GET", "/api/images/{image_id}/proposals", service.proposals)
    route("GET", "/api/images/{image_id}/distinct", service.distinct)
    route("POST", "/api/images/{image_id}/detections", service.detect)
    route("GET", "/api/images/{image_id}/detections", service.detections)

    @app.post("/api/images")
    async def open_upload(request: Request, name: str = "image") -> Response:
        data = await read_body(request)
        return as_json(await run_in_threadpool(service.open_upload, data, name))

    @app.post("/api/downloads/{format}")
    async def download(request: Request, format: str) -> Response:
        body = await read_body(request)
        data, name = await run_in_threadpool(service.download, body, format)
        return Response(data, headers={"Content-Disposition": f'attachment; filename="{name}"'})

    app.mount("/", StaticFiles(directory=STATIC, html=True))
    return app


def _describe_argument(problem: dict) -> str:
    """A missing or malformed argument of a request."""
    return f"{problem['loc'][-1]}: {problem['msg']}"
