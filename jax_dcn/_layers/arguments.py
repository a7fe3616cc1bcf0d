"""How the layers' arguments are called."""

from __future__ import annotations

from typing import Any

# By the names of Flax's layers, and of mmcv before 1.0.
_OTHER_NAMES = {
    "in_features": "in_channels",
    "features": "out_channels",
    "out_features": "out_channels",
    "strides": "stride",
    "kernel_dilation": "dilation",
    "feature_group_count": "groups",
    "deformable_groups": "deform_groups",
    "use_bias": "bias",
}


class MmcvArguments:
    """A class that answers the names that others have for its arguments. Python refuses all other names."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
        for name in keywords:
            if name in _OTHER_NAMES:
                raise TypeError(f"{cls.__name__}: the argument {name} is called {_OTHER_NAMES[name]} here, as in mmcv")
        return super().__new__(cls)
