"""Checkpoints as files: what is read and written, and that nothing in a file runs."""

import collections
import re
import traceback

import jax.numpy as jnp
import numpy as np
import pytest
from support.processes import run_python
from support.state_dicts import normal, pack
from support.tolerances import assert_same_arrays

from jax_dcn import mmcv
from jax_dcn.mmcv import __main__ as command


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_round_trip_of_a_file(tmp_path, suffix):
    pytest.importorskip("safetensors" if suffix == ".safetensors" else "torch")
    arrays = {
        **pack(),
        "count": np.array(3),
        "half": normal(3).astype(np.float16),
        "bfloat": normal(2, 5).astype(jnp.bfloat16),
        "transposed": normal(3, 2).T,
    }
    mmcv.save_checkpoint(arrays, tmp_path / f"model{suffix}")
    assert_same_arrays(mmcv.load_checkpoint(tmp_path / f"model{suffix}"), arrays)


def test_torch_loads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    mmcv.save_checkpoint(layer.state_dict(), tmp_path / "model.pth")
    loaded = torch.load(tmp_path / "model.pth", weights_only=True)
    layer.load_state_dict(loaded["state_dict"], strict=True)
    assert_same_arrays(mmcv.load_checkpoint(tmp_path / "model.pth"), mmcv.load_checkpoint(layer.state_dict()))


@pytest.mark.parametrize("zipped", [True, False])
def test_detector_checkpoint(tmp_path, zipped):
    """Wrapped and prefixed, with other objects besides, also as torch before 1.6 wrote it."""
    torch = pytest.importorskip("torch")
    state_dict = {"backbone.layer2.0.conv2." + key: torch.from_numpy(array) for key, array in pack().items()}
    state_dict["bbox_head.weight"] = torch.zeros(3)
    checkpoint = {"meta": {"epoch": 12, "CLASSES": ("cat",)}, "state_dict": state_dict, "optimizer": {"state": {}}}
    torch.save(checkpoint, tmp_path / "detector.pth", _use_new_zipfile_serialization=zipped)
    loaded = mmcv.load_checkpoint(tmp_path / "detector.pth", prefix="backbone.")
    assert_same_arrays(loaded, pack("layer2.0.conv2."))


class Foreign:
    """An object that a checkpoint should not bring to life."""

    def __init__(self):
        self.made = True

    def __setstate__(self, state):
        raise AssertionError("a checkpoint's code ran")


