"""Trains CenterNet, mmdet's detector, on scenes of handwritten digits, with deformable convolutions and without.

The scenes are those of examples/scenes.py, made as they are needed. A backbone is first trained to name single digits,
as mmdet's are on ImageNet. Then two detectors begin with it: twins of the same layers, channels and kernel sizes, which
see the same scenes. The neck of one is deformable, and has parameters of its own that say where to look. Run it with

    pip install "/path/to/the/clone[examples]"
    python examples/detect.py

It prints the average precision in scenes of digits that were never trained on, and the time per step, of both, and
draws what the deformable one detects, and where it looks for one object, as detect.png. With --processes 2 the same
program trains data-parallel over two processes, on the CPU.

    python examples/detect.py --checkpoint centernet.pth image.png

draws what a CenterNet of mmdet's on ResNet-18 or 34, or one that --save saved here, detects in an image. To read a
`.pth` takes torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from scenes import CLASSES, Detections, Digits, Scenes, average_precision, load_digits, make_scenes
from tqdm import tqdm
from train_distributed import join_processes, processes_parser

from jax_dcn import mmcv
from jax_dcn.models import CenterNet, ResNet, centernet_loss, centernet_targets
from jax_dcn.plot import sampling_points

SCENE = dict(size=128, objects=(6, 9))
BATCH = 4  # scenes, of all processes together
SINGLE = dict(size=64, objects=(1, 1))  # for the backbone
SINGLES = 64  # of these in a batch

# mmdet's, of RGB from 0 to 255.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

SHOWN = 0.3  # the least score of a box that is drawn, as in mmdet
TAPS = 9  # of a 3x3 kernel

COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")


# --- the networks ---

# As in mmdet's config, but small: three stages, of which the last keeps the resolution of the second, 1/8.
BACKBONE = dict(
    type="ResNet",
    depth=18,
    base_channels=16,
    num_stages=3,
    strides=(1, 2, 1),
    out_indices=(2,),
    norm_eval=False,
    zero_init_residual=False,
)


def detector(*, use_dcn: bool, seed: int) -> CenterNet:
    return CenterNet(
        backbone=BACKBONE,
        neck=dict(
            type="CTResNetNeck",
            in_channels=64,
            num_deconv_filters=(32,),
            num_deconv_kernels=(4,),
            use_dcn=use_dcn,
        ),
        bbox_head=dict(type="CenterNetHead", num_classes=CLASSES, in_channels=32, feat_channels=32),
        data_format="NHWC",
        rngs=nnx.Rngs(seed),
    )


class Classifier(nnx.Module):
    """Of an image with one object."""

    def __init__(self, *, rngs: nnx.Rngs):
        options = {name: value for name, value in BACKBONE.items() if name != "type"}
        self.backbone = ResNet(**options, data_format="NHWC", rngs=rngs)
        self.head = nnx.Linear(self.backbone.out_channels[-1], CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # (N, H, W, 3) -> (N, CLASSES)
        return self.head(self.backbone(x)[-1].mean((1, 2)))


def normalized(images: Any) -> Any:
    """As mmdet does it, RGB from 0 to 255 with the channels last."""
    return (images - np.float32(MEAN)) / np.float32(STD)


def classification_loss(model: Classifier, batch: Scenes) -> jax.Array:
    logits = model(normalized(batch.images))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels[:, 0]).mean()


def detection_loss(model: CenterNet, batch: Scenes) -> jax.Array:
    outputs = model(normalized(batch.images))
    targets = centernet_targets(
        batch.boxes,
        batch.labels,
        num_classes=CLASSES,
        size=outputs[0].shape[1:3],
        image_size=batch.images.shape[1:3],
        data_format="NHWC",
    )
    return sum(centernet_loss(outputs, targets).values())


# --- training ---


class Trained(NamedTuple):
    model: Any  # for this process alone, in evaluation mode
    losses: list[float]
    seconds: float  # of a step, the median, without compilation and the making of scenes


def train(
    name: str,
    start: Callable[[], nnx.Module],
    loss: Callable[[Any, Scenes], jax.Array],
    batches: Iterable[Scenes],
    *,
    steps: int,
    learning_rate: float,
) -> Trained:
    """Trains on all devices of all processes, each of which computes its part of every batch.

    It is one program over all of them, so normalisations are over the whole batch, and the loss is that of one process.
    """
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    everywhere, by_image = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
    # What computes offsets learns slowly, as in Deformable DETR.
    optimizer = optax.chain(optax.adam(schedule), optax.masked(optax.scale(0.1), of_offsets))

    def begin() -> tuple[nnx.Module, nnx.Optimizer]:
        model = start()
        return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    def step(state: nnx.State, batch: Scenes) -> tuple[nnx.State, jax.Array]:
        model, optimizer = nnx.merge(structure, state)
        value, gradients = nnx.value_and_grad(loss)(model, batch)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    structure, _ = nnx.split(nnx.eval_shape(begin))
    state = jax.jit(lambda: nnx.state(begin()), out_shardings=everywhere)()
    step = jax.jit(step, out_shardings=everywhere, donate_argnums=0)
    losses, times = [], []
    progress = tqdm(batches, f"{name:10}", total=steps, unit="step", disable=jax.process_index() > 0)
    for batch in progress:
        # Every process makes the same scenes, and gives those of its own devices.
        shared = [jax.make_array_from_callback(a.shape, by_image, lambda index, a=a: a[index]) for a in batch]
        before = time.perf_counter()
        state, value = step(state, Scenes(*shared))
        losses.append(value.item())
        times.append(time.perf_counter() - before)
        progress.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    model, _ = nnx.merge(structure, jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), state))
    model.eval()
    return Trained(model, losses, float(np.median(times[1:])))


def of_offsets(state: nnx.State) -> Any:
    return jax.tree.map_with_path(lambda path, _: "conv_offset" in jax.tree_util.keystr(path), state)


def train_backbone(digits: Digits, *, steps: int, seed: int) -> Trained:
    rng = np.random.default_rng(seed)
    batches = (make_scenes(digits, SINGLES, **SINGLE, rng=rng) for _ in range(steps))

    def start() -> Classifier:
        return Classifier(rngs=nnx.Rngs(seed))

    return train("backbone", start, classification_loss, batches, steps=steps, learning_rate=5e-3)


def train_detector(digits: Digits, backbone: ResNet, *, use_dcn: bool, steps: int, seed: int) -> Trained:
    rng = np.random.default_rng(seed)
    batches = (make_scenes(digits, BATCH, **SCENE, rng=rng) for _ in range(steps))
    values = jax.tree.map(np.asarray, nnx.state(backbone))

    def start() -> CenterNet:
        model = detector(use_dcn=use_dcn, seed=seed)
        nnx.update(model.backbone, jax.tree.map(jnp.asarray, values))
        return model

    name = "deformable" if use_dcn else "plain"
    return train(name, start, detection_loss, batches, steps=steps, learning_rate=3e-3)


# --- detections ---


@nnx.jit
def predict(model: CenterNet, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return model.predict(normalized(images))


def detect_scenes(model: CenterNet, scenes: Scenes) -> Iterator[Detections]:
    for part in np.split(scenes.images, range(20, len(scenes.images), 20)):
        yield from zip(*map(np.asarray, predict(model, part)), strict=True)


def detect_image(model: CenterNet, image: np.ndarray) -> Detections:
    """Those in an RGB image of any size, as mmdet's test pipeline has them: not resized, and padded as by `padded`."""
    inside, corner = padded(image)
    boxes, scores, labels = (np.asarray(y)[0] for y in predict(model, inside[None].astype(np.float32)))
    return boxes - corner[[1, 0, 1, 0]], scores, labels


