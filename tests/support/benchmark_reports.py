"""What benchmarks/gpu.py reports, made up."""

import gpu

ENVIRONMENT = dict(
    processor="a processor",
    cores=16,
    load_average=0.1,
    commit="abc",
    uncommitted_changes=False,
    config=["jax_dcn 0"],
    gpu="a GPU",
    card="its name, its driver",
    versions={"torch": "2"},
)


def measurement(competitor, build="this", **more):
    entry = dict(case="r50_c4_76", batch=16, direction="both", mode="bfloat16", competitor=competitor, build=build)
    return entry | more


def benchmark_report(*more, **changed):
    measurements = [
        measurement(gpu.OWN, milliseconds=[2.0, 2.0], host_milliseconds=[0.1, 0.1], error=1e-3),
        measurement(gpu.OWN, build="baseline", milliseconds=[4.0, 4.0], host_milliseconds=[0.1, 0.1], error=1e-3),
        measurement("plain convolution", milliseconds=[1.0, 1.0], host_milliseconds=[0.1, 0.1]),
        measurement("torchvision", milliseconds=[8.0, 8.0], host_milliseconds=[0.1, 0.1], error=1e-3),
        *more,
    ]
    builds = {"this": ENVIRONMENT, "baseline": ENVIRONMENT}
    report = {"few_tiles": True, "left_out": [], "under_way": None, "measurements": measurements, "builds": builds}
    return report | changed
