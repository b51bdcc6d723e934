"""The data module: shapes, refusals, and the position in the data through Lightning's checkpoints."""

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from braceexpand import braceexpand
from conftest import write_shards
from omegaconf import DictConfig
from test_config import composed
from test_configs import EXPERIMENTS
from test_configs import commands as of_header
from test_docs import blocks
from test_docs import commands as of_block
from tiny import ROOT, workers_are_gone
from torch import Tensor, distributed, nn

from ldm import config
from ldm.batch import Batch
from ldm.data import sources
from ldm.data.datamodule import ShardDataModule
from ldm.data.decode import DecodeSample
from ldm.data.stream import count_streams
from ldm.errors import UserError


def make(shards: str, val: str, **changes: Any) -> ShardDataModule:
    options = {"side": 16, "batch_size": 8, "steps": 7, "seed": 3, "val_batch_size": 4, "shuffle": 4, **changes}
    decode = DecodeSample(16, random_flip=options.pop("random_flip", False), seed=3)
    return ShardDataModule(shards, val, decode=decode, **{"run_dir": "unused", **options})


def as_rank(data: ShardDataModule, rank: int, world: int) -> ShardDataModule:
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
    return data


def consume(data: ShardDataModule, n: int) -> list[int]:
    """Train n micro-batches; the loader reads ahead and that must not count."""
    seen: list[int] = []
    batches = iter(data.train_dataloader())
    for _ in range(n):
        batch = next(batches)
        data.consumed(batch)
        seen += batch["index"].tolist()
    next(batches, None)
    return seen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"data.batch_size=0; expected 1 or more"),
        ({"steps": -1}, r"data.steps=-1; expected 1"),
        ({"val_samples": 0}, r"data.val_samples=0; expected 1"),
        ({"num_workers": -1}, r"data.num_workers=-1; expected 0"),
        (
            {"batch_size": 8, "accumulate": 3},
            r"batch_size=8 cannot be split over 1 ranks x 3 accumulation steps.* of 3",
        ),
        ({"shards": "/nowhere/{0..4}.tar"}, r"/nowhere/0.tar' is not a file \(5 of 5 are missing\); .*: make tiny"),
        ({"shards": "pipe:curl x"}, r"allow_pipe"),
    ],
)
def test_refusals(tiny_shards: str, tiny_val: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(changes.pop("shards", tiny_shards), tiny_val, how_to_make="make tiny", **changes).setup("fit")


def test_ranks_that_cannot_share(tiny_shards: str, tiny_val: str) -> None:
    with pytest.raises(UserError, match=r"8 shards make 8 streams, which 3 ranks cannot share .*max_streams=6"):
        as_rank(make(tiny_shards, tiny_val, batch_size=9), 0, 3).setup("fit")
    with pytest.raises(UserError, match=r"batch_size=8 cannot be split over 2 ranks x 8"):
        as_rank(make(tiny_shards, tiny_val, accumulate=8), 0, 2).setup("fit")
    as_rank(make("/nowhere.tar", tiny_val), 0, 3).setup("validate")  # which needs no training shards


def test_every_rank_has_something_to_validate(tiny_shards: str, tiny_val: str) -> None:
    """Lightning would stop the ranks without, and leave the others waiting for them."""
    with pytest.raises(
        UserError, match=r"3 validation samples leave some of 4 ranks without; give more by data.val_sh"
    ):
        as_rank(make(tiny_shards, tiny_val, val_samples=3), 0, 4).setup("fit")


def test_workers_that_would_have_nothing_to_read(tiny_shards: str, tiny_val: str) -> None:
    as_rank(make(tiny_shards, tiny_val, num_workers=4), 0, 2).setup("fit")
    with pytest.raises(
        UserError, match=r"8 shards .* make 8 streams, too few for 2 ranks x 5 workers; set data.num_workers=4 or less"
    ):
        as_rank(make(tiny_shards, tiny_val, num_workers=5), 0, 2).setup("fit")


def test_sources_are_named_and_weighed(tiny_shards: str, tiny_val: str) -> None:
    mixed = {"a": {"shards": tiny_shards, "weight": 3}, "b": {"shards": tiny_val, "weight": 1}}
    data = make(mixed, tiny_val, steps=50)
    keys = [key for batch in data.train_dataloader() for key in batch["key"]]
    assert len(keys) == 400
    with pytest.raises(UserError, match=r"several sources; give data.val_shards"):
        make(mixed, None).setup("fit")
    for wrong in ({"shards": tiny_shards}, {"shards": tiny_shards, "weight": 0}, {"shards": tiny_shards, "wait": 1}):
        with pytest.raises(UserError, match=r"data.shards.a=.*give shards: and weight:"):
            make({"a": wrong}, tiny_val).setup("fit")
    again = make({**mixed, "b": {"shards": tiny_val, "weight": 2}}, tiny_val)
    with pytest.raises(UserError, match=r"data.weights=\[3.0, 1.0\], this run has \[3.0, 2.0\]"):
        again.load_state_dict(data.state_dict())


def test_the_key_log_and_the_tally(tiny_shards: str, tiny_val: str, tmp_path: Path) -> None:
    data = make(tiny_shards, tiny_val, accumulate=2, log_keys=True, run_dir=tmp_path, steps=3)
    data.setup("fit")
    keys = []
    for batch in data.train_dataloader():
        data.consumed(batch)
        keys += batch["key"]
    rows = [json.loads(line) for line in (tmp_path / "keys" / "rank0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [key for row in rows for key in row["keys"]] == keys
    assert data.tally().report() == {"delivered": 24, "dropped": {}, "last_dropped": {}}


def test_too_many_bad_samples_stop_the_run(tiny_val: str, tmp_path: Path) -> None:
    spec = write_shards(tmp_path, [20] * 4)
    (tmp_path / "00002.tar").write_bytes(b"<html>")
    data = make(spec, tiny_val, budget=0.001)
    with pytest.raises(UserError, match=r"'shard/unreadable' \(20\), the last at .*00002.tar: -; look with"):
        consume(data, 6)


def test_without_validation_shards_the_last_shard_is_held_out(tiny_shards: str) -> None:
    data = make(tiny_shards, None)
    data.setup("fit")
    assert data.val_paths == [data.sources[0].paths[0].replace("00000", "00007")]
    assert len(data.sources[0].paths) == 7
    assert data.val_paths[0] not in data.sources[0].paths
    with pytest.raises(UserError, match="is one shard; give one more to hold out"):
        make(data.sources[0].paths[0], None).setup("fit")


def test_micro_batches_cut_each_step_in_order(tiny_shards: str, tiny_val: str) -> None:
    data = make(tiny_shards, tiny_val, steps=3, accumulate=2, random_flip=True)
    loader = data.train_dataloader()
    got = list(loader)
    assert len(loader) == len(got) == 6
    assert [batch["index"].tolist() for batch in got] == [list(range(4 * i, 4 * i + 4)) for i in range(6)]
    assert got[0]["image"].shape == (4, 3, 16, 16)
    second = as_rank(make(tiny_shards, tiny_val, steps=3, accumulate=2), 1, 2)
    assert [batch["index"].tolist() for batch in second.train_dataloader()][:2] == [[1, 3], [5, 7]]


def test_validation_is_the_same_each_time_and_split_without_padding(tiny_shards: str, tiny_val: str) -> None:
    data = make(tiny_shards, tiny_val, val_samples=19)
    once, twice = ([batch["index"].tolist() for batch in data.val_dataloader()] for _ in range(2))
    assert once == twice == [list(range(0, 4)), [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18]]
    parts = [as_rank(data, rank, 2).val_dataloader() for rank in range(2)]
    assert [len(part) for part in parts] == [3, 3]
    part = [
        [index for batch in as_rank(data, rank, 2).val_dataloader() for index in batch["index"].tolist()]
        for rank in (0, 1)
    ]
    assert part == [list(range(0, 19, 2)), list(range(1, 19, 2))]


def test_the_cursor_stays_on_the_cpu(tiny_shards: str, tiny_val: str) -> None:
    data = make(tiny_shards, tiny_val)
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["image"].is_meta
    assert torch.equal(moved["cursor"], batch["cursor"])
    assert list(moved) == list(batch)
    assert not batch["image"].is_meta


def test_state_is_what_was_consumed(tiny_shards: str, tiny_val: str) -> None:
    data = make(tiny_shards, tiny_val)
    assert consume(data, 3) == list(range(24))
    state = data.state_dict()
    assert (state["samples_seen"], state["batches_seen"]) == (24, 3)
    assert state["cursors"] == {stream: [0, 3] for stream in range(8)}
    again = make(tiny_shards, tiny_val)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert consume(again, 4) == list(range(24, 56))
    assert next(iter(again.train_dataloader()), None) is None  # the run's 7 batches are done


def test_a_state_of_another_order_is_refused(tiny_shards: str, tiny_val: str, tmp_path: Path) -> None:
    state = make(tiny_shards, tiny_val).state_dict()
    for changes, message in [
        ({"seed": 4}, r"data.seed=3, this run has 4"),
        ({"shuffle": 5}, r"data.shuffle=4, this run has 5"),
        ({"max_streams": 2}, r"data.max_streams=8, this run has 2"),
    ]:
        with pytest.raises(UserError, match=message):
            make(tiny_shards, tiny_val, **changes).load_state_dict(state)
    with pytest.raises(UserError, match=r"data.shards=8 shards, digest \w+, this run has 3 shards"):
        make(write_shards(tmp_path, [4, 4, 4]), tiny_val).load_state_dict({**state, "data": {**state["data"]}})
    make(tiny_shards, tiny_val, num_workers=2, batch_size=16, max_streams=100).load_state_dict(state)


class Net(pl.LightningModule):
    """Remembers what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, str]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen += zip(batch["index"].tolist(), batch["key"], strict=True)
        return self.scale * batch["image"].float().mean() / 255

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Consume(pl.Callback):
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        trainer.datamodule.consumed(batch)  # type: ignore[attr-defined]


def fit(data: ShardDataModule, folder: Path, steps: int, resume: bool = False) -> Net:
    net = Net()
    save = pl.callbacks.ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)
    trainer = pl.Trainer(
        max_steps=steps,
        accumulate_grad_batches=data.accumulate,
        callbacks=[Consume(), save],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(net, data, ckpt_path=folder / "last.ckpt" if resume else None)
    assert trainer.global_step == steps
    return net


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 1), (0, 2)])
def test_lightning_resumes_where_the_step_stopped(
    tiny_shards: str, tiny_val: str, tmp_path: Path, workers: int, accumulate: int
) -> None:
    options = {"num_workers": workers, "accumulate": accumulate}
    whole = fit(make(tiny_shards, tiny_val, **options), tmp_path / "whole", 7)
    assert [index for index, _ in whole.seen] == list(range(56))
    assert whole.validated == list(range(21))
    first = fit(make(tiny_shards, tiny_val, **options), tmp_path / "cut", 3)
    second = fit(make(tiny_shards, tiny_val, **options), tmp_path / "cut", 5, resume=True)
    third = fit(make(tiny_shards, tiny_val, **options), tmp_path / "cut", 7, resume=True)
    assert [len(net.seen) for net in (first, second, third)] == [24, 16, 16]
    assert first.seen + second.seen + third.seen == whole.seen
    saved = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["ShardDataModule"]
    assert saved["samples_seen"] == 56
    assert workers_are_gone()


def _as_one_of_two(rank: int, rendezvous: str, shards: str, val: str, state: dict[str, Any] | None, out: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    data = as_rank(make(shards, val), rank, 2)
    if state:
        data.load_state_dict(state)
    seen = consume(data, 2)
    out.put((rank, seen, data.state_dict()))
    distributed.destroy_process_group()


def on_two_ranks(folder: Path, shards: str, val: str, state: dict[str, Any] | None) -> Iterator[Any]:
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    args = (str(folder / f"rendezvous{bool(state)}"), shards, val, state, out)
    processes = [context.Process(target=_as_one_of_two, args=(rank, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    yield from sorted((out.get(timeout=60) for _ in processes), key=lambda row: row[0])
    for process in processes:
        process.join(60)


def test_ranks_put_their_positions_together(tiny_val: str, tmp_path: Path) -> None:
    """1 rank -> 2 -> 2 -> 1: the state is the same on each, and the same as one rank's."""
    shards = write_shards(tmp_path, [6] * 4)
    (tmp_path / "00001.tar").write_bytes((tmp_path / "00001.tar").read_bytes()[:7000])  # drops on one side
    alone = make(shards, tiny_val)
    consume(alone, 1)
    state = alone.state_dict()
    for _ in range(2):
        (_, even, state_0), (_, odd, state_1) = on_two_ranks(tmp_path, shards, tiny_val, state)
        (tmp_path / "rendezvousTrue").unlink(missing_ok=True)
        assert state_0 == state_1
        assert sorted(even + odd) == list(range(state["samples_seen"], state["samples_seen"] + 16))
        assert consume(alone, 2) == sorted(even + odd)
        assert state_0 == alone.state_dict()
        state = state_0
    assert state["report"]["dropped"]["shard/truncated"] >= 1
    assert alone.tally().report() == state["report"]


# --- the configs that ship ------------------------------------------------------------------------------------------


def assert_ranks_can_share(cfg: DictConfig) -> None:
    """Over nodes of 8 GPUs."""
    world = cfg.trainer.get("num_nodes", 1) * (8 if cfg.trainer.devices == "auto" else cfg.trainer.devices)
    training = len(list(braceexpand(cfg.data.shards))) - (cfg.data.val_shards is None)
    assert count_streams(training, cfg.data.max_streams, world) >= world * cfg.data.num_workers
    assert cfg.data.batch_size % (world * cfg.trainer.accumulate_grad_batches) == 0


# finetune_sd composes over an imported run; `'...'` stands for any shards
STREAMED = {path.stem: of_header(path)[0] for path in EXPERIMENTS if path.stem != "finetune_sd"}
STREAMED = {name: words for name, words in STREAMED.items() if "data.shards=..." not in words}


@pytest.mark.parametrize("name", STREAMED)
def test_an_experiment_s_own_command_makes_enough_streams(name: str) -> None:
    assert_ranks_can_share(composed("train", *STREAMED[name]))


@pytest.mark.parametrize("name", [name for name, words in STREAMED.items() if "trainer.num_nodes=32" in words])
def test_a_large_experiment_suits_any_power_of_two(name: str) -> None:
    words = [word for word in STREAMED[name] if "num_nodes" not in word]
    for nodes in (1, 2, 4, 8, 16, 32):
        assert_ranks_can_share(composed("train", *words, f"trainer.num_nodes={nodes}", "data.num_workers=2"))


def test_the_commands_of_the_page_on_scaling_make_enough_streams() -> None:
    found = 0
    for words in (c.words for block in blocks(ROOT / "docs" / "scaling.md") for c in of_block(block)):
        script = next((word for word in ("train.py", "slurm/train.sbatch") if word in words), None)
        if script:
            options = dict(word.removeprefix("--").split("=") for word in words if word.startswith("--"))
            keys = {"nodes": "trainer.num_nodes", "ntasks-per-node": "trainer.devices"}
            ranks = [f"{keys[option]}={value}" for option, value in options.items()]
            assert_ranks_can_share(composed("train", *words[words.index(script) + 1 :], *ranks))
            found += 1
    assert found == 4


@pytest.mark.parametrize("callbacks", ["latent_diffusion", "autoencoder"])
def test_a_shard_that_does_not_answer_is_given_up_before_the_watchdog_ends_the_run(callbacks: str) -> None:
    """Behind an attempt to fetch it ahead, which began just before it was opened."""
    for data in ("shards", "latents", "shapes", "latent_arrays"):
        cfg = composed("train", f"data={data}", f"callbacks={callbacks}", "name=x")
        cache = config.build(cfg.data.cache)
        waits = [min(sources.FIRST_WAIT * 2**n, sources.LONGEST_WAIT) * 1.5 for n in range(cache.retries)]
        assert (1 + cache.retries + 1) * cache.timeout + sum(waits) < 0.9 * cfg.callbacks.watchdog.timeout
