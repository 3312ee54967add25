"""Headers of a pack's files: a bit that has turned, and what contradicts itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pack_support import make_pack

import moert
from moert.errors import CorruptFileError
from moert.runtime.pack_file import (
    CHECKSUM,
    HEADER_CHECKSUM,
    NO_CHECKSUM,
    _with_seal,
    checksum,
    read_pack_file,
    read_sealed,
    sealed_header,
)

FIRST = "experts-00000.safetensors"
DENSE = "model-00001-of-00001.safetensors"

Header = dict[str, Any]


@pytest.fixture
def pack(tiny_olmoe: Path, tmp_path: Path) -> Path:
    make_pack(tiny_olmoe, tmp_path / "pack", "int8")
    return tmp_path / "pack"


@pytest.mark.parametrize("name", [FIRST, DENSE])
def test_a_flipped_bit_anywhere_in_a_header_is_found(name: str, pack: Path, tmp_path: Path) -> None:
    image = (pack / name).read_bytes()
    end = 8 + int.from_bytes(image[:8], "little")
    damaged = tmp_path / name
    for offset in range(end):
        raw = bytearray(image[:end])
        raw[offset] ^= 1 << offset % 8
        damaged.write_bytes(raw)
        os.truncate(damaged, len(image))
        with pytest.raises(CorruptFileError):
            read_sealed(damaged)


def rewrite(path: Path, change: Callable[[Header], object]) -> None:
    """Change a header, as nobody does by accident: its checksum is that of the changed one."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    metadata = header.pop("__metadata__")
    del metadata[HEADER_CHECKSUM]
    tensors = [
        (name, one["dtype"], one["shape"], one["data_offsets"][1] - one["data_offsets"][0])
        for name, one in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    ]
    path.write_bytes(sealed_header(tensors, metadata) + raw[end:])


def edit(key: str, change: Callable[[str], str]) -> Callable[[Header], object]:
    def edited(header: Header) -> None:
        header["__metadata__"][key] = change(header["__metadata__"][key])

    return edited


def swap(header: Header) -> None:
    one, other = header["experts.00002"], header["experts.00003"]
    header["experts.00002"], header["experts.00003"] = other, one


def test_a_header_may_be_changed_on_purpose(pack: Path) -> None:
    before = (pack / FIRST).read_bytes()
    rewrite(pack / FIRST, lambda _: None)
    assert (pack / FIRST).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit(CHECKSUM, lambda text: text.rpartition(",")[0]), ["7 checksums for 8 experts"]),
        (edit(CHECKSUM, lambda text: NO_CHECKSUM + text[32:]), ["metadata contradict themselves"]),
        (edit("record", lambda text: text.replace('"offset":0', '"offset":4096')), ["do not lie where they belong"]),
        (edit("num_experts", lambda _: "7"), ["metadata contradict themselves"]),
        (edit("layer", lambda _: "none"), ["metadata contradict themselves"]),
        (swap, ["record of expert 2 is not where it belongs"]),
        (edit("module", lambda text: text.replace("mlp", "other")), ["has the experts of", "not of"]),
        (edit("weight_format", lambda _: "int4"), ["is of another pack", "as int4"]),
    ],
    ids=["checksums", "none", "layout", "experts", "layer", "order", "module", "format"],
)
def test_what_contradicts_itself_is_refused(change: Callable[[Header], object], words: list[str], pack: Path) -> None:
    rewrite(pack / FIRST, change)
    with pytest.raises(CorruptFileError) as refusal:
        moert.load(pack)
    for word in (FIRST, *words):
        assert word in str(refusal.value)


def test_records_begin_at_whole_blocks(pack: Path) -> None:
    raw = (pack / FIRST).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = raw[8:end].rstrip() + b" "
    blank = _with_seal(len(text).to_bytes(8, "little") + text, NO_CHECKSUM)
    (pack / FIRST).write_bytes(_with_seal(blank, checksum(memoryview(blank))) + raw[end:])
    with pytest.raises(CorruptFileError, match=r"8 records from byte \d+ for 8 experts"):
        read_pack_file(pack / FIRST)
