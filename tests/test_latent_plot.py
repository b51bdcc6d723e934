import torch

from ldm.evaluation.latent_plot import latent_plot


def test_a_panel_for_each_channel_and_one_for_the_codebook():
    plain = latent_plot(torch.randn(4, 3, 8, 8))
    coded = latent_plot(torch.randn(4, 4, 8, 8), torch.tensor([3, 0, 9, 1]))
    many = latent_plot(torch.randn(4, 40, 2, 2))
    assert plain.width == coded.width == many.width == 1280
    assert plain.height < coded.height < many.height
    assert len(set(plain.getdata())) > 2
