"""The notebooks run from top to bottom, in a kernel of their own, as a user would run them."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(p.name for p in FOLDER.glob("*.ipynb")))
def test_runs(name, tmp_path):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "strip the outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    errors = [o for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert not errors
    texts = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    if name.startswith("02"):
        assert texts.startswith("8 devices")
        difference = re.search(r"largest difference (\S+) of", texts)
        assert difference is not None
        assert float(difference[1]) < 1e-4
        assert "u8[" not in texts  # experts do not travel
        assert "16 of 16 prompts answered now" in texts
        assert "same bits: True" in texts
    images = [
        o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    if name.startswith("01"):
        assert "632" in texts  # 347 + 285
        assert "98895" in texts  # 347 * 285, by the calculator
        assert len(images) == 2
    if name.startswith("03"):
        after = re.search(r"right after training: (\d+)%, before: (\d+)%", texts)
        assert after is not None
        assert int(after[1]) >= 80
        assert len(images) == 1
        assert int(after[2]) <= 20
        difference = re.search(r"largest difference of logits: (\S+)", texts)
        assert difference is not None
        assert float(difference[1]) < 1e-4
    if name.startswith("04"):
        assert "347 + 285 = 632" in texts
        assert "58 + 67 = 125" in texts
        assert "98895" in texts  # 347 * 285, from the tool's result
        assert "Sum(answer=42)" in texts
        right = re.search(r"(\d+) of 32 right", texts)
        assert right is not None
        assert int(right[1]) >= 30
        faster = re.search(r"(\d+\.\d) x", texts)
        assert faster is not None
        assert float(faster[1]) > 1.5
        assert "gptoss_engine_generated_tokens_total" in texts
        assert len(images) == 1
        assert "exit code 0" in texts
