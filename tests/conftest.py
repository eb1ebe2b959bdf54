"""Strictness for all tests: promotions and warnings are errors, eight simulated devices, types
checked where they pass.
"""

import gc
import os
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import children
import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes and types of annotated arguments are checked in the tests only.
install_import_hook(["gptoss_jax.ops", "gptoss_jax.model"], "beartype.beartype")

MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = (
    30_000  # Linux allows a process 65,530; a file's compiled programs take up to 10,000
)


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Lets go of compiled programs before the process has as many mappings as it may have: beyond
    that, allocation fails and the process ends in a segmentation fault.
    """
    yield
    if MAPPINGS.exists() and MAPPINGS.read_text().count("\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def no_engine_outlives_its_test():
    """Closes what a test made and did not close; what a module's fixture made stays."""
    import fakes  # after the import hook

    with fakes.closing():
        yield


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    """Ends what a test started by children.start and did not end."""
    yield
    children.end()


@pytest.fixture
def client():
    """Makes openai clients of servers that replay scripts; with the engines."""
    from serving import clients

    with clients() as make:
        yield make


@pytest.fixture
def arithmetic(request):
    """Computes with one instruction set after the other; asked for by a test, not at its import,
    which would compile the kernels for tests that need none.
    """
    from gptoss_jax.kernels.cpu import library

    library.choose(request.param)
    yield request.param
    library.choose(library.arithmetics()[0])


def pytest_generate_tests(metafunc):
    if "arithmetic" in metafunc.fixturenames:
        from gptoss_jax.kernels.cpu import library

        metafunc.parametrize("arithmetic", library.arithmetics(), indirect=True)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the slow proofs")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
