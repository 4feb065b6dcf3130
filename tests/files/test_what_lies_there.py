"""What may lie in the place of a file: every reader says so in a line, at once, and takes no memory for it."""

import json
import os
import socket
import tracemalloc
import zlib
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from blake3 import blake3
from readers import LAYERS, READERS, index_of, info_json, profile_file, try_reading, with_index

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.files import BadFile, parse_json, read_bytes
from vllm_adapmoe.printable import MAX_CHARACTERS, OneLineError, printable
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.simulate.trace import FRAME_BYTES
from vllm_adapmoe.store.pack_index import HEAD, MAGIC
from vllm_adapmoe.store.record import ALIGNMENT

pytestmark = pytest.mark.timeout(60)  # an open that waits for ever


@pytest.fixture(params=sorted(READERS))
def kind(request):
    return request.param


def test_a_sound_file_is_read(kind, tmp_path):
    READERS[kind].write(path := READERS[kind].at(tmp_path))
    assert try_reading(kind, path) == ""


def pipe(path: Path) -> str:
    os.mkfifo(path)
    return "not a regular file"


def folder(path: Path) -> str:
    path.mkdir()
    return "Is a directory"


def bound_socket(path: Path) -> str:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)
    return "No such device or address"


def device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "not a regular file"


def loop(path: Path) -> str:
    path.symlink_to(path)
    return "Too many levels of symbolic links"


def nowhere(path: Path) -> str:
    path.symlink_to(path.with_name("nothing"))
    return "No such file or directory"


def sparse(path: Path) -> str:
    with path.open("wb") as file:
        file.truncate(1 << 40)
    return ""


@pytest.mark.timeout(120)  # none is waited for, or read to its end
@pytest.mark.parametrize("place", [pipe, folder, bound_socket, device, loop, nowhere, sparse])
def test_something_else_in_its_place(kind, place, tmp_path):
    path = READERS[kind].at(tmp_path)
    said = place(path)
    message = try_reading(kind, path)
    assert message or (place is nowhere and not READERS[kind].absent)
    assert not message or said in message or (place is nowhere and READERS[kind].absent in message)
    assert not message or str(path.parent) in message


