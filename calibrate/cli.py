"""`python -m spear_jax.calibrate`: settings, the run, its summary, and what goes wrong in one line."""

import json
import sys

import jax

from calibrate.config import CalibrateConfig, parse
from calibrate.pipeline import Outcome, calibrate
from calibrate.progress import Stages
from spear_jax.cli import run_main
from spear_jax.hosts import join


def main() -> None:
    """Run the command line."""
    run_main(lambda: run(parse(sys.argv[1:])))


def run(config: CalibrateConfig) -> None:
    """Calibrate and print a summary as one JSON object.

    Raises:
        ValueError: An input cannot be used, or the device has too little memory; says what to lower.
    """
    command = ["python", "-m", "spear_jax.calibrate", *sys.argv[1:]]
    if config.coordinator is not None:
        join(config.coordinator, num_processes=config.num_processes, process_id=config.process_id)
    try:
        with Stages() as stages:
            outcome = calibrate(config, stages=stages, command=command)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise ValueError(
            f"the device is out of memory: lower --batch-size ({config.batch_size}), --length ({config.length}) or "
            f"--sequences ({config.sequences}); what is finished is kept"
        ) from error
    if jax.process_index() == 0:
        print(json.dumps(summary(outcome)))


def summary(outcome: Outcome) -> dict[str, object]:
    """Give the figures that matter as JSON values."""
    result = outcome.result
    texts = {
        gap.text: {
            arm.label: {
                "perplexity": arm.perplexity,
                "recovered_of_rtn": gap.recovered(arm, base="rtn" if gap.arm("rtn") else "w4"),
                "recovered_of_w4": gap.recovered(arm),
            }
            for arm in gap.arms
        }
        for gap in result.gaps
    }
    return {
        "model": result.model,
        "quantizer": result.quantizer,
        "texts": texts,
        "compensator_bytes": result.budget.total("compensators"),
        "overhead_of_model": result.budget.overhead_of_model,
        "overhead_of_linears": result.budget.overhead_of_linears,
        "seconds": round(sum(timing.seconds for timing in result.timings), 1),
        "checkpoint": str(outcome.checkpoint),
        "report": str(outcome.report),
    }
