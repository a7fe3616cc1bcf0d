"""What the tests share.

cases              geometries worth a test, their operands, and the library and the definition called on these
marks              parametrisations by implementation, dtype, data format and operands
state_dicts        state dicts as torch has them
strategies         any geometry, for hypothesis
formats            NCHW and NHWC
oracle             the operator and its gradients by their definition
golden             numbers of mmcv's operators
models_golden      numbers of others' models
centernet_golden   a step of training of a detector
tolerances         how far a result may be from the exact one
processes          Python in a process of its own
programs           what XLA's GPU compiler dumps
benchmark_reports  what benchmarks/gpu.py reports, made up
"""
