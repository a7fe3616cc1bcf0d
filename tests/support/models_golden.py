"""Feature maps of models as mmdet, BasicSR and RepPoints have them, by the torch models of data/make_models.py.

The file holds the names and shapes of every state dict and the results; the weights follow from the names.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

PATH = Path(__file__).parents[1] / "data" / "models.npz"


def random_state_dict(shapes):
    """Weights that keep feature maps at about 1 and offsets at about a pixel, the same for the same names."""
    return {key: _random(key, tuple(shape)) for key, shape in shapes.items()}


def _random(key, shape):
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    leaf = key.split(".")[-1]
    if leaf == "num_batches_tracked":
        return np.array(rng.integers(1, 1000))
    if leaf == "running_var":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if leaf == "weight" and len(shape) == 1:
        # A residual block's last scale is small, else the maps grow from block to block.
        return (rng.uniform(0.5, 1.5, shape) * (0.3 if ".bn3." in key else 1)).astype(np.float32)
    if leaf == "weight":
        return (rng.normal(size=shape) * math.sqrt(1.5 / math.prod(shape[1:]))).astype(np.float32)
    return (rng.normal(size=shape) * 0.1).astype(np.float32)


def random_inputs(name, shapes):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


class GoldenModel:
    """A model's `config` (a dict), `state_dict`, `inputs` and `outputs`."""

    def __init__(self, name):
        with np.load(PATH) as arrays:
            description = json.loads(str(arrays[name]))
            self.outputs = [arrays[f"{name}/{i}"] for i in range(description["outputs"])]
        self.config = description["config"]
        self.state_dict = random_state_dict(description["shapes"])
        self.inputs = random_inputs(name, description["inputs"])
