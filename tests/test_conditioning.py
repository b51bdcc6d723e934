import pytest
import torch

from ldm.conditioning import Conditioning


def make(rows: int, value: float, spatial: bool = True) -> Conditioning:
    return Conditioning(
        tokens=torch.full((rows, 3, 4), value),
        mask=torch.full((rows, 3), value > 0),
        vector=torch.full((rows, 5), value),
        spatial=torch.full((rows, 2, 4, 4), value) if spatial else None,
    )


@pytest.mark.parametrize("null_rows", [1, 3])
def test_where_takes_whole_rows(null_rows: int):
    cond, null = make(3, 1.0), make(null_rows, -1.0)
    mixed = cond.where(torch.tensor([True, False, True]), null)
    for part in filter(lambda part: part is not None, mixed):
        assert part.shape[0] == 3
        rows = part.float().flatten(1)
        assert (rows[[0, 2]] == 1).all()
        assert (rows[1] != 1).all()
    assert (cond.tokens == 1).all(), "where must not edit what it was given"


def test_where_without_spatial():
    mixed = make(2, 1.0, spatial=False).where(torch.tensor([False, True]), make(1, -1.0, spatial=False))
    assert mixed.spatial is None
    with pytest.raises(AssertionError, match="same parts"):
        make(2, 1.0).where(torch.tensor([False, True]), make(1, -1.0, spatial=False))


def test_cat_puts_self_first():
    both = make(2, 1.0).cat(make(2, -1.0))
    assert both.tokens[:, 0, 0].tolist() == [1, 1, -1, -1]
    assert both.mask[:, 0].tolist() == [True, True, False, False]
    assert both.spatial is not None
    assert both.spatial.shape == (4, 2, 4, 4)
    assert make(2, 1.0, spatial=False).cat(make(2, -1.0, spatial=False)).spatial is None


def test_concat_to_stacks_spatial_after_the_latent():
    x = torch.zeros(2, 4, 4, 4, dtype=torch.float64)
    stacked = make(2, 1.0).concat_to(x)
    assert stacked.shape == (2, 6, 4, 4)
    assert stacked.dtype == x.dtype
    assert (stacked[:, :4] == 0).all()
    assert (stacked[:, 4:] == 1).all()
    assert make(2, 1.0, spatial=False).concat_to(x) is x
