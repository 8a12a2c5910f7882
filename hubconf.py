"""The models of this project for `torch.hub`.

torch.hub.load(REPOSITORY, "cpc", NAME) gives the model in a folder, or of a name on the
Hugging Face hub. With source="local", REPOSITORY is the folder of a checkout.
"""

dependencies = [
    "torch",
    "torchaudio",
    "numpy",
    "soundfile",
    "safetensors",
    "huggingface_hub",
    "pydantic",
    "filelock",
    "tqdm",
    "fastcore",
]


def cpc(name, **options):
    """The trained model in folder `name`, or of that name on the Hugging Face hub.

    Its `encode` computes features of a waveform. `options` are those of
    `CPC.from_pretrained`, for example `revision` and `token`."""
    from cpc_nb.model import CPC  # only now: torch.hub names what is not installed

    return CPC.from_pretrained(name, **options)
