"""Results and gradients of mmcv 2.2.0's own operators, computed in float64."""

import json
import pathlib

import numpy as np

from support.cases import OPERANDS, Case

_PATH = pathlib.Path(__file__).parents[1] / "data" / "mmcv_ops.npz"


def _load():
    with np.load(_PATH) as file:
        arrays = dict(file)
    cases = {}
    while (prefix := f"c{len(cases)}/") + "cfg" in arrays:
        values = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        cfg = json.loads(str(values.pop("cfg")))
        case = Case(
            f"c{len(cases)}-v{cfg['version']}-offsets-{cfg['offsets']}",
            batch=values["x"].shape[0],
            c_in=values["x"].shape[1],
            c_out=values["weight"].shape[0],
            size=values["x"].shape[2:],
            kernel=tuple(cfg["kernel_size"]),
            stride=tuple(cfg["stride"]),
            padding=tuple(cfg["padding"]),
            dilation=tuple(cfg["dilation"]),
            groups=cfg["groups"],
            deform_groups=cfg["deform_groups"],
            mask="mask" in values,
            bias="bias" in values,
        )
        cases[case] = values
    return cases


_CASES = _load()
CASES = tuple(_CASES)


def operands(case, dtype):
    return {name: value.astype(dtype) for name, value in _CASES[case].items() if name in OPERANDS}


def cotangent(case, dtype):
    return _CASES[case]["gy"].astype(dtype)


def result(case):
    return _CASES[case]["y"]


def gradients(case):
    return {key.removeprefix("grad_"): value for key, value in _CASES[case].items() if key.startswith("grad_")}
