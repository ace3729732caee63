"""A chat request, and the job that it stands for.

What would change the answer and cannot be done is refused by its name; what makes no difference is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from api_stub.contract.conversation import MAX_FRAMES
from api_stub.contract.error import explain
from api_stub.contract.job import MAX_DEADLINE_S, TaskName
from api_stub.contract.media import MediaOptions
from api_stub.contract.sampling import MAX_STOP_STRINGS, StopString
from api_stub.gateway.media_hosts import NO_HOSTS, AddressRefused, MediaAddress, MediaHosts
from api_stub.gateway.problems import Problem, fields_of, invalid, wrong_field

MAX_MESSAGES: Final = 1024
#: Taken and not looked at.
_IGNORED: Final = frozenset(
    {"user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"parallel_tool_calls"}
)
_IGNORED_IN_MESSAGE: Final = frozenset({"name", "refusal", "annotations"})
#: Not supported, and the values with which they say nothing.
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
_TAGS: Final = frozenset({"text", "image_url", "video_url"})


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)


class ImageAddress(_Part):
    """Where an image is: a data URL, an s3:// address, or http(s) of a listed host. `detail` makes no difference."""

    url: str
    detail: str | None = None


class VideoAddress(_Part):
    """Where a clip is: a data URL, an s3:// address, or http(s) of a listed host."""

    url: str
    num_frames: Annotated[int, Field(ge=1, le=MAX_FRAMES)] | None = None


class ChatTextPart(_Part):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ChatImagePart(_Part):
    """An image, at its place in the turn."""

    type: Literal["image_url"]
    image_url: ImageAddress


class ChatVideoPart(_Part):
    """A clip, at its place in the turn."""

    type: Literal["video_url"]
    video_url: VideoAddress


ChatPart = Annotated[ChatTextPart | ChatImagePart | ChatVideoPart, Field(discriminator="type")]
ChatParts = Annotated[list[ChatPart], Field(min_length=1)]


def _as_parts(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


class ChatMessage(_Part):
    """One turn. `developer` is another word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[ChatParts, BeforeValidator(_as_parts, json_schema_input_type=str | ChatParts)]


class StreamOptions(_Part):
    """`include_usage`: one more chunk with the usage comes last."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class PixelOptions(MediaOptions):
    """Pixels of every picture and frame; vLLM's clients say `mm_processor_kwargs` for it."""

    model_config = ConfigDict(strict=True, hide_input_in_errors=True)


StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]


class ChatRequest(_Part):
    """What `POST /v1/chat/completions` takes. `temperature` is 0 when absent; `top_k` … `deadline_s` are ours."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=32_768)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=32_768)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        StopStrings | None, BeforeValidator(_as_list, json_schema_input_type=StopString | StopStrings | None)
    ] = None
    n: Literal[1] | None = None
    metadata: dict[str, str] | None = None
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    media_options: PixelOptions | None = None
    mm_processor_kwargs: PixelOptions | None = None
    priority: int | None = Field(default=None, ge=0, le=9)
    deadline_s: float | None = Field(default=None, gt=0, le=MAX_DEADLINE_S)

    @property
    def wants_usage(self) -> bool:
        """True when a stream shall end with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def parse_chat(fields: Mapping[str, Any]) -> ChatRequest:
    """Check a request. Raises Problem that names the field."""
    for name, neutral in _NEUTRAL.items():
        value = fields.get(name)
        if value is not None and not any(value == good and type(value) is type(good) for good in neutral):
            raise invalid(name, "not supported here")
    known = {name: value for name, value in fields.items() if name not in _IGNORED and name not in _NEUTRAL}
    if isinstance(known.get("messages"), list):
        known["messages"] = [_plain(message) for message in known["messages"]]
    try:
        request = ChatRequest.model_validate(known)
    except ValidationError as error:
        message = explain(error, tags=_TAGS)
        raise _invalid(message) from error
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "only for stream=true")
    if request.media_options is not None and request.mm_processor_kwargs is not None:
        raise invalid("mm_processor_kwargs", "not beside media_options")
    return request


def job_fields(request: ChatRequest, hosts: MediaHosts = NO_HOSTS) -> dict[str, Any]:
    """Return the job of a request as a producer would write it, data URLs and those of `hosts` still inside.

    Raises Problem.
    """
    messages = [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": [_part(part, f"messages.{at}.content.{i}", hosts) for i, part in enumerate(message.content)],
        }
        for at, message in enumerate(request.messages)
    ]
    has_video = any(isinstance(part, ChatVideoPart) for message in request.messages for part in message.content)
    options: dict[str, object] = {
        "metadata": request.metadata,
        "priority": request.priority,
        "deadline_s": request.deadline_s,
    }
    pixels = request.media_options or request.mm_processor_kwargs
    if pixels is not None and not pixels.are_empty:
        options["media_options"] = pixels.model_dump(exclude_none=True)
    return {
        "task": str(TaskName.VIDEO_QA if has_video else TaskName.VQA),
        "model": request.model,
        "messages": messages,
        "sampling": _sampling(request),
        **{name: value for name, value in options.items() if value is not None},
    }


def _sampling(request: ChatRequest) -> dict[str, object]:
    given = {
        "max_new_tokens": request.max_completion_tokens or request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "seed": None if request.seed is None else request.seed % 2**63,
        "stop": request.stop,
    }
    return {name: value for name, value in given.items() if value is not None}


def _part(part: ChatTextPart | ChatImagePart | ChatVideoPart, place: str, hosts: MediaHosts) -> dict[str, object]:
    if isinstance(part, ChatTextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, ChatImagePart):
        return {"type": "image", "uri": _address(part.image_url.url, "image", f"{place}.image_url.url", hosts)}
    video: dict[str, object] = {"type": "video"}
    video["uri"] = _address(part.video_url.url, "video", f"{place}.video_url.url", hosts)
    if part.video_url.num_frames is not None:
        video["num_frames"] = part.video_url.num_frames
    return video


def listed_address(hosts: MediaHosts, url: str, place: str) -> MediaAddress | None:
    """Return the address of http(s) media that may be fetched; None: it is no http(s) address. Raises Problem (400)."""
    if not url[:8].lower().startswith(("http://", "https://")):
        return None
    try:
        return hosts.address(url)
    except AddressRefused as error:
        raise wrong_field(HTTPStatus.BAD_REQUEST, error.code, place, str(error)) from error


def _address(url: str, kind: str, place: str, hosts: MediaHosts) -> str:
    if listed_address(hosts, url, place) is not None:
        return url
    head = url[:12].lower()
    if head.startswith("data:") and not head.startswith(f"data:{kind}/"):
        raise invalid(place, f"a data URL of {kind}/… is required")
    if not head.startswith(("data:", "s3://")):
        raise invalid(place, "a data URL or an s3:// address is required")
    return url


def _plain(message: object) -> object:
    if not isinstance(message, dict):
        return message
    return {k: v for k, v in message.items() if k not in _IGNORED_IN_MESSAGE and (v is not None or k == "content")}


def _invalid(message: str) -> Problem:
    problem = invalid("", message)
    return Problem(problem.status, problem.code, message, errors=fields_of(message))
