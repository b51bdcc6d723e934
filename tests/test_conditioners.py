import torch
from tiny import WordEncoder, captions

from ldm.batch import Batch
from ldm.models.conditioners import TextConditioner


def test_captions_become_tokens_mask_and_vector():
    encoder = WordEncoder()
    cond = TextConditioner(encoder, pooled=True)(Batch(caption=captions(3)))
    tokens, mask, vector = encoder(captions(3))
    assert torch.equal(cond.tokens, tokens)
    assert torch.equal(cond.mask, mask)
    assert torch.equal(cond.vector, vector)
    assert cond.spatial is None


def test_without_pooling_the_vector_has_width_zero():
    cond = TextConditioner(WordEncoder())(Batch(caption=captions(3)))
    assert cond.vector.shape == (3, 0)


def test_the_null_is_the_empty_caption_in_equal_rows_encoded_once():
    encoder = WordEncoder()
    calls = []
    encoder.register_forward_hook(lambda _, args, __: calls.append(args[0]))
    null = TextConditioner(encoder, pooled=True).null(5)
    assert calls == [[""]]
    for part, alone in zip(null[:3], encoder([""]), strict=True):
        assert torch.equal(part, alone.expand(5, *alone.shape[1:]))


def test_a_trained_encoder_gets_gradients_through_the_null():
    conditioner = TextConditioner(WordEncoder())
    conditioner.null(4).tokens.sum().backward()
    assert conditioner.encoder.table.weight.grad[0].any()


def test_cached_text_is_taken_in_place_of_the_caption():
    encoder = WordEncoder()
    tokens, mask, vector = encoder(captions(3))
    cached = Batch(caption=["never read"] * 3, text_tokens=tokens.half(), text_mask=mask, text_vector=vector.half())
    for pooled in (True, False):
        conditioner = TextConditioner(encoder, pooled)
        live = conditioner(Batch(caption=captions(3)))
        for part, other in zip(conditioner(cached)[:3], live[:3], strict=True):
            torch.testing.assert_close(part, other, rtol=1e-3, atol=1e-3)
