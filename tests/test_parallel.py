"""Work in processes: in order, ended with its parent, and a killed worker is one line."""

import os
import signal

import pytest

from ldm.data.parallel import in_parallel
from ldm.errors import UserError


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    raise UserError(f"no {number}")


def end(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2, None])
def test_results_come_in_the_order_of_the_tasks(workers: int | None):
    assert list(in_parallel(square, range(20), workers, "squares")) == [i * i for i in range(20)]
    assert list(in_parallel(square, [], workers, "squares")) == []


def test_errors_arrive():
    with pytest.raises(UserError, match="no 3"):
        list(in_parallel(refuse, [3, 4], 2, "refusals"))
    with pytest.raises(UserError, match="fewer --workers"):
        list(in_parallel(end, [1, 2], 2, "ends"))
    with pytest.raises(UserError, match="workers=0"):
        list(in_parallel(square, [1], 0, "none"))
