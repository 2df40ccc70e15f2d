"""Torch7 files: all that Lua writes is read as it was, and nothing else is read at all."""

import os
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.torch7.describe import describe
from pipeline.torch7.reader import MAX_DEPTH, LuaFunction, Torch7Object, read_torch7, walk
from tests.fuzzing import fuzzed
from tests.pipeline.torch7.torch7_writer import CODES, Function, Storage, Tensor, memory, written
from tests.real_data import TORCH7, needs

SMALL = [f"reader/{name}.t7" for name in ("closure", "misc", "number", "string", "tensor")]
SMALL += ["reader/unreferenced.t7", "multipathnet/transformer.t7"]
needs_originals = needs(TORCH7)

DTYPES = dict(zip(CODES, (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
                          torch.float16, torch.float32, torch.float64), strict=True))  # fmt: skip
HUGE = 2**31 - 1


@pytest.fixture
def load(tmp_path):
    """Reads the bytes of a file."""

    def read(content: bytes) -> object:
        (tmp_path / "file.t7").write_bytes(content)
        return read_torch7(tmp_path / "file.t7")

    return read


@pytest.fixture(params=[8, 4], ids=["8-byte longs", "4-byte longs"])
def store(request, load):
    """Writes an object and reads it."""
    return lambda value, **options: load(written(value, long_bytes=request.param, **options))


def refused(load, content: bytes, reason: str) -> None:
    """The file is refused in one line with its path and an offset inside it, for that reason."""
    with pytest.raises(ValueError, match=reason) as error:
        load(content)
    message = str(error.value)
    assert "file.t7: " in message and "\n" not in message
    assert 0 <= int(message.split("byte ")[1].split(":")[0]) <= len(content)


def test_plain_values_and_tables(store):
    """A table is a list if its keys count from 1."""
    plain = {"yes": True, "no": False, "half": 0.5, "whole": -3, "big": 1e300, "é": "ü\n "}
    for value in ("", True, 7, plain, [3, "a", [1.5]]):
        assert store(value) == value
    assert store(b"\xff\x00").encode("utf-8", "surrogateescape") == b"\xff\x00"
    assert store({"a": 1, "b": None}) == {"a": 1} and store({2: "b", 1: "a"}) == ["a", "b"]
    for table in ({}, {0: "z", 1: "a"}, {1: "a", 3: "c"}, {1: "a", "n": 1}, {1.5: "a"}, {True: 4}):
        assert store(table) == table and isinstance(store(table), dict)


@pytest.mark.parametrize("cuda", ["", "Cuda"])
@pytest.mark.parametrize("element", CODES)
def test_every_element_type(load, store, element, cuda):
    dtype = DTYPES[element]
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    # Of longs, what 4 bytes hold.
    high, low = (2**31 - 1, -(2**31)) if element == "Long" else (limits.max, limits.min)
    values = [3, high, low, 10, 32, 0]
    storage = Storage("Cuda" if cuda and element == "Float" else cuda + element, values)
    tensor, alone = store([Tensor(storage, (2, 3), (3, 1)), storage])
    assert tensor.dtype == alone.dtype == dtype and tensor.shape == (2, 3)
    assert tensor.flatten().tolist() == alone.tolist() == torch.tensor(values, dtype=dtype).tolist()
    extremes = {"Long": [2**63 - 1, -(2**63), 2**53 + 1]}
    extremes["Double"] = [float("inf"), float("-inf"), float("nan"), 1e-310]
    if values := extremes.get(element):
        assert repr(load(written(Storage(element, values))).tolist()) == repr(values)


