"""JupyterLab's configuration for `make lab`: notebooks open and close unchanged,
and the file browser shows the chapters.

nbdev strips a notebook, as it is saved, of what depends on the machine: the kernel's
display name and the version of Python. JupyterLab adds them as it opens one, and takes
the notebook for edited unless they are there already. Widgets and progress bars are
stripped as well: they live no longer than the kernel that drew them.

`lab_settings` gives the chapters' names the whole width of the file browser, and asks
nobody about news of Jupyter.
"""

from pathlib import Path

from ipykernel.ipkernel import IPythonKernel
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbdev.clean import clean_jupyter

# What builds the docs lies beside the chapters, and is no chapter.
NO_CHAPTERS = {"_quarto.yml", "_sphinx", "images", "nbdev.yml", "results", "styles.css"}
WIDGET = "application/vnd.jupyter.widget-view+json"


class Notebooks(AsyncLargeFileManager):
    """Reads notebooks with what JupyterLab would add to them, and lists chapters."""

    async def get(self, path, content=True, *args, **options):
        model = await super().get(path, content, *args, **options)
        if content and model["type"] == "directory" and path.strip("/") == "nbs":
            listed = model["content"]
            model["content"] = [one for one in listed if one["name"] not in NO_CHAPTERS]
        if content and model["type"] == "notebook":
            metadata = model["content"]["metadata"]
            name = metadata.get("kernelspec", {}).get("name")
            if name == "python3":
                spec = self.parent.kernel_spec_manager.get_kernel_spec(name)
                metadata["kernelspec"]["display_name"] = spec.display_name
                metadata["language_info"] = IPythonKernel.language_info
        return model


def lasts(output: dict) -> bool:
    """Whether an output shows something when it is opened again; what else it shows is
    kept of a widget's."""
    if output["output_type"] == "stream":
        return "\r" not in "".join(output["text"])
    data = output.get("data", {})
    return data.pop(WIDGET, None) is None or bool(set(data) - {"text/plain"})


def clean(path, model, **options):
    """Strip what does not last, and then what nbdev strips."""
    if model["type"] == "notebook":
        for cell in model["content"]["cells"]:
            if "outputs" in cell:
                cell["outputs"] = [one for one in cell["outputs"] if lasts(one)]
    clean_jupyter(path=path, model=model, **options)


c = get_config()  # noqa: F821
c.ServerApp.contents_manager_class = Notebooks
c.ContentsManager.pre_save_hook = clean
c.LabApp.app_settings_dir = str(Path(__file__).parent / "lab_settings")
