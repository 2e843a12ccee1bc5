"""Videos as pictures: frames spread evenly over a file, which any model for several pictures can be shown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from routing_experts.errors import RecordError
from routing_experts.optional import need


def sample_frames(video: Any, count: int, record_id: str) -> list[Image.Image]:
    """Frames of a video file, evenly spread: the middle of each of ``count`` equal parts, in order.

    Args:
        video: a path, or a mapping with ``path`` or ``url``, and ``video_start`` and ``video_end`` in seconds for a
            part of it.
        count: how many; a shorter video gives each of its frames once.
        record_id: for messages.

    Raises:
        RecordError: if the file is missing or no video that can be read.
        MissingExtraError: without PyAV.
    """
    av = need("av", "eval", "reading videos")
    part = video if isinstance(video, Mapping) else {"path": video}
    path = Path(part.get("path") or part.get("url") or part.get("video") or "")
    if not path.is_file():
        raise RecordError(f"record {record_id}: video {path} is not there. Put it in place.")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            times = [frame.time for frame in container.decode(stream)]
        chosen = _spread(_within(times, part), count)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [f.to_image() for i, f in enumerate(container.decode(stream)) if i in chosen]
    except (av.error.FFmpegError, IndexError) as error:
        raise RecordError(
            f"record {record_id}: video {path} cannot be read ({error}); it may be cut short, damaged or without "
            "pictures. Replace the file, or leave the record out."
        ) from error
    if not frames:
        raise RecordError(f"record {record_id}: video {path} has no frame in the part asked for. Widen the part.")
    return [frame.convert("RGB") for frame in frames]


def _within(times: list[Any], part: Mapping[str, Any]) -> list[int]:
    """Indices of frames between the part's start and end."""
    start, end = part.get("video_start"), part.get("video_end")
    if start is None and end is None:
        return list(range(len(times)))
    first, last = start or 0.0, float("inf") if end is None else end
    return [index for index, time in enumerate(times) if time is not None and first <= time <= last]


def _spread(indices: list[int], count: int) -> set[int]:
    """So many of them, each in the middle of its share."""
    if len(indices) <= count:
        return set(indices)
    return {indices[int((place + 0.5) * len(indices) / count)] for place in range(count)}
