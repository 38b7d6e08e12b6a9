"""Every YAML file under configs/ is one that its command takes."""

from pathlib import Path

import pytest

from calibrate import config as calibrate_config
from serve.config import ServeConfig
from spear_jax.config import ModelConfig, load_yaml
from spear_jax.sharding import part_of

CONFIGS = Path(__file__).parents[1] / "configs"


def files(folder: str) -> list[str]:
    return sorted(path.name for path in (CONFIGS / folder).glob("*.yaml"))


@pytest.mark.parametrize("name", files("calibrate"))
def test_a_calibration_can_be_planned(name: str) -> None:
    config = calibrate_config.parse([str(CONFIGS / "calibrate" / name)])
    assert config.output is not None or config.model == "demo"


@pytest.mark.parametrize("name", files("serve"))
def test_a_server_takes_its_settings(name: str) -> None:
    assert load_yaml(ServeConfig, CONFIGS / "serve" / name).max_slots >= 1


@pytest.mark.parametrize("name", files("models"))
def test_an_architecture_can_be_divided(name: str) -> None:
    config = load_yaml(ModelConfig, CONFIGS / "models" / name)
    assert part_of(config, 4).intermediate_size * 4 == config.intermediate_size


def test_there_are_some() -> None:
    assert len(files("calibrate")) >= 4
    assert len(files("models")) >= 3
    assert files("serve")
