"""How often faults come: a tenth of the trials by default, all of them by `make faults`."""

import os

ALL = 60
TRIALS = int(os.environ.get("JAXFLAT_FAULT_TRIALS", "6"))
