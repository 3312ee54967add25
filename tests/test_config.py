"""Options and byte sizes: what they mean, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from moert.config import Budget, OffloadConfig, format_bytes, parse_budget
from moert.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (1, 1),
        (4096, 4096),
        (2.5e9, 2_500_000_000),
        ("4GiB", 4 * 2**30),
        ("4 gib", 4 * 2**30),
        ("512MB", 512_000_000),
        ("1.5KiB", 1536),
        (".5 GB", 500_000_000),
        ("7", 7),
        ("2TiB", 2 * 2**40),
        ("100 B", 100),
    ],
)
def test_size_is_read(value: int | float | str, nbytes: int) -> None:
    assert parse_budget(value, "host_memory") == Budget(nbytes=nbytes)


@pytest.mark.parametrize(("value", "share"), [("25%", 0.25), ("100 %", 1.0), ("0.5%", 0.005)])
def test_share_is_read(value: str, share: float) -> None:
    assert parse_budget(value, "host_memory") == Budget(share=share)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "lots",
        "4GiBs",
        "-1GB",
        "1e9",
        "0",
        0,
        -5,
        "0%",
        "101%",
        "%",
        float("nan"),
        float("inf"),
        True,
        "0.1B",
        "4 G B",
    ],
)
def test_what_is_no_size_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError, match="host_memory"):
        OffloadConfig(host_memory=value)


@pytest.mark.parametrize(
    "options",
    [
        {"io_depth": 0},
        {"predictor": ""},
        {"predictor": None},
        {"io_depth": 65},
        {"io_depth": True},
        {"policy": ""},
        {"policy": 3},
        {"direct_io": 1},
        {"preload": "yes"},
        {"cache_dir": 7},
        {"debug": None},
        {"device_memory": [1]},
    ],
)
def test_bad_option_is_refused_by_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        OffloadConfig(**options)


def test_config_is_frozen_and_lists_itself() -> None:
    config = OffloadConfig(host_memory="1GiB")
    with pytest.raises(AttributeError):
        config.host_memory = "2GiB"  # type: ignore[misc]
    as_dict = config.to_dict()
    assert as_dict.pop("quant_method") == "moert"
    assert tuple(as_dict) == OffloadConfig.option_names()
    assert OffloadConfig(**as_dict) == config


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (3 * 2**41, "6.0 TiB")]
)
def test_bytes_are_written_for_people(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text
