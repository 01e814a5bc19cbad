"""Run a recipe: `python train.py recipe=ccs`. Everything else is composed from `conf/`."""

import os
import sys
from pathlib import Path

# Hydra then raises composition errors, so that they can be explained below.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlkit.cli import explain, prepare, short_name
from mlkit.errors import MlkitError
from mlkit.run import train

CONF = Path(__file__).resolve().parent / "conf"
sys.path.insert(0, str(CONF.parent))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run the composed recipe."""
    return train(cfg)


if __name__ == "__main__":
    OmegaConf.register_new_resolver("short_name", short_name)
    try:
        sys.argv[1:] = prepare(sys.argv[1:], CONF)
        main()
    except (HydraException, OmegaConfBaseException, MlkitError, OSError) as error:
        sys.exit(explain(error, sys.argv[1:], CONF))