@contextmanager
def as_nobody():
    """As a user whom the mode of a file binds."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_that_may_not_be_read(kind):
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        READERS[kind].write(path := READERS[kind].at(Path(folder)))
        path.chmod(0)
        with as_nobody(), pytest.raises(OneLineError, match="Permission denied"):
            READERS[kind].read(path)


def test_folders_that_may_not_be_read(kind, tmp_path):
    READERS[kind].write(path := READERS[kind].at(tmp_path))
    tmp_path.chmod(0)
    with as_nobody(), pytest.raises(OneLineError, match="Permission denied"):
        READERS[kind].read(path)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"\xff\xfe{\0}\0", b"[]", b"{}\n", b"null", b"\n", b"[" * 100_000]
)
def test_no_such_content(kind, content, tmp_path):
    path = READERS[kind].at(tmp_path)
    path.write_bytes(content)
    try_reading(kind, path)  # a text may be anything, and a configuration empty


def test_gigabytes_of_json(kind, tmp_path):
    """As large as the reader takes, and larger."""
    path = READERS[kind].at(tmp_path)
    for size in (1 << 20, 100 << 20, 3 << 30):
        with path.open("wb") as file:
            file.write(b'{"layers": [' + b"1," * 400_000)
            file.truncate(size)
        if kind != "text" or size < 1 << 21:
            try_reading(kind, path)


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred\x1b[0m", "\u202egnirts", "half\udc80", "a" * 200])
def test_names_do_not_forge_lines(kind, name, tmp_path):
    READERS[kind].write(path := READERS[kind].at(tmp_path, name))
    assert try_reading(kind, path) == ""
    path.unlink()
    message = try_reading(kind, path)
    assert READERS[kind].absent in message
    assert not message or name.isprintable() == (name in message)


@pytest.mark.parametrize("name", ["nul\0", "x" * 300, "half\ud800"])
def test_names_that_no_file_has(kind, name, tmp_path):
    if READERS[kind].inside:
        name += "/" + READERS[kind].inside
    assert "cannot be read" in try_reading(kind, Path(f"{tmp_path}/{name}"))
    with pytest.raises(AdapMoEError, match="cannot be read"):
        ModelProfile.load("~nobody-of-that-name/x")


def test_a_message_is_one_line_of_bounded_length():
    assert printable("a b é 漢") == "a b é 漢"
    assert printable("a\nb\x1b\u2028\ud800") == "a\\nb\\x1b\\u2028\\ud800"
    long = str(AdapMoEError("x" * 10**7 + "; the remedy"))
    assert len(long) <= MAX_CHARACTERS and long.endswith("; the remedy") and printable(long) == long
    with pytest.raises(AdapMoEError, match="too large a number"):
        AdapMoEConfig.parse('{"cache_experts": ' + "9" * 5000 + "}")
    for given in ({"cache_experts": 10**5000}, {"gating": 10**5000}, [10**5000], {3: 4}):
        with pytest.raises(AdapMoEError):
            AdapMoEConfig.parse(given)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ('{"a": 1e400}', "1e400 is too large a number"),
        ('{"a": -1e999}', "too large a number"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ("[" + "1" * 5000 + "]", "too large a number"),
        ("[9223372036854775808]", "too large a number"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" + "1," * 1001 + "1]", "more than 1000 values"),
        ("{" + ",".join(f'"{key}": 1' for key in range(300)) + "}", "an object of 300 keys"),
        (b"\xff", "not UTF-8"),
        (b'\xff\xfe[\0"\0]\0', "not UTF-8"),
        ('"\0"', "Invalid control character"),
    ],
)
def test_json_that_is_refused(text, said):
    with pytest.raises(BadFile, match=said):
        parse_json(text, 1000)


def test_json_that_is_read():
    assert parse_json(b'\xef\xbb\xbf{"a": [1, -9223372036854775808, 0.5]}', 1000) == {"a": [1, -(2**63), 0.5]}
    assert parse_json('{"a": Infinity, "a": 1e999}', 1000, strict=False) == {"a": float("inf")}


def test_a_file_that_grows_is_not_followed():
    with pytest.raises(BadFile, match="grows while it is read"):  # the kernel makes its content when it is read
        read_bytes("/proc/self/status", 1 << 20)


def test_a_profile_of_many_errors_takes_little(tmp_path):
    path = tmp_path / "profile"
    profile_file(path)
    profile = json.loads(path.read_text())
    for layer in profile["layers"]:
        layer["predictions"] = [["x", "y", "z"]] * 100_000
    path.write_text(json.dumps(profile))
    assert "layers.0.predictions.0" in try_reading("profile", path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 10**12}, "num_layers"),
        ({"num_experts": 10**12}, "num_experts"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 2**63 - 1}, "top_k"),
        ({"hidden_size": -1}, "hidden_size"),
    ],
)
def test_a_profile_of_no_model(change, said, tmp_path):
    profile_file(path := tmp_path / "profile")
    profile = json.loads(path.read_text())
    profile["model"] |= change
    path.write_text(json.dumps(profile))
    with pytest.raises(AdapMoEError, match=said):
        ModelProfile.load(path)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("base_loss", 0, "base_loss"),  # of which a share is no budget
        ("base_loss", 1e300, "base_loss"),
        ("loss_scale", 1e-300, "loss_scale"),
        ("layers", [], "0 layers"),
        ("layers.0.sensitivity", 1e300, "sensitivity"),
        ("layers.0.sensitivity", -1, "sensitivity"),
        ("model.top_k", 1, "1 histograms for top-1"),
        ("layers.0.dropped.0.tokens", [0.9, 0.9], "more than all"),
        ("layers.0.dropped.0.tokens", [0.0] * 1000, "tokens"),
        ("layers.0.popularity", [0.5] * 3, "3 of 8"),
        ("layers.0.predictions.0.precision", [0.5] * 3, "3 ranks of 2"),
        ("layers.0.predictions.0.lookahead", 0, "lookahead"),
        ("heads", "x" * 2000, "heads"),
    ],
)
def test_a_profile_with_figures_that_cannot_be(place, value, said, tmp_path):
    profile_file(path := tmp_path / "profile")
    profile = json.loads(path.read_text())
    *keys, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    part = profile
    for key in keys:
        part = part[key]
    part[last] = value
    path.write_text(json.dumps(profile))
    assert said in try_reading("profile", path)


def write_trace(path: Path, *frames: bytes, **info: object) -> Path:
    head = json.dumps(info_json() | info).encode() + b"\n"
    path.write_bytes(head + b"".join(len(frame).to_bytes(4, "little") + frame for frame in frames))
    return path


def test_a_frame_that_would_fill_memory(tmp_path):
    bomb = zlib.compress(b"\0" * (100 << 20), 1)
    assert "damaged: the frame at byte" in try_reading("trace", write_trace(tmp_path / "zeros", bomb))
    size = 1 << 30  # as it may be, but for that
    header = json.dumps({"rows": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    packed = zlib.compressobj(1)
    parts = [packed.compress(len(header).to_bytes(8, "little") + header)]
    parts += [packed.compress(bytes(1 << 24)) for _ in range(size >> 24)]
    path = write_trace(tmp_path / "wide", b"".join([*parts, packed.flush()]))
    assert path.stat().st_size < 6 << 20
    tracemalloc.start()
    with pytest.raises(AdapMoEError, match="more than 268435456 bytes of arrays"):
        READERS["trace"].read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * FRAME_BYTES


def test_a_trace_of_no_model(tmp_path):
    path = tmp_path / "trace"
    for info, said in (
        ({"num_experts": [2**40] * LAYERS}, "num_experts"),
        ({"num_experts": [60_000] * 1000, "expert_bytes": [1] * 1000, "pool_of": [0] * 1000}, "more than any model"),
        ({"num_experts": []}, "num_experts"),
        ({"pool_of": [0, 0, 500]}, "pools"),
        ({"pool_of": [0, 0]}, "2 pool_of"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 6}, "top_k 6 of 5"),
        ({"format": 2}, "format 2, not 1"),
    ):
        message = try_reading("trace", write_trace(path, b"", **info))
        assert said in message and "is not a trace" in message


def test_the_older_part_of_a_trace(tmp_path):
    READERS["trace"].write(path := tmp_path / "trace")
    os.mkfifo(older := tmp_path / "trace.1")
    assert "not a regular file" in try_reading("trace", path)
    older.unlink()
    write_trace(older, model="other")
    assert "of another server" in try_reading("trace", path)


def test_a_pack_that_claims_more_than_there_is(tmp_path):
    """An index of a terabyte, in a file of that size with nothing in it: of what use is a right checksum?"""
    path = tmp_path / "pack"
    size = 1 << 40
    head = HEAD.pack(MAGIC, ALIGNMENT, size, blake3(b"").digest())
    path.write_bytes(head + blake3(head).digest())
    os.truncate(path, ALIGNMENT + size)
    assert "has an index of 1099511627776 bytes" in try_reading("pack", path)


def test_a_pack_whose_records_are_elsewhere(tmp_path):
    READERS["pack"].write(path := tmp_path / "pack")
    pack = path.read_bytes()
    index = json.loads(index_of(pack)[1])

    def said(**change: object) -> str:
        layers = [index["layers"][0] | change, *index["layers"][1:]]
        path.write_bytes(with_index(pack, json.dumps(index | {"layers": layers}).encode()))
        return try_reading("pack", path)

    assert said() == ""
    first = index["layers"][0]
    for offset in (0, -ALIGNMENT, 1 << 50, index["layers"][1]["offset"]):
        assert "outside of" in said(offset=offset)
    for offset in (ALIGNMENT + 512, "x", None):
        assert "MoE layer 0 at byte" in said(offset=offset) or "not of a pack" in said(offset=offset)
    assert "outside of" in said(digests=first["digests"] * 100_000)
    assert "no checksum" in said(digests=[])
    assert "no checksum" in said(digests=["00"])
    for shape in ([1 << 40], [1 << 62, 1 << 62], [-1], ["x"], [[]], [0.5], [1] * 100_000):
        assert said(layout=[first["layout"][0] | {"shape": shape}])
    for dtype in ("Tensor", "nothing", 5, None, "\n"):
        assert "not of a pack" in said(layout=[first["layout"][0] | {"dtype": dtype}])
    path.write_bytes(with_index(pack, json.dumps(index | {"layers": []}).encode()))
    assert "has no layer" in try_reading("pack", path)


def test_a_link_that_would_take_for_ever():
    with pytest.raises(AdapMoEError, match="link_gbps"):
        AdapMoEConfig.parse({"link_gbps": 1e-300})
