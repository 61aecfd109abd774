"""Fetch the version that EKIBEN_FOLLOW names before the server of this pod starts: its first answer is that one's.

A server begins with what the alias names when that is on its disk, else with the version of its image, until it has
fetched the other one. In a fleet that would mean vectors of two versions behind one address for a while, whenever a pod
is added. So a pod whose registry does not answer waits, and says why; the pods that run go on. EKIBEN_FOLLOW= (empty)
ends the waiting: then the version of the image is served.
"""

import sys
from pathlib import Path

from bentos.errors import LunchboxError, RegistryError
from bentos.registry_client import MlflowSource
from bentos.settings import ServeSettings
from bentos.sources import LocalSource, UnknownVersionError

IMAGE_BOXES = "bento/models/*/*/manifest.json"  # from the image's working directory


def main() -> None:
    """Fetch it, or end with the reason."""
    settings = ServeSettings()
    if not settings.follow:
        tell("nothing is followed: the image's version will be served")
        return
    own = next((path.parent for path in Path().glob(IMAGE_BOXES)), None)
    source = MlflowSource(settings, LocalSource(settings.home, settings.model_name, own=own))
    try:
        pointer = source.look(settings.follow)
        if pointer is None:
            tell(f"{source.name} has no {settings.follow} yet: the image's version will be served")
            return
        tell(f"{settings.follow} is {pointer.bento_version}, in {source.fetch(pointer)}")
    except (RegistryError, LunchboxError, UnknownVersionError, OSError) as error:
        sys.exit(f"{settings.follow} cannot be fetched: {error}")


def tell(message: str) -> None:
    """Say what happened."""
    sys.stdout.write(f"{message}\n")


if __name__ == "__main__":
    main()
