"""A Sphinx role for the fields of a configuration."""

from docutils import nodes
from sphinx.util.docutils import SphinxRole


class Field(SphinxRole):
    """A field by its full name: shown in bold as its last part, and known to links and
    to the search as an attribute of its class."""

    def run(self):
        name = nodes.strong("", self.text.rpartition(".")[2], ids=[self.text])
        python = self.env.domains.python_domain
        python.note_object(self.text, "attribute", self.text, location=name)
        return [name], []
