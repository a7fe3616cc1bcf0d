"""What the CUDA kernels are to reach on an H100 or H200 in bfloat16: ratios of times that were measured in turn."""

from __future__ import annotations

from typing import Any, NamedTuple

from report import markdown, paired_ratio

OWN, CONVOLUTION, TORCHVISION = "jax_dcn NHWC", "plain convolution", "torchvision"
MODE = "bfloat16"  # torchvision computes in float16 there


class Goal(NamedTuple):
    """For the time of one competitor relative to that of another."""

    case: str
    batch: int
    direction: str
    competitors: tuple[str, str]
    bound: str  # "at most" or "at least"
    value: float

    def met(self, ratio: float) -> bool:
        return ratio <= self.value if self.bound == "at most" else ratio >= self.value

    def ratio(self, measurements: list[dict[str, Any]]) -> float | None:
        """None if one of the two was not measured, or failed."""
        key = dict(case=self.case, batch=self.batch, direction=self.direction, mode=MODE, build="this")
        found = [m for m in measurements if key.items() <= m.items() and "milliseconds" in m]
        times = {m["competitor"]: m["milliseconds"] for m in found}
        if not times.keys() >= set(self.competitors):
            return None
        return paired_ratio(*(times[competitor] for competitor in self.competitors))


def slower(case: str, batch: int, direction: str, other: str, times: float) -> Goal:
    return Goal(case, batch, direction, (OWN, other), "at most", times)


def faster(case: str, batch: int, direction: str, other: str, times: float) -> Goal:
    return Goal(case, batch, direction, (other, OWN), "at least", times)


GOALS = (
    slower("r50_c4_76", 16, "forward", CONVOLUTION, 1.5),
    faster("r50_c4_76", 16, "forward", TORCHVISION, 6),
    slower("r50_c4_76", 16, "both", CONVOLUTION, 4),
    faster("r50_c4_76", 16, "both", TORCHVISION, 6),
    Goal("r50_c4_76", 16, "both", ("deterministic grad_x", "grad_x"), "at most", 1.5),
    slower("r50_c4", 1, "forward", CONVOLUTION, 2),
    faster("r50_c4", 1, "forward", TORCHVISION, 3),
    faster("r50_c4", 1, "both", TORCHVISION, 3),
    *(
        faster(case, 16, direction, TORCHVISION, 4)
        for case in ("r50_c3", "r50_c5", "edvr_m", "x101", "depthwise")
        for direction in ("forward", "both")
    ),
)


LEGEND = """Goals for an H100 or H200, in bfloat16; torchvision's times are in float16. measured: the median, over the
rounds, of the ratio of two times that were measured in turn. A goal that is missed fails nothing."""


def judged(measurements: list[dict[str, Any]]) -> str:
    """A table of the goals, and what came of them."""
    rows = []
    for goal in GOALS:
        ratio = goal.ratio(measurements)
        verdict = "not measured" if ratio is None else "met" if goal.met(ratio) else "missed"
        row = [goal.case, str(goal.batch), goal.direction, " / ".join(goal.competitors), f"{goal.bound} {goal.value:g}"]
        rows.append([*row, "" if ratio is None else f"{ratio:.3f}", verdict])
    return LEGEND.replace("\n", " ") + "\n\n" + markdown(["case", "batch", "", "times", "goal", "measured", ""], rows)
