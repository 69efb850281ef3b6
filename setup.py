"""Packaging: the repository is the package ``titans_build``, and its folders with code are the subpackages."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = ("blocks", "kernels", "recipes", "registry", "tools")


class BuildWithoutSetup(build_py):
    """Leaves out this file, which lies in the package's folder and is no part of it."""

    def find_package_modules(self, package, package_dir):
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]


found = find_packages(include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")])
setup(
    packages=["titans_build", *(f"titans_build.{name}" for name in found)],
    package_dir={"titans_build": "."},
    cmdclass={"build_py": BuildWithoutSetup},
)