def padded(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Black on all sides, so that each is (n | 31) + 1 pixels long. And the (row, column) where the image begins."""
    size = np.array(image.shape[:2])
    target = (size | 31) + 1
    corner = target // 2 - size // 2
    (top, left), (bottom, right) = corner, target - size - corner
    return np.pad(image, ((top, bottom), (left, right), (0, 0))), corner


def config_of(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The config of the CenterNet that has these weights, one of mmdet's on ResNet-18 or 34 or the example's own.

    What the names and shapes of the weights do not tell, the strides of the stages, is mmdet's default or `BACKBONE`'s.
    """

    def entries(prefix: str) -> int:  # of a list
        return len({name.removeprefix(prefix).split(".")[0] for name in state_dict if name.startswith(prefix)})

    stages = sum(f"backbone.layer{stage}.0.conv1.weight" in state_dict for stage in (1, 2, 3, 4))
    depth = {2: 18, 3: 34}.get(entries("backbone.layer1."))
    basic = "backbone.layer1.0.conv3.weight" not in state_dict and "bbox_head.heatmap_head.2.weight" in state_dict
    if depth is None or stages < 3 or not basic:
        sys.exit("Only checkpoints of CenterNet on ResNet-18 or 34 are read here; others need CenterNet(**config)")
    neck = "neck.deconv_layers."
    kernels = [state_dict[f"{neck}{index}.conv.weight"] for index in range(1, entries(neck), 2)]
    features, channels, _, _ = state_dict["bbox_head.heatmap_head.0.weight"].shape
    return dict(
        backbone=dict(
            type="ResNet",
            depth=depth,
            stem_channels=len(state_dict["backbone.conv1.weight"]),
            base_channels=len(state_dict["backbone.layer1.0.conv1.weight"]),
            num_stages=stages,
            strides=BACKBONE["strides"] if stages == 3 else (1, 2, 2, 2),
            out_indices=(stages - 1,),
        ),
        neck=dict(
            type="CTResNetNeck",
            in_channels=state_dict[f"{neck}0.conv.weight"].shape[1],
            num_deconv_filters=[kernel.shape[1] for kernel in kernels],
            num_deconv_kernels=[kernel.shape[2] for kernel in kernels],
            use_dcn=f"{neck}0.conv.conv_offset.weight" in state_dict,
        ),
        bbox_head=dict(
            type="CenterNetHead",
            num_classes=len(state_dict["bbox_head.heatmap_head.2.weight"]),
            in_channels=channels,
            feat_channels=features,
        ),
    )


def load(path: Path) -> CenterNet:
    state_dict = mmcv.load_checkpoint(path)
    config = config_of(state_dict)
    model = nnx.eval_shape(lambda: CenterNet(**config, data_format="NHWC", rngs=nnx.Rngs(0)))
    mmcv.load_into(model, state_dict)
    model.eval()
    return model


# --- pictures ---


def draw_detections(axes: Any, image: np.ndarray, detections: Detections, names: Sequence[str]) -> None:
    axes.imshow(image.astype(np.uint8))
    for (x1, y1, x2, y2), score, label in zip(*detections, strict=True):
        if score >= SHOWN:
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white"))
            axes.text(x1, y1 - 1, f"{names[label]} {score:.2f}", color="white", fontsize=7, clip_on=True)
    axes.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5), xticks=[], yticks=[])


