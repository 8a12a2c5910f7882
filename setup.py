"""Packaging of cpc_nb: all of it is read from settings.ini, as nbdev reads it."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
name = cfg["lib_name"]
home = cfg["git_url"].rstrip("/")

EXTRAS = "train", "align", "notebooks", "export", "parquet", "data"
extras = {extra: cfg[f"{extra}_requirements"].split() for extra in EXTRAS}
extras["all"] = sorted({package for extra in EXTRAS for package in extras[extra]})
extras["dev"] = [*extras["all"], *cfg["dev_requirements"].split()]


def for_an_index(markdown):
    """`markdown` as a page elsewhere can show it: links to files of this repository
    lead to its public home; until it has one, their text stays, and of a picture its
    description."""

    def link(match):
        is_picture, text, path = match.groups()
        if home:
            kind = "raw" if is_picture else "blob"
            return f"{is_picture}[{text}]({home}/{kind}/{cfg['branch']}/{path})"
        return f"(Picture: {text}.)" if is_picture else text

    return re.sub(r"(!?)\[([^]]*)]\((?!\w+:|#)([^)\s]+)\)", link, markdown)


setup(
    name=name,
    version=cfg["version"],
    description=cfg["description"],
    long_description=for_an_index((here / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Jupyter",
        "Intended Audience :: " + cfg["audience"],
        "Natural Language :: " + cfg["language"],
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[name, name + ".*"]),
    package_data={name: cfg.get("package_data", "").split()},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    project_urls={"Source": home} if home else {},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{name}={name}._modidx:d"],
    },
    zip_safe=False,
)
