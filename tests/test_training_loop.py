"""The loop of all trainings: what Ctrl-C and a kill leave behind is a whole step."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import pytest

from trace_sdk.alone import alone
from trace_sdk.errors import DatasetError, OutputError
from trace_sdk.training.history import CURVES
from trace_sdk.training.loop import train_until
from trace_sdk.training.state import STATE


class Counting:
    """Counts each step twice, and does what is asked for in between."""

    def __init__(self, between: dict[int, int]) -> None:
        self.step = self.first = self.second = 0
        self.between = between

    def batch(self, step: int) -> int:
        return step

    def train(self, batch: int) -> dict[str, float]:
        self.first += 1
        for _ in range(self.between.get(batch, 0)):
            signal.raise_signal(signal.SIGINT)
        self.second += 1
        self.step += 1
        return {"loss": float(batch)}

    def save(self, file: Path) -> None:
        file.write_text(json.dumps([self.step, self.first, self.second]))

    def restore(self, file: Path) -> None:
        self.step, self.first, self.second = json.loads(file.read_text())


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run by nohup ignores it


def test_ctrl_c_waits_for_the_end_of_the_step(tmp_path: Path) -> None:
    """It came in the middle of one, whose half was saved and then done again."""
    with pytest.raises(KeyboardInterrupt):
        train_until(5, Counting({2: 1}), tmp_path, 1e9, lambda *_: None)
    assert json.loads((tmp_path / STATE).read_text()) == [3, 3, 3]
    trainer = Counting({})
    train_until(5, trainer, tmp_path, 1e9, lambda *_: None)
    assert (trainer.step, trainer.first, trainer.second) == (5, 5, 5)
    assert (tmp_path / CURVES).read_text() == "step,loss\n1,0\n2,1\n3,2\n4,3\n5,4\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait_and_saves_no_half(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_until(5, Counting({2: 2}), tmp_path, 0, lambda *_: None)
    assert json.loads((tmp_path / STATE).read_text()) == [2, 2, 2]


def test_what_breaks_off_because_of_ctrl_c_is_no_error(tmp_path: Path) -> None:
    """A terminal sends it to torch's compilers and to the other processes of a training as well."""

    class Broken(Counting):
        def train(self, batch: int) -> dict[str, float]:
            if batch == 2:
                signal.raise_signal(signal.SIGINT)
                raise RuntimeError("c++ was interrupted")
            return super().train(batch)

    with pytest.raises(KeyboardInterrupt):
        train_until(5, Broken({}), tmp_path, 0, lambda *_: None)
    assert json.loads((tmp_path / STATE).read_text()) == [2, 2, 2]


def test_a_kill_between_two_files_loses_no_row_of_the_curves(tmp_path: Path) -> None:
    """The state was written first: rows up to its step that no file had were never written."""

    class Killed(Counting):
        def save(self, file: Path) -> None:
            super().save(file)
            if self.step == 3:
                raise SystemExit

    with pytest.raises(SystemExit):
        train_until(5, Killed({}), tmp_path, 0, lambda *_: None)
    train_until(5, Counting({}), tmp_path, 0, lambda *_: None)
    rows = (tmp_path / CURVES).read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["step", "1", "2", "3", "4", "5"]


def test_a_finished_run_without_its_curves_has_nothing_to_draw(tmp_path: Path) -> None:
    train_until(2, Counting({}), tmp_path, 0, lambda *_: None)
    (tmp_path / CURVES).unlink()
    train_until(2, Counting({}), tmp_path, 0, lambda *_: None)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_batch_is_one_line(workers: int, tmp_path: Path) -> None:
    """From a worker it came with the worker's traceback."""

    class Damaged(Counting):
        def batch(self, step: int) -> int:
            if step == 1:
                raise DatasetError("a.npz is not a label file. Remove it.")
            return step

    with pytest.raises(DatasetError) as caught:
        train_until(3, Damaged({}), tmp_path, 1e9, lambda *_: None, workers)
    assert str(caught.value) == "a.npz is not a label file. Remove it."


def test_it_trains_outside_of_the_main_thread_too(tmp_path: Path) -> None:
    trainer = Counting({})
    thread = threading.Thread(target=train_until, args=(3, trainer, tmp_path, 1e9, lambda *_: None))
    thread.start()
    thread.join()
    assert trainer.step == 3


def test_one_training_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(OutputError, match="Another process is writing"):
        train_until(1, Counting({}), tmp_path, 1e9, lambda *_: None)
    assert not list(tmp_path.iterdir())
    train_until(1, Counting({}), tmp_path, 1e9, lambda *_: None)
    assert (tmp_path / STATE).is_file()


def test_what_a_kill_left_of_a_state_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".{STATE}.a1b2c3.tmp"
    left.write_bytes(b"half")
    train_until(1, Counting({}), tmp_path, 1e9, lambda *_: None)
    assert not left.exists()