def test_other_objects_stay_inert(tmp_path):
    torch = pytest.importorskip("torch")
    checkpoint = {"state_dict": {"a": torch.ones(2)}, "message_hub": Foreign(), "rng": np.float64(1)}
    torch.save(checkpoint, tmp_path / "training.pth")
    assert_same_arrays(mmcv.load_checkpoint(tmp_path / "training.pth"), {"a": np.ones(2, np.float32)})


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_does_not_run(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    checkpoint = {"state_dict": {"a": torch.ones(2)}, "meta": Malicious(tmp_path / "made")}
    torch.save(checkpoint, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bad\.pth cannot be read safely"):
        mmcv.load_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "made").exists()


class OwnDict(dict):
    pass


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (Malicious("made"), r"Trying to load unsupported GLOBAL posix\.mkdir whose module posix is blocked"),
        (collections.defaultdict(int, a=1), r"Can only SETITEM .* but got <class 'collections\.defaultdict'>"),
        (collections.deque([1]), r"Can only append to lists, but got <class 'collections\.deque'>"),
        (OwnDict(a=1), r"Can only SETITEM .* but got <class 'test_checkpoints\.OwnDict'>"),
    ],
)
def test_what_cannot_be_read_safely(tmp_path, value, cause):
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": value}, path := tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=rf"bad\.pth cannot be read safely: {cause}\.?$") as caught:
        mmcv.load_checkpoint(path)
    shown = "".join(traceback.format_exception(caught.value))
    assert "weights_only" not in shown.split("ValueError: ")[-1] and "_Inert" not in shown
    assert "set to `False`" not in shown


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", r"cannot be read safely: EOFError$"),
        ("a.pth", b"hello world", r"cannot be read safely: \w+Error$"),
        ("a.pth", b"PK\x03\x04 cut off", r"cannot be read safely: PytorchStreamReader failed"),
        ("a.safetensors", b"", r"cannot be read: .*header"),
        ("a.safetensors", b"hello world", r"cannot be read: .*header"),
    ],
)
def test_corrupt_files(tmp_path, capsys, name, content, message):
    pytest.importorskip("safetensors" if name.endswith("safetensors") else "torch")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        mmcv.load_checkpoint(tmp_path / name)
    with pytest.raises(SystemExit, match="1"):
        command.main(["convert", str(tmp_path / name), str(tmp_path / "out.pth")])
    assert re.search(rf"^error: .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "<i8", "|u1", "|b1", "<c8"])
def test_numpy_arrays_in_a_pth(tmp_path, zipped, dtype):
    torch = pytest.importorskip("torch")
    arrays = {
        "a": np.arange(6).reshape(2, 3).astype(dtype),
        "transposed": np.arange(6).reshape(2, 3).astype(dtype).T,
        "scalar": np.dtype(dtype).type(1),
        "empty": np.zeros((0, 4), dtype),
    }
    torch.save(arrays, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    expected = {key: np.array(value, np.dtype(dtype).newbyteorder("="), order="C") for key, value in arrays.items()}
    assert_same_arrays(mmcv.load_checkpoint(tmp_path / "a.pth"), expected)


class Reduced:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("damaged", [(bytes, (10**15,)), (np.dtype, ("f4",), 5), (np.dtype, ())], ids=str)
def test_damaged_numpy_arrays_stay_inert(tmp_path, damaged):
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": Reduced(*damaged)}, tmp_path / "a.pth")
    assert set(mmcv.load_checkpoint(tmp_path / "a.pth")) == {"a"}


def test_numpy_arrays_of_objects_stay_inert(tmp_path):
    torch = pytest.importorskip("torch")
    objects = np.array([None, "a"], object)
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": objects}, tmp_path / "a.pth")
    assert set(mmcv.load_checkpoint(tmp_path / "a.pth")) == {"a"}
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": np.ones(2, jnp.bfloat16)}, tmp_path / "a.pth")
    assert set(mmcv.load_checkpoint(tmp_path / "a.pth")) == {"a"}
    torch.save({"a": objects}, tmp_path / "b.pth")
    with pytest.raises(TypeError, match=r"^a is not an array of numbers but ndarray$"):
        mmcv.load_checkpoint(tmp_path / "b.pth")


def test_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    arrays = {f"backbone.{key}": array for key, array in pack("layer2.0.conv2.", "conv_offset_mask").items()}
    mmcv.save_checkpoint(arrays, tmp_path / "in.pth")
    monkeypatch.setattr(command, "_LARGE", 1000)
    command.main(["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors"), "--prefix", "backbone."])
    printed = capsys.readouterr()
    assert "3 arrays, 0.0 MiB, float32" in printed.out
    assert (
        "renamed by rule 'conv_offset_mask': 2, for example backbone.layer2.0.conv2.conv_offset_mask.weight "
        "-> backbone.layer2.0.conv2.conv_offset.weight" in printed.out
    )
    assert "in.pth" in printed.err  # the progress bar
    assert_same_arrays(mmcv.load_checkpoint(tmp_path / "out.safetensors"), pack("layer2.0.conv2."))
    command.main(["convert", str(tmp_path / "in.pth"), str(tmp_path / "same.safetensors"), "--keep-names"])
    assert_same_arrays(mmcv.load_checkpoint(tmp_path / "same.safetensors", rules=False), arrays)
    with pytest.raises(SystemExit, match="1"):
        command.main(["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.npz")])
    assert "out.npz must end in .pth, .pt or .safetensors" in capsys.readouterr().err


def test_optional_packages_are_imported_only_when_used(tmp_path):
    run_python("""
import sys
for name in "torch", "safetensors", "flax", "tqdm":
    sys.modules[name] = None
import numpy as np
from jax_dcn import mmcv
assert mmcv.convert_state_dict({"a.weight": np.ones((2, 3))})["a"]["kernel"].shape == (3, 2)
for file, package in ("a.pth", "torch"), ("a.safetensors", "safetensors"):
    try:
        mmcv.load_checkpoint(file)
    except ImportError as error:
        assert str(error) == f"{file} needs {package}: pip install {package}", error
    else:
        raise AssertionError(file)
""")
