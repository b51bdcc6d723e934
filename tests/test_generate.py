import io
import json
import os
import tarfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.generate import SHARD, Ranks, generate, in_bfloat16, kept, shards, stamp

N = 3 * SHARD + 5
CAPTIONS = [f"caption {i}" for i in range(N)]


def sample(captions: list[str], index: Tensor) -> Tensor:
    """A picture whose gray level is its index, checked against its caption."""
    assert captions == [CAPTIONS[i] for i in index.tolist()]
    return (index.float() / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, 4, 5)


def counted(made: list[int], most: int = 10**9) -> Callable[[list[str], Tensor], Tensor]:
    """The same, writing down what it made; it fails when that is more than `most`."""

    def make(captions: list[str], index: Tensor) -> Tensor:
        if len(made) + len(index) > most:
            raise KeyboardInterrupt
        made.extend(index.tolist())
        return sample(captions, index)

    return make


def check(parts: list[tuple[slice, Tensor]], rows: range = range(N)) -> None:
    images = torch.cat([images for _, images in parts])
    assert images.dtype == torch.uint8
    assert images.shape == (len(rows), 3, 4, 5)
    assert torch.equal(images[:, 2, 1, 3], torch.tensor(rows, dtype=torch.uint8))
    assert [i for part, _ in parts for i in range(N)[part]] == list(rows)
    assert all(len(images) == part.stop - part.start for part, images in parts)


@pytest.mark.parametrize("batch_size", [1, 3, SHARD, 2 * SHARD, 40, 1000])
def test_pictures_do_not_depend_on_the_batch_size(batch_size: int, tmp_path: Path):
    made: list[int] = []
    check(list(generate(counted(made), CAPTIONS, batch_size, tmp_path)))
    assert made == list(range(N))
    check(list(generate(counted(made, N), CAPTIONS, 7, tmp_path)))  # again: nothing is made


def test_single_pictures_are_read_back_with_their_captions(tmp_path: Path):
    list(generate(sample, CAPTIONS, 20, tmp_path))
    found = kept(tmp_path, [N - 1, 3, N, 10 * N, SHARD])
    assert [each.index for each in found] == [N - 1, 3, SHARD]
    assert [each.caption for each in found] == [CAPTIONS[i] for i in (N - 1, 3, SHARD)]
    assert [Image.open(io.BytesIO(each.png)).getpixel((0, 0))[0] for each in found] == [N - 1, 3, SHARD]


@pytest.mark.parametrize(("world", "batch_size"), [(2, 3), (3, 100), (4, 16)])
def test_ranks_share_the_pictures_in_order_without_padding(world: int, batch_size: int, tmp_path: Path):
    made: list[int] = []
    parts = [
        part
        for rank in range(world)
        for part in generate(counted(made), CAPTIONS, batch_size, tmp_path, Ranks(rank, world))
    ]
    check(parts)
    assert sorted(made) == list(range(N))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:05d}.tar" for i in range(shards(N))]


@pytest.mark.parametrize("most", [SHARD + 1, 2 * SHARD + 9])
def test_a_stopped_generation_goes_on_on_other_ranks(most: int, tmp_path: Path):
    made: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        list(generate(counted(made, most), CAPTIONS, 4, tmp_path))
    kept = len(list(tmp_path.glob("*.tar"))) * SHARD
    assert kept >= most - SHARD - 4
    again: list[int] = []
    check([part for rank in range(2) for part in generate(counted(again), CAPTIONS, 9, tmp_path, Ranks(rank, 2))])
    assert again == list(range(kept, N))


def test_a_gap_is_filled_alone(tmp_path: Path):
    list(generate(sample, CAPTIONS, 50, tmp_path))
    (tmp_path / "00001.tar").rename(tmp_path / "00001.partial")  # as a kill leaves it
    made: list[int] = []
    check(list(generate(counted(made), CAPTIONS, 50, tmp_path)))
    assert made == list(range(SHARD, 2 * SHARD))


def test_shards_hold_pngs_and_captions(tmp_path: Path):
    list(generate(sample, CAPTIONS, 50, tmp_path))
    with tarfile.open(tmp_path / "00003.tar") as tar:
        assert tar.getnames()[:4] == [f"{3 * SHARD + i:09d}.{end}" for i in range(2) for end in ("png", "txt")]
        assert tar.extractfile(f"{3 * SHARD:09d}.txt").read().decode() == CAPTIONS[3 * SHARD]


