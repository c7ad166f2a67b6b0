"""Networks with known answers, for tests of what stands between images and metrics."""

import torch
from torch import nn

from metrics import evaluation


class MeanDetector(nn.Module):
    """A detector whose features are the mean and the first pixels of each channel, over 255."""

    name, weights_sha256, preprocessing = "inception-v3", "0" * 64, "none"
    num_features, has_classes = 6, True

    def __init__(self, name="inception-v3"):
        super().__init__()
        self.name = name
        self.seen = []  # images of each call

    def forward(self, pixels):
        self.seen.append(len(pixels))
        x = pixels.float() / 255
        return torch.cat([x.mean(dim=(2, 3)), x[:, :, 0, 0]], dim=1)

    def classify(self, pixels):
        features = self(pixels)
        return features, torch.softmax(4 * features[:, :3], dim=1)


def use_mean_detectors(monkeypatch):
    """Put a MeanDetector in place of every detector; return them by name once they are opened."""
    opened = {}

    def open_detector(name, *, device, weights):
        opened[name] = MeanDetector(name)
        return opened[name]

    monkeypatch.setattr(evaluation, "open_detector", open_detector)
    monkeypatch.setattr(evaluation, "open_similarity", lambda name, *, device, weights: SquareDistance())
    return opened


class SquareDistance:
    """A similarity with a closed form: the sum of squared differences."""

    name, weights_sha256, preprocessing = "lpips-vgg16", "1" * 64, "none"

    def __call__(self, a, b):
        return (a - b).square().sum(dim=(1, 2, 3)).float()


class LinearGenerator(nn.Module):
    """A generator without layers: w = z (or 2 z with label 1), and the image holds w, once in each corner."""

    def __init__(self, z_dim=4, c_dim=0, resolution=8, channels=3):
        super().__init__()
        self.z_dim, self.c_dim, self.img_resolution, self.img_channels = z_dim, c_dim, resolution, channels
        self.mapping, self.synthesis = _Mapping(), _Synthesis(resolution, channels)


class _Mapping(nn.Module):
    def forward(self, z, c):
        scale = 1 + c[:, 1:2] if c.shape[1] > 1 else 1
        return (scale * z)[:, None]  # [N, 1, Z]


class _Synthesis(nn.Module):
    def __init__(self, resolution, channels):
        super().__init__()
        self.resolution, self.channels = resolution, channels

    def forward(self, ws, noise_mode, force_fp32, generator):
        assert (noise_mode, generator is None) == ("random", False)
        image = ws.new_zeros(len(ws), self.channels, self.resolution, self.resolution)
        image[:, 0, 0, :ws.shape[2]] = ws[:, 0]
        return image
