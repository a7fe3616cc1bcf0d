"""The two data formats, by the names of the arrays. Nothing is shared with jax_dcn.

Every array is an image but the weight, which is OIHW with NCHW and HWIO with NHWC, and the bias.
"""

DATA_FORMATS = ("NCHW", "NHWC")

_NHWC_OF_NCHW = {"weight": (2, 3, 1, 0), "bias": (0,)}
_NCHW_OF_NHWC = {"weight": (3, 2, 0, 1), "bias": (0,)}


def to_nhwc(array, name="x"):
    return array.transpose(_NHWC_OF_NCHW.get(name, (0, 2, 3, 1)))


def to_nchw(array, name="x"):
    return array.transpose(_NCHW_OF_NHWC.get(name, (0, 3, 1, 2)))


def in_format(data_format, operands):
    """NCHW operands by name, in the data format."""
    if data_format == "NCHW":
        return dict(operands)
    return {name: to_nhwc(operand, name) for name, operand in operands.items()}
