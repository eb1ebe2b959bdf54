"""libtpu where there are no TPUs: it compiles for them all the same, but asks the cloud's metadata
server who it is and complains on stderr at every start. These settings answer for the server.
"""

import glob
import os

ANSWERS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def hush() -> None:
    """Sets them, unless the machine has device files of TPUs; before JAX starts."""
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/*"):
        for name, value in ANSWERS.items():
            os.environ.setdefault(name, value)