def test_pictures_survive_the_files_exactly(tmp_path: Path):
    images = torch.randint(0, 256, (20, 3, 9, 9), dtype=torch.uint8)
    make: Callable[[list[str], Tensor], Tensor] = lambda _, index: images[index].float() / 127.5 - 1  # noqa: E731
    for _ in range(2):
        parts = list(generate(make, ["é ∞"] * 20, 8, tmp_path))
        assert torch.equal(torch.cat([part for _, part in parts]), images)


def test_nothing_for_no_captions(tmp_path: Path):
    with pytest.raises(UserError, match="no captions to generate for: the list is empty"):
        list(generate(sample, [], 4, tmp_path))


def test_pictures_that_are_not_finite_are_refused(tmp_path: Path):
    broken = lambda captions, index: sample(captions, index) * (float("nan") if 5 in index else 1)  # noqa: E731
    with pytest.raises(UserError, match="pictures of captions 4 to 7 are not finite"):
        list(generate(broken, CAPTIONS, 4, tmp_path))


def test_too_many_ranks_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="4 shards of 16 pictures are too few for 5 ranks"):
        list(generate(sample, CAPTIONS, 4, tmp_path, Ranks(0, 5)))


BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "8",
}
TASK = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (2, 3, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, (2, 3, 0)),
        (TASK, (5, 8, 1)),
        ({name: value for name, value in TASK.items() if name != "SLURM_STEP_NUM_TASKS"}, (5, 8, 1)),
        ({**TASK, **TORCHRUN}, (2, 3, 1)),  # srun torchrun
        (BATCH, (0, 1, 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, (0, 1, 0)),  # a shell of salloc on the login node
        ({**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),  # and on a compute node
    ],
    ids=["alone", "torchrun", "by hand", "srun", "srun without a step's count", "torchrun in srun", "batch script",
         "salloc", "interactive step"],
)  # fmt: skip
def test_ranks_are_those_of_torchrun_or_of_a_job_step(
    environment: dict[str, str], ranks: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
):
    cleared(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Ranks.of_environment() == ranks


def cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "MASTER_")) or name in TORCHRUN:
            monkeypatch.delenv(name)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert [Ranks(8 + i, 16, i).device().index for i in range(8)] == [*range(8)]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # bound by SLURM
    assert Ranks(13, 16, 5).device() == torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Ranks(13, 16, 5).device() == torch.device("cpu")


def test_ranks_wait_for_each_other_for_a_day_where_they_are_told_to_meet(monkeypatch: pytest.MonkeyPatch):
    cleared(monkeypatch)
    joined: list[dict[str, object]] = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **how: joined.append(how))
    monkeypatch.setenv("MASTER_PORT", "1234")
    with pytest.raises(
        UserError, match=r"rank 1 of 2 cannot find the others without MASTER_ADDR: start them by torchrun"
    ):
        Ranks(1, 2).meet()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    Ranks(1, 2).meet()
    assert joined == [{"rank": 1, "world_size": 2, "timeout": timedelta(days=1)}]


def test_ranks_share_in_order():
    assert list(Ranks(2, 3).share(10)) == [6, 7, 8, 9]


def test_networks_compute_in_bfloat16_and_sums_do_not():
    weight = torch.randn(3, 3)
    seen: list[torch.dtype] = []

    def make(captions: list[str], index: Tensor) -> Tensor:
        seen.extend([(weight @ weight).dtype, (weight + weight).dtype])
        return weight

    assert in_bfloat16(make, "cpu")([], torch.arange(0)) is weight
    assert seen == [torch.bfloat16, torch.float32]
    assert not torch.is_autocast_enabled("cpu")


def test_other_weights_pictures_are_refused(tmp_path: Path):
    stamp(tmp_path / "r" / "pictures", "abc")
    stamp(tmp_path / "r" / "pictures", "abc")
    assert json.loads((tmp_path / "r" / "pictures" / "made_by.json").read_text()) == {"weights": "abc"}
    with pytest.raises(UserError, match=r"are those of weights abc, the run now has xyz: delete .*/r$"):
        stamp(tmp_path / "r" / "pictures", "xyz")
