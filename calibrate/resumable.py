"""A stage of training that goes on where it was after a kill, and ends the same."""

import dataclasses
from collections.abc import Callable
from typing import Any

from calibrate.progress import Stages
from calibrate.student import Params
from calibrate.train import CurvePoint, Standing, Trainer
from calibrate.workdir import Key, WorkDirectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """The end of a stage of training: what was best on held-out text, and the losses on the way."""

    params: Params
    curve: tuple[CurvePoint, ...]


def train_resumably(
    stage: str,
    params: Params,
    make_trainer: Callable[[], Trainer],
    *,
    work: WorkDirectory,
    key: Key,
    stages: Stages,
) -> Trained:
    """Train from `params`, saving what is needed to go on at every evaluation; what is finished is only read.

    Raises:
        TrainingDiverged: A loss or gradient is not finite; what was saved stays.
        OSError: The disk is full; what was saved before stays.
    """
    saved = work.load(stage, key)
    if saved is not None:
        stages.resumed(stage, saved.values["seconds"])
        return Trained(params=saved.tree(params), curve=_curve(saved.values))
    trainer = make_trainer()
    steps, resume, unfinished = trainer.config.steps, None, work.load(f"{stage} state", key)
    if unfinished is not None:
        state = unfinished.tree(trainer.start(params), prefix="state.")
        resume = Standing(state, unfinished.tree(params, prefix="best."), _curve(unfinished.values))
        stages.resumed(stage, resume.curve[-1].seconds, what=f"goes on from step {int(state.step)} of {steps}")

    def keep(standing: Standing) -> None:
        point = standing.curve[-1]
        stages.say(
            f"{stage}: step {point.step} of {steps}, loss {point.loss:.4f}, held-out KL {point.held_out_kl:.4f}, "
            f"hidden error {point.held_out_hidden:.4f}"
        )
        if point.step:
            arrays = {"state": standing.state, "best": standing.best}
            work.save(f"{stage} state", key, arrays, curve=_values(standing.curve))

    with stages.stage(stage) as report:
        end = trainer.run(params, resume=resume, on_point=keep, progress=report)
    if end.curve[-1].step < steps:
        stages.say(f"{stage}: stopped early, the last {trainer.config.patience} evaluations were no better")
    work.save(stage, key, end.best, seconds=stages.seconds[stage], curve=_values(end.curve))
    work.remove(f"{stage} state", key)
    return Trained(params=end.best, curve=end.curve)


def _curve(values: dict[str, Any]) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(**point) for point in values["curve"])


def _values(curve: tuple[CurvePoint, ...]) -> list[dict[str, float]]:
    return [dataclasses.asdict(point) for point in curve]
