"""Uploads: leave to put one object straight into S3, or one file through the gateway."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter, UploadFile

from api_stub.gateway.access import CallerHere, GatewayHere
from api_stub.gateway.intake import store_file
from api_stub.gateway.schemas import StoredReply, UploadReply, UploadRequest
from api_stub.gateway.uploads import promise_upload

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


@router.post("", status_code=HTTPStatus.CREATED)
async def make_upload(gateway: GatewayHere, caller: CallerHere, upload: UploadRequest) -> UploadReply:
    """Sign a PUT of exactly these bytes and this type to a new object; a job that uses the object checks both again."""
    return await promise_upload(gateway, caller, upload)


@router.post("/inline", status_code=HTTPStatus.CREATED, form_limits={"max_files": 1, "max_fields": 8})
async def upload_inline(gateway: GatewayHere, caller: CallerHere, file: UploadFile) -> StoredReply:
    """Store one file of a form and return the address that a job names it by. The same file again has the same one."""
    return await store_file(gateway, caller, file)
