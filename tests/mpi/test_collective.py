"""Sums over shards are right, and the same to the last bit on all; ranks that wait leave their core to others."""

import json

from harness import Mpi, mpirun

# Prints, from rank 0, what share of a core each rank took while the first two computed and the others waited.
PROGRAM = """
import json, random, time
from contextlib import nullcontext
from ctypes import byref
import numpy as np, torch
from mpinfer.models.kernels import find_kernels
from mpinfer.models.layer import ShardSums
from mpinfer.transport import collective
from mpinfer.transport.endpoint import Endpoint

torch.set_num_threads(1)
endpoint = Endpoint()
rank = endpoint.rank


def make(count):
    return collective.ShardGroup(endpoint, range(count), lambda phase: nullcontext())


kernels, problem = find_kernels("auto", "cpu", torch.float32)
assert kernels is not None, problem


def in_kernels(group):
    sums = ShardSums(group.memory())

    def way(numbers):
        if len(numbers) <= sums.most:
            assert kernels.library.sum_shards(byref(sums.struct), numbers.ctypes.data, len(numbers)) == 0
        else:
            group._all_add(numbers)

    return way


def check(group, count, bits=True, own_kernels=False):
    assert (group.memory() is not None) == bits
    ways = [group._by_mpi, group._by_leaders]
    if bits:
        ways[1:] = [group._all_add, group._share_out, in_kernels(group)]
    if bits and own_kernels:  # one shard may be in Python while another is in a kernel
        ways[1] = ways[1] if rank else ways[3]
    both, own = random.Random(count), random.Random(rank)
    for number in range(120):
        size = both.choice([1, 2, 3, 576, both.randrange(1, 3000), 70000 if number % 20 == 0 else 5])
        dtype = both.choice([torch.float32, torch.bfloat16])
        group._ways = [both.choice(ways)] * 4
        data = np.random.default_rng(1000 * count + number).standard_normal((count, size), dtype=np.float32)
        terms = [torch.from_numpy(row).to(dtype) for row in data]
        x = terms[rank].clone().reshape(1, size)
        if own.random() < 0.05:
            time.sleep(own.random() * 2e-3)
        y = group.all_reduce(x)
        assert y.data_ptr() == x.data_ptr() and y.dtype == dtype
        expected = torch.stack(terms).double().sum(0)
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        assert torch.allclose(y[0].double(), expected, rtol=tolerance, atol=tolerance), (count, number, size)
        raw = y.view(torch.uint8).numpy().tobytes()
        assert len(set(group._comm.allgather(raw))) == 1, (count, number, size)
    assert group.any(rank == count - 1) and not group.any(False)


for count in range(1, endpoint.size + 1):
    if rank < count:
        group = make(count)
        check(group, count)
        check(group, count, own_kernels=True)
        before = group.bytes_summed
        in_kernels(group)(np.ones(10, np.float32))
        assert group.bytes_summed == before + 40
        group.restart()
        assert group.bytes_summed == 0
        group.free()
collective._of_this_node = lambda comm: comm.Split(comm.rank // 2)  # as if on two nodes
if rank < 3:
    group = make(3)
    check(group, 3, bits=False)
    group.free()
endpoint.broadcast(None)

comm, wall, cpu = endpoint.data, time.perf_counter(), time.process_time()
late = comm.irecv(source=rank - 2) if rank >= 2 else None
if late is None:
    while time.perf_counter() - wall < 1.0:
        pass
    comm.send(None, rank + 2)
else:
    endpoint.wait_until(lambda: late.test()[0])
share = (time.process_time() - cpu) / (time.perf_counter() - wall)
everyone = endpoint.all_gather(share)
if rank == 0:
    print(json.dumps(everyone))
"""


def test_sums_are_the_same_everywhere_and_waiting_ranks_leave_the_cores(mpi: Mpi) -> None:
    run = mpirun(mpi, 4, ["python", "-c", PROGRAM])
    assert run.returncode == 0, run.stderr
    assert not run.stderr, run.stderr
    *_, first, second = json.loads(run.stdout)
    assert max(first, second) < 0.1
