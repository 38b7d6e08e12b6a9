"""Compare variants of a calibration on one model: loads, samples and captures once, then runs arm after arm.

python -m calibrate.ablate --model demo --text wikitext2_test.txt --preset gates --output calibrate/results/gates.json
"""

import dataclasses
import datetime
import json
import sys
from typing import Any

import jax

from calibrate.arms import PRESETS, AblateConfig, parse_arm
from calibrate.workbench import Workbench, log
from spear_jax.atomic import writing_file
from spear_jax.cli import parse_flags, run_main
from spear_jax.versions import package_versions


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Run all arms; give and write the results.

    Raises:
        ValueError: No arm, no text, or an input does not fit.
    """
    if config.preset and config.preset not in PRESETS:
        raise ValueError(f"unknown preset {config.preset!r}; known: {', '.join(PRESETS)}")
    texts = (*PRESETS.get(config.preset, ()), *config.arms)
    arms = [parse_arm(text, config.common) for text in texts]
    if not arms or not config.text:
        raise ValueError("give --preset or --arms, and --text to measure on")
    for arm in arms:
        if arm.compensate and arm.max_rank > config.spectrum:
            raise ValueError(
                f"arm {arm.name}: max_rank {arm.max_rank} is beyond --spectrum {config.spectrum}, the ranks at hand"
            )
    bench = Workbench(config)
    log(f"reference {bench.reference_scores}")
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "versions": package_versions("jax", "flax", "optax", "numpy"),
        "command": " ".join(["python -m calibrate.ablate", *sys.argv[1:]]),
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "seconds": bench.marks,
        "arms": {},
    }
    for arm in arms:
        result = bench.run(arm)
        results["arms"][arm.name] = result
        share = {name: f"{value:.2f}" for name, value in result["perplexity"].items()}
        part = {name: f"{100 * value:.1f}%" for name, value in result["recovered_of_rtn"].items()}
        own = {name: f"{100 * value:.1f}%" for name, value in result["recovered_of_base"].items()}
        bytes_ = f"{100 * result.get('overhead_of_model', 0):.3f}% of the model"
        log(f"{arm.name}: {share} | of the RTN gap {part}, of the base's {own} | {bytes_} | {result['seconds']:.0f} s")
        if config.output is not None:
            with writing_file(config.output) as stream:
                stream.write(json.dumps(results, indent=1).encode() + b"\n")
    return results


def main() -> None:
    """Run the command line."""
    run_main(lambda: _main(parse_flags(AblateConfig, prog="python -m calibrate.ablate")))


def _main(config: AblateConfig) -> None:
    results = ablate(config)
    summary = {
        name: {
            key: arm.get(key) for key in ("perplexity", "recovered_of_rtn", "recovered_of_base", "overhead_of_model")
        }
        for name, arm in results["arms"].items()
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
