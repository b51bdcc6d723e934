import torch

from ldm.evaluation.features import PooledPixels


def test_features_are_average_colors_of_the_cells():
    network = PooledPixels(2)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[0, 1, :4, 4:] = 255  # green in the upper right
    features = network(images)
    assert features.shape == (2, network.num_features) == (2, 12)
    assert features.dtype == torch.float32
    expected = torch.zeros(3, 2, 2)
    expected[1, 0, 1] = 1
    assert torch.equal(features[0], expected.flatten())
    assert not features[1].any()


def test_it_is_named_by_its_grid():
    assert PooledPixels(4).name == "pixels4"
