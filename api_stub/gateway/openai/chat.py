"""A chat request as OpenAI's clients write it, checked field by field. `ChatDraft` (chat_draft.py) makes a job of it.

What would change the answer and cannot be done is refused by its name; what makes no difference is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from api_stub.contract.conversation import MAX_FRAMES
from api_stub.contract.error import explain
from api_stub.contract.job import MAX_DEADLINE_S
from api_stub.contract.media import MediaOptions
from api_stub.contract.sampling import MAX_STOP_STRINGS, StopString
from api_stub.gateway.problems import Problem, fields_of, invalid

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

    def with_defaults(self, priority: int, deadline_s: float) -> ChatRequest:
        """Return the request with a priority and a deadline where it names none."""
        given = {"priority": self.priority, "deadline_s": self.deadline_s}
        defaults = {"priority": priority, "deadline_s": deadline_s}
        return self.model_copy(update={name: v for name, v in defaults.items() if given[name] is None})

    @property
    def wants_usage(self) -> bool:
        """True when a stream shall end with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def parse_chat(fields: Mapping[str, object]) -> ChatRequest:
    """Check a request. Raises Problem that names the field."""
    for name, neutral in _NEUTRAL.items():
        value = fields.get(name)
        if value is not None and not any(value == good and type(value) is type(good) for good in neutral):
            raise invalid(name, "not supported here")
    known = {name: value for name, value in fields.items() if name not in _IGNORED and name not in _NEUTRAL}
    if isinstance(messages := known.get("messages"), list):
        known["messages"] = [_plain(message) for message in messages]
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


def _plain(message: object) -> object:
    if not isinstance(message, dict):
        return message
    return {k: v for k, v in message.items() if k not in _IGNORED_IN_MESSAGE and (v is not None or k == "content")}


def _invalid(message: str) -> Problem:
    problem = invalid("", message)
    return Problem(problem.status, problem.code, message, errors=fields_of(message))
