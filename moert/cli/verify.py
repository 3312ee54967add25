from __future__ import annotations


def verify() -> int:
    return 0
