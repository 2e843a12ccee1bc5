"""What the sources of a set are called: by the folder of a record's first picture."""

from collections.abc import Sequence

TEXT_ONLY = "text only"
DEPTH = 2  # folders of a path that name a source
MOST = 200  # sources of a set; a set with a folder a picture has no others
OTHERS = "other folders"
IN_MEMORY = "pictures in the table"


class Sources:
    """Names the sources of one set, in the order in which its records come: the first two hundred by themselves."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}  # folders by the names that their records give them

    def __call__(self, paths: Sequence[str | None]) -> str:
        """A record's source.

        Args:
            paths: of its pictures, relative to the image folder; None for one that a table holds itself.
        """
        if not paths:
            return TEXT_ONLY
        first = paths[0]
        if first is None:
            return IN_MEMORY
        name = "/".join(first.split("/")[:-1][:DEPTH]) or "the image folder"
        if name not in self._known:
            if len(self._known) == MOST:
                return OTHERS
            self._known[name] = name.encode("utf-8", "backslashreplace").decode()  # for any terminal and file
        return self._known[name]
