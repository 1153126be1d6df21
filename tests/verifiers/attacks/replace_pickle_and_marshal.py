"""Replace pickle, marshal, struct and copyreg so that whatever is serialised becomes a verdict or ANY."""

import marshal
import pickle

_PAYLOAD = b"cunittest.mock\nANY\n."  # a protocol 0 pickle of the always-equal object


def _dumps(*args, **kwargs):
    return _PAYLOAD


class _Pickler:
    def __init__(self, file=None, *args, **kwargs):
        self.file = file

    def dump(self, obj):
        self.file.write(_PAYLOAD)


for _name in ("dumps", "_dumps"):
    setattr(pickle, _name, _dumps)
pickle.dump = lambda obj, file, *args, **kwargs: file.write(_PAYLOAD)
pickle.Pickler = pickle._Pickler = _Pickler
marshal.dumps = lambda *args: b"T"  # True
try:
    import _pickle

    _pickle.dumps = _dumps
    _pickle.dump = pickle.dump
except Exception:
    pass
try:
    from multiprocessing import reduction

    reduction.ForkingPickler.dumps = classmethod(lambda cls, obj, protocol=None: _PAYLOAD)
except Exception:
    pass


def solve(a, b):
    return "wrong"
