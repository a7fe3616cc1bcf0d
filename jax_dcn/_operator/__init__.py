"""The operator below the public functions, whose operands have been checked. One way down, each using those after it:

differentiation  reverse mode by rules of its own, or any mode by those of the primitives
primitives       what is computed, and its derivatives
batching         `vmap` of a primitive
partitioning     a primitive on the devices of a mesh
lowering         what a primitive becomes on a platform: a kernel, by `native`, or plain XLA, by `reference`
native           the native modules, their handlers, and how these are called
reference        the operator in plain jax.numpy
operands         names and axes of the arrays
geometry         sizes
compat           what differs between versions of jax
"""
