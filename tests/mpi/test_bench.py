"""`mpinfer bench transport` measures what it says it does; never how fast it is."""

import json

from harness import Mpi, mpirun

WAYS = {"channel", "raw", "persistent", "blocking", "gloo"}


def test_every_way_is_measured_at_every_size(mpi: Mpi) -> None:
    options = ["--largest", 5000, "--rounds", 2]
    bench = mpirun(mpi, 2, ["mpinfer", "bench", "transport", "--json", *options])
    assert bench.returncode == 0, bench.stderr
    found = json.loads(bench.stdout)
    assert found["nodes"] == 1
    assert [size["bytes"] for size in found["sizes"]] == [8, 64, 1024]
    for size in found["sizes"]:
        for figure in ("latency_s", "latency_of_raw", "bytes_per_s", "bytes_per_s_of_raw"):
            assert size[figure].keys() == WAYS
            assert min(size[figure].values()) > 0
        assert size["latency_of_raw"]["raw"] == size["bytes_per_s_of_raw"]["raw"] == 1
        assert max(size["latency_s"].values()) < 1
    overlap = found["overlap"]
    assert overlap["bytes"] == 5000
    assert overlap["hidden"].keys() == overlap["send_s"].keys()
    assert {"channel, no calls", "channel, progress points", "Isend, Test"} < overlap["hidden"].keys()


def test_a_world_of_another_size_is_refused_in_one_line(one_mpi: Mpi) -> None:
    bench = mpirun(one_mpi, None, ["mpinfer", "bench", "transport"])
    assert bench.returncode == 2
    assert bench.stderr.startswith("mpinfer: error: a world of 1 rank: messages go between two; start it with `mpirun")
    assert bench.stderr.count("\n") == 1
