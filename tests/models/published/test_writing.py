"""An imported model's folder is whole or not there, and nothing that was there is replaced."""

import os
from types import SimpleNamespace

import pytest

from routing_experts.errors import CheckpointError
from routing_experts.models.published.writing import check_place, write_model


def saver(fails: bool = False):
    """A model or processor that writes a file, or the beginning of one."""

    def save_pretrained(folder) -> None:
        (folder / f"{fails}.txt").write_text("written")
        if fails:
            raise KeyboardInterrupt

    return SimpleNamespace(save_pretrained=save_pretrained)


def test_a_write_that_is_cut_short_leaves_nothing(tmp_path):
    """Guards the rename: a folder that is there is whole; what a kill left is swept by the next write."""
    with pytest.raises(KeyboardInterrupt):
        write_model(saver(), saver(fails=True), tmp_path / "made")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".made.abcdefgh.partial").mkdir()
    write_model(saver(), saver(), tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_others_get_the_rights_that_they_get_elsewhere(tmp_path):
    """Guards the umask, of those who keep others out and of those who do not."""
    before = os.umask(0o077)
    try:
        for mask, rights in ((0o077, 0o700), (0o022, 0o755)):
            os.umask(mask)
            write_model(saver(), saver(), tmp_path / f"{mask}")
            assert (tmp_path / f"{mask}").stat().st_mode & 0o777 == rights
    finally:
        os.umask(before)


def test_what_is_there_stays(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for place in ("file", "full", "link"):
        with pytest.raises(CheckpointError, match="is there already"):
            check_place(tmp_path / place)
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_place(tmp_path / "file" / "below")
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_empty_folders_and_links_to_them_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    for place, real in (("link", "empty"), ("dangling", "later"), ("deep/er", "deep/er")):
        write_model(saver(), saver(), tmp_path / place)
        assert (tmp_path / real / "False.txt").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_place(tmp_path / "made")
