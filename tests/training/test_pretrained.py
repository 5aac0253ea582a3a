"""The pretrained weights and the layers that are made of them."""

import io
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from defect_detection import PipelineError
from defect_detection.training import network, pretrained
from defect_detection.training.network import keras

# What PyTorch makes of `_picture` with efficientnet-lite-pytorch 0.1.0 and these weights: the mean
# of each channel, and all channels of one place, of block 4 and of block 7.
EXPECTED = np.load(__file__.replace("test_pretrained.py", "pretrained.npz"))


def _picture() -> np.ndarray:
    y, x = np.mgrid[:64, :96]
    return (127 + 80 * np.sin(x / 5) * np.cos(y / 7) + 40 * (x > y))[np.newaxis, ..., np.newaxis]


def _outputs(pictures: np.ndarray) -> list[np.ndarray]:
    blocks = network._pretrained(pictures.shape[1:], 8)
    outputs = [blocks.get_layer(f"block{number}_add").output for number in (4, 7)]
    made = keras.Model(blocks.input, outputs)
    return [one.numpy() for one in made(pictures.astype(np.float32))]


def test_layers_give_what_the_source_gives():
    for number, found in zip((4, 7), _outputs(_picture()), strict=True):
        np.testing.assert_allclose(found.mean((0, 1, 2)), EXPECTED[f"mean{number}"], atol=1e-4)
        np.testing.assert_allclose(found[0, 2, 3], EXPECTED[f"place{number}"], atol=1e-4)


def test_layers_give_what_pytorch_gives():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    lite = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed"
    )
    from importlib.util import find_spec
    from pathlib import Path

    folder = Path(find_spec(pretrained.PACKAGE).submodule_search_locations[0])
    source = lite.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=str(folder / pretrained.FILE)
    ).eval()
    picture = _picture()
    x = torch.tensor((picture - 127) / 128, dtype=torch.float32).permute(0, 3, 1, 2)
    found = _outputs(picture)
    with torch.no_grad():
        x = torch.nn.functional.relu6(source._bn0(source._conv_stem(x.repeat(1, 3, 1, 1))))
        for number, block in enumerate(source._blocks[:8]):
            x = block(x)
            if number in (4, 7):
                expected = x.permute(0, 2, 3, 1).numpy()
                np.testing.assert_allclose(found[number == 7], expected, atol=1e-4)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package")
    with pytest.raises(PipelineError, match="no_such_package, which holds.*'make setup'"):
        pretrained._content()


def test_another_file_is_refused_before_it_is_opened(monkeypatch, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"not the weights")
    monkeypatch.setattr(pretrained, "FILE", str(tmp_path / "weights.pth"))
    monkeypatch.setattr(pretrained, "_read", pytest.fail)
    pretrained.weights.cache_clear()
    with pytest.raises(PipelineError, match=r"weights.pth is not the file of .* 0.1.0"):
        pretrained.weights()
    monkeypatch.setattr(pretrained, "FILE", str(tmp_path / "gone.pth"))
    with pytest.raises(PipelineError, match=r"gone.pth cannot be read \(No such file"):
        pretrained.weights()


class _Runs:
    """Runs a function when it is unpickled without restrictions."""

    def __reduce__(self):
        return print, ("this must not be printed",)


def test_nothing_in_the_file_can_run(capsys):
    file = io.BytesIO()
    for value in (1, 2, 3, OrderedDict(weight=_Runs())):
        pickle.dump(value, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="print is not part of a dictionary"):
        pretrained._read(file)
    assert capsys.readouterr().out == ""
