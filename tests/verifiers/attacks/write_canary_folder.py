"""Create a file in a folder of the host, at import and in the call; whoever runs this looks there afterwards."""

import os

_FOLDER = "@CANARY_DIR@"


def _write(name):
    try:
        with open(os.path.join(_FOLDER, name), "w") as file:
            file.write("a cheating solution wrote this\n")
    except Exception:
        pass


_write("written_at_import")


def solve(a, b):
    _write("written_in_call")
    try:
        os.mkdir(os.path.join(_FOLDER, "made_in_call"))
    except Exception:
        pass
    try:
        os.symlink("/tmp", os.path.join(_FOLDER, "link_made_in_call"))
    except Exception:
        pass
    return "wrong"
