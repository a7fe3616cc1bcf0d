"""Hypothesis: any geometry, and how examples are chosen.

They do not depend on chance. JAX_DCN_HYPOTHESIS_EXAMPLES asks for more of them.
"""

import math
import os

from hypothesis import settings
from hypothesis import strategies as st

from support.cases import Case

SETTINGS = settings(
    max_examples=int(os.environ.get("JAX_DCN_HYPOTHESIS_EXAMPLES", 25)), derandomize=True, deadline=None
)


@st.composite
def geometries(draw):
    def pair(smallest, largest):
        return tuple(draw(st.integers(smallest, largest)) for _ in "hw")

    kernel, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 4), pair(1, 3)
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    groups, deform_groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return Case(
        "random",
        batch=draw(st.integers(0, 3)),
        c_in=math.lcm(groups, deform_groups) * draw(st.integers(1, 5)),
        c_out=groups * draw(st.integers(1, 6)),
        size=tuple(n + draw(st.integers(0, 4)) for n in smallest),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        deform_groups=deform_groups,
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
    )
