"""Leave to upload one object straight to S3."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter

from api_stub.gateway.access import CallerHere, GatewayHere
from api_stub.gateway.bodies import UploadReply, UploadRequest
from api_stub.gateway.uploads import promise_upload

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


@router.post("", status_code=HTTPStatus.CREATED)
async def make_upload(gateway: GatewayHere, caller: CallerHere, upload: UploadRequest) -> UploadReply:
    """Sign a PUT of exactly these bytes and this type to a new object; a job that uses the object checks both again."""
    return await promise_upload(gateway, caller, upload)
