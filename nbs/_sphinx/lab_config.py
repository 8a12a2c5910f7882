"""JupyterLab's configuration for `make lab`: notebooks open and close unchanged.

nbdev strips a notebook, as it is saved, of what depends on the machine: the kernel's
display name and the version of Python. JupyterLab adds them as it opens one, and takes
the notebook for edited unless they are there already.
"""

from ipykernel.ipkernel import IPythonKernel
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbdev.clean import clean_jupyter


class Notebooks(AsyncLargeFileManager):
    """Reads notebooks with what JupyterLab would add to them."""

    async def get(self, path, content=True, *args, **options):
        model = await super().get(path, content, *args, **options)
        if content and model["type"] == "notebook":
            metadata = model["content"]["metadata"]
            name = metadata.get("kernelspec", {}).get("name")
            if name == "python3":
                spec = self.parent.kernel_spec_manager.get_kernel_spec(name)
                metadata["kernelspec"]["display_name"] = spec.display_name
                metadata["language_info"] = IPythonKernel.language_info
        return model


c = get_config()  # noqa: F821
c.ServerApp.contents_manager_class = Notebooks
c.ContentsManager.pre_save_hook = clean_jupyter
