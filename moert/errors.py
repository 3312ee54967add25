"""Every error moert raises on purpose.

MoertError
  ConfigError(ValueError)               an option that cannot be honoured
  UnsupportedModelError(TypeError)      a model whose experts moert cannot run, and why
  CapacityError(RuntimeError)           a budget or a machine that is too small, with the numbers
  CorruptFileError(ValueError)          a checkpoint that contradicts itself, or changed while it was in use
  TransferError(OSError)                a read or copy the operating system refused
  KernelUnavailableError(RuntimeError)  a compute path this machine does not have

PolicyError(RuntimeError)               a cache policy of one's own broke its contract
"""

from __future__ import annotations


class MoertError(Exception):
    """Base of all errors raised by moert; its message says what happened, with the numbers, and what to do."""


class ConfigError(MoertError, ValueError):
    """An option is malformed, contradicts another one, or asks for what this machine does not have."""


class UnsupportedModelError(MoertError, TypeError):
    """The model has no experts, or experts whose layout moert does not know."""


class CapacityError(MoertError, RuntimeError):
    """A tier is too small for what it must hold at once."""


class CorruptFileError(MoertError, ValueError):
    """A checkpoint file is malformed, incomplete, or was changed while it was in use."""


class TransferError(MoertError, OSError):
    """The operating system failed a read or a write; `errno` and `filename` are kept where it gave them."""


class KernelUnavailableError(MoertError, RuntimeError):
    """A compute path was asked for that this machine or build does not offer."""


class PolicyError(RuntimeError):
    """A cache policy from outside the tree failed, or named a victim that cannot leave.

    It is no `MoertError`: after those a step has been put in order, and here only the next use of the model does that.
    """
