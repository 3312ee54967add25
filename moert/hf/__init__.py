"""The seam into transformers; the only folder that imports it.

Importing it registers the quantizer plug-in `moert`, through which HuggingFace's own loader reads the dense weights
and leaves the experts to moert.
"""

from __future__ import annotations

from moert.hf import quantizer

__all__ = ["quantizer"]
