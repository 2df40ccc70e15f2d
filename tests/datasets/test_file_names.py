"""Which files the names of a json mean: one that is clearly meant, or none; never one outside."""

import os
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import strategies as st

from datasets.file_names import find_named_files, match_paths
from tests.fuzzing import fuzzed

NFC, NFD = (unicodedata.normalize(form, "Übung 1.png") for form in ("NFC", "NFD"))


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


MEANT = {  # a name, files of the folder, the one that is meant
    "as it is": ("a b%20c.png", ["a b%20c.png", "a b c.png"], "a b%20c.png"),
    "backslash in a file's name": ("a\\b.png", ["a\\b.png", "a/b.png"], "a\\b.png"),
    "backslash": ("x\\y\\1.png", ["x/y/1.png", "1.png"], "x/y/1.png"),
    "backslash, other folder": ("images\\1.png", ["1.png"], "1.png"),
    "backslash up": ("..\\..\\media\\4\\1.png", ["1.png"], "1.png"),
    "drive": ("C:\\data\\x\\1.png", ["x/1.png"], "x/1.png"),
    "dot": ("./1.png", ["1.png"], "1.png"),
    "detour": ("x//../y/./1.png", ["y/1.png"], "y/1.png"),
    "percent": (quote("ü b/1 2.png"), ["ü b/1 2.png"], "ü b/1 2.png"),
    "percent slash": (quote("x/1.png", safe=""), ["x/1.png"], "x/1.png"),
    "blank for percent": ("1 2.png", ["1%202.png"], "1%202.png"),
    "NFC": (NFC, [NFD], NFD),
    "NFD": (f"ö/{NFD}", [f"ö/{NFC}"], f"ö/{NFC}"),
    "percent of NFD": (quote(NFD), [NFC], NFC),
    "newline": ("1.png\n", ["1.png"], "1.png"),
    "blanks": (" x /1.png ", ["x/1.png"], "x/1.png"),
    "case": ("IMG.JPG", ["img.jpg"], "img.jpg"),
    "case of two": ("IMG.JPG", ["img.jpg", "IMG.JPG"], "IMG.JPG"),
    "absolute": ("/mnt/set/images/x/1.png", ["x/1.png", "1.png"], "x/1.png"),
    "address": ("https://host/x/1.png?token=8#3", ["x/1.png"], "x/1.png"),
    "file address": ("file:///data/x/1.png", ["x/1.png"], "x/1.png"),
    "label studio": ("/data/local-files/?d=set/1.png", ["1.png"], "1.png"),
    "label studio, no folder": ("/data/local-files/?d=1.png", ["1.png"], "1.png"),
    "up": ("../other/1.png", ["1.png"], "1.png"),
}


@pytest.mark.parametrize("case", MEANT)
def test_the_file_that_is_meant(tmp_path, case):
    name, files, expected = MEANT[case]
    folder = touch(tmp_path / "images", *files)
    touch(tmp_path, "1.png", "other/1.png")
    named = find_named_files([name, name], folder, "a.json")
    assert named.names == [expected] * 2
    assert (named.message == "") == (name == expected)
    if name != expected:
        assert named.message.startswith("a.json: 1 file names are not as in ")
        assert repr(name) in named.message and repr(expected) in named.message
        assert "\n" not in named.message


NOT_CLEAR = {  # names, files, what each means
    "one for two": (["x/1.png", "y/1.png", "2.png"], ["1.png", "2.png"], [None, None, "2.png"]),
    "taken": (["1.png", "old/1.png"], ["1.png"], ["1.png", None]),
    "taken by itself": (["./1.png", "old/1.png"], ["1.png"], ["1.png", None]),
    "two alike": (["IMG.png", "2.png"], ["img.PNG", "img.png", "2.png"], [None, "2.png"]),
    "a folder": (["z\\x", "2.png"], ["x/1.png", "2.png"], [None, "2.png"]),
    "missing": (["x/9.png", "2.png"], ["x/1.png", "2.png"], [None, "2.png"]),
    "nothing": (["/", "..", ".", "\0", "\ud800", " ", "2.png"], ["2.png"], [None] * 6 + ["2.png"]),
}


@pytest.mark.parametrize("case", NOT_CLEAR)
def test_what_is_not_clear_is_missing(tmp_path, case):
    names, files, expected = NOT_CLEAR[case]
    folder = touch(tmp_path / "images", *files)
    named = find_named_files(names, folder, "a.json")
    for name, file in zip(named.names, expected, strict=True):
        if file is None:
            assert name.isprintable() and not (folder / name).is_file()
        else:
            assert name == file
    assert f"{expected.count(None)} files are not in {folder}, such as" in named.message


@pytest.mark.parametrize("name", ["a.png", "../1.png", "x\\9.png", "line\nbreak.png"])
def test_none_is_there(tmp_path, name):
    touch(tmp_path, "1.txt", "images/b.png")
    with pytest.raises(ValueError, match="none of the 2 images of a.json is there") as error:
        find_named_files([name, "other.png"], tmp_path / "images", "a.json")
    line = str(error.value)
    assert repr(name) in line and "'b.png'" in line and "\n" not in line


pieces = st.sampled_from(["a", "B", "..", ".", "", "1.png", "2.png", "%2e%2e", "C:", " ", "\n"])
paths = st.lists(st.tuples(pieces, st.sampled_from("/\\")), min_size=1, max_size=6).map(
    lambda parts: "".join(piece + slash for piece, slash in parts)[:-1]
)


@fuzzed(names=st.lists(paths | st.text(max_size=8), min_size=1, max_size=6))
def test_no_name_leads_out_of_the_folder(tmp_path_factory, names):
    root = tmp_path_factory.getbasetemp() / "fuzzed"
    folder = touch(root / "images", "1.png", "a/1.png", "a/B/2.png", "first.png")
    touch(root, "1.png", "2.png", "a/1.png")
    named = find_named_files(["first.png", *names], folder, "a.json")
    assert "\n" not in named.message
    for name in named.names:
        path = os.path.normpath(folder / name)
        assert path.startswith(f"{folder}{os.sep}") and name.isprintable()


def test_ends_of_paths():
    names = ["x/1.png", "y/1.png", "z\\7.png", "/data/?d=set/8.png", NFC, "9.png"]
    given = ["/r/x/1.png", "/r/q/1.png", "/r/z/7.png", "/r/p/7.png", "/r/8.png", f"/r/{NFD}"]
    found = match_paths(map(Path, given), names)
    assert {str(path): value for path, value in found.items()} == {
        "/r/x/1.png": ("x/1.png", "x/1.png"),
        "/r/z/7.png": ("z\\7.png", "z/7.png"),
        "/r/p/7.png": ("z\\7.png", "7.png"),
        "/r/8.png": ("/data/?d=set/8.png", "8.png"),
        f"/r/{NFD}": (NFC, NFD),
    }
