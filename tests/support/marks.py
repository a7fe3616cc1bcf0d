"""What many tests are parametrised by."""

import pytest

from support.cases import SUBSETS

# Dtypes and data formats do not interact, so pairs of them will do.
dtypes_and_formats = pytest.mark.parametrize(("dtype", "data_format"), [("float64", "NCHW"), ("float32", "NHWC")])

# Plain XLA is the same program for both, and slow to compile.
implementations_dtypes_and_formats = pytest.mark.parametrize(
    ("implementation", "dtype", "data_format"),
    [("native", "float64", "NCHW"), ("native", "float32", "NHWC"), ("xla", "float64", "NCHW")],
    indirect=["implementation"],
)

implementations_and_formats = pytest.mark.parametrize(
    ("implementation", "data_format"),
    [("native", "NCHW"), ("native", "NHWC"), ("xla", "NCHW")],
    indirect=["implementation"],
)

# Some of the operands. Which ones matters above the implementations, so plain XLA, slow to compile, has few.
implementations_and_subsets = pytest.mark.parametrize(
    ("implementation", "subset"),
    [
        *(("native", subset) for subset in SUBSETS),
        *(("xla", subset) for subset in SUBSETS if len(subset) in (1, 5)),
    ],
    indirect=["implementation"],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
