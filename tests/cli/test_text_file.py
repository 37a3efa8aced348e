"""Files that people write are read within limits; nothing that blocks or never ends is opened."""

import math
import os
import tempfile
import time
from pathlib import Path

import pytest
from odd_inputs import make_places

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.json_file import read_json
from jaxmorph.cli.paths import is_file, is_folder, is_folder_or_free
from jaxmorph.cli.text_file import LARGEST_FILE, plain_float, read_text
from jaxmorph.cli.yaml_file import read_yaml
from jaxmorph.train import main


@pytest.fixture
def places(tmp_path):
    make_places(tmp_path)
    return tmp_path


@pytest.mark.parametrize("read", [read_text, read_json, read_yaml])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pipe", "it is a pipe"),
        ("socket", "it is a socket"),
        ("loop", "symbolic links"),
        (".", "it is a folder"),
        ("text.txt/below", "Not a directory"),
        ("nowhere", "No such file"),
        ("/dev/zero", "it is a device"),
        ("/dev/null", "it is a device"),
        ("x" * 300, "name too long"),
        ("x/" * 3000, "name too long"),
        ("a\0b", "null byte"),
        ("\ud800", r"can't encode character '\ud800'"),
    ],
)
def test_what_is_no_regular_file_is_refused_without_opening_it(read, name, said, places):
    start = time.process_time()
    with pytest.raises(InputError) as refused:
        read(places / name)
    assert said in str(refused.value)
    assert "a readable file" in str(refused.value)
    assert time.process_time() - start < 1


def test_only_as_much_is_read_as_is_allowed(tmp_path):
    path = tmp_path / "large.yaml"
    path.touch()
    os.truncate(path, 50 << 30)  # 50 GB, none of which is on disk
    with pytest.raises(InputError, match=r"at most 1,000,000 bytes \(it has 53,687,091,200\)"):
        read_text(path)
    path.write_bytes(b"#" * LARGEST_FILE)
    assert len(read_text(path)) == LARGEST_FILE
    with pytest.raises(InputError, match="at most 1,000 bytes"):
        read_text(path, 1000)


def test_a_byte_order_mark_is_no_text(tmp_path):
    for reader, content in ((read_text, "a: 1"), (read_yaml, "a: 1"), (read_json, '{"a": 1}')):
        (tmp_path / "plain").write_text(content)
        (tmp_path / "marked").write_text("\ufeff" + content)
        assert reader(tmp_path / "marked") == reader(tmp_path / "plain")


@pytest.mark.parametrize("text", ["0", "-0.0", "0e999", ".5", "1.", "1e-45", "3E+2", "1e999"])
def test_decimals_are_floats(text):
    assert plain_float(text) == float(text)
    assert math.copysign(1, plain_float(text)) == math.copysign(1, float(text))


@pytest.mark.parametrize("text", ["1e-999", "-1e-999", "0.00001e-400", "4e-324"[:1] + "e-4000"])
def test_decimals_too_small_for_a_float_are_not_zero(text, tmp_path):
    assert float(text) == 0
    for name, read in (("a.json", read_json), ("a.yaml", read_yaml)):
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name) == math.copysign(5e-324, float(text))


def test_thirty_thousand_values_of_yaml_are_the_most(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("- 1\n" * 249_000)
    start = time.process_time()
    with pytest.raises(InputError, match=r"line 30000: .*at most 30,000 names and values"):
        read_yaml(path)
    assert time.process_time() - start < 3


def test_a_place_is_looked_at_and_nothing_is_made(places):
    assert is_file(places / "text.txt")
    assert is_folder(places)
    assert not any(is_file(places / name) for name in ("pipe", ".", "nowhere", "socket"))
    assert is_folder_or_free(places)
    assert is_folder_or_free(places / "a" / "b" / "c")
    assert not is_folder_or_free(places / "text.txt")
    for path, kind, said in (
        (places / "text.txt" / "below", NotADirectoryError, "text.txt is not a folder"),
        (places / "new" / ("x" * 256), OSError, "name too long"),
        (places / "a\0b", ValueError, "null"),
    ):
        with pytest.raises(kind, match=said):
            is_folder_or_free(path)
    assert not (places / "a").exists()


@pytest.fixture
def as_nobody():
    """Act as a user without rights, also where the tests run as root, who may do everything."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_places(folder)
        (folder / "secret").mkdir(mode=0o000)
        (folder / "secret.yaml").touch(mode=0o000)
        folder.chmod(0o755)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)


def test_what_may_not_be_read_or_written_is_refused(as_nobody):
    with pytest.raises(PermissionError, match="read_only may not be written"):
        is_folder_or_free(as_nobody / "read_only" / "new" / "run")
    with pytest.raises(PermissionError, match="denied"):
        is_folder_or_free(as_nobody / "secret" / "run")
    with pytest.raises(InputError, match="Permission denied"):
        read_text(as_nobody / "secret.yaml")


@pytest.mark.parametrize(
    ("flag", "name", "said"),
    [
        ("--run_dir", "read_only/new", "read_only may not be written"),
        ("--run_dir", "secret/new", "Permission denied"),
        ("--data", "secret/text", "Permission denied"),
        ("--scaling_schedule_file", "secret/a.json", "Permission denied"),
        ("--scaling_schedule_file", "secret.yaml", "Permission denied"),
        ("--config", "secret.yaml", "Permission denied"),
    ],
)
def test_the_command_says_what_it_may_not_do(flag, name, said, as_nobody, capsys):
    assert main(["--dry_run", "--run_dir", "/tmp/run", flag, str(as_nobody / name)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert str(as_nobody) in err
