"""Where the files that ship with the project lie: at the top of a checkout, or inside the installed package."""

import os
from pathlib import Path

from ldm.errors import AbsentError

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent


def shipped(relative: str) -> Path:
    """Find a shipped file or folder such as "configs/v1-inference.yaml" or "model_data/shapes".

    Raises:
        AbsentError: it is in neither place; both are named, also where no file could have such a name.
    """
    for place in (CHECKOUT / relative, PACKAGE / relative):
        if os.path.exists(place):  # False, too, for a name that no file system takes
            return place
    raise AbsentError(
        f"'{str(relative):.80}' ships with ldm but is in neither {CHECKOUT} nor {PACKAGE}; reinstall ldm"
    )
