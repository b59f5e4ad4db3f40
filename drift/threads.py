"""How idle threads wait. Imported first by the command, before torch loads OpenMP, which reads the environment once.

libgomp's idle threads spin. If another process needs the core, the spinning thread keeps it from the work that it waits for,
and a step of two threads can take ten times as long. Passive waiting sleeps instead.
`OMP_WAIT_POLICY=active drift doctor` and any other choice of the user stands.
"""

import os

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

if not any(name in os.environ for name in CHOICES):
    os.environ["OMP_WAIT_POLICY"] = "passive"
