"""The Grafana board asks only for what the server measures, by labels that are there."""

import json
import re
from pathlib import Path

from fakes import ScriptedEngine
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from gptoss_jax.server.app import create_app

BOARD = Path(__file__).parent.parent / "gptoss_jax" / "server" / "board.json"
MADE_BY_PROMETHEUS = {"instance"}


def measured() -> dict[str, set[str]]:
    """Samples in /metrics after one request, with their labels."""
    engine = ScriptedEngine("<|channel|>final<|message|>one two three<|return|>")
    try:
        client = TestClient(create_app(engine))
        body = {"model": engine.name, "messages": [{"role": "user", "content": "Count"}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        families = list(text_string_to_metric_families(client.get("/metrics").text))
    finally:
        engine.close(0)
    out: dict[str, set[str]] = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name.startswith("gptoss_"):
            out.setdefault(sample.name, set()).update(sample.labels)
    return out


def expressions() -> list[str]:
    board = json.loads(BOARD.read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [*found, *(v["definition"] for v in board["templating"]["list"] if "definition" in v)]


def test_every_metric_and_label_of_the_board_exists():
    known = measured()
    for expression in expressions():
        names = re.findall(r"gptoss_\w+", expression)
        assert names, expression
        assert set(names) <= known.keys(), expression
        wanted = set(re.findall(r"by \((\w+)\)", expression)) | set(
            re.findall(r'(\w+)=~?"', expression)
        )
        for name in names:
            assert wanted <= known[name] | MADE_BY_PROMETHEUS, expression


def test_everything_measured_is_on_the_board():
    asked = set(re.findall(r"gptoss_\w+", " ".join(expressions())))
    # a histogram's _bucket is asked for, not its _count and _sum
    own = {name for name in measured() if not name.endswith(("_created", "_count", "_sum"))}
    assert own == asked


def test_panels_do_not_overlap():
    panels = json.loads(BOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
