import torch

from ldm.batch import to_uint8, to_unit


def test_every_pixel_value_survives_the_round_trip():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    unit = to_unit(image)
    assert unit.dtype == torch.float32
    assert (unit.min(), unit.max()) == (-1, 1)
    assert torch.equal(to_uint8(unit), image)


def test_to_uint8_rounds_and_clips():
    values = torch.tensor([-7.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 7.0])
    assert to_uint8(values).tolist() == [0, 1, 0, 255]
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]
