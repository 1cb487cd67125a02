"""The models of the recipe: two residual networks and a plain one, or anybody's by import path.

They take images (B, C, H, W) from 8x8 to 224x224 (the last feature map is averaged) and give logits (B, num_classes).
Nothing downloads weights.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from lasgd.errors import ConfigurationError, unknown

GROUPS = 8
LEAST_SQUARED_LENGTH = 1e-4
"""Added to a filter's squared length, so that one of zeros divides nothing by zero."""

Norm = Callable[[int], nn.Module]  # channels -> normalisation
NORMS: dict[str, Norm] = {"group": lambda channels: nn.GroupNorm(GROUPS, channels), "batch": nn.BatchNorm2d}


def build_model(name: str, *, num_classes: int, channels: int, norm: str = "group") -> nn.Module:
    """A new model, its weights drawn from torch's global generator.

    `name`: `resnet20`, `resnet56`, `cnn4`, or an import path `package.module:callable`, which is called with
    num_classes= and nothing else (`channels` and `norm` are then the callable's affair).

    Raises ConfigurationError where there is no such model or it cannot be made.
    """
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if ":" in name:
        return _imported(name, num_classes)
    if name not in BUILT_IN:
        raise ConfigurationError(
            f"{unknown('model', name, BUILT_IN)} Any other model: an import path package.module:callable, "
            "such as torchvision:resnet50."
        )
    return BUILT_IN[name](num_classes, channels, NORMS[norm])


def check_model(model: nn.Module, *, channels: int, image_size: int, num_classes: int) -> None:
    """Shows the model two blank images, without gradients and in evaluation mode; leaves its mode as it was.

    Raises ConfigurationError where it cannot take them or does not give (2, num_classes) logits.
    """
    was_training = model.training
    shape = (2, channels, image_size, image_size)
    expected = f"Expected logits of shape (2, {num_classes}) for images of shape {shape}."
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(shape))
    except Exception as error:  # somebody else's code
        raise ConfigurationError(f"the model cannot take the images: {_said(error)}. {expected}") from error
    finally:
        model.train(was_training)
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigurationError(f"the model gives {got}. {expected}")


def check_single_images(model: nn.Module, *, channels: int, image_size: int) -> None:
    """Shows a copy of the model one blank image in training mode, where its BatchNorm may lack values to normalise.

    Raises ConfigurationError where it cannot take it. Leaves torch's generator as it was.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(model).train()(torch.zeros(1, channels, image_size, image_size))
    except Exception as error:  # somebody else's code, and a GPU's may not run here: the first local step will tell
        if "more than 1 value per channel" not in str(error):
            return
        raise ConfigurationError(
            f"--batch-size: the model cannot train on one image at a time: {_said(error)}. BatchNorm normalises over "
            "a batch: take a --batch-size of at least 2, or a model without it, as the built-in ones are with "
            "--norm group"
        ) from error


class CNN4(nn.Sequential):
    """Four 3x3 convolutions to 32, 64, 128, 256 channels with strides 2, 2, 2, 1; made for measuring, not for accuracy.

    391,466 parameters for 10 classes of RGB.
    """

    def __init__(self, num_classes: int, channels: int, norm: Norm) -> None:
        widths, strides = (channels, 32, 64, 128, 256), (2, 2, 2, 1)
        layers: list[nn.Module] = []
        for before, width, stride in zip(widths, widths[1:], strides, strict=False):
            layers += [_conv3x3(before, width, stride), norm(width), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))
        _initialise(self)


class ResNet(nn.Module):
    """The residual network of 6n+2 layers for small images; about 0.27 million parameters for n = 3, 0.85 for n = 9.

    Source: K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition" (2016), section 4.2. Three
    stages of n blocks with 16, 32 and 64 channels; shortcuts without parameters (their option A). Most blocks
    start as their shortcut, see `_Block`. With GroupNorm the convolutions are standardised.
    """

    def __init__(self, n: int, num_classes: int, channels: int, norm: Norm) -> None:
        super().__init__()
        conv = StandardisedConv2d if isinstance(norm(16), nn.GroupNorm) else nn.Conv2d
        self.stem = nn.Sequential(_conv3x3(channels, 16, 1, conv), norm(16), nn.ReLU(inplace=True))
        blocks = [_Block(16, 16, 1, norm, conv) for _ in range(n)]
        for before, width in ((16, 32), (32, 64)):
            blocks += [_Block(before, width, 2, norm, conv)]
            blocks += [_Block(width, width, 1, norm, conv) for _ in range(n - 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) for images (B, C, H, W)."""
        return self.head(self.blocks(self.stem(images)))


