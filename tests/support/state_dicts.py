"""State dicts as torch has them, and a layer for one."""

import numpy as np
from flax import nnx

import jax_dcn

C_IN, C_OUT = 4, 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pack(prefix="", offset="conv_offset", channels=27, bias=False):
    """The state dict of a Pack, v2 by default."""
    arrays = {
        f"{prefix}weight": normal(C_OUT, C_IN, 3, 3, seed=1),
        f"{prefix}{offset}.weight": 0.1 * normal(channels, C_IN, 3, 3, seed=2),
        f"{prefix}{offset}.bias": 0.1 * normal(channels, seed=3),
    }
    return arrays | ({f"{prefix}bias": normal(C_OUT, seed=4)} if bias else {})


def layer():
    """Which `pack` fills."""
    return jax_dcn.nnx.ModulatedDeformConv2dPack(C_IN, C_OUT, 3, bias=False, rngs=nnx.Rngs(0))


def messages(caplog):
    """What jax_dcn.mmcv has logged."""
    return [record.getMessage() for record in caplog.records if record.name == "jax_dcn.mmcv"]
