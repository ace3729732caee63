"""The job that a chat request stands for: typed parts, each of its media with where it is now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

from api_stub.contract.job import Job, TaskName
from api_stub.gateway.drafts import S3, Inline, Remote, Source, Unstored, Uris, uri_of
from api_stub.gateway.media_hosts import NO_HOSTS, AddressRefused, MediaAddress, MediaHosts, MediaKind
from api_stub.gateway.openai.chat import ChatImagePart, ChatRequest, ChatTextPart, ChatVideoPart
from api_stub.gateway.problems import invalid, wrong_field
from api_stub.submit import checked


@dataclass(frozen=True, slots=True)
class _Text:
    text: str

    def written(self, uris: Uris) -> dict[str, object]:
        return {"type": "text", "text": self.text}


@dataclass(frozen=True, slots=True)
class _Media:
    kind: MediaKind
    source: Source
    num_frames: int | None = None

    def written(self, uris: Uris) -> dict[str, object]:
        frames = {} if self.num_frames is None else {"num_frames": self.num_frames}
        return {"type": self.kind, "uri": uri_of(self.source, uris), **frames}


@dataclass(frozen=True, slots=True)
class _Message:
    role: str
    parts: tuple[_Text | _Media, ...]


@dataclass(frozen=True, slots=True)
class ChatDraft:
    """The job that a chat request stands for, its media still where the client said. `tenant`: it names none."""

    request: ChatRequest
    messages: tuple[_Message, ...]
    tenant: str = ""

    @classmethod
    def of(cls, request: ChatRequest, hosts: MediaHosts = NO_HOSTS) -> ChatDraft:
        """Tell where a request's media are; http(s) ones must be at `hosts`. Raises Problem that names the field."""
        parts = _Parts(hosts)
        return cls(
            request,
            tuple(
                _Message(
                    "system" if message.role == "developer" else message.role,
                    tuple(parts.of(part, f"messages.{at}.content.{i}") for i, part in enumerate(message.content)),
                )
                for at, message in enumerate(request.messages)
            ),
        )

    @property
    def sources(self) -> Sequence[Unstored]:
        """What is not in S3, an http(s) address once."""
        media = (part.source for message in self.messages for part in message.parts if isinstance(part, _Media))
        return list(dict.fromkeys(source for source in media if not isinstance(source, S3)))

    def job(self, uris: Uris, tenant: str | None) -> Job:
        request = self.request
        pixels = request.media_options or request.mm_processor_kwargs
        has_video = any(isinstance(part, ChatVideoPart) for message in request.messages for part in message.content)
        options = {
            "metadata": request.metadata,
            "priority": request.priority,
            "deadline_s": request.deadline_s,
            "media_options": None if pixels is None or pixels.are_empty else pixels,
            "tenant": tenant,
        }
        return checked(
            {
                "task": str(TaskName.VIDEO_QA if has_video else TaskName.VQA),
                "model": request.model,
                "messages": [
                    {"role": message.role, "content": [part.written(uris) for part in message.parts]}
                    for message in self.messages
                ],
                "sampling": _sampling(request),
                **{name: value for name, value in options.items() if value is not None},
            }
        )


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


class _Parts:
    """Makes the parts of one draft. The same http(s) address twice is one source, named by its first place."""

    def __init__(self, hosts: MediaHosts) -> None:
        self._hosts = hosts
        self._remote: dict[tuple[MediaKind, MediaAddress], Remote] = {}

    def of(self, part: ChatTextPart | ChatImagePart | ChatVideoPart, place: str) -> _Text | _Media:
        if isinstance(part, ChatTextPart):
            return _Text(part.text)
        if isinstance(part, ChatImagePart):
            return _Media("image", self._source(part.image_url.url, "image", f"{place}.image_url.url"))
        source = self._source(part.video_url.url, "video", f"{place}.video_url.url")
        return _Media("video", source, part.video_url.num_frames)

    def _source(self, url: str, kind: MediaKind, place: str) -> Source:
        head = url[:12].lower()
        if head.startswith(("http://", "https://")):
            address = self._listed(url, place)
            return self._remote.setdefault((kind, address), Remote(place, kind, address))
        if head.startswith("data:"):
            if not head.startswith(f"data:{kind}/"):
                raise invalid(place, f"a data URL of {kind}/… is required")
            return Inline(place, url)
        if not head.startswith("s3://"):
            raise invalid(place, "a data URL or an s3:// address is required")
        return S3(url)

    def _listed(self, url: str, place: str) -> MediaAddress:
        try:
            return self._hosts.address(url)
        except AddressRefused as error:
            raise wrong_field(HTTPStatus.BAD_REQUEST, error.code, place, str(error)) from error
