"""The house: imports go down the floors, no two rooms import each other, and importing the package
loads nothing.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gptoss_jax"

FLOORS = [
    {
        "errors",
        "config",
        "dims",
        "mxfp4",
        "hf_names",
        "sharding",
        "cluster",
        "hosts",
        "libtpu",
        "places",
    },
    {"kernels", "ops"},
    {"cache", "model", "lora", "bounds"},
    {"checkpoint", "hub", "tokenizer", "adapters"},
    {"sampling", "steps", "stops", "completions", "engine", "loading", "batching"},
    {"chat", "tools"},
    {"server", "train", "bench", "plan", "cli", "convert"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Imports inside one floor that have a reason: the lower room comes second.
SAME_FLOOR = {
    ("config", "errors"), ("dims", "config"), ("mxfp4", "errors"), ("hf_names", "errors"), ("sharding", "errors"), ("cluster", "errors"), ("hosts", "errors"), ("hosts", "cluster"),
    ("hf_names", "config"), ("hf_names", "mxfp4"), ("hf_names", "dims"), ("sharding", "dims"), ("sharding", "config"),
    ("sharding", "mxfp4"), ("ops", "kernels"), ("model", "cache"), ("lora", "model"), ("bounds", "cache"), ("bounds", "model"), ("checkpoint", "hub"),
    ("steps", "sampling"), ("engine", "steps"), ("engine", "stops"), ("engine", "sampling"), ("chat", "tools"), ("completions", "sampling"), ("completions", "stops"), ("engine", "completions"), ("loading", "engine"), ("batching", "completions"),
    ("batching", "sampling"), ("batching", "steps"), ("batching", "engine"), ("batching", "stops"),
    ("checkpoint", "tokenizer"), ("adapters", "checkpoint"),
}  # fmt: skip
# Third parties with walls: the rooms that may import them.
WALLS = {
    "flax": {"model", "lora"},
    "orbax": {"checkpoint", "train"},
    "safetensors": {"checkpoint", "convert", "train"},
    "tiktoken": {"tokenizer"},
    "openai_harmony": {"chat"},
    "llguidance": {"chat"},
    "huggingface_hub": {"hub"},
    "fastapi": {"server"},
    "ray": {"server"},
    "optax": {"train"},
    "grain": {"train"},
    "rich": {"cli", "convert", "train", "bench", "plan", "server"},
    "tyro": {"cli", "train", "bench", "plan", "server", "convert"},
    "torch": {"bench"},
    "transformers": {"bench"},
}
F0_ALLOWED = {"jax", "numpy", "ml_dtypes", "jaxtyping"}


def room_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "convert"):
        return "convert"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
    return [f for f in files if room_of(f) != "__init__"]


def imports(path: Path):
    """(top-level package, room inside gptoss_jax or None) of every import, lazy ones included."""
    package = (
        "convert"
        if room_of(path) == "convert"
        else ".".join(path.relative_to(PACKAGE).parent.parts)
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                parts = name.name.split(".")
                yield parts[0], parts[1] if parts[0] == "gptoss_jax" and len(parts) > 1 else None
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "gptoss_jax", package.split(".")[0] or None
                continue
            parts = (node.module or "").split(".")
            if parts == ["gptoss_jax"]:
                for name in node.names:
                    yield "gptoss_jax", name.name
            else:
                yield parts[0], parts[1] if parts[0] == "gptoss_jax" else None


def edges():
    return {
        (room_of(path), room)
        for path in sources()
        for top, room in imports(path)
        if top == "gptoss_jax" and room in FLOOR and room != room_of(path)
    }


def test_every_room_has_a_floor():
    assert {room_of(path) for path in sources()} <= set(FLOOR)


def test_imports_go_down():
    wrong = [
        f"{a} imports {b}"
        for a, b in sorted(edges())
        if FLOOR[b] > FLOOR[a] or (FLOOR[b] == FLOOR[a] and (a, b) not in SAME_FLOOR and a != "cli")
    ]
    assert not wrong


def test_no_two_rooms_import_each_other():
    found = edges()
    assert not [pair for pair in found if pair[::-1] in found]


def test_third_parties_stay_behind_their_walls():
    wrong = []
    for path in sources():
        for top, _ in imports(path):
            if top in WALLS and room_of(path) not in WALLS[top]:
                wrong.append(f"{path.name} imports {top}")
            facts = FLOOR[room_of(path)] == 0
            if (
                facts
                and top not in F0_ALLOWED
                and top != "gptoss_jax"
                and top not in sys.stdlib_module_names
            ):
                wrong.append(f"{path.name} (facts) imports {top}")
    assert not wrong


def test_lower_floors_know_no_config_objects():
    """ops get numbers; the network's words stay out of arithmetic."""
    wrong = [
        p.name
        for p in (PACKAGE / "ops").rglob("*.py")
        for top, room in imports(p)
        if room == "config"
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("gptoss_jax", ["jax", "flax", "orbax", "fastapi", "torch", "numpy"]),
        ("gptoss_jax.cli.main", ["jax", "flax", "tyro", "rich"]),
        ("gptoss_jax.engine", ["torch", "fastapi", "openai_harmony", "orbax"]),
        ("gptoss_jax.loading", ["torch", "fastapi", "openai_harmony", "orbax"]),
    ],
)
def test_importing_loads_no_more_than_needed(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_packages_are_listed_in_pyproject():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent for p in PACKAGE.rglob("*.py")}
    names = {".".join(p.relative_to(ROOT).parts) for p in folders} | {"gptoss_jax.convert"}
    assert set(listed) == names


def test_public_names_exist_and_say_what_they_are():
    import gptoss_jax

    for name in gptoss_jax.__all__:
        assert getattr(gptoss_jax, name).__doc__, name


def test_top_level_holds_what_it_should():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "gptoss_jax",
        "convert",
        "tests",
        "notebooks",
    }
    assert {top for top in tops if not top.startswith(".")} <= allowed
