"""Checkpoints of mmcv's models: read, renamed, laid out for Flax, loaded into a module, and written back.

    state_dict = load_checkpoint("detector.pth", prefix="backbone.")
    load_into(model, state_dict)

A state dict here is flat and mmcv's: dotted names, and PyTorch's layouts. torch and safetensors are needed only by the
files of their formats, Flax only by what fills its modules. On the command line,

    python -m jax_dcn.mmcv convert in.pth out.safetensors

`jax_dcn.mmcv.nn` has the parts of which ports are made, for Flax's nnx, and `compare` runs a port beside its original.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jax_dcn.mmcv.checkpoint import StateDict as StateDict
from jax_dcn.mmcv.checkpoint import load_checkpoint as load_checkpoint
from jax_dcn.mmcv.checkpoint import save_checkpoint as save_checkpoint
from jax_dcn.mmcv.comparison import Comparison as Comparison
from jax_dcn.mmcv.comparison import compare as compare
from jax_dcn.mmcv.convert import StateDictError as StateDictError
from jax_dcn.mmcv.convert import convert_state_dict as convert_state_dict
from jax_dcn.mmcv.convert import load_into as load_into
from jax_dcn.mmcv.convert import load_parts as load_parts
from jax_dcn.mmcv.convert import to_state_dict as to_state_dict

if TYPE_CHECKING:
    from jax_dcn.mmcv import nn as nn
else:  # for which every name would exist

    def __getattr__(name: str) -> Any:
        if name == "nn":  # which needs Flax
            return importlib.import_module("jax_dcn.mmcv.nn")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
