import pytest
import torch
from torch import nn

from lasgd.errors import ConfigurationError
from lasgd.training.models import BUILT_IN, StandardisedConv2d, build_model, check_model
from lasgd.training.settings import BUILT_IN_MODELS


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the given name and text into the current folder, which is a fresh one."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> None:
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import torch\nfrom torch import nn\n" + text)

    return write


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("name", "count"), [("cnn4", 391_466), ("resnet20", 269_722), ("resnet56", 853_018)])
def test_built_in_models_have_the_published_number_of_parameters(name, count, norm):
    assert parameters(build_model(name, num_classes=10, channels=3, norm=norm)) == count


def test_the_command_line_knows_the_built_in_models_by_name():
    assert tuple(sorted(BUILT_IN)) == BUILT_IN_MODELS


@pytest.mark.parametrize(("norm", "kind"), [("group", nn.GroupNorm), ("batch", nn.BatchNorm2d)])
@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_the_norm_is_the_one_asked_for_everywhere(name, norm, kind):
    modules = list(build_model(name, num_classes=10, channels=3, norm=norm).modules())
    found = [module for module in modules if isinstance(module, nn.GroupNorm | nn.BatchNorm2d)]
    assert len(found) == sum(isinstance(module, nn.Conv2d) for module in modules)
    assert all(isinstance(module, kind) for module in found)
    assert all(module.num_groups == 8 for module in found if isinstance(module, nn.GroupNorm))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 9, 32, 224])
@pytest.mark.parametrize("name", ["cnn4", "resnet20"])
def test_built_in_models_take_images_from_8_to_224_pixels(name, side, channels):
    model = build_model(name, num_classes=7, channels=channels, norm="group")
    with torch.no_grad():
        assert model(torch.randn(1, channels, side, side)).shape == (1, 7)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_logits_start_in_a_sane_range_and_every_channel_learns_from_the_second_step_on(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=10, channels=3, norm="group")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    assert 0.01 < model(images).std() < 10
    for _ in range(2):  # behind a scale of 0 the first gradient is 0
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for parameter in model.parameters():  # channels are rows
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        assert parameter.grad.flatten(1).any(1).all() if parameter.dim() > 1 else parameter.grad.all()


def test_the_same_generator_state_gives_the_same_weights():
    def made() -> list[torch.Tensor]:
        torch.manual_seed(4)
        return list(build_model("resnet20", num_classes=10, channels=3, norm="group").state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(made(), made(), strict=True))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_block_of_equal_width_starts_as_its_shortcut(norm):
    block = build_model("resnet20", num_classes=10, channels=3, norm=norm).blocks[4]
    x = torch.rand(2, 32, 8, 8)
    assert torch.equal(block(x), x)


def test_a_shortcut_that_widens_keeps_the_old_channels_and_adds_zeros():
    block = build_model("resnet20", num_classes=10, channels=3, norm="group").blocks[3]
    nn.init.zeros_(block.change[-1].weight)  # nothing but the shortcut is left
    x = torch.rand(2, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2])
    assert not out[:, 16:].any()


def test_an_unknown_model_is_named_with_the_nearest_known_one():
    with pytest.raises(
        ConfigurationError, match=r"model 'resnet21' is not known.*Did you mean 'resnet20'.*import path"
    ):
        build_model("resnet21", num_classes=10, channels=3, norm="group")


def test_an_unknown_norm_is_refused():
    with pytest.raises(ConfigurationError, match=r"norm 'layer' is not known. Known: batch, group"):
        build_model("cnn4", num_classes=10, channels=3, norm="layer")


def test_a_model_in_the_current_folder_is_found_and_the_search_path_is_as_before(module):
    import sys

    module(
        "my_own_models",
        "class Net(nn.Linear):\n    def __init__(self, num_classes): super().__init__(4, num_classes)\n",
    )
    before = list(sys.path)
    model = build_model("my_own_models:Net", num_classes=6, channels=3, norm="group")
    assert model.out_features == 6
    assert sys.path == before


