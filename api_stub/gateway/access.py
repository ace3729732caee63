"""Who may call a route: the caller behind a request's key, counted against its rate.

Without keys everybody on this machine may call, so a web page must not: requests that a browser sends from another
origin, or for another host name, are refused.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api_stub.contract.finetune import s3_prefix
from api_stub.contract.job import FinetuneJob, Job
from api_stub.contract.media import S3Object
from api_stub.contract.names import TRAINING_MODEL_NAME, split_model
from api_stub.errors import InvalidRequest
from api_stub.gateway.forwarded import DIRECT_HOST
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.keys import ANYBODY, Caller, is_loopback
from api_stub.gateway.problems import FieldError, Problem

_bearer = HTTPBearer(auto_error=False, description="An API key. Not needed where the gateway has no keys.")


def gateway_of(request: Request) -> Gateway:
    """Return the process' gateway."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def root_path_of(request: Request) -> str:
    """Return the path prefix that the client put before the gateway's own paths; mostly empty."""
    return str(request.scope.get("root_path", ""))


GatewayHere = Annotated[Gateway, Depends(gateway_of)]
#: What the addresses in an answer begin with.
RootPathHere = Annotated[str, Depends(root_path_of)]


async def _identified(
    request: Request,
    gateway: GatewayHere,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None,
) -> Caller:
    caller = _from_this_machine(request, gateway) if not gateway.keys else _with_key(gateway, credentials)
    request.state.tenant = caller.tenant
    await gateway.limits.count_request(caller)
    return caller


#: The caller, as a route's parameter; without a good key the route is not entered.
CallerHere = Annotated[Caller, Depends(_identified)]


async def _operator(caller: CallerHere) -> Caller:
    if not caller.is_operator:
        detail = "operators only: the key's entry in VISIONQ_API_KEYS needs `role=operator`"
        raise Problem(HTTPStatus.FORBIDDEN, "forbidden", detail)
    return caller


#: The caller, when it is an operator; for others the route answers 403.
OperatorHere = Annotated[Caller, Depends(_operator)]


async def _identified_if_any(
    request: Request,
    gateway: GatewayHere,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None,
) -> Caller | None:
    if not gateway.keys:
        return ANYBODY
    return None if credentials is None else _with_key(gateway, credentials)


#: The caller of a route that answers without a key, too; None for one that sent none. It is not counted.
MaybeCaller = Annotated[Caller | None, Depends(_identified_if_any)]


def _with_key(gateway: Gateway, credentials: HTTPAuthorizationCredentials | None) -> Caller:
    caller = gateway.keys.caller(credentials.credentials) if credentials is not None else None
    if caller is None:
        what = "no key" if credentials is None else "unknown key"
        detail = f"{what}: send `Authorization: Bearer <key>`"
        raise Problem(HTTPStatus.UNAUTHORIZED, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})
    return caller


def _from_this_machine(request: Request, gateway: Gateway) -> Caller:
    # A page may make a browser send requests to this machine, and may let its own host name lead here.
    # A proxy's word for the host is looked at beside the connection's own, never instead of it.
    hosts = {request.url.hostname or "", _name_of(request.scope.get(DIRECT_HOST, ""))} - {""}
    if not hosts or not all(is_loopback(host) for host in hosts):
        raise Problem(HTTPStatus.FORBIDDEN, "forbidden", "without keys the gateway answers to localhost only")
    origin = request.headers.get("origin")
    if origin is not None and not _is_own(origin, request) and origin not in gateway.settings.cors_origins:
        raise Problem(HTTPStatus.FORBIDDEN, "forbidden", "without keys the gateway answers to its own pages only")
    return ANYBODY


def _name_of(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return host


def _is_own(origin: str, request: Request) -> bool:
    try:
        return urlsplit(origin).netloc == request.url.netloc
    except ValueError:
        return False


def check_allowed(caller: Caller, job: Job, training_root: str) -> None:
    """Raise Problem (403) when the caller may not use the job's model or one of its buckets.

    `training_root`: the prefix below which each tenant's fine-tuned checkpoints are.
    """
    if isinstance(job, FinetuneJob):
        _check_training(caller, job, training_root)
        return
    if not caller.may_use(job.model):
        raise _forbidden("model", f"this key may not use the model {job.model!r}")
    if caller.buckets is None:
        return
    for index, uri in enumerate(media_of(job)):
        bucket = S3Object.parse(uri).bucket
        if bucket not in caller.buckets:
            raise _forbidden(f"media.{index}", f"this key may not read from the bucket {bucket!r}")


def _check_training(caller: Caller, job: FinetuneJob, training_root: str) -> None:
    if not caller.may_train:
        raise _forbidden("task", "this key may not fine-tune; its entry in VISIONQ_API_KEYS needs `train=1`")
    own = f"{training_root}{job.tenant}/" if job.tenant else training_root
    places = {"output": job.output, "options.resume": job.options.resume}
    if "://" in job.base:
        places["base"] = job.base
    elif not caller.may_use(job.base):
        raise _forbidden("base", f"this key may not use the model {job.base!r}")
    for field, place in places.items():
        if isinstance(place, str) and not s3_prefix(place).startswith(own):
            raise _forbidden(field, f"must lie below {own}")
    bucket = S3Object.parse(job.dataset).bucket
    if caller.buckets is not None and bucket not in caller.buckets:
        raise _forbidden("dataset", f"this key may not read from the bucket {bucket!r}")


async def check_known(gateway: Gateway, model: str) -> None:
    """Raise Problem (404) for a model name that is not known, InvalidRequest for an adapter that no worker serves."""
    name, adapter = split_model(model)
    if not await gateway.queues.is_known(name):
        who = "trains (`visionq-worker start --training`)" if name == TRAINING_MODEL_NAME else "serves it"
        reason = f"no worker {who} or did in the last day, and VISIONQ_API_MODELS does not list it"
        raise unknown_model(f"the model {name[:80]!r} is not known: {reason}")
    if adapter and not await gateway.queues.may_serve(name, adapter):
        raise InvalidRequest(f"model: no adapter {adapter[:80]!r} of {name!r} is served; GET /v1/models lists all")


def unknown_model(message: str) -> Problem:
    """Return the problem of a model that does not exist, for its caller at least."""
    errors = [FieldError(field="model", message=message)]
    return Problem(HTTPStatus.NOT_FOUND, "model_not_found", message, errors=errors)


def media_of(job: Job) -> list[str]:
    """Return all media URIs of a job, in order; a data set's files are not named in its job."""
    if isinstance(job, FinetuneJob):
        return []
    parts = (part for message in job.messages or () for part in message.content)
    return [*job.media, *(part.uri for part in parts if part.type != "text")]


def _forbidden(field: str, message: str) -> Problem:
    errors = [FieldError(field=field, message=message)]
    return Problem(HTTPStatus.FORBIDDEN, "forbidden", f"{field}: {message}", errors=errors)
