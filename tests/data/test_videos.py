"""Videos become pictures: frames spread over the file or a part of it; what cannot be read is named."""

import numpy as np
import pytest

from routing_experts.data.videos import sample_frames
from routing_experts.errors import RecordError

av = pytest.importorskip("av")
RATE, FRAMES = 10, 40


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Four seconds that grow brighter frame by frame."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for index in range(FRAMES):
            grey = np.full((32, 32, 3), 20 + 5 * index, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def places(frames):
    """Which frame each is, by its brightness."""
    return [round((np.asarray(frame).mean() - 20) / 5) for frame in frames]


def test_frames_stand_in_the_middle_of_equal_parts(video):
    frames = sample_frames(video, 4, "r")
    assert all(frame.mode == "RGB" and frame.size == (32, 32) for frame in frames)
    assert places(frames) == pytest.approx([5, 15, 25, 35], abs=1)
    assert places(sample_frames(str(video), 1, "r")) == pytest.approx([20], abs=1)


def test_a_short_video_gives_each_frame_once(video):
    assert places(sample_frames({"path": str(video)}, 100, "r")) == pytest.approx(list(range(FRAMES)), abs=1)


def test_a_part_of_a_video(video):
    part = {"url": str(video), "video_start": 2.0, "video_end": 3.0}
    assert places(sample_frames(part, 2, "r")) == pytest.approx([22, 28], abs=1.5)
    with pytest.raises(RecordError, match=r"record r: .*no frame in the part"):
        sample_frames({"path": str(video), "video_start": 9.0}, 2, "r")


def test_what_cannot_be_read_is_named(tmp_path, video):
    with pytest.raises(RecordError, match=r"record r: video .*none.mp4 is not there"):
        sample_frames(tmp_path / "none.mp4", 2, "r")
    (tmp_path / "text.mp4").write_text("<html>not found</html>")
    with pytest.raises(RecordError, match=r"record r: video .*text.mp4 cannot be read"):
        sample_frames(tmp_path / "text.mp4", 2, "r")
    half = tmp_path / "half.mp4"
    half.write_bytes(video.read_bytes()[:600])
    with pytest.raises(RecordError, match=r"half\.mp4 cannot be read"):
        sample_frames(half, 2, "r")
