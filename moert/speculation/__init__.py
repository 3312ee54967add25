"""Speculative decoding over offloaded experts: how long drafts may be."""

from __future__ import annotations

from moert.speculation.assisted import govern
from moert.speculation.governor import LENGTHS, Governor

__all__ = ["LENGTHS", "Governor", "govern"]
