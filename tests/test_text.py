import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer

from ldm.errors import UserError
from ldm.models.text import CachedText, TransformerText

CAPTIONS = ["a red circle", "Two   Dogs &amp; a CAT, running!", "naïve café 你好", ""]
LONG = "word " * 40


@pytest.fixture(scope="module")
def encoder() -> TransformerText:
    torch.manual_seed(0)
    return TransformerText(width=16, layers=2, heads=2, context_length=24, embed_width=4).eval()


def test_tokens_are_open_clip_s(encoder: TransformerText):
    ids, mask = encoder.tokenize(CAPTIONS)
    assert torch.equal(ids, SimpleTokenizer(context_length=24)(CAPTIONS))
    assert torch.equal(mask[:, 0], torch.ones(4, dtype=torch.bool))
    assert mask.sum(dim=1).tolist() == (ids != 0).sum(dim=1).tolist()
    assert torch.equal(mask, mask.cummin(dim=1).values)  # real tokens first, then padding


def test_a_long_caption_is_cut_and_keeps_its_end_token(encoder: TransformerText):
    ids, mask = encoder.tokenize([LONG])
    assert torch.equal(ids, SimpleTokenizer(context_length=24)([LONG]))
    assert ids[0, -1] == SimpleTokenizer().eot_token_id
    assert mask.all()


def test_a_caption_s_states_do_not_depend_on_its_batch(encoder: TransformerText):
    with torch.no_grad():
        together, mask, vector = encoder([*CAPTIONS, LONG])
        for i, caption in enumerate(CAPTIONS):
            alone, own_mask, own_vector = encoder([caption])
            assert torch.equal(own_mask[0], mask[i])
            torch.testing.assert_close(alone[0][mask[i]], together[i][mask[i]], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(own_vector[0], vector[i], rtol=1e-5, atol=1e-5)


def test_padding_does_not_change_the_states(encoder: TransformerText):
    """The same weights with a longer context give the same states."""
    longer = TransformerText(width=16, layers=2, heads=2, context_length=40, embed_width=4).eval()
    state = encoder.state_dict()
    state["position"] = torch.cat([state["position"], torch.full((16, 16), 3.0)])
    longer.load_state_dict(state)
    with torch.no_grad():
        (short, mask, vector), (long, _, long_vector) = encoder(CAPTIONS), longer(CAPTIONS)
    torch.testing.assert_close(long[:, :24][mask], short[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(long_vector, vector, rtol=1e-5, atol=1e-5)


def test_the_vector_is_the_normalized_mean_of_the_real_tokens(encoder: TransformerText):
    with torch.no_grad():
        tokens, mask, vector = encoder([*CAPTIONS, LONG])
    assert tokens.shape == (5, 24, 16)
    for i in range(5):
        torch.testing.assert_close(vector[i], F.layer_norm(tokens[i, mask[i]].mean(dim=0), (16,)), rtol=1e-5, atol=1e-5)


def test_captions_with_the_same_words_in_another_order_differ(encoder: TransformerText):
    with torch.no_grad():
        vector = encoder(["red on blue", "blue on red"])[2]
    assert (vector[0] - vector[1]).abs().max() > 1e-4


def test_embed_width_is_optional_and_everything_is_trained():
    plain = TransformerText(width=8, layers=1, heads=2, context_length=8)
    assert plain.embed.weight.shape[1] == 8
    tokens, _, vector = plain(CAPTIONS)
    (tokens.square().sum() + vector.sum()).backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_without_a_gain_there_is_no_pooled_vector_and_nothing_that_would_make_one():
    plain = TransformerText(width=8, layers=1, heads=2, context_length=8, pooled_gain=None)
    tokens, _, vector = plain(CAPTIONS)
    assert vector.shape == (len(CAPTIONS), 0)
    tokens.square().sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_cached_text_knows_the_empty_caption_only():
    tokens, mask, vector = torch.randn(4, 8), torch.tensor([True, False, False, False]), torch.randn(6)
    encoder = CachedText(tokens, mask, vector, digest="d")
    out = encoder(["", "", ""])
    assert [part.shape for part in out] == [(3, 4, 8), (3, 4), (3, 6)]
    assert all(torch.equal(part[2], one) for part, one in zip(out, (tokens, mask, vector), strict=True))
    assert encoder.state_dict() == {}  # the cache keeps them, not the checkpoint
    with pytest.raises(UserError, match=r"caption 'a cat' has to be encoded, .* choose the model/conditioner"):
        encoder(["", "a cat"])
