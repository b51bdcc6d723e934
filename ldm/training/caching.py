"""Makes latent caches (see data/latents.py) and refuses those of other networks."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ldm.data.accounts import Tally
from ldm.data.decode import MAX_CAPTION_BYTES, Captions, Fields, decode_picture
from ldm.data.latents import (
    CACHED,
    CacheShard,
    Stamp,
    TextStamp,
    finite,
    pack_text,
    read_null,
    to_npy,
    write_null,
)
from ldm.data.parallel import in_parallel
from ldm.data.schema import normalize, parse
from ldm.data.shards import BadSample
from ldm.data.sources import ShardCache
from ldm.data.stream import OrderedSamples, merge
from ldm.data.transforms import EXTENSIONS, DecodeImage
from ldm.errors import UserError
from ldm.models.first_stage import FirstStage
from ldm.models.text import CachedText
from ldm.training.base import digest

COMMAND = "ldm shards encode --first-stage RUN SHARDS OUT"


class CacheEncoder:
    """Shards of pictures -> shards of posterior moments, one for each, and of encoded captions if there is a text encoder.

    What is written is a function of the source and the networks alone, not of ranks, workers or interruptions. A sample is
    dropped when its picture or .json cannot be used; captions are judged when the cache is read.

    Args:
        first_stage: on the device that is to encode.
        side: pixels of the pictures' sides.
        flip: encode the mirrored pictures too.
        text: frozen text encoder: captions -> (tokens (B, L, D), mask (B, L), vector (B, V)); None: captions stay text.
        batch_size: samples encoded together.
        num_workers: processes that decode pictures.
    """

    def __init__(
        self,
        first_stage: FirstStage,
        side: int,
        flip: bool = False,
        text: nn.Module | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        self.first_stage, self.side, self.flip = first_stage, side, flip
        self.text = text.eval() if text else None
        self.batch_size, self.num_workers = batch_size, num_workers

    def __call__(
        self, shards: Sequence[str], out: str | Path, cache: ShardCache, rank: int = 0, world: int = 1
    ) -> Tally:
        """Encodes shards rank, rank + world, ... into `out`: shard i becomes i.tar, unless that is there already.

        Returns what was written and what was dropped in all of this rank's shards, those of earlier runs too.

        Raises:
            UserError: `out` holds another cache or other shards; a shard cannot be opened.
        """
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        stamp = self._begin(shards, out)
        total = Tally()

        def encode(number: int) -> Tally:
            shard = CacheShard(out, number)
            tally = shard.tally()
            if tally is None:
                tally = Tally()
                shard.write(self._samples(shards[number], stamp, cache, tally), tally)
            return tally

        for tally in in_parallel(encode, range(rank, len(shards), world), 1, f"encoding {out}"):
            total += tally
        return total

    @torch.no_grad()
    def _begin(self, shards: Sequence[str], out: Path) -> Stamp:
        z, height, width = self.first_stage.latent_shape(self.side)
        names = ["/".join(Path(path).parts[-2:]) for path in shards]  # the last two: a data folder may move
        null: Any = self.text([""]) if self.text else None
        sizes: Any = (*null[0].shape[1:], null[2].shape[1]) if null else ()
        stamp = Stamp(
            first_stage=digest(self.first_stage.encoder_state()),
            side=self.side,
            moments=(1 + self.flip, 2 * z, height, width),
            shards=len(shards),
            source=hashlib.sha256(json.dumps(names).encode()).hexdigest(),
            text=TextStamp(text_digest(self.text), *sizes) if self.text else None,
        )
        if (out / "cache.json").exists():
            _refuse_another_stamp(Stamp.read(out), stamp, out)
        elif any(out.glob("*.tar")):
            raise UserError(f"{out} holds shards that are no latent cache: give a folder of its own")
        if stamp.text:
            write_null(out, pack_text(stamp.text, *(part[0] for part in null)))
        stamp.write(out)
        return stamp

    def _samples(
        self, path: str, stamp: Stamp, cache: ShardCache, tally: Tally
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """What becomes of one shard; counts into `tally`."""
        try:
            cache.open(path).close()
        except (OSError, BadSample) as error:  # a shard that is away for a while must not become an empty one
            raise UserError(
                f"shard {path!r} cannot be opened ({error}); run the same command when it is there"
            ) from None
        source = OrderedSamples([path], DecodeSource(self.side), cache)
        for batch in DataLoader(
            source, self.batch_size, num_workers=self.num_workers, collate_fn=merge, generator=torch.Generator()
        ):
            tally.add(0, batch["dropped"], batch["dropped_where"])
            for key, members in self._encode(batch, stamp) if batch["key"] else ():
                if isinstance(members, BadSample):
                    tally.add(0, {members.reason: 1}, {members.reason: f"{path}: {key}"})
                else:
                    tally.add(1, {}, {})
                    yield key, members

    @torch.no_grad()
    def _encode(self, batch: Any, stamp: Stamp) -> list[tuple[str, dict[str, bytes] | BadSample]]:
        """(key, members), one for each sample."""
        images = batch["image"].to(self.first_stage.mean.device)
        views = [images, images.flip(3)][: stamp.moments[0]]
        moments = torch.stack([self.first_stage.moments(view) for view in views], dim=1).cpu().numpy()
        captions = {i: caption for i, caption in enumerate(batch["caption"]) if caption}
        encoded = self.text(list(captions.values())) if self.text and captions else ()
        texts = dict(zip(captions, zip(*encoded, strict=True), strict=False))
        out: list[tuple[str, dict[str, bytes] | BadSample]] = []
        for i, (key, members) in enumerate(zip(batch["key"], batch["members"], strict=True)):
            try:
                text = pack_text(stamp.text, *texts[i]) if stamp.text and i in texts else {}
                out.append((key, {stamp.name(): to_npy(finite(moments[i])), **members, **text}))
            except BadSample as bad:
                out.append((key, bad))
        return out


class DecodeSource:
    """What is encoded, and what is kept: image, caption ("" where there is none that can be used), members."""

    def __init__(self, side: int) -> None:
        self.image, self.captions = DecodeImage(side), Captions({"txt": 1.0}, seed=0)

    def __call__(self, key: str, members: dict[str, bytes], index: int) -> Fields:
        """Raises BadSample: "image/...", "json/..."."""
        row = parse(members.get("json"))
        picture = decode_picture(self.image, members, normalize(row), index)
        row |= {CACHED: {"original_size": list(picture.size), "crop": list(picture.frame.crop)}}
        kept = {
            name: data for name, data in members.items() if name not in EXTENSIONS and len(data) <= MAX_CAPTION_BYTES
        }
        try:
            caption = self.captions(members, row, index)
        except BadSample:
            caption = ""
        # not as ASCII: the escapes would lengthen it, and there is a limit
        kept["json"] = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
        return {"image": picture.pixels, "caption": caption, "members": kept}


def cached_text(folder: str) -> CachedText:
    """The text encoder of a run that reads encoded captions from the cache in `folder`.

    Raises:
        UserError: there is no cache, or one without text.
    """
    text = Stamp.read(folder).text
    if text is None:
        raise UserError(
            f"{folder} holds no encoded text: encode with `{COMMAND} --text ...`, or use a live text encoder"
        )
    null = read_null(folder, text)
    return CachedText(null["text_tokens"], null["text_mask"], null["text_vector"], text.digest)


def text_digest(encoder: nn.Module) -> str:
    """Names a text encoder by its weights; CachedText goes by the name of the one it stands for."""
    return encoder.digest if isinstance(encoder, CachedText) else digest(encoder.state_dict())


def refuse_other_networks(stamp: Stamp, first_stage: nn.Module, encoder: nn.Module | None) -> None:
    """Raises UserError where a cache was not made by this first stage, or its text not by this text encoder.

    Args:
        encoder: the conditioner's text encoder; None: it reads no text.
    """
    made, here = stamp.first_stage, digest(first_stage.encoder_state())
    if made != here:
        raise UserError(
            f"the latent cache was encoded by first stage {made[:12]}, this run has {here[:12]}: use that one, or encode "
            f"again with this one: {COMMAND}"
        )
    if stamp.text is None or encoder is None:
        return
    made, here = stamp.text.digest, text_digest(encoder)
    if made != here:
        raise UserError(
            f"the cache's text was encoded by text encoder {made[:12]}, this run has {here[:12]}: use that one, or encode "
            f"again with this one: {COMMAND} --text ..."
        )
    if any(p.requires_grad for p in encoder.parameters()):
        raise UserError("the cache holds encoded text, which would leave this run's text encoder untrained: freeze it")


def _refuse_another_stamp(found: Stamp, wanted: Stamp, out: Path) -> None:
    for name, value in asdict(wanted).items():
        if (before := asdict(found)[name]) != value:
            raise UserError(f"{out} holds a cache with {name}={before}, this one has {value}: give another folder")
