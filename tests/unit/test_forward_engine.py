"""What a job of records that pass once makes of its ranks' timings."""

import pytest

from mpinfer.forward.engine import ForwardEngine
from mpinfer.spec import spec_from_dict


def engine() -> ForwardEngine:
    spec = spec_from_dict({"model": {"path": "modules:linear", "task": "forward"}, "input": {"path": "x"}})
    found = ForwardEngine(spec, [["x", [8], "float32", None]])
    found.summary()
    return found


@pytest.mark.parametrize("crowd", [1.0, 2.0])
def test_ranks_that_share_cores_are_not_slow(crowd: float) -> None:
    """The best is of CPU time, which a neighbour on the core does not lengthen; the mean is of the clock's."""
    _, speeds = engine().rates([(crowd, (1.0, crowd))] * 4)
    assert speeds == pytest.approx([1.0] * 4)


def test_a_rank_that_pauses_is_slow() -> None:
    _, speeds = engine().rates([(1.0, (1.0, 1.0)), (1.0, (1.0, 3.0))])
    assert speeds == pytest.approx([1.0, 1 / 3])
