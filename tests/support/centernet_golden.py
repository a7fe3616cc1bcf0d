"""A step of training of a narrow CenterNet, by the torch model of data/make_centernet.py.

The file holds the targets, losses, gradients and statistics; the weights follow from the names.
"""

import json
from pathlib import Path

import numpy as np

from support import models_golden

PATH = Path(__file__).parents[1] / "data" / "centernet_step.npz"
CONFIG = dict(channels=4, filters=(12, 8, 6), classes=3)
IMAGES = (2, 3, 64, 96)

# Of the first image the third and fourth object overlap, of one class; of the second the last two have one centre.
BOXES = np.array(
    [
        [[0, 0, 17, 9], [60.5, 30, 95, 63.5], [10, 20, 41, 44], [21, 25, 50, 52], [0, 0, 0, 0]],
        [[3, 40, 30, 64], [70, 2, 80, 7], [88, 55, 96, 64], [30, 10, 66, 30], [40, 5, 57, 36]],
    ]
)
LABELS = np.array([[0, 1, 2, 2, -1], [1, 0, 2, 0, 1]])


def random_state_dict(shapes):
    weights = models_golden.random_state_dict(shapes)
    # Offsets of a pixel or so.
    return {key: array * np.float32(0.2) if ".conv_offset." in key else array for key, array in weights.items()}


class Step:
    """`state_dict`, `images`, and by name the arrays `heatmap`, `values`, `losses`, `grads` and `after`."""

    def __init__(self):
        with np.load(PATH) as arrays:
            arrays = dict(arrays)
        self.state_dict = random_state_dict(json.loads(str(arrays.pop("shapes"))))
        (self.images,) = models_golden.random_inputs("centernet", [IMAGES])
        self.heatmap, self.values, self.losses = (arrays[name] for name in ("heatmap", "values", "losses"))
        self.grads, self.after = (
            {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            for prefix in ("grad:", "after:")
        )
