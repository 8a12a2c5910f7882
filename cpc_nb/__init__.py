"""Contrastive predictive coding for speech, told in notebooks."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from cpc_nb.api import __dir__, __getattr__  # names are imported when they are asked for

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from cpc_nb.checkpoint import RunFolder as RunFolder
    from cpc_nb.config import Config as Config
    from cpc_nb.config import ConfigError as ConfigError
    from cpc_nb.config import make_config as make_config
    from cpc_nb.corpus import Corpus as Corpus
    from cpc_nb.corpus import pack as pack
    from cpc_nb.loss import InfoNCE as InfoNCE
    from cpc_nb.model import CPC as CPC
    from cpc_nb.pretrained import Features as Features
