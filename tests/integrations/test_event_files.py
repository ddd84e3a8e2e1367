"""Event files of TensorBoard: checksums, cuts, flipped bits, and every form that a scalar is written in."""

from __future__ import annotations

import struct
from contextlib import closing
from pathlib import Path

import pytest

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.columns import Point
from model_checkpoint.errors import FormatError, UnsupportedValueError
from model_checkpoint.integrations import event_files, import_tensorboard

SAMPLES = Path(__file__).parent / "samples"
EVENTS = "events.out.tfevents.1700000000.host.1.0"


def test_the_checksum_is_crc32c() -> None:
    """The values of RFC 3720, B.4, and of the usual check."""
    assert event_files.crc32c(b"123456789") == 0xE3069283
    assert event_files.crc32c(bytes(32)) == 0x8A9136AA
    assert event_files.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert event_files.crc32c(bytes(range(32))) == 0x46DD794E
    assert event_files.crc32c(b"") == 0


def test_an_event_file_that_is_cut_off_anywhere_counts_as_far_as_it_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (SAMPLES / "torch" / EVENTS).read_bytes()
    every = repr(list(event_files.read_scalars(SAMPLES / "torch" / EVENTS)))
    path, counts = tmp_path / "cut", []
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found = list(event_files.read_scalars(path))
        assert every.startswith(repr(found)[:-1])
        counts.append(len(found))
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 10)
    assert not caplog.records


def test_an_event_file_with_a_flipped_bit_anywhere_ends_there_with_a_warning(tmp_path: Path) -> None:
    whole = (SAMPLES / "torch" / EVENTS).read_bytes()
    every = repr(list(event_files.read_scalars(SAMPLES / "torch" / EVENTS)))
    path = tmp_path / "flipped"
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        found: list[Point] = []
        with pytest.raises(
            FormatError, match=r"flipped: the (length of the )?record at byte [\d,]+ fails its checksum"
        ):
            found.extend(event_files.read_scalars(path))
        assert every.startswith(repr(found)[:-1])


def record(content: bytes) -> bytes:
    head = struct.pack("<Q", len(content))
    return b"".join(
        part + struct.pack("<I", event_files._masked(part)) for part in (head, content)
    )  # the checksums are tested above, on files of others


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


def value_event(value: bytes) -> bytes:
    return record(b"\x09" + struct.pack("<d", 5.0) + b"\x10\x03" + field(5, field(1, value)))


SCALARS = field(9, field(1, field(1, b"scalars")))


@pytest.mark.parametrize(
    ("tensor", "number"),
    [
        (b"\x08\x01" + field(4, struct.pack("<f", 0.5)), 0.5),  # TensorFlow 2: the bytes of a float
        (b"\x08\x01\x12\x00" + field(5, struct.pack("<f", 0.5)), 0.5),
        (b"\x08\x01\x2d" + struct.pack("<f", 0.5), 0.5),  # not packed
        (b"\x08\x02" + field(4, struct.pack("<d", 0.1)), 0.1),
        (b"\x08\x03" + field(4, struct.pack("<i", -7)), -7.0),
        (b"\x08\x03" + field(7, b"\xf9" + b"\xff" * 8 + b"\x01"), -7.0),
        (b"\x08\x09" + field(10, b"\x80\x01"), 128.0),
        (b"\x08\x09\x50\x07", 7.0),
        (b"\x08\x0a" + field(11, b"\x01"), 1.0),
        (b"\x08\x13" + field(13, b"\x80\x70"), 0.5),  # a half, by its bits
        (b"\x08\x01" + field(4, struct.pack("<ff", 0.5, 0.5)), None),
        (b"\x08\x07" + field(8, b"text"), None),
        (b"", None),
    ],
)
def test_tensors_that_hold_one_number_are_scalars(tensor: bytes, number: float | None, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(value_event(field(1, b"tag") + field(8, tensor) + SCALARS))
    expected = [] if number is None else [("tag", number, 3, 5.0)]
    assert list(event_files.read_scalars(tmp_path / "f")) == expected


def test_tensors_of_other_plugins_are_no_scalars(tmp_path: Path) -> None:
    """TensorFlow may name the plugin with the first value of a tag only."""
    tensor = field(8, b"\x08\x01" + field(4, struct.pack("<f", 0.5)))
    other = field(9, field(1, field(1, b"hparams")))
    (tmp_path / "f").write_bytes(
        value_event(field(1, b"h") + other + tensor)
        + value_event(field(1, b"h") + tensor)
        + value_event(field(1, b"s") + SCALARS + tensor)
        + value_event(field(1, b"s") + tensor)
    )
    assert [point[0] for point in event_files.read_scalars(tmp_path / "f")] == ["s", "s"]


@pytest.mark.parametrize(
    "event", [b"\xff", b"\x0b", b"\x2a\x7f", b"\x09\x00\x00\x00\x00\x00\x00\xf8\x7f", b"\xff" * 12]
)
def test_a_record_that_is_no_event_ends_the_file(event: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(record(event))
    with pytest.raises(FormatError, match="the record at byte 0 is no event"):
        list(event_files.read_scalars(tmp_path / "f"))


def test_a_name_that_no_database_stores_is_refused(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / EVENTS).write_bytes(value_event(field(1, b"a\0b") + b"\x15" + struct.pack("<f", 1.0)))
    url = f"sqlite:///{tmp_path}/imported.db"
    with pytest.raises(UnsupportedValueError, match="metric name"):
        import_tensorboard(tmp_path / "logs", url)
    with closing(EnhancedDatabaseConnection(url)) as database:
        assert not database.query("SELECT id FROM experiments")
