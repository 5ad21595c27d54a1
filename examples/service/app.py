"""START HERE: the routes of the service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import generate_latest
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ernie_accel.batch import Progress, Result, Row
from ernie_accel.batch.engines import Engine
from ernie_accel.batch.watch.exposition import exposition
from ernie_accel.batch.watch.metrics import CONTENT_TYPE
from examples.service.answers import ApiError, EventStream, now, picture_fields, until_gone
from examples.service.gate import Gate, Metrics
from examples.service.schema import ImageRequest
from examples.service.settings import Settings
from examples.service.studio import Studio, load_engine

_FILES = ("image", "image[]", "mask")


class Service:
    """What the routes share.

    Attributes:
        settings: Its settings.
        studio: Makes the pictures; there from the start of the app to its end.
        stopping: Whether it is to stop: what is under way is finished, and nothing else is begun.
    """

    studio: Studio

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stopping = False


def create_app(settings: Settings, load: Callable[[Settings], Engine] = load_engine) -> FastAPI:
    """Return the app; the model is loaded as it starts, before it listens."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.studio = await asyncio.to_thread(lambda: Studio(load(settings), settings))
        yield
        service.stopping = True
        await asyncio.to_thread(service.studio.close)

    app = FastAPI(title="ernie_accel image service", lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    metrics = Metrics(lambda: service.studio.waiting)
    app.add_middleware(Gate, settings=settings, metrics=metrics, stopping=lambda: service.stopping)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return ApiError(error.status_code, what, headers=error.headers).response()  # Allow, of a 405

    @app.post("/v1/images/generations", openapi_extra=_documented("application/json"))
    async def generations(request: Request) -> Response:
        asked = ImageRequest.of(await _json(request), strict=True)
        return await _answer(service, request, asked, asked.rows(settings), "image_generation")

    @app.post("/v1/images/edits", openapi_extra=_documented("multipart/form-data"))
    async def edits(request: Request) -> Response:
        fields, image, mask = await _form(request)
        asked = ImageRequest.of(fields, strict=False)
        with ExitStack() as kept:
            first, second = await asyncio.to_thread(kept.enter_context, service.studio.uploaded(image, mask))
            rows = asked.rows(settings, image=first, mask=second)
            return await _answer(service, request, asked, rows, "image_edit", kept)

    @app.get("/v1/models")
    async def models() -> Response:
        model = {"id": settings.name, "object": "model", "created": 0, "owned_by": "ernie_accel"}
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/health")
    async def health() -> Response:
        status = "stopping" if service.stopping else "lost" if service.studio.lost else "ok"
        state = {"status": status, "model": settings.name, "waiting": service.studio.waiting}
        return JSONResponse(state, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def scrape() -> Response:
        state = service.studio.snapshot()
        return Response(generate_latest(metrics.registry) + exposition(state), media_type=CONTENT_TYPE)

    return app


async def _answer(
    service: Service,
    request: Request,
    asked: ImageRequest,
    rows: Sequence[Row],
    kind: str,
    files: ExitStack | None = None,
) -> Response:
    """Have the rows made, and return them at once or as they come."""
    studio, timeout_s = service.studio, service.settings.timeout_s
    if asked.stream:
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[tuple[int, Progress] | Future[Result]] = asyncio.Queue()

        def tell(item: tuple[int, Progress] | Future[Result]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(news.put_nowait, item)

        futures = studio.submit(rows, lambda index, progress: tell((index, progress)), files)
        for future in futures:
            future.add_done_callback(tell)
        events = _events(studio, asked, kind, futures, news)
        return EventStream(events, timeout_s, lambda: studio.give_up(futures))

    futures = studio.submit(rows, None, files)
    making = asyncio.gather(*(_picture(studio, asked, future) for future in futures))
    try:
        data = await until_gone(request.receive, making, timeout_s)
    finally:
        studio.give_up(futures)
    sizes = {picture.pop("size") for picture in data}
    answer = {"created": now(), "data": data, "size": sizes.pop(), "output_format": asked.output_format or "png"}
    return JSONResponse(answer | {"background": "opaque"})


async def _picture(studio: Studio, asked: ImageRequest, future: Future[Result]) -> dict[str, Any]:
    result, png = await studio.picture(future)
    output_format = asked.output_format or "png"
    return await asyncio.to_thread(picture_fields, png, result, output_format, asked.output_compression)


async def _events(
    studio: Studio,
    asked: ImageRequest,
    kind: str,
    futures: Sequence[Future[Result]],
    news: asyncio.Queue[tuple[int, Progress] | Future[Result]],
) -> AsyncGenerator[Mapping[str, object], None]:
    """Yield the steps as they are done, and each picture as it is made."""
    left = len(futures)
    while left:
        item = await news.get()
        if isinstance(item, tuple):
            index, progress = item
            yield {"type": f"{kind}.progress", "index": index, **vars(progress)}
            continue
        left -= 1
        fields = await _picture(studio, asked, item)
        settled = {"created_at": now(), "output_format": asked.output_format or "png", "background": "opaque"}
        yield {"type": f"{kind}.completed", "index": futures.index(item), **fields, **settled}


async def _json(request: Request) -> Mapping[str, object]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Send JSON, with 'Content-Type: application/json'.", None, "unsupported_media_type")
    try:
        fields = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ApiError(400, "The request is no JSON.", None, "invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The request is no JSON object.", None, "invalid_json")
    return fields


async def _form(request: Request) -> tuple[dict[str, object], bytes, bytes | None]:
    """Return a form's fields, its picture and its mask."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        message = "Send a form with the picture, as 'multipart/form-data'."
        raise ApiError(415, message, None, "unsupported_media_type")
    fields: dict[str, object] = {}
    files: dict[str, bytes] = {}
    try:
        form = await request.form(max_files=2, max_fields=40, max_part_size=2**18)
    except FormParserError:  # older releases of Starlette let it pass
        raise ApiError(400, "The request is no form.", None, "invalid_form") from None
    try:
        for name, value in form.multi_items():
            param = name.removesuffix("[]")
            if param in fields or param in files:
                raise ApiError(
                    400, f"'{param[:60]}' is given twice; this service takes one.", param[:60], "invalid_value"
                )
            if isinstance(value, UploadFile) != (name in _FILES):
                expected = "a file" if name in _FILES else "a text"
                raise ApiError(400, f"'{name[:60]}' must be {expected}.", name[:60], "invalid_value")
            if isinstance(value, UploadFile):
                files[param] = await value.read()
            else:
                fields[name] = _nested(value) if name == "extra_params" else value
    finally:
        await form.close()
    if "image" not in files:
        raise ApiError(400, "Missing required parameter: 'image'.", "image", "missing_required_parameter")
    return fields, files["image"], files.get("mask")


def _nested(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(400, "'extra_params' is no JSON.", "extra_params", "invalid_json") from None


def _documented(media_type: str) -> dict[str, object]:
    """Return what /docs says of a request."""
    schema = ImageRequest.model_json_schema()
    if media_type != "application/json":
        file = {"type": "string", "format": "binary"}
        schema = {**schema, "properties": {"image": file, "mask": file, **schema["properties"]}}
        schema["required"] = ["image", *schema["required"]]
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}
