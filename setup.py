"""Package metadata: everything is read from settings.ini, the version from unify_rl/__init__.py."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read(here / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]

def lines(key): return [line.strip() for line in cfg[key].splitlines() if line.strip()]

version = re.search(r'__version__ = "(.+?)"', (here / "unify_rl" / "__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name=cfg["lib_name"],
    version=version,
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["unify_rl*"]),
    include_package_data=True,
    install_requires=lines("requirements"),
    extras_require={"dev": lines("dev_requirements"), "maths": lines("maths_requirements")},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
