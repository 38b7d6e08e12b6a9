"""Sums of a row-parallel product's parts over devices, with what comes after them: gate, B, residual, next norm."""

from pallas_kernels.peer_reduce.api import Reduction, peer_reduce, row_parallel
from pallas_kernels.peer_reduce.inbox import Inbox, PeerLostError, empty_inbox
from pallas_kernels.peer_reduce.operands import PeerCompensator, prepare

__all__ = [
    "Inbox",
    "PeerCompensator",
    "PeerLostError",
    "Reduction",
    "empty_inbox",
    "peer_reduce",
    "prepare",
    "row_parallel",
]
