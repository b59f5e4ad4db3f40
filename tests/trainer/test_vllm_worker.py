"""What vLLM's workers learn from drift, in a class that plays the worker."""

import subprocess
import sys
from pathlib import Path

import pytest

from drift.engines import vllm_worker


def test_the_worker_loads_then_renews_the_head_and_forgets_a_version_that_failed():
    done = []

    class Head:
        class quant_method:
            @staticmethod
            def process_weights_after_loading(head):
                done.append("head")

    class Model:
        lm_head = Head

    class Worker(vllm_worker.Weights):
        class vllm_config:
            class model_config:
                get_vocab_size = staticmethod(lambda: 23)

        class model_runner:
            get_model = staticmethod(lambda: Model)

        def reload_weights(self, weights_path):
            if weights_path == "bad":
                raise RuntimeError("bad")
            done.append(weights_path)

    worker = Worker()
    assert worker.drift_state() == {"start": vllm_worker.START, "version": None, "vocabulary": 23}
    worker.drift_load("folder", "v1")
    assert done == ["folder", "head"]
    assert worker.drift_version is None  # the cache still has prefixes of older weights
    worker.drift_mark("v1")
    assert worker.drift_state()["version"] == "v1"
    worker.drift_load("folder", "v1")
    assert worker.drift_version == "v1"
    for version in ("v2", "v1"):
        worker.drift_mark("v1")
        with pytest.raises(RuntimeError):
            worker.drift_load("bad", version)
        assert worker.drift_version is None


def test_the_worker_needs_none_of_drifts_dependencies():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'pydantic', 'transformers', 'httpcore2']))\n"
    )
    code += "import drift.engines.vllm_worker"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent.parent)
