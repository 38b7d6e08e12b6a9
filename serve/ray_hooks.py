"""What Ray Serve is given to run in its own places: the choice of a replica, and of how many there are.

Ray copies these classes by value into other processes, so they hold nothing and lean on `serve.router`.
"""

from typing import Any

from ray.serve.config import AutoscalingContext
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.router import Scaling, wanted_replicas


class RouteByCall(RequestRouter):
    """Asks the call itself, which is still in the process that made it, for the order of the replicas."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Give each replica as a rank of its own, best first; the next is asked where one is full."""
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[named[name]] for name in pending_request.args[0].rank(list(named))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Tell the call where it went."""
        del result
        if pending_request.args:
            pending_request.args[0].sent(replica_id.unique_id)


class ScaleByAttainment:
    """Gives the number of replicas that `serve.router.wanted_replicas` asks for; what it takes are JSON values."""

    def __init__(self, *, least: int, most: int, slots: int):
        self._scaling, self._slots = Scaling(least=least, most=most), slots

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Sum up what the replicas recorded."""
        recorded = context.aggregated_metrics or {}
        total = {name: sum(recorded.get(name, {}).values()) for name in ("waiting", "running", "kept", "missed")}
        wanted = wanted_replicas(
            self._scaling,
            replicas=context.current_num_replicas,
            slots=self._slots,
            waiting=total["waiting"],
            running=total["running"],
            kept={True: total["kept"], False: total["missed"]},
        )
        return wanted, context.policy_state
