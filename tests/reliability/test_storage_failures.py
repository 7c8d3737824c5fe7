"""Training on a disk that is full, read-only, forbidden or failing."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from figures import Figure
from trainings import (
    TrainingServer,
    assert_models_are_whole,
    assert_no_other_value,
    assert_same_run,
    copy_up_to,
    curve_of,
    everything_on,
    saved_steps,
    write_config,
)

SEED = 40
FAIL_ONCE, FAIL_FROM = 4, 5
# Some calls further is the second save of a start.
CALLS = 160
FAILURES = {
    "disk full": (errno.ENOSPC, FAIL_FROM),
    "quota used up": (errno.EDQUOT, FAIL_FROM),
    "read-only": (errno.EROFS, FAIL_FROM),
    "permission denied": (errno.EACCES, FAIL_FROM),
    "input/output error": (errno.EIO, FAIL_ONCE),
}


class Suffering:
    """A run that is started again and again on a failing disk."""

    def __init__(self, folder: Path, uninterrupted: Path, server: TrainingServer) -> None:
        self.root, self.log, self.trace = folder / "run", folder / "log", folder / "trace"
        self.uninterrupted, self.server = uninterrupted, server
        self.config = write_config(everything_on(self.root), folder / "config.toml")
        self.ends: Counter[str] = Counter()
        self.finished = 0

    def meet(self, what: str, **request: Any) -> int:
        """One start on the failing disk; everything saved before is there afterwards."""
        before = saved_steps(self.root)
        self.log.unlink(missing_ok=True)
        status = self.server.run(self.config, self.log, **request)
        text = self.log.read_text()
        assert "Traceback" not in text, text
        if status == 0:
            self.compare()
        else:
            said = [line for line in text.splitlines() if line.startswith("error: ")]
            assert len(said) == 1, text
            assert str(self.root.parent) in said[0], said
            assert any(word in said[0] for word in ("choose", "free ", "raise the")), said
            # 3 is of data, which a run of a generated task writes itself.
            assert status == (3 if "/data" in said[0] or "/cache" in said[0] else 4), said
            after = saved_steps(self.root)
            assert all(after[phase] >= step for phase, step in before.items())
            assert_models_are_whole(self.root)
        self.ends[f"{what}: {status}"] += 1
        return status

    def compare(self) -> None:
        assert_no_other_value(self.root, curve_of(self.uninterrupted))
        assert_same_run(self.root, self.uninterrupted)
        shutil.rmtree(self.root)
        self.finished += 1

    def finish(self) -> None:
        """The disk is well again: the same command ends the run."""
        if self.root.exists():
            assert self.server.run(self.config, self.log) == 0, self.log.read_text()
            self.compare()


@pytest.fixture
def suffering(server: TrainingServer, uninterrupted: Path, tmp_path: Path) -> Suffering:
    return Suffering(tmp_path, uninterrupted, server)


def test_a_failing_call_leaves_what_was_saved(
    suffering: Suffering, campaign: bool, figure: Figure
) -> None:
    if suffering.server.faults is None:
        pytest.skip("needs a C compiler and LD_PRELOAD")
    rng = random.Random(SEED)
    below, trace = str(suffering.root.resolve()), str(suffering.trace)
    for number in range(24 if campaign else 2):
        if number == 1:
            # Data are most of the calls of a new run: from here on they are there.
            shutil.rmtree(suffering.root, ignore_errors=True)
        for what, (error, action) in FAILURES.items():
            if number and not suffering.root.exists():
                phase = rng.choice(("teacher", "stage1", "stage2") if campaign else ("stage2",))
                copy_up_to(phase, suffering.uninterrupted, suffering.root)
            call = rng.randint(1, CALLS)
            suffering.meet(what, fault=[below, action, call, error, trace])
    suffering.finish()
    met = suffering.ends.total()
    print(f"seed {SEED}: {sorted(suffering.ends.items())}")
    assert met >= 10
    assert sum(n for end, n in suffering.ends.items() if not end.endswith(": 0")) > met / 2
    figure(
        "R4",
        "a disk that fails at a random call: full, quota, read-only, forbidden, I/O error",
        "previous checkpoint intact, exit 4 (3 while data are made) or a warning, 10 of 10",
        f"{met} of {met} ({exit_codes(suffering.ends)}), then resumed: {suffering.finished} runs "
        "bit-identical",
    )


def exit_codes(ends: Counter[str]) -> str:
    codes: Counter[str] = Counter()
    for end, number in ends.items():
        codes[end.rpartition(": ")[2]] += number
    return ", ".join(f"{number} × exit {code}" for code, number in sorted(codes.items()))


def test_real_limits_permissions_and_a_full_log(suffering: Suffering, figure: Figure) -> None:
    copy_up_to("stage2", suffering.uninterrupted, suffering.root)
    saved, folder = saved_steps(suffering.root), suffering.root / "checkpoints" / "stage2"
    folder.mkdir()
    folder.chmod(0o555)
    assert suffering.meet("forbidden", ordinary=True) == 4
    assert saved_steps(suffering.root) == saved
    folder.chmod(0o755)
    assert suffering.meet("file size", prepare=("storage_hooks", "limit_after", 2)) == 4
    assert saved_steps(suffering.root) == saved | {"stage2": 2}
    suffering.root.chmod(0o555)
    assert suffering.meet("forbidden", ordinary=True) == 4
    suffering.root.chmod(0o755)
    # The table that ends a run is written there as well: training is over by then.
    status = suffering.server.run(suffering.config, Path("/dev/full"), folder=str(folder.parent))
    assert status == 4
    suffering.finish()
    assert suffering.finished == 1
    figure(
        "R4",
        "real ones: RLIMIT_FSIZE, chmod without root's rights, a log on a full disk",
        "previous checkpoint intact, exit 4 or a warning, 10 of 10",
        f"{suffering.ends.total() + 1} of 4, then resumed: bit-identical",
    )


@pytest.fixture
def small_disk(tmp_path: Path, campaign: bool) -> Iterator[Path]:
    """A file system of 1 MiB, where this process may mount one."""
    if not campaign:
        pytest.skip("is a part of the campaign alone")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_small_disk_that_is_really_full_and_read_only(
    small_disk: Path, server: TrainingServer, uninterrupted: Path, figure: Figure
) -> None:
    suffering = Suffering(small_disk, uninterrupted, server)
    log = small_disk.parent / "log"
    suffering.log = log
    assert suffering.meet("disk full") in (3, 4)
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    assert suffering.meet("disk full") == 4
    saved = saved_steps(suffering.root)
    assert saved["teacher"] > 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert suffering.meet("read-only") == 4
    assert saved_steps(suffering.root) == saved
    subprocess.run(["mount", "-o", "remount,rw,size=32m", str(small_disk)], check=True)
    suffering.finish()
    assert suffering.finished == 1
    figure(
        "R4",
        "a real file system that is full, then read-only",
        "previous checkpoint intact, exit 4 or a warning, 10 of 10",
        f"{suffering.ends.total()} of 3, then resumed: bit-identical",
    )
