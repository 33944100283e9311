"""What the other tests lean on: worlds end, and the token rule can say no."""

from pathlib import Path

import pytest
from harness import Mpi, Reference, World, assert_token_rule, eventually

REFERENCES = [Reference([3, 4, 5], [1.0, 1e-4, 1.0])] * 100


def results(*first: int) -> list[dict]:
    """Results as the references, but for the first record."""
    tokens = [list(first), *(reference.tokens for reference in REFERENCES[1:])]
    return [{"index": index, "output": {"token_ids": ids}} for index, ids in enumerate(tokens)]


def test_world_that_hangs_is_ended(mpi: Mpi) -> None:
    with World(mpi, 2, ["python", "-c", "import time; time.sleep(60)"]) as world:
        world.wait_until(lambda: len(world.ranks()) == 2, 20)
        pids = world.ranks().values()
        with pytest.raises(pytest.fail.Exception, match=r"still ran after 0\.1 s"):
            world.wait(0.1)
        assert not world.processes()
    # Their adoptive parent may take a moment to bury them.
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 5)


@pytest.mark.parametrize("tokens", [(3, 4, 5), (3, 9, 9)], ids=["equal", "diverges at a near tie"])
def test_token_rule_accepts(tokens: tuple[int, ...]) -> None:
    assert_token_rule(results(*tokens), REFERENCES)


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [((9, 4, 5), "no tie"), ((3, 4), "continues"), ((3, 4, 5, 6), "continues"), ((), "continues")],
    ids=["diverges elsewhere", "too short", "too long", "empty"],
)
def test_token_rule_refuses(tokens: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        assert_token_rule(results(*tokens), REFERENCES)


def test_token_rule_refuses_many_ties() -> None:
    with pytest.raises(AssertionError, match="1 of 50 records"):
        assert_token_rule(results(3, 9, 9)[:50], REFERENCES[:50])


def test_token_rule_refuses_another_order() -> None:
    with pytest.raises(AssertionError):
        assert_token_rule(results(3, 4, 5)[::-1], REFERENCES)
