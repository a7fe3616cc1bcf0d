"""Deformable convolution for JAX."""

from jax_dcn.functional import deform_conv2d as deform_conv2d
from jax_dcn.functional import modulated_deform_conv2d as modulated_deform_conv2d
from jax_dcn.native import show_config as show_config
from jax_dcn.version import __version__ as __version__
