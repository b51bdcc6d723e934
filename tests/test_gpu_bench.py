"""bench/gpu.py at toy size on any machine, with nothing but torch; bench/scale.py's model and its real ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import gpu
import gpu_report
import scale

ABSENT = ("hydra", "omegaconf", "webdataset", "open_clip", "wandb", "pytorch_lightning", "lightning_fabric", "torchmetrics",
          "transformers", "yaml", "diffusers")  # fmt: skip
BLOCKED = f"""
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {ABSENT}:
            raise ModuleNotFoundError('No module named ' + name)
sys.meta_path.insert(0, Blocker())
sys.argv = ['bench/gpu.py', *sys.argv[1:]]
runpy.run_path('bench/gpu.py', run_name='__main__')
"""


def test_it_runs_with_torch_alone_and_writes_after_each_rung(tmp_path: Path):
    subprocess.run([sys.executable, "-c", BLOCKED, "--toy", "--out", str(tmp_path)], cwd=ROOT, check=True,
                   capture_output=True, timeout=600)  # fmt: skip
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert found["diffusers"] == "not installed"
    assert found["matmul_tflops"] > 0
    rows = found["cases"]["sd2_512"]
    assert list(rows) == ["eager", "sdpa", "channels_last", "fused", "compile", "sampling", "batch 4 fused",
                          "compiled sampling"]  # fmt: skip
    assert set(found["cases"]) == set(gpu.TOYS)
    for case, measured in found["cases"].items():
        for rung, row in measured.items():
            assert row["images_per_second"] > 0, (case, rung, row)
            if "tflops" in row:
                expected = row["images_per_second"] * found["tflop_per_image"][case]
                assert row["tflops"] == pytest.approx(expected)
                assert row["mfu"] == pytest.approx(expected / found["matmul_tflops"])


def test_diffusers_takes_the_same_steps(tmp_path: Path):
    bench = gpu.Bench(gpu.Report(tmp_path / "x.json", torch.device("cpu"), 5.0), toy=True)
    bench.peak, bench.report.results["data_sheet_tflops"] = 1.0, None
    assert bench.peer()
    bench.ladder("sd2_512", gpu.TOYS["sd2_512"], ("fused",), peer=True)
    assert bench.report.results["cases"]["sd2_512"]["diffusers fused"]["images_per_second"] > 0


def report(tmp_path: Path, minutes: float = 5.0) -> gpu.Report:
    return gpu.Report(tmp_path / "x.json", torch.device("cpu"), minutes)


def test_failures_are_told_apart_and_nothing_else_is_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(error: Exception) -> dict:
        raise error

    def forever() -> dict:
        while True:
            pass

    told = report(tmp_path)
    assert (
        told.measured("a", "1", lambda: fail(torch.cuda.OutOfMemoryError("CUDA out of memory.")))["failed"]
        == "out of memory"
    )
    assert told.measured("a", "2", lambda: fail(RuntimeError("no kernel\nx")))["failed"] == "RuntimeError: no kernel"
    with pytest.raises(KeyError):
        told.measured("a", "3", lambda: fail(KeyError("ours")))
    monkeypatch.setattr(gpu_report, "EAGER", 0.2)
    assert "TookTooLong" in told.measured("a", "4", forever)["failed"]
    assert "skipped" in report(tmp_path, minutes=0.0).measured("a", "compile", lambda: {"ran": 1})
    assert list(json.loads((tmp_path / "x.json").read_text())["cases"]["a"]) == ["compile"]


@pytest.mark.parametrize("name", sorted({case.config for case in gpu.CASES.values()}))
def test_sizes_are_those_of_the_configs(name: str):
    def whole(name: str) -> dict:
        values = yaml.safe_load((ROOT / "configs/model/backbone" / f"{name}.yaml").read_text())
        base = values.pop("defaults", [None])[0]
        return (whole(base) if base else {}) | values

    expected = {k: v for k, v in whole(name).items() if not isinstance(v, dict)}
    assert gpu.arguments("backbone", name) == expected


def test_networks_have_their_published_sizes_and_operations():
    sizes = {"sd2_512": 865_910_724, "dit_xl_256": 824_641_936, "sdxl_512": 2_567_463_684}
    for name, count in sizes.items():
        case = gpu.CASES[name]
        with torch.device("meta"):
            net = gpu.build("backbone", case.config, **case.changes)
        assert sum(p.numel() for p in net.parameters()) == count
    assert gpu.operations(gpu.CASES["sd2_512"]) == pytest.approx(3 * 0.804e12, rel=0.03)  # 0.80 is published, forward


def test_young_and_daly_s_interval_is_the_best_one():
    cluster = scale.CLUSTERS["H100"]
    best = scale.goodput(1024, cluster, checkpoint_seconds=60.0)
    for factor in (0.5, 2.0):
        interval = best["interval_seconds"] * factor
        assert scale.lost(interval, 60.0, best["mtbf_seconds"], cluster.restart_seconds) > 1 - best["goodput"]
    assert best["mtbf_seconds"] == pytest.approx(cluster.gpu_mtbf_hours * 3600 / 1024)
    assert best["interval_seconds"] == pytest.approx((2 * 60.0 * best["mtbf_seconds"]) ** 0.5)


def test_the_model_of_one_gpu_is_what_was_measured_and_more_gpus_share_it():
    rows = scale.model("H100")
    assert [row["gpus"] for row in rows] == [8, 64, 256, 1024]
    for row in rows:
        assert row["all_reduce_gb"] == pytest.approx(2 * (1 - 1 / row["gpus"]) * 4 * scale.PARAMETERS / 1e9)
        assert row["images_per_second"] <= row["gpus"] * scale.CLUSTERS["H100"].images_per_second
        assert 0 < row["goodput"] <= 1
    assert rows[0]["step_seconds"] > rows[-1]["step_seconds"]


def test_the_tables_in_scale_md_are_those_that_the_script_prints():
    printed = subprocess.run([sys.executable, "bench/scale.py", "--model"], cwd=ROOT, check=True, capture_output=True,
                             text=True).stdout  # fmt: skip
    text = (ROOT / "bench" / "SCALE.md").read_text()
    assert printed.strip() in text


def test_two_real_ranks_exchange_the_gradient_and_no_more():
    command = [sys.executable, "bench/scale.py", "--toy", "--json", "--steps", "9"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=600)
    one, two = json.loads(done.stdout.splitlines()[-1])
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["wire_bytes_per_step"] < 0.05 * two["gradient_bytes"]
    # a ring of two sends each gradient once; TCP, gloo and the loss's own words come on top
    assert two["wire_bytes_per_step"] == pytest.approx(2 * two["gradient_bytes"], rel=0.10)