@given(
    long_bytes=st.sampled_from([8, 4]),
    padding=st.integers(0, 8),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_strided_views_share_their_storage(tmp_path_factory, long_bytes, padding, sizes, data):
    strides = [data.draw(st.integers(0, 6)) for _ in sizes]
    reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    offset = data.draw(st.integers(1, 5))
    storage = Storage("Float", list(range(offset + reach + data.draw(st.integers(0, 3)))))
    # The text before it moves the storage to any position relative to multiples of 4.
    value = ["x" * padding, Tensor(storage, sizes, strides, offset), storage]
    path = tmp_path_factory.mktemp("strided") / "file.t7"
    path.write_bytes(written(value, long_bytes=long_bytes))
    _, view, whole = read_torch7(path)
    expected = torch.tensor(storage.values).float().as_strided(sizes, strides, offset - 1)
    assert torch.equal(view, expected)
    whole[offset - 1] = 77  # the storage is one, and the file is not changed
    assert view.flatten()[0] == 77 and view.data_ptr() % 4 == 0
    assert read_torch7(path)[2][offset - 1] == offset - 1


def test_empty_tensors_and_large_strides_of_single_elements(store):
    five, nothing = Storage("Int", [5, 6]), Tensor(None, (), (), element="Cuda")
    empty, no_storage = store([Tensor(Storage("Double", [1]), (), ()), nothing])
    assert empty.numel() == no_storage.numel() == 0
    assert (empty.dtype, no_storage.dtype) == (torch.float64, torch.float32)
    assert store(Tensor(five, (1, 2), (HUGE, 1))).tolist() == [[5, 6]]
    assert store(Tensor(five, (3, 4), (0, 0))).tolist() == [[5] * 4] * 3


@pytest.mark.parametrize("version", [None, "V 1", "V 2"])  # the first files have none
def test_shared_and_self_referencing_objects(store, version):
    shared, tensor = [1, 2], Tensor(Storage("Float", [1, 2]), (2,), (1,))
    outer = {"a": shared, "b": shared, "t": tensor, "u": tensor}
    outer["self"] = outer
    ring = [outer]
    ring.append(ring)
    ring.append({"up": ring})
    module = Torch7Object("nn.Loop", {"list": ring, "none": Torch7Object("x.Y", {})})
    module.fields |= {"me": module, "fields": Torch7Object("nn.Sequential", {1: "a"})}
    read = store(module, version=version)
    assert isinstance(read, Torch7Object) and read.typename == "nn.Loop"
    assert read.fields["me"] is read
    assert read.fields["fields"].fields == {1: "a"} and read.fields["none"].fields == {}
    items = read.fields["list"]
    assert isinstance(items, list) and items[1] is items and items[2]["up"] is items
    assert items[0]["self"] is items[0] and items[0]["a"] is items[0]["b"] == [1, 2]
    assert items[0]["t"] is items[0]["u"]


@pytest.mark.parametrize("type_", [6, 7, 8])
def test_functions_are_skipped(store, type_):
    code, inner = b"\x1bLJ\n" * 5, ["shared"]
    function = Function(code, [{"name": "up", "value": inner}], type_)
    if type_ != 6:  # those have no index to be called by
        function.variables.append({"name": "me", "value": function})
    read = store({"f": function, "inner": inner, "after": 1})
    assert isinstance(read["f"], LuaFunction) and read["f"].num_bytes == len(code)
    assert read["inner"] == ["shared"] and read["after"] == 1


@pytest.mark.parametrize("long_bytes", [8, 4])
def test_every_truncation_is_refused(load, long_bytes):
    tensor = Tensor(Storage("Short", [1, 2, 3]), (3,), (1,))
    value = {"t": tensor, "m": Torch7Object("nn.M", {"x": [True, 0.5, "text"]})}
    content = written(value, long_bytes=long_bytes)
    for length in range(len(content)):
        refused(load, content[:length], "byte")
    refused(load, content + b"\0", "too many")


def floats(values: list, *layout: object) -> bytes:
    """A file with a tensor of these sizes and strides, perhaps from an offset."""
    return written(Tensor(Storage("Float", values) if values else None, *layout))


def binary(*parts: int | bytes) -> bytes:
    return b"".join(p if isinstance(p, bytes) else struct.pack("<i", p) for p in parts)


def named(name: str, code: str, *numbers: int) -> bytes:
    return binary(4, 1, 3, b"V 1", len(name), name.encode()) + struct.pack(code, *numbers)


HOSTILE = [
    (floats([1, 2], (3,), (1,)), "outside its storage of 2"),
    (floats([1, 2], (2,), (1,), 0), "outside its storage"),
    (floats([1, 2], (2,), (-1,), 2), "impossible"),
    (floats([1, 2], (-2,), (1,)), "impossible"),
    (floats([1], (HUGE,), (0,)), "impossible"),
    (floats([1], (HUGE,) * 5 + (0,), (1,) * 6), "impossible"),
    (floats([], (2,), (1,)), "outside its storage of 0"),
    (floats([1], (1,) * 65, (1,) * 65), "65 dimensions"),
    (floats([1, 2], (2,), (1,)).replace(b"FloatT", b"ShortT"), "of a int16 tensor is not one"),
    (written(Torch7Object("nn.Linear", 3)), "nn.Linear is not stored as a table"),
    (written(Torch7Object("not a name", {})), "expected the name of a class, got 'not a name'"),
    (written({float("nan"): "b"}), "a key must be text or a number, got nan"),
    (written({None: 1}), "a key must be text or a number, got None"),
    (b"", "empty"),
    (b"PK\x03\x04 a zip file", "the type of an object is 0 to 8, got 67324752"),
    (binary(9), "0 to 8, got 9"),
    (binary(2, HUGE), "expected 2147483647 bytes, and 0 are left"),
    (binary(5, 2), "a boolean is 0 or 1, got 2"),
    (binary(3, 1, HUGE), "a table of 2147483647 entries"),
    (binary(3, 0, 0), "the index of an object is at least 1, got 0"),
    (binary(3, 1, 1, 3, 1, 5, 0), "a key must be text or a number, got dict"),
    (binary(3, 1, 2, 5, 1, 5, 0, 5, 1, 5, 0), "True is twice"),
    (binary(3, 1, 1, 2, 0, 4, 1), "object 1 is a table, not a class"),
    (named("torch.FloatStorage", "<q", 2**62), "expected .* bytes"),
    (named("torch.FloatStorage", "<q", -1), "a storage of -1 elements"),
    (named("torch.FloatTensor", "<i", HUGE), "a tensor of 2147483647 dimensions"),
    (named("torch.FloatTensor", "<iqii", 0, 1, 4, 1), "contains itself"),
    (named("torch.FloatTensor", "<iqiii", 0, 1, 3, 2, 0), "of a float32 tensor is not one"),
    (b"4\n1\n3\nV 1\n18\ntorch.ShortStorage\n1\n4\n", "Torch7's ascii mode is not supported"),
    (b"1\n3.25\n", "ascii mode is not supported; in Lua, load the file and save it again"),
]


@pytest.mark.parametrize(("content", "reason"), HOSTILE)
def test_hostile_bytes_are_refused(load, content, reason):
    refused(load, content, reason)


def nested(depth: int, *, in_keys: bool = False) -> bytes:
    """The start of a table in a table in a table, of one entry each."""
    return b"".join(binary(3, n, 1, *([] if in_keys else [5, 1])) for n in range(1, depth + 1))


def test_depth_has_a_limit_that_is_not_pythons(load):
    value, depth = load(nested(MAX_DEPTH) + binary(5, 0)), 0
    assert len(describe(value).splitlines()) == MAX_DEPTH + 1
    while value is not False:
        value, depth = value[True], depth + 1
    assert depth == MAX_DEPTH
    for in_keys in (True, False):
        started = time.process_time()
        refused(load, nested(100_000, in_keys=in_keys), "nested deeper than")
        assert time.process_time() - started < 5


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch7(tmp_path / "none.t7")
    os.mkfifo(tmp_path / "pipe.t7")
    for path in (tmp_path, tmp_path / "pipe.t7"):
        with pytest.raises(ValueError, match="not a file"):
            read_torch7(path)


NUMBERS = (*range(10), -1, 255, 65536, HUGE, -(2**31))
ADDED = st.one_of(
    st.binary(max_size=9),
    st.sampled_from(NUMBERS).map(lambda number: struct.pack("<i", number)),
    st.sampled_from([*NUMBERS, 2**62, -(2**63)]).map(lambda number: struct.pack("<q", number)),
)
EDIT = st.tuples(st.floats(0, 1), st.integers(0, 32), ADDED)  # where, and how many bytes go


@needs_originals
@fuzzed(
    name=st.sampled_from(SMALL),
    edits=st.lists(EDIT, max_size=4),
    length=st.just(1.0) | st.floats(0, 1),
)
def test_damaged_files_are_read_or_refused(tmp_path_factory, name, edits, length):
    """No other error, no long time and no long text; a crash would end the tests."""
    content = (TORCH7 / name).read_bytes()
    for where, removed, added in edits:
        at = int(where * len(content))
        content = content[:at] + added + content[at + removed :]
    content = content[: round(length * len(content))]
    path = tmp_path_factory.getbasetemp() / "damaged.t7"
    path.write_bytes(content)
    started = time.process_time()
    try:
        value = read_torch7(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "byte " in str(error)
        assert "\n" not in str(error) and len(str(error)) < len(str(path)) + 500
    else:
        for _, item in walk(value):
            if isinstance(item, torch.Tensor) and item.numel():
                item[(0,) * item.ndim].item(), item[(-1,) * item.ndim].item()
        assert len(describe(value).encode()) < 100 * len(content) + 1000
    assert time.process_time() - started < 2


@needs_originals
def test_original_files_of_all_types():
    read = read_torch7(TORCH7 / "reader" / "misc.t7")
    assert read["self"] is read and read["shared_a"] is read["shared_b"]
    assert read["str"] == "héllo" and read["special"][:2].tolist() == [float("inf"), -float("inf")]
    assert read["long"].tolist() == [-(2**53), 2**53]
    assert read["byte"].tolist() == [0, 128, 255] and read["char"].tolist() == [-128, 0, 127]
    numbers = torch.arange(1, 25).view(4, 6).float()
    assert torch.equal(read["float"], numbers) and torch.equal(read["transposed"], numbers.T)
    assert torch.equal(read["narrowed"], numbers[:, 1:4])
    assert torch.equal(read["selected"], numbers[2])
    read["float"][2, 1] = -1
    assert read["selected"][1] == read["narrowed"][2, 0] == read["transposed"][1, 2] == -1
    closure = read_torch7(TORCH7 / "reader" / "closure.t7")
    assert closure["after"] == "still readable" and isinstance(closure["f"], LuaFunction)
    with pytest.raises(ValueError, match="misc_ascii.t7: .*ascii mode is not supported"):
        read_torch7(TORCH7 / "reader" / "misc_ascii.t7")


def test_tensors_are_in_memory_once_at_most(tmp_path):
    """A mapped one is not read at all; a converter that copies all needs twice the file's size."""
    size = 2**25
    values = np.zeros(size // 4, np.float32) + 1
    one = Tensor(Storage("Float", [1]), (1,), (1,))
    # The storage is the file's end: the file's length says where it is.
    aligned = -len(written(["", one])) % 4
    large = Tensor(Storage("Float", values), values.shape, (1,))
    files = {"small": one, "mapped": ["x" * aligned, large], "moved": ["x" * (aligned + 1), large]}
    for name, value in files.items():
        (tmp_path / name).write_bytes(written(value))
    _, mapped, moved = memory("read_torch7(path)", *map(tmp_path.joinpath, files))
    assert mapped < 0.1 * size
    assert moved < 1.1 * size
