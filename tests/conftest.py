"""Strictness for all tests: promotions and warnings are errors, eight simulated devices, types
checked where they pass.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes and types of annotated arguments are checked in the tests only.
install_import_hook(["gptoss_jax.ops", "gptoss_jax.model"], "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the slow proofs")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
