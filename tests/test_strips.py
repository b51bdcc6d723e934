import pytest
import torch

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.strips import InStrips


def network(**options) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(3, 8, [1, 2, 2], blocks=1, groups=4, **options).eval()


def test_strips_equal_the_whole():
    for options in ({}, {"attention": [False, False, True], "middle_attention": False}):
        whole = network(**options)
        images = torch.randn(2, 3, 44, 24).clamp(-1, 1)
        with torch.no_grad():
            posterior, expected = InStrips(whole, rows=6).encode(images), whole.encode(images)
            torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=1e-4, atol=1e-5)
            z = torch.randn(2, 3, 11, 6)
            torch.testing.assert_close(InStrips(whole, rows=4).decode(z), whole.decode(z), rtol=1e-4, atol=1e-5)


def test_what_is_on_the_device_at_once_is_a_strip(monkeypatch: pytest.MonkeyPatch):
    """The largest input that a convolution of the decoder sees, after the 1x1 one on the latents."""
    whole, seen = network(middle_attention=False), []
    conv2d = torch.nn.functional.conv2d

    def watched(x: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        seen.append(x.shape[2])
        return conv2d(x, *rest, **options)

    monkeypatch.setattr("torch.nn.functional.conv2d", watched)
    InStrips(whole, rows=8).decode(torch.randn(1, 3, 32, 4))
    assert max(seen[1:]) <= 12
