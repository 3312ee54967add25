"""The seam into transformers; the only folder that imports it.

Importing it registers the quantizer plug-in `moert`, through which HuggingFace's own loader reads the dense weights
and leaves the experts to moert, and the configuration by which that loader knows a pack.
"""

from __future__ import annotations

from moert.hf import packed_config, quantizer

__all__ = ["packed_config", "quantizer"]
