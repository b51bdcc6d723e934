from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import vgg16

from ldm.errors import UserError
from ldm.models.perceptual import efficientnet, lpips


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG16 with random weights: the structure is what is compared."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    features = vgg16(weights=None).features
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, path)
    return path


def pictures(seed: int) -> Tensor:
    return torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equals_torchmetrics(weights: Path):
    peer = _LPIPS(pretrained=True, net="vgg", pnet_rand=True, use_dropout=True).eval()
    state = torch.load(weights, weights_only=True)
    slices = [peer.net.slice1, peer.net.slice2, peer.net.slice3, peer.net.slice4, peer.net.slice5]
    for part in slices:
        for name, layer in part.named_children():
            if hasattr(layer, "weight"):
                layer.load_state_dict({k: state[f"features.{name}.{k}"] for k in ("weight", "bias")})
    ours = lpips(str(weights))
    a, b = pictures(0), pictures(1)
    with torch.no_grad():
        torch.testing.assert_close(ours(a, b), peer(a, b).flatten(), rtol=1e-5, atol=1e-5)
    assert ours(a, a).abs().max() < 1e-6


def test_the_gradient_reaches_the_reconstruction_alone(weights: Path):
    ours, a = lpips(str(weights)), pictures(0).requires_grad_()
    ours.train()
    assert not ours.training
    ours(a, pictures(1)).sum().backward()
    assert a.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in ours.parameters())


def test_missing_and_wrong_files_are_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"VGG16's weights in .*none.pth: fetch .*`ldm fetch vgg16 .*perceptual=effi"):
        lpips(str(tmp_path / "none.pth"))
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"wrong.pth is not torchvision's VGG16: features.0.weight"):
        lpips(str(tmp_path / "wrong.pth"))
    (tmp_path / "text.pth").write_text("<html>")
    with pytest.raises(UserError, match=r"text.pth is no file of weights that can be read safely"):
        lpips(str(tmp_path / "text.pth"))


def test_efficientnet_s_distance_orders_pictures_as_people_do():
    """The same picture, blurred a little, blurred a lot, another one."""
    from torch.nn.functional import avg_pool2d, interpolate

    distance, a = efficientnet(), interpolate(pictures(0)[:, :, :8, :8], size=(64, 64), mode="bicubic").clamp(-1, 1)
    other = interpolate(pictures(1)[:, :, :8, :8], size=(64, 64), mode="bicubic").clamp(-1, 1)
    blurred = [avg_pool2d(a, k, 1, k // 2) for k in (3, 9)]
    values = torch.stack([distance(a, b) for b in (a, *blurred, other)])
    assert (values.diff(dim=0) > 0).all()
    assert values[0].abs().max() < 1e-6
