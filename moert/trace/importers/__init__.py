"""Readers of other programs' routing traces, one a file; see `moert.trace.importers.base`."""
