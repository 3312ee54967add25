from __future__ import annotations


def doctor() -> int:
    return 0
