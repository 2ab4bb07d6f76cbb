"""Files that are whole or not there."""

import pytest

from sslzoo.checkpoints.files import write_text, write_whole


def test_a_file_appears_whole_under_its_name_alone(tmp_path):
    seen = []

    def write(partial):
        partial.write_bytes(b"half")
        seen.append((partial, path.exists()))
        partial.write_bytes(b"whole")

    path = tmp_path / "last.ckpt"
    assert write_whole(str(path), write) == path
    assert path.read_bytes() == b"whole"
    ((partial, existed),) = seen
    assert not existed
    assert partial.parent == tmp_path  # of the same file system, or it could not be renamed
    assert partial.suffix == ".ckpt"  # some writers choose a format by it
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_write_that_fails_leaves_the_old_file_and_no_partial(tmp_path, error, before):
    path = tmp_path / "summary.json"
    if before:
        path.write_text(before)

    def write(partial):
        partial.write_text("ne")
        raise error

    with pytest.raises(error):
        write_whole(path, write)
    assert [file.name for file in tmp_path.iterdir()] == ([path.name] if before else [])
    assert before is None or path.read_text() == before


def test_a_writer_that_writes_nothing_leaves_the_old_file(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")
    with pytest.raises(FileNotFoundError):
        write_whole(path, lambda partial: None)
    assert path.read_text() == "old"


def test_text_replaces_text(tmp_path):
    write_text(tmp_path / "a.txt", "first")
    assert write_text(tmp_path / "a.txt", "second").read_text() == "second"