def draw_image(model: CenterNet, image: np.ndarray, path: Path) -> None:
    classes = model.bbox_head.num_classes
    names = COCO if classes == len(COCO) else [str(label) for label in range(classes)]
    figure = Figure(figsize=(8, 8 * image.shape[0] / image.shape[1]), dpi=150, layout="constrained")
    draw_detections(figure.subplots(), image, detect_image(model, image), names)
    figure.savefig(path)


def draw_scenes(model: CenterNet, scenes: Scenes, path: Path) -> None:
    """What is detected in some scenes, and where the deformable layer looks for the surest object of the first."""
    names = [str(label) for label in range(CLASSES)]
    figure = Figure(figsize=(12, 8.2), dpi=100, layout="constrained")
    detections = list(detect_scenes(model, scenes))
    *panels, plain, deformable = figure.subplots(2, 3).ravel()
    for axes, image, detected in zip(panels, scenes.images, detections, strict=False):
        draw_detections(axes, image, detected, names)
    image, (boxes, _, _) = scenes.images[0], detections[0]
    offset, mask = predicted_taps(model, image)
    stride = image.shape[0] // offset.shape[0]
    centre = (boxes[0, 1::-1] + boxes[0, :1:-1]) / 2  # row, column
    pixel = tuple(np.clip(np.rint(centre / stride).astype(int), 0, offset.shape[0] - 1))
    for axes, taps, weights, title in (
        (plain, np.zeros_like(offset), np.ones_like(mask), "where a plain 3x3 layer looks"),
        (deformable, offset, mask, "where the deformable one looks"),
    ):
        sampling_points(image / 255, taps, pixel, mask=weights, scale=stride, data_format="NHWC", axes=axes)
        axes.set_title(title)
    figure.savefig(path)


