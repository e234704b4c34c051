"""Another project on the package index is called `fastbert` too, and installs a package of the same import name."""

import os
import sys
import warnings


def warn_of_namesake() -> None:
    """Warn where that project is installed beside this one: each overwrites files of the other.

    It looks at names in the folders of installed packages only, for it runs whenever this package is imported.
    """
    for folder in sys.path:
        if os.path.basename(folder) not in ("site-packages", "dist-packages"):
            continue
        try:
            names = [entry.name for entry in os.scandir(folder) if entry.name.startswith("fastbert-")]
        except OSError:
            continue
        for name in names:
            if name.endswith((".dist-info", ".egg-info")) and not _is_ours(os.path.join(folder, name)):
                warnings.warn(
                    f"another project, {name.rpartition('.')[0]}, is installed in {folder} under the import name of "
                    "this one, fastbert-triton, and each overwrites files of the other: uninstall both (pip uninstall "
                    "fastbert fastbert-triton), then install fastbert-triton again",
                    stacklevel=3,
                )


def _is_ours(folder: str) -> bool:
    """Whether a distribution named `fastbert` is this project under the name it had before its first release."""
    for name in ("METADATA", "PKG-INFO"):
        try:
            with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                return "Triton" in file.read(2000)
        except OSError:
            continue
    return False
