"""All media of one job: fetched, decoded and put in the order in which the conversation names them.

In: the job's turns. Out: one DecodedMedia per media part. An object named twice is fetched and decoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from api_stub.contract.job import ImagePart, MediaPart, TaskName, TextPart, Turn, VideoPart
from worker.errors import MediaUnsupported, RequestError
from worker.media.fetch import FetchedMedia, MediaFetcher
from worker.media.image import decode_image
from worker.media.policy import MediaPolicy
from worker.media.sniff import MediaKind
from worker.media.types import DecodedMedia
from worker.media.video import sample_clip

AnyMediaPart = ImagePart | VideoPart | MediaPart


class MediaCollector:
    """Fetches and decodes for many jobs at once; holds nothing of any of them."""

    def __init__(self, fetcher: MediaFetcher, policy: MediaPolicy) -> None:
        self._fetcher = fetcher
        self._policy = policy

    def fetch(
        self,
        parts: Sequence[AnyMediaPart],
        directory: Path,
        *,
        should_stop: Callable[[], None],
        on_progress: Callable[[int, int], None],
    ) -> dict[str, FetchedMedia]:
        """Bring every distinct object of `parts` into `directory`.

        `on_progress(done, total)` is called before each and at the end; not at all without media.
        """
        uris = list(dict.fromkeys(part.uri for part in parts))
        fetched: dict[str, FetchedMedia] = {}
        for done, uri in enumerate(uris):
            on_progress(done, len(uris))
            fetched[uri] = self._fetcher.fetch(uri, directory, should_stop=should_stop)
        if uris:
            on_progress(len(uris), len(uris))
        return fetched

    def decode(
        self,
        parts: Sequence[AnyMediaPart],
        fetched: dict[str, FetchedMedia],
        *,
        task: TaskName,
        num_frames: int,
        should_stop: Callable[[], None],
    ) -> list[DecodedMedia]:
        """Decode every part. Raises MediaUnsupported where a clip stands for an image or the reverse."""
        kinds = [_checked_kind(part, fetched[part.uri].kind, task) for part in parts]
        if task is TaskName.VIDEO_QA and MediaKind.VIDEO not in kinds:
            raise MediaUnsupported(f"media: a video question needs at least 1 video, got {len(parts)} images")
        decoded: dict[tuple[str, int], DecodedMedia] = {}
        media: list[DecodedMedia] = []
        for part, kind in zip(parts, kinds, strict=True):
            should_stop()
            frames = (part.num_frames or num_frames) if isinstance(part, VideoPart) else num_frames
            key = (part.uri, frames if kind is MediaKind.VIDEO else 0)
            if key not in decoded:
                decoded[key] = self._decode(part.uri, fetched[part.uri], frames, should_stop)
            media.append(decoded[key])
        return media

    def _decode(self, uri: str, media: FetchedMedia, num_frames: int, should_stop: Callable[[], None]) -> DecodedMedia:
        try:
            if media.kind is MediaKind.VIDEO:
                return sample_clip(media.path, num_frames, self._policy, should_stop=should_stop)
            return decode_image(media.path, self._policy)
        except RequestError as error:
            raise type(error)(f"{uri}: {error}") from error  # the decoders see a file, the producer knows a URI


def media_parts(turns: Sequence[Turn]) -> list[AnyMediaPart]:
    """Return the media parts of a conversation in order."""
    return [part for turn in turns for part in turn.content if not isinstance(part, TextPart)]


def _checked_kind(part: AnyMediaPart, kind: MediaKind, task: TaskName) -> MediaKind:
    is_clip = kind is MediaKind.VIDEO
    wants_image = isinstance(part, ImagePart) or (isinstance(part, MediaPart) and task is not TaskName.VIDEO_QA)
    if is_clip and wants_image:
        raise MediaUnsupported(f"{part.uri}: a video where {task.value} takes an image")
    if not is_clip and isinstance(part, VideoPart):
        raise MediaUnsupported(f"{part.uri}: an image where a video was named")
    return kind