def predicted_taps(model: CenterNet, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The offsets (H, W, 2*TAPS) and masks (H, W, TAPS) of the neck's last deformable layer for an image."""
    *below, module, _ = model.neck.deconv_layers
    x = model.backbone(normalized(image[None]))[-1]
    for layer in below:
        x = layer(x)
    offset, mask = np.split(np.asarray(module.conv.conv_offset(x))[0], [2 * TAPS], axis=-1)
    return offset, 1 / (1 + np.exp(-mask))


def compare_twins(arguments: argparse.Namespace) -> None:
    digits, held_out = load_digits()
    steps, seed = arguments.steps, arguments.seed
    backbone = train_backbone(digits, steps=steps // 4, seed=seed).model.backbone
    twins = {
        name: train_detector(digits, backbone, use_dcn=name == "deformable", steps=steps, seed=seed)
        for name in ("plain", "deformable")
    }
    if jax.process_index() > 0:
        return
    scenes = make_scenes(held_out, arguments.scenes, **SCENE, rng=np.random.default_rng(seed))
    print(f"{'':12}parameters   AP50:95     AP50   time per step   loss at first, and at the end")
    for name, (model, losses, seconds) in twins.items():
        parameters = sum(parameter.size for parameter in jax.tree.leaves(nnx.state(model, nnx.Param)))
        both, at_half = average_precision(scenes, detect_scenes(model, scenes))
        print(
            f"{name:12}{parameters:>10,}{both:>10.1%}{at_half:>9.1%}{seconds * 1e3:>13.1f} ms"
            f"{losses[0]:>11.5f}{losses[-1]:>10.5f}"
        )
    model = twins["deformable"].model
    draw_scenes(model, Scenes(*(array[:4] for array in scenes)), arguments.output)
    print(f"Detections in new scenes: {arguments.output}")
    if arguments.save is not None:
        mmcv.save_checkpoint(mmcv.to_state_dict(model), arguments.save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[processes_parser()])
    parser.add_argument("image", nargs="?", type=Path, help="in which to detect objects")
    parser.add_argument("--checkpoint", type=Path, help="of a CenterNet, .pth or .safetensors, for the image")
    parser.add_argument(
        "--steps", type=int, default=1200, help="of each detector; the backbone takes a quarter of them"
    )
    parser.add_argument("--scenes", type=int, default=200, help="to compare by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("detect.png"), help="where to save the picture")
    parser.add_argument("--save", type=Path, help="where to save the deformable detector, .pth or .safetensors")
    arguments = parser.parse_args()
    if (arguments.image is None) != (arguments.checkpoint is None):
        parser.error("an image and a --checkpoint belong together")
    if arguments.steps < 8:
        parser.error("--steps must be at least 8, which are two of the backbone")
    if arguments.image is not None:
        try:
            image = ImageOps.exif_transpose(Image.open(arguments.image)).convert("RGB")
            model = load(arguments.checkpoint)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        draw_image(model, np.asarray(image), arguments.output)
        print(f"Detections: {arguments.output}")
        return
    join_processes(arguments)
    if BATCH % jax.device_count():
        sys.exit(f"{jax.device_count()} devices cannot share a batch of {BATCH}")
    compare_twins(arguments)


if __name__ == "__main__":
    main()
