"""What is set for MPI libraries before they are imported."""

import pytest

from mpinfer.transport import settings

SIZE, HERE = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"


@pytest.mark.parametrize(
    ("environ", "leaves_out_libfabric"),
    [
        ({}, True),
        ({SIZE: "4", HERE: "4", "PMIX_RANK": "0"}, True),
        ({SIZE: "4", HERE: "2", "PMIX_RANK": "0"}, False),
        ({"PMIX_RANK": "0"}, False),  # srun does not say how many are here
        ({"OMPI_MCA_btl": "self,tcp"}, False),  # the user does
    ],
)
def test_libfabric_is_left_out_on_one_node(environ: dict[str, str], leaves_out_libfabric: bool) -> None:
    assert ("OMPI_MCA_btl" in settings(environ)) == leaves_out_libfabric


def test_what_the_user_says_stays() -> None:
    assert "OMPI_MCA_osc" in settings({})
    assert "OMPI_MCA_osc" not in settings({"OMPI_MCA_osc": "ucx"})