class _Block(nn.Module):
    """Two convolutions and a shortcut. Starts as the shortcut alone where that carries every channel.

    The last normalisation's scale is then 0 at first; without that the first local steps at a large learning rate take
    the network into a plateau, from which it recovers late. Source: P. Goyal et al., "Accurate, Large Minibatch SGD"
    (2017), section 5.1. Not where channels are new: shortcut and change would both be 0 there, and the gradient of a
    ReLU at 0 is 0, so that these channels would never learn.
    """

    def __init__(self, before: int, width: int, stride: int, norm: Norm, conv: type[nn.Conv2d]) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = width - before
        self.change = nn.Sequential(
            _conv3x3(before, width, stride, conv),
            norm(width),
            nn.ReLU(inplace=True),
            _conv3x3(width, width, 1, conv),
            norm(width),
        )
        if not self.new_channels:
            nn.init.zeros_(self.change[-1].get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        if self.new_channels:  # option A: every second pixel, and zeros for the new channels
            kept = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return functional.relu(self.change(x) + kept)


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters are used with mean 0 and length 1, whatever their parameters' mean and length.

    Source: S. Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization" (2019),
    arXiv 1903.10520. Made for GroupNorm, which takes the scale out again: with it training on small batches is about
    as quick as with BatchNorm, without it far slower.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As Conv2d's, (B, C, H, W) to (B, D, H', W')."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        length = torch.sqrt(variance * self.weight[0].numel() + LEAST_SQUARED_LENGTH)
        return self._conv_forward(input, (self.weight - mean) / length, self.bias)


def _conv3x3(before: int, width: int, stride: int = 1, conv: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    return conv(before, width, 3, stride=stride, padding=1, bias=False)


def _initialise(model: nn.Module) -> None:
    """He's initialisation; normalisations start as the identity, as torch makes them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)


BUILT_IN: dict[str, Callable[[int, int, Norm], nn.Module]] = {
    "cnn4": CNN4,
    "resnet20": lambda num_classes, channels, norm: ResNet(3, num_classes, channels, norm),
    "resnet56": lambda num_classes, channels, norm: ResNet(9, num_classes, channels, norm),
}


# Models by import path


def _imported(name: str, num_classes: int) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"model {name!r}: expected package.module:callable")
    with _current_folder_importable():
        make = _find(name, module_name, attribute)
        if not callable(make):
            raise ConfigurationError(f"model {name!r}: {attribute} is a {type(make).__name__}, not callable")
        _check_takes_num_classes(name, make)
        try:
            model = make(num_classes=num_classes)
        except Exception as error:  # somebody else's code
            raise ConfigurationError(f"model {name!r}: calling it with num_classes= failed: {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model {name!r}: gives a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _find(name: str, module_name: str, attribute: str) -> object:
    module = _import(name, module_name)
    if hasattr(module, attribute):
        return getattr(module, attribute)
    where, public = module_name, [key for key, value in vars(module).items() if key[0] != "_" and callable(value)]
    if hasattr(module, "__path__") and importlib.util.find_spec(f"{module_name}.models") is not None:
        models = _import(name, f"{module_name}.models")
        if hasattr(models, attribute):
            return getattr(models, attribute)
        where = f"{module_name} and {module_name}.models"
        public += [key for key, value in vars(models).items() if key[0] != "_" and callable(value)]
    nearest = str(unknown("", attribute, public)).rpartition(" Did you mean ")
    hint = f" Did you mean {nearest[2]}" if nearest[1] else ""
    raise ConfigurationError(f"model {name!r}: {where} has no {attribute!r}.{hint}")


def _import(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            said = f"there is no module {missing!r}, neither installed nor in {os.getcwd()}"
        else:
            said = f"{module_name} needs {missing!r}, which is not installed"
        raise ConfigurationError(f"model {name!r}: {said}") from error
    except Exception as error:  # somebody else's code
        if "torchvision::" in str(error):
            raise ConfigurationError(
                f"model {name!r}: the installed torchvision does not match torch {torch.__version__} ({_said(error)}). "
                "Install the torchvision build made for this torch: the same source, the matching version."
            ) from error
        raise ConfigurationError(f"model {name!r}: importing {module_name} failed: {_said(error)}") from error


def _check_takes_num_classes(name: str, make: Callable[..., object]) -> None:
    try:
        signature = inspect.signature(make)
    except ValueError:  # some callables written in C have none
        return
    try:
        signature.bind(num_classes=10)
    except TypeError as error:
        raise ConfigurationError(
            f"model {name!r}: is called with num_classes= and nothing else, but its signature is {signature} ({error})"
        ) from error


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """An installed command does not look for modules in the current folder; a model of one's own is often there."""
    folder = os.getcwd()
    sys.path.append(folder)  # last: a file here never hides an installed package
    try:
        yield
    finally:
        if folder in sys.path:
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
