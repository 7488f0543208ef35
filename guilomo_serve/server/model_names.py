"""What a request's `model` does where vLLM 0.32 does otherwise.

*`/invocations`*, the route of one cloud's containers. vLLM has `inject_adapter_id("model")` of
model_hosting_container_standards 0.1 around it (vllm/entrypoints/serve/sagemaker/api_router.py),
whose `InjectToBodyApiTransform` puts that cloud's header in the place of the body's field, and
nothing where there is no header: whoever names an adapter in the body, or one that does not exist,
is answered by the base. Here a body stays as it is without the header, and one that names another
adapter is refused. If the class is renamed, the server does not start; if vLLM no longer uses it,
this does nothing.

*A name that nobody has.* vLLM's 404 lists the names of the base model alone (`_check_model` of
vllm/entrypoints/serve/engine/serving.py; what pooling has in its place says nothing). Here it names
those that are like it among what /v1/models lists. If `_check_model` is renamed, vLLM's text stays.

*A name whose weights went for others* gets them back (models.py) when vLLM has
checked it, as vLLM asks `resolve_lora` only for names that it does not know. If `_check_model` is
renamed, the worker reads them again by itself, whatever they are by then.
"""

from __future__ import annotations

import difflib
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError

_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
_COMPARED = 1000  # names, in about 10 ms
_SUGGESTED = 3

_check: Any = None  # vLLM's own
_check_of_pooling: Any = None


def install() -> None:
    """To be called once the routes are there: their package sets up logging when it is imported."""
    from model_hosting_container_standards.sagemaker.lora.transforms import inject_to_body
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.entrypoints.serve.engine.serving import BaseServing

    inject_to_body.InjectToBodyApiTransform.transform_request = _keep_or_inject
    global _check, _check_of_pooling
    if _check is None:
        _check, _check_of_pooling = BaseServing._check_model, PoolingBaseServing._check_model
    setattr(BaseServing, "_check_model", _check_or_suggest)  # noqa: B010
    setattr(PoolingBaseServing, "_check_model", _check_pooling_or_suggest)  # noqa: B010


async def _keep_or_inject(transform: Any, request: Any) -> Any:
    """As `transform_request`: the request with the adapter's name in its body.

    Raises:
        HTTPException: the body is no JSON object, or names another adapter than the header.
    """
    from model_hosting_container_standards.sagemaker.lora import models

    try:
        body = await request.json()
    except ValueError as e:
        raise HTTPException(400, f"the body is no JSON: {e}") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is no JSON object")
    adapter, named = request.headers.get(_HEADER), body.get("model")
    if adapter is not None:
        is_base = request.app.state.openai_serving_models.registry.is_base_model
        if named not in (None, "", adapter) and not is_base(named):
            raise HTTPException(
                400, f"the body's model is {named!r} and {_HEADER} is {adapter!r}: name one"
            )
        body["model"] = adapter  # the request keeps this dict, and gives it to who asks next
    return models.BaseLoRATransformRequestOutput(request=None, raw_request=request)


async def _check_or_suggest(serving: Any, request: Any) -> Any:
    """As `BaseServing._check_model`: None if the model is served, else what is answered."""
    error = await _check(serving, request)
    if error is None:
        return await serving.models.bring_in(request.model)
    if error.error.code == HTTPStatus.NOT_FOUND:
        error.error.message = await _not_found(serving.models, request.model)
    return error


async def _check_pooling_or_suggest(serving: Any, request: Any) -> Any:
    """As `PoolingBaseServing._check_model`, which leaves it to others to say that there is none.

    Raises:
        VLLMNotFoundError: the model is not served.
        GracefulHTTPError: it cannot be brought in.
    """
    error = await _check_of_pooling(serving, request)
    refused = await serving.models.bring_in(request.model)
    if refused is not None:
        raise GracefulHTTPError(refused.error.message, HTTPStatus(refused.error.code))
    try:
        serving._maybe_get_adapters(request)
    except VLLMNotFoundError:
        raise VLLMNotFoundError(await _not_found(serving.models, request.model)) from None
    return error


async def _not_found(models: Any, name: str) -> str:
    listed = await models.show_available_models()
    names = [card.id for card in listed.data][:_COMPARED]
    like = difflib.get_close_matches(name, names, _SUGGESTED)
    meant = f" Did you mean {' or '.join(f'`{each}`' for each in like)}?" if like else ""
    return f"The model `{name}` does not exist.{meant} /v1/models lists those that do."
