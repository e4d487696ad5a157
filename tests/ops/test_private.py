"""What PyTorch keeps to itself: asked, and found by what is public where it is not there."""

import gc

import pytest
import torch
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

from fastdreamer.ops import private


@pytest.fixture(params=["private", "public"], autouse=True)
def way(request, monkeypatch):
    if request.param == "private":
        assert None not in (private._transforms, private._storage_expired)
    else:
        monkeypatch.setattr(private, "_transforms", None)
        monkeypatch.setattr(private, "_storage_expired", None)
        monkeypatch.setattr(private, "forward_ad", _Public)


class _Public:
    """``torch.autograd.forward_ad`` without what it keeps to itself."""

    make_dual = staticmethod(forward_ad.make_dual)


def test_transforms_of_torch_func():
    seen = []

    def look(x):
        seen.append(private.transforms_active([torch.ones(2), x]))
        return x.square().sum()

    x = torch.ones(3)
    look(x)
    look(x.clone().requires_grad_())
    look(x.to_sparse())
    assert seen == [False] * 3
    torch.func.grad(look)(x)
    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.jvp(look, (x,), (x,))
    torch.func.vmap(torch.func.grad(look))(torch.ones(2, 3))
    assert seen[3:] == [True] * (len(seen) - 3) and len(seen) == 7


def test_forward_mode():
    assert not private.forward_mode()
    with forward_ad.dual_level():
        assert private.forward_mode()
        with torch.no_grad():
            assert private.forward_mode()
    assert not private.forward_mode()


def test_storages_that_are_gone():
    kept, gone = torch.ones(2), torch.ones(3)
    view = gone[1:]
    storages = [StorageWeakRef(t.untyped_storage()) for t in (kept, gone)]
    assert not private.expired(storages) and not private.expired([])
    del gone
    gc.collect()
    assert not private.expired(storages)  # a view holds it
    del view
    gc.collect()
    assert private.expired(storages) and not private.expired(storages[:1])
