"""Store the outputs of notebooks anew: `python nbs/_sphinx/execute.py [NOTEBOOK ...]`.

Each notebook is run from a fresh kernel, and each cell with an output notes of which
source it is the output, so that an output that has become stale can be found. Those of
04_train and 05_evaluate are taken from runs/demo, where `make run` has executed them.
"""

import base64
import hashlib
import io
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NBS = Path(__file__).resolve().parent.parent
RUN = NBS.parent / "runs" / "demo"
EXECUTED_BY_MAKE_RUN = {
    "04_train": RUN / "04_train.ipynb",
    "05_evaluate": RUN / "evaluation" / "05_evaluate.ipynb",
}
OUTPUT_OF = "output_of"  # the key in a cell's metadata


def digest(source: str) -> str:
    """A hash of a cell's source, of which directives are no part."""
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    return hashlib.blake2b(code.encode(), digest_size=4).hexdigest()


def is_worth_storing(output) -> bool:
    """Whether a page shows an output: no progress bar, log or widget."""
    if output.output_type == "stream":
        return output.name == "stdout"
    return "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def shrink(png: str, width: int = 1000, most: int = 100_000) -> str:
    """A picture (base64) of more than `most` characters, with 256 colours."""
    if len(png) <= most:
        return png
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.thumbnail((width, 10 * width))
    small = io.BytesIO()
    picture.quantize(256).save(small, "PNG", optimize=True)
    return min(png, base64.b64encode(small.getvalue()).decode(), key=len)


def execute(path: Path):
    """The notebook at `path` with the outputs of a run from a fresh kernel."""
    notebook = nbformat.read(path, 4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=900, resources=where).execute()
    return notebook


def outputs_of_make_run(path: Path):
    """The notebook at `path` with the outputs that `make run` left in runs/demo.

    Exits where there are none, or where a cell has changed since."""
    notebook, executed = nbformat.read(path, 4), EXECUTED_BY_MAKE_RUN[path.stem]
    if not executed.is_file():
        sys.exit(f"{executed} is missing; run `make run` first")
    cells = {cell.id: cell for cell in nbformat.read(executed, 4).cells}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if cell.id not in cells or cells[cell.id].source != cell.source:
            sys.exit(f"{path.name} has changed since {executed}; run `make run` anew")
        cell.outputs = cells[cell.id].outputs
    return notebook


def store(path: Path, notebook):
    """Write the outputs that a page shows, each with the digest of its source."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = [output for output in cell.outputs if is_worth_storing(output)]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
            if png := output.get("data", {}).get("image/png"):
                output.data["image/png"] = shrink(png)
        if "#| echo: false" in cell.source:
            cell.metadata["jupyter"] = {"source_hidden": True}  # folded in JupyterLab
        cell.metadata.pop(OUTPUT_OF, None)
        if cell.outputs:
            cell.metadata[OUTPUT_OF] = digest(cell.source)
    for key in ("widgets", "papermill", "language_info"):
        notebook.metadata.pop(key, None)
    nbformat.write(notebook, path)


def main(names: list[str]):
    paths = [Path(name).resolve() for name in names] or sorted(NBS.glob("*.ipynb"))
    for path in paths:
        print(path.name, flush=True)
        ran = path.stem in EXECUTED_BY_MAKE_RUN
        store(path, outputs_of_make_run(path) if ran else execute(path))


if __name__ == "__main__":
    main(sys.argv[1:])
