"""A pytest plug-in: the tests run with the extension that MOERT_EXTENSION names, and say so."""

from __future__ import annotations

import os
from pathlib import Path


def pytest_report_header() -> str:
    from moert import _C

    expected, found = Path(os.environ["MOERT_EXTENSION"]), Path(_C.__file__)
    assert found.samefile(expected), f"the tests would run with {found}, not with {expected}"
    return f"extension: {found}"
