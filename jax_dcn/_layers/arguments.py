"""How the layers' arguments are called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar


class MmcvArguments:
    """A class that answers the names that others have for its arguments. Python refuses all other names."""

    # By the names of Flax's layers, and of mmcv before 1.0.
    _OTHER_NAMES: ClassVar[Mapping[str, str]] = {
        "in_features": "in_channels",
        "features": "out_channels",
        "out_features": "out_channels",
        "strides": "stride",
        "kernel_dilation": "dilation",
        "feature_group_count": "groups",
        "deformable_groups": "deform_groups",
        "use_bias": "bias",
    }

    if not TYPE_CHECKING:  # A checker would take the constructor's arguments from here.

        def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
            for name in cls._OTHER_NAMES.keys() & keywords:
                # A derived class may take other arguments.
                taken, ours = inspect.signature(cls.__init__).parameters, cls._OTHER_NAMES[name]
                if name not in taken and ours in taken:
                    raise TypeError(f"{cls.__name__}: the argument {name} is called {ours} here, as in torch and mmcv")
            return super().__new__(cls)
