"""Where the files that ship with the project lie: at the top of a checkout, or inside the installed package."""

from pathlib import Path

from ldm.errors import AbsentError

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent


def shipped(relative: str) -> Path:
    """Find a shipped file or folder such as "configs/v1-inference.yaml" or "model_data/shapes".

    Raises:
        AbsentError: it is in neither place; both are named.
    """
    places = [CHECKOUT / relative, PACKAGE / relative]
    for place in places:
        if place.exists():
            return place
    raise AbsentError(
        f"'{relative}' ships with ldm but is in neither {places[0]} nor {places[1]}; reinstall ldm"
    )