def test_a_package_s_models_are_found_one_level_down(module):
    module("shop_of_models.__init__", "")
    module("shop_of_models.models", "def net(num_classes=1000): return nn.Linear(4, num_classes)\n")
    assert build_model("shop_of_models:net", num_classes=3, channels=3, norm="group").out_features == 3


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        (None, "no_such_package:net", r"no module 'no_such_package', neither installed nor in "),
        (None, "no_such_package.deep:net", r"no module 'no_such_package'"),
        ("", ":net", r"expected package.module:callable"),
        ("def network(num_classes): ...", "bad0:netwrk", r"bad0 has no 'netwrk'. Did you mean 'network'\?"),
        ("import not_there_at_all", "bad1:net", r"bad1 needs 'not_there_at_all', which is not installed"),
        ("raise OSError('disk on fire')", "bad2:net", r"importing bad2 failed: OSError: disk on fire"),
        ("def broken(:", "bad3:net", r"importing bad3 failed: SyntaxError"),
        ("def net(classes): ...", "bad4:net", r"called with num_classes= and nothing else, but .*\(classes\)"),
        ("def net(num_classes, width): ...", "bad5:net", r"nothing else, but .*missing a required argument: 'width'"),
        ("def net(num_classes): return 3", "bad6:net", r"gives a int, expected a torch.nn.Module"),
        ("def net(num_classes): raise KeyError('w')", "bad7:net", r"calling it with num_classes= failed: KeyError"),
        ("net = 7", "bad8:net", r"net is a int, not callable"),
    ],
)
def test_a_model_that_cannot_be_made_says_why(module, text, path, message):
    if text is not None:
        module(path.split(":")[0] or "unused", text)
    with pytest.raises(ConfigurationError, match=message):
        build_model(path, num_classes=10, channels=3, norm="group")


def test_a_torchvision_that_does_not_match_torch_is_told_as_such(module):
    module("mismatched_vision", "raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(ConfigurationError, match=r"torchvision does not match torch .*Install the torchvision build"):
        build_model("mismatched_vision:resnet50", num_classes=10, channels=3, norm="group")


def test_a_model_that_fits_the_data_passes_the_check_and_keeps_its_mode():
    model = build_model("cnn4", num_classes=10, channels=1, norm="batch")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_model(model, channels=1, image_size=8, num_classes=10)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_model_that_does_not_fit_the_data_is_told_before_the_first_step():
    model = build_model("cnn4", num_classes=10, channels=3, norm="group")
    with pytest.raises(ConfigurationError, match=r"cannot take the images: RuntimeError.*\(2, 1, 8, 8\)"):
        check_model(model, channels=1, image_size=8, num_classes=10)
    with pytest.raises(
        ConfigurationError, match=r"gives a tensor of shape \(2, 10\). Expected logits of shape \(2, 5\)"
    ):
        check_model(model, channels=3, image_size=8, num_classes=5)


def test_a_standardised_filter_is_used_with_mean_zero_and_length_one_whatever_its_parameters():
    torch.manual_seed(0)
    conv = StandardisedConv2d(3, 4, 3, bias=False)
    images = torch.randn(2, 3, 8, 8)
    before = conv(images)
    with torch.no_grad():
        conv.weight.mul_(torch.tensor([1.0, 2.0, 5.0, 0.5]).view(-1, 1, 1, 1)).add_(3.0)
    assert torch.allclose(conv(images), before, atol=1e-2)  # the least length shows in short filters
    unit = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)
    unit = unit / unit.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(conv(images), nn.functional.conv2d(images, unit), atol=1e-2)


def test_a_standardised_filter_of_zeros_gives_zeros_and_a_finite_gradient():
    conv = StandardisedConv2d(3, 4, 3, bias=False)
    nn.init.zeros_(conv.weight)
    out = conv(torch.randn(2, 3, 8, 8))
    out.square().sum().backward()
    assert not out.any() and conv.weight.grad.isfinite().all()


@pytest.mark.parametrize("norm, kind", [("group", StandardisedConv2d), ("batch", nn.Conv2d)])
def test_residual_networks_standardise_their_convolutions_with_group_norm_only(norm, kind):
    model = build_model("resnet20", num_classes=10, channels=3, norm=norm)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Conv2d)}
    assert kinds == {kind}
    assert sum(p.numel() for p in model.parameters()) == 269_722
