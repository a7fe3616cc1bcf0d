"""Draws the results of run.py as bars: time relative to XLA's plain convolution.

python benchmarks/chart.py results.json chart.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from report import paired_ratio

TITLES = {"forward": "forward", "both": "forward and backward"}

# Colours from Okabe and Ito, which colour-blind readers tell apart.
COLOURS = {
    "jax_dcn NHWC": "#0072B2",
    "jax_dcn NCHW": "#56B4E9",
    "ONNX Runtime": "#E69F00",
    "OpenVINO": "#F0E442",
    "Paddle": "#CC79A7",
    "XLA gather": "#999999",
    "torch conv": "#009E73",
}


def draw(report: dict[str, Any], path: Path) -> None:
    """float32 and all threads; each competitor is compared with the convolution in its own data format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = report["threads"][-1]
    chosen = [m for m in report["measurements"] if (m["dtype"], m["threads"]) == ("float32", threads)]
    if not chosen:
        return
    times = {(m["direction"], m["case"], m["competitor"]): m["ms"] for m in chosen}
    cases = list(dict.fromkeys(m["case"] for m in chosen))
    directions = list(dict.fromkeys(m["direction"] for m in chosen))
    competitors = [name for name in COLOURS if any(m["competitor"] == name for m in chosen)]
    thickness = 0.85 / len(competitors)
    figure, axes = plt.subplots(
        1,
        len(directions),
        figsize=(6 * len(directions), 1.5 + 0.12 * len(cases) * len(competitors)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, direction in zip(axes[0], directions, strict=True):
        for i, name in enumerate(competitors):
            data_format = "NHWC" if name in ("jax_dcn NHWC", "XLA gather") else "NCHW"
            conv = f"XLA conv {data_format}"
            present = [case for case in cases if {(direction, case, name), (direction, case, conv)} <= times.keys()]
            ratios = [paired_ratio(times[direction, case, name], times[direction, case, conv]) for case in present]
            at = [cases.index(case) + (i - (len(competitors) - 1) / 2) * thickness for case in present]
            # From 1, since a logarithmic axis has no 0: to the left is faster than the convolution.
            axis.barh(at, [r - 1 for r in ratios], thickness, left=1, color=COLOURS[name], label=name)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel("time / time of XLA's plain convolution of the same shape")
        axis.set_title(TITLES[direction])
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(cases)), cases)
    axes[0, 0].set_ylim(len(cases) - 0.5, -0.5)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(competitors))
    processor = report["environment"]["processor"]
    figure.supxlabel(f"float32, {threads} thread{'s' * (threads > 1)}, {processor}", fontsize="small")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
