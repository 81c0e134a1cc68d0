"""Checkpoints under kill -9, several processes, and full or read-only disks: real processes, real file systems."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ppomax.engine.checkpoint import dry_run, latest_checkpoint, save_checkpoint
from ppomax.engine.durable import SaveError
from ppomax.types import SetupError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, number: int) -> Path:
    return save_checkpoint(folder, f"iteration-{number}", {"w": torch.full((4,), number)}, {"n": number})


# One process forks writers and kills each at a random moment, so that torch is imported once.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from ppomax.engine.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
folder, last = Path(sys.argv[1]), 0
for turn in range(60):
    if turn >= 12 and last >= 3:  # a busy machine may need more turns to save anything
        break
    pid = os.fork()
    if pid == 0:
        for n in range(last + 1, 10**6):
            save_checkpoint(folder, f"iteration-{n}", {"w": torch.full((300_000,), n)}, {"n": n}, keep=1)
    time.sleep(random.uniform(0.05, 0.3) * (1 + turn / 12))  # where saving takes long, later turns save something
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL  # the writer itself had not failed
    path, problems = latest_checkpoint(folder)
    assert not problems, problems
    if path is None:
        assert last == 0
        continue
    tensors, state = load_checkpoint(path)
    assert path.name == f"iteration-{state['n']}" and (tensors["w"] == state["n"]).all() and state["n"] >= last
    last = state["n"]
print("checkpoints", last)
"""


def run_script(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kill_9_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    assert int(run_script(KILLED, str(tmp_path)).split()[-1]) >= 3


# Two gloo ranks with FSDP2 shards save; one process loads whole tensors; two ranks load into other shards.
SHARDED = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from ppomax.engine.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ppomax.engine.durable import SaveError
from ppomax.types import DataError
folder = Path(sys.argv[1])

def flat(mesh, steps):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 1, bias=False))
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    optimiser = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(4, 5)).pow(2).mean().backward()
        optimiser.step(); optimiser.zero_grad()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    both = {k: v for part in get_state_dict(model, optimiser, options=options) for k, v in part.items()}
    return {k: v for k, v in both.items() if isinstance(v, torch.Tensor)}

def whole(tensors):
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in tensors.items()}

def rank_main(rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    tensors = flat(mesh, 3)
    path = save_checkpoint(folder, "step-3", tensors, {"step": 3})
    wanted = whole(tensors)
    if rank == 0:
        torch.save(wanted, folder / "wanted.pt")
    other = flat(mesh, 1)
    load_checkpoint(path, into=other)
    assert all(t.equal(wanted[k]) for k, t in whole(other).items())
    dist.barrier()
    (path / "state.json").write_text("{}")
    try:
        load_checkpoint(path, into=other)
    except DataError as error:
        assert "state.json" in str(error)
        (folder / f"refused-{rank}").touch()
    try:
        save_checkpoint(folder / "rendezvous", "step-4", tensors, {})
    except SaveError:
        (folder / f"failed-{rank}").touch()
    dist.barrier()
    save_checkpoint(folder, "step-4", tensors, {"step": 4})
    dist.destroy_process_group()

children = []
for rank in range(2):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            rank_main(rank)
            code = 0
        except BaseException:
            import traceback; traceback.print_exc()
        finally:
            os._exit(code)
    children.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
assert all((folder / f"{word}-{rank}").exists() for word in ("refused", "failed") for rank in range(2))
path, problems = latest_checkpoint(folder)
assert path == folder / "step-4" and not problems
tensors, state = load_checkpoint(path)
wanted = torch.load(folder / "wanted.pt")
assert state == {"step": 4} and tensors.keys() == wanted.keys() and len(wanted) == 20
assert all(t.equal(wanted[k]) and t.dtype == wanted[k].dtype for k, t in tensors.items())
print("shards", len(list(path.glob("shard-*.safetensors"))))
"""


def test_two_processes_save_and_one_or_two_load(tmp_path: Path) -> None:
    assert run_script(SHARDED, str(tmp_path)) == "shards 2\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, mounted for the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_old_checkpoints(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    save(folder, 1)
    with pytest.raises(SaveError) as caught:
        save_checkpoint(folder, "iteration-2", {"w": torch.zeros(1_000_000)}, {})
    message = str(caught.value)
    for part in (f"{folder / 'iteration-2'}", "No space left on device", "4 MB needed", "MB free", "untouched",
                 "free some space", "another output directory", "--resume"):  # fmt: skip
        assert part in message
    assert caught.value.errno == errno.ENOSPC and isinstance(caught.value, OSError)
    assert names(folder) == ["iteration-1"] and latest_checkpoint(folder) == (folder / "iteration-1", [])
    with pytest.raises(SetupError, match=r"MB free, expected 3 MB \(2 checkpoints of 1.5 MB more.*save.keep.*choose"):
        dry_run(folder, 1_500_000)
    dry_run(folder, 1_500_000, copies=1)
    dry_run(folder, 500_000)
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 8192))
    with pytest.raises(SetupError, match=r"cannot save here \(No space left on device\).* 2 kB free; found .* kB free"):
        dry_run(folder, 1000)
    assert names(folder) == ["iteration-1"]


def test_a_file_size_limit_is_a_full_disk_too(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from ppomax.engine.checkpoint import save_checkpoint\n"
        "from ppomax.engine.durable import SaveError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "save_checkpoint(Path(sys.argv[1]), 'step-1', {'w': torch.zeros(10)}, {})\n"
        "try: save_checkpoint(Path(sys.argv[1]), 'step-2', {'w': torch.zeros(50_000)}, {})\n"
        "except SaveError as error: print(error)"
    )
    assert "step-2: cannot save (File too large; 200 kB needed, " in run_script(code, str(tmp_path))
    assert names(tmp_path) == ["step-1"]


def test_a_read_only_disk_is_found_by_the_dry_run(small_disk: Path) -> None:
    save(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(SetupError, match=rf"{small_disk}: cannot save here \(Read-only file system\).*choose another"):
        dry_run(small_disk, 1000)
    with pytest.raises(SaveError, match=r"Read-only file system.*can be written"):
        save(small_disk, 2)
    assert latest_checkpoint(small_disk)[0] == small_disk / "iteration-1"


def test_a_dry_run_under_a_file_and_on_a_good_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        SetupError, match=r"file/run: cannot save here \(Not a directory\), expected .*2 kB free; found"
    ):
        dry_run(tmp_path / "file" / "run", 1000)
    dry_run(tmp_path / "run", 1000)
    assert names(tmp_path / "run") == []
    with pytest.raises(SetupError, match=r"run: found .* free, expected 2000 TB"):
        dry_run(tmp_path / "run", 10**15)
