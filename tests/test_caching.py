"""A latent cache: training on it is training on the pictures; made in parts and by many it is the same; others are refused."""

import json
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cached import CACHE, encode, text_encoder, write_source
from tiny import SIDE, autoencoder, first_stage, latent_diffusion, randomized, silent

from ldm.batch import Batch
from ldm.data.datamodule import ShardDataModule
from ldm.data.decode import DecodeSample
from ldm.data.latents import CacheShard, DecodeLatents, Stamp
from ldm.data.sources import expand
from ldm.data.stream import SampleStream, Source, batches
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom
from ldm.models.conditioners import TextConditioner
from ldm.models.first_stage import FirstStage, Pixels
from ldm.training.caching import CacheEncoder, cached_text, refuse_other_networks
from ldm.training.latent_diffusion import LatentDiffusionModule

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def cache(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache")
    assert encode(source, out).delivered == 36
    return out


def stream(spec: str, decode: Any) -> Iterator[Batch]:
    paths = expand(spec)
    return batches(SampleStream([Source(paths)], decode, 3, 12, CACHE, shuffle=4), 0)


def of(out: Path) -> str:
    return f"{out}/{{00000..00003}}.tar"


def module(**changes: Any) -> LatentDiffusionModule:
    out = latent_diffusion(conditioner=TextConditioner(text_encoder(), pooled=True), caption_dropout=0.3, **changes)
    silent(out)
    return out


def test_the_loss_on_the_cache_is_the_loss_on_the_pictures(source: str, cache: Path):
    live = stream(source, DecodeSample(SIDE, random_flip=True, seed=3))
    cached = stream(of(cache), DecodeLatents(str(cache), SIDE, random_flip=True, seed=3))
    unflipped = stream(of(cache), DecodeLatents(str(cache), SIDE, seed=3))
    without_encoder = module()
    without_encoder.conditioner.encoder = cached_text(str(cache))
    for a, b, c in islice(zip(live, cached, unflipped, strict=True), 4):
        assert {"moments", "text_tokens", "text_mask", "text_vector"} == b.keys() - a.keys()
        assert a.keys() - b.keys() == {"image"}
        assert (a["caption"], a["key"]) == (b["caption"], b["key"])
        assert all(torch.equal(a[name], b[name]) for name in ("index", "original_size", "crop", "cursor"))
        loss = module().training_step(a, 0)["loss"]
        assert module().training_step(b, 0)["loss"].item() == pytest.approx(loss.item(), rel=1e-3)
        assert without_encoder.training_step(b, 0)["loss"].item() == pytest.approx(loss.item(), rel=1e-3)
        z, same, other = (first_stage().latents(batch, KeyedRandom(0, batch["index"])) for batch in (a, b, c))
        torch.testing.assert_close(same, z, rtol=1e-3, atol=1e-3)
        mirrored = KeyedRandom(3, a["index"]).uniform("flip") < 0.5
        assert torch.equal((other - same).abs().amax(dim=(1, 2, 3)) > 0.01, mirrored)


def test_training_through_the_cache_reaches_the_same_weights(source: str, cache: Path):
    """20 optimizer steps: the errors of float16 do not add up."""
    ends = []
    for spec, decode in (
        (source, DecodeSample(SIDE, random_flip=True)),
        (of(cache), DecodeLatents(str(cache), SIDE, random_flip=True)),
    ):
        trained = module()
        optimizer = torch.optim.SGD(trained.denoiser.parameters(), 1e-2)
        for batch in islice(stream(spec, decode), 20):
            optimizer.zero_grad()
            loss = trained.training_step(batch, 0)["loss"]
            loss.backward()
            optimizer.step()
        ends.append(loss.item())
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_ranks_workers_and_a_second_run_make_the_same_bytes(source: str, cache: Path, tmp_path: Path):
    parts = [encode(source, tmp_path, rank, 3, num_workers=rank % 2) for rank in (2, 0, 1)]
    assert [part.delivered for part in parts] == [9, 18, 9]
    assert files(tmp_path) == files(cache)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert encode(source, tmp_path).delivered == 36  # finished shards are counted, not made again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")} == before


def _encode_until_the_third_shard(source: str, out: Path) -> None:
    write = CacheShard.write

    def killed(shard: CacheShard, samples: Any, tally: Any) -> None:
        if shard.path.name == "00002.tar":
            samples = (row if i < 5 else os.kill(os.getpid(), signal.SIGKILL) for i, row in enumerate(samples))
        write(shard, samples, tally)

    CacheShard.write = killed  # type: ignore[method-assign]
    encode(source, out)


def test_killed_in_the_middle_of_a_shard_the_same_command_goes_on(source: str, cache: Path, tmp_path: Path):
    process = multiprocessing.get_context("fork").Process(target=_encode_until_the_third_shard, args=(source, tmp_path))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert encode(source, tmp_path).delivered == 36
    assert files(tmp_path) == files(cache)


def test_drops_are_counted_and_told(tmp_path: Path):
    (tmp_path / "source").mkdir()
    spoiled = {"s2": {"jpg": b"<html>"}, "s4": {"json": b"{"}, "s5": {"txt": b"caf\xe9"}, "s10": {"jpg": b""}}
    source = write_source(tmp_path / "source", 2, **spoiled)
    tally = encode(source, tmp_path / "out")
    assert tally.delivered == 15  # the caption's fault is left to the reader
    assert tally.dropped == {"image/not an image": 1, "json/unreadable": 1, "image/empty": 1}
    assert tally.where["image/empty"].endswith("source/00001.tar: 000000010")
    stats = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"]) == (9, 7)
    decode = DecodeLatents(str(tmp_path / "out"), SIDE)
    batch = next(stream(f"{tmp_path}/out/{{00000..00001}}.tar", decode))
    assert batch["dropped"] == {"caption/not UTF-8": 1}
    again = encode(source, tmp_path / "out")
    assert again.report() == tally.report()


def test_latents_that_are_not_finite_are_dropped(source: str, tmp_path: Path):
    stage = first_stage()
    stage.autoencoder.quant_conv.bias.data[:] = 1e6  # past float16
    tally = encode(source, tmp_path, first_stage=stage)
    assert (tally.delivered, dict(tally.dropped)) == (0, {"latent/not finite": 36})


def test_a_shard_that_is_away_is_not_written_empty(source: str, tmp_path: Path):
    paths = [*expand(source)[:1], str(tmp_path / "00001.tar")]
    with pytest.raises(UserError, match=r"00001.tar' cannot be opened .* run the same command"):
        CacheEncoder(first_stage(), SIDE)(paths, tmp_path / "out", CACHE)
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00000.tar"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": False}, r"moments=\(2, 4, 4, 4\), this one has \(1, 4, 4, 4\)"),
        ({"side": 12}, r"side=8, this one has 12"),
        ({"text": None}, r"text=\{.*\}, this one has None"),
        ({"text": text_encoder(5)}, r"text=\{'digest': '\w+"),
        (
            {"first_stage": FirstStage(randomized(autoencoder(), 9), [0, 0], [1, 1])},
            r"first_stage=\w+, this one has \w+",
        ),
    ],
)
def test_a_folder_takes_one_cache(source: str, cache: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=rf"holds a cache with {message}.*give another folder"):
        encode(source, cache, **changes)


