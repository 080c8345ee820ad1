"""The models, their state and their tokens: /v1/models, /health, /metrics, /v1/tokenize, /v1/detokenize."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from g3n_mlx.installation import version
from g3n_mlx.media.video import reads_video
from g3n_mlx.server.documents import opened_turns
from g3n_mlx.server.engine import Engine, PlaceOf
from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.scheduler import Served
from g3n_mlx.server.schemas.base import now
from g3n_mlx.server.schemas.models import (
    DetokenizeRequest,
    DetokenizeResponse,
    ModelList,
    ServedModel,
    TokenizeRequest,
    TokenizeResponse,
)

# What clients of other local servers send when there is but one model: LM Studio's, mistral.rs's, and none at all.
ALIASES = ("default", "ignore", "")

# The model without a slice, where slices have names too.
WHOLE = "whole"
SLICE_HEADER = "x-g3n-slice"

router = APIRouter()


class ModelTable:
    """The ids that requests may name: the loaded model's, those of its slices, and those of its adapters."""

    def __init__(
        self,
        name: str,
        slice_name: str | None,
        slices: Sequence[str] = (),
        adapters: Sequence[str] = (),
        *,
        other_names: Sequence[str] = (),
        any_name: bool = False,
    ) -> None:
        """name: as served. slice_name: of the slice that was taken at load, None for the whole model.

        slices: short names of what is offered beside it. adapters: their names, which are ids.
        other_names: of the served model. any_name: it answers to every other name as well.
        """
        self.created = now()
        self._name = name
        self.loaded = slice_name or WHOLE
        self._slices: dict[str, str | None] = {}  # by id; None is the model as it was loaded
        if slice_name is not None or slices:
            self._slices[f"{name}:{self.loaded}"] = None
        self._slices |= {f"{name}:{short_name}": short_name for short_name in slices}
        self._adapters = adapters
        self._other_names, self._any_name = other_names, any_name

    @property
    def ids(self) -> list[str]:
        """What requests may name; the first is what they get that name nothing."""
        return [self._name, *self._other_names, *self._slices, *self._adapters]

    def find(self, name: str) -> Served:
        """What serves a request that names a model; raises ApiError 404 with the ids there are.

        The name alone leaves the slice open; a name with a slice is served by that one whatever happens.
        """
        if name not in self.ids:
            name = name.removesuffix(":latest")  # Ollama's clients write it behind a name without a tag
        if name in ALIASES:
            return Served(self._name, is_open=True)
        if name == self._name or name in self._other_names:
            return Served(name, is_open=True)
        if name in self._adapters:
            return Served(name, name)
        if name not in self._slices and self._any_name and name.isprintable():  # no lone surrogate: it is sent back
            return Served(name, is_open=True)
        if name not in self._slices:
            known = ", ".join(map(repr, self.ids))
            raise ApiError(
                404, f"the model {name!r:.200} does not exist; there are {known}", param="model", code="model_not_found"
            )
        return Served(name, self._slices[name])

    def headers(self, served: Served) -> dict[str, str]:
        """What a response says of the slice that made it."""
        chosen = None if served.slice in self._adapters else served.slice
        return {SLICE_HEADER: chosen or self.loaded} if self._slices else {}


@router.get("/v1/models")
@router.get("/v1/models/", include_in_schema=False)
async def list_models(request: Request) -> ModelList:
    """The ids that requests may name."""
    table: ModelTable = request.app.state.models
    return ModelList(data=[_described(request, name) for name in table.ids])


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> ServedModel:
    """One of the ids, or a 404."""
    table: ModelTable = request.app.state.models
    return _described(request, table.find(name).model_id)


@router.get("/props")
async def props(request: Request) -> dict[str, Any]:
    """What the server runs, by llama-server's names, and its slices and limits."""
    engine: Engine = request.app.state.engine
    table: ModelTable = request.app.state.models
    model, limits = engine.model, engine.limits
    context_tokens, sees = model.config.text.max_position_embeddings, model.config.vision is not None
    return {
        "default_generation_settings": {"n_ctx": context_tokens, "params": dict(model.sampling_defaults)},
        "total_slots": limits.parallel,
        "model_alias": table.ids[0],
        "modalities": {"vision": sees, "audio": model.config.audio is not None, "video": sees and reads_video()},
        "build_info": f"g3n_mlx {version()}, {model.backend} on {model.device}",
        "model_ids": table.ids,
        "slice": table.loaded,
        "limits": {
            "max_queue": limits.max_queue,
            "request_timeout_s": limits.request_timeout_s,
            "max_media_bytes": limits.policy.max_bytes,
            "max_image_pixels": limits.policy.max_pixels,
            "max_audio_s": limits.policy.max_seconds,
        },
    }


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """200 when the model can respond, else 503."""
    engine: Engine = request.app.state.engine
    if not engine.scheduler.alive:
        raise ApiError(503, "the model does not respond")
    return {"status": "ok"}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """The metrics for Prometheus."""
    engine: Engine = request.app.state.engine
    return Response(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.post("/v1/tokenize")
async def tokenize(body: TokenizeRequest, request: Request, place: PlaceOf) -> TokenizeResponse:
    """The ids of a text, or of messages in the chat template."""
    request.app.state.models.find(body.model)
    model = place.engine.model
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt, a text, or messages", param="prompt")
    if body.messages is not None:
        turns = await opened_turns(body.messages, None, place)
        prompt = await place.prepared(turns, answered=False, continued=body.continue_final_message)
        ids = list(prompt.token_ids)
    else:
        assert body.prompt is not None
        ids = await place.encoded(body.prompt)
        ids = [model.tokenizer.bos_id, *ids] if body.add_special_tokens else ids
    return TokenizeResponse(tokens=ids, count=len(ids), max_model_len=model.config.text.max_position_embeddings)


@router.post("/v1/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request, place: PlaceOf) -> DetokenizeResponse:
    """The text of some ids."""
    request.app.state.models.find(body.model)
    place.check_ids(body.tokens, "tokens")
    return DetokenizeResponse(prompt=place.engine.model.tokenizer.decode(body.tokens, skip_special=False))


def _described(request: Request, name: str) -> ServedModel:
    engine: Engine = request.app.state.engine
    table: ModelTable = request.app.state.models
    return ServedModel(id=name, created=table.created, max_model_len=engine.model.config.text.max_position_embeddings)
