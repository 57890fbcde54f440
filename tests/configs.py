"""Configurations as the commands compose them. Hydra takes a tenth of a second for one, and copying it a fortieth of
that, so equal ones are composed once per test worker."""

import copy
import functools
from pathlib import Path

from hydra import compose, initialize_config_dir

CONF = Path(__file__).resolve().parents[1] / "conf"


def composed(config, *overrides):
    return copy.deepcopy(_composed(config, overrides))


@functools.cache
def _composed(config, overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config, overrides=list(overrides))
