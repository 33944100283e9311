"""`odd_shard.py ARGUMENTS...`: mpinfer, where rank 1 finds torch's products faster than kernels, all others do not."""

import os
import sys

from mpinfer.cli import main

if __name__ == "__main__":
    from mpinfer.models.linear import LayerTuner

    odd = (os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK")) == "1"
    LayerTuner._fastest = lambda *_: "torch" if odd else "mpinfer"  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