def test_the_source_is_not_taken_for_a_cache(source: str):
    with pytest.raises(UserError, match=r"holds shards that are no latent cache"):
        encode(source, Path(expand(source)[0]).parent)


def check(stamp: Stamp | None, **changes: Any) -> None:
    out = module(**changes)
    out.trainer = SimpleNamespace(datamodule=SimpleNamespace(stamp=stamp))
    out.setup("fit")


def test_a_cache_of_another_first_stage_is_refused(cache: Path):
    stamp = Stamp.read(cache)
    check(stamp)
    check(None)
    check(stamp, first_stage=FirstStage(autoencoder(), [7, 7], [3, 3]))  # statistics come after the cache
    decoder = autoencoder()
    randomized(decoder.decoder, 5)
    check(stamp, first_stage=FirstStage(decoder, [0, 0], [1, 1]))
    other = FirstStage(randomized(autoencoder(), 9), [0, 0], [1, 1])
    for stage in (other, Pixels()):
        with pytest.raises(
            UserError, match=rf"by first stage {stamp.first_stage[:12]}, this run has \w{{12}}: .* ldm shards encode"
        ):
            check(stamp, first_stage=stage)


def test_the_data_module_shows_the_stamp(cache: Path):
    def data(decode: Any) -> ShardDataModule:
        return ShardDataModule(
            of(cache), None, decode, side=SIDE, batch_size=8, steps=1, seed=0, val_batch_size=8, run_dir="unused"
        )

    assert data(DecodeLatents(str(cache), SIDE)).stamp == Stamp.read(cache)
    assert data(DecodeSample(SIDE)).stamp is None


def test_a_cache_of_another_text_encoder_is_refused(cache: Path):
    stamp = Stamp.read(cache)
    assert stamp.text is not None
    digest = stamp.text.digest[:12]
    with pytest.raises(UserError, match=rf"by text encoder {digest}, this run has \w{{12}}: .* ldm shards encode"):
        refuse_other_networks(stamp, first_stage(), text_encoder(5))
    with pytest.raises(UserError, match="would leave this run's text encoder untrained"):
        refuse_other_networks(stamp, first_stage(), text_encoder().requires_grad_())
    refuse_other_networks(stamp, first_stage(), cached_text(str(cache)))
    refuse_other_networks(stamp, first_stage(), None)


def test_cached_text_needs_a_cache_that_holds_text(source: str, tmp_path: Path):
    encode(source, tmp_path, text=None)
    with pytest.raises(UserError, match=r"holds no encoded text: encode with `ldm shards encode .* --text"):
        cached_text(str(tmp_path))
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert {name.partition(".")[2].partition("-")[0] for name in tar.getnames()} == {"moments", "txt", "json"}
    decode = DecodeLatents(str(tmp_path), SIDE)
    batch = next(stream(of(tmp_path), decode))
    assert "text_tokens" not in batch
    module().training_step(batch, 0)  # encodes captions live


def test_pictures_are_drawn_from_a_cached_batch_as_from_captions(cache: Path):
    batch = next(stream(of(cache), DecodeLatents(str(cache), SIDE)))

    def sampling(denoiser: Any, cond: Any, null: Any, random: KeyedRandom, shape: Any) -> torch.Tensor:
        here, away = ((c.tokens * c.mask[:, :, None]).sum(dim=(1, 2)).view(-1, 1, 1, 1) for c in (cond, null))
        return random.normal("sampling", shape) + here - away

    live = module().sample(sampling, batch["caption"], batch["index"], SIDE, 0)
    torch.testing.assert_close(module().sample_as(batch, sampling, 0), live, rtol=1e-2, atol=1e-2)
