"""The `verl.plugins` entry point "drift". verl loads every entry point it finds, so that one does nothing unless named.

VERL_USE_EXTERNAL_PLUGINS=drift names it. verl logs what a plugin raises at debug level and goes on: a failure to turn on
ends the process instead. Hence this room beside the adapter: importing that can fail too.
"""

import os

if "drift" in os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "").replace(" ", "").lower().split(","):
    try:
        import drift_kernels.adapters.verl.on  # noqa: F401
    except Exception as error:
        raise SystemExit(f"VERL_USE_EXTERNAL_PLUGINS names drift, which cannot be turned on: {error}") from error
