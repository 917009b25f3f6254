"""Operators that have no protocol are refused before anything is deployed, by name and with their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import capture

Function = Callable[[torch.Tensor], Any]

# what torch.export calls the operator, and a use of it on a tensor of 4 x 4
REFUSED: dict[str, Function] = {
    "aten.acos.default": torch.acos,
    "aten.asin.default": torch.asin,
    "aten.atan.default": torch.atan,
    "aten.atan2.default": lambda x: torch.atan2(x, x + 1),
    "aten.bincount.default": lambda x: torch.bincount(x.argmax(-1)),
    "aten.bucketize.Tensor": lambda x: torch.bucketize(x, torch.arange(3.0)),
    "aten.cdist.default": lambda x: torch.cdist(x, x + 1),
    "aten.cholesky.default": torch.cholesky,
    "aten.cos.default": torch.cos,
    "aten.cosh.default": torch.cosh,
    "aten.cummax.default": lambda x: x.cummax(-1)[0],
    "aten.cumprod.default": lambda x: x.cumprod(-1),
    "aten.digamma.default": torch.digamma,
    "aten.erfinv.default": torch.erfinv,
    "aten.fft_fft.default": lambda x: torch.view_as_real(torch.fft.fft(x)),
    "aten.fft_rfft.default": lambda x: torch.view_as_real(torch.fft.rfft(x)),
    "aten.fmod.Tensor": lambda x: torch.fmod(x, x + 3),
    "aten.grid_sampler.default": lambda x: F.grid_sample(x[None, None], x.reshape(1, 2, 4, 2), align_corners=False),
    "aten.histc.default": lambda x: torch.histc(x, 4),
    "aten.i0.default": torch.i0,
    "aten.igamma.default": lambda x: torch.igamma(x, x + 1),
    "aten.index_put.default": lambda x: x.index_put((x.argmax(-1),), x[1]),
    "aten.kthvalue.default": lambda x: x.kthvalue(2)[0],
    "aten.lgamma.default": torch.lgamma,
    "aten.linalg_cross.default": lambda x: torch.linalg.cross(x[:, :3], x[:, 1:]),
    "aten.linalg_det.default": torch.linalg.det,
    "aten.linalg_inv.default": torch.linalg.inv,
    "aten.linalg_qr.default": lambda x: torch.linalg.qr(x)[0],
    "aten.linalg_svd.default": lambda x: torch.linalg.svd(x)[1],
    "aten.logcumsumexp.default": lambda x: x.logcumsumexp(-1),
    "aten.matrix_exp.default": torch.matrix_exp,
    "aten.median.default": torch.median,
    "aten.mode.default": lambda x: x.mode()[0],
    "aten.multinomial.default": lambda x: torch.multinomial(x.abs() + 1, 2),
    "aten.nonzero.default": torch.nonzero,
    "aten.polygamma.default": lambda x: torch.polygamma(2, x),
    "aten.rand_like.default": lambda x: x + torch.rand_like(x),
    "aten.scatter.src": lambda x: x.scatter(0, x.argmax(0, keepdim=True), x + 1),
    "aten.searchsorted.Tensor": lambda x: torch.searchsorted(torch.arange(3.0), x),
    "aten.sin.default": torch.sin,
    "aten.sinh.default": torch.sinh,
    "aten.tan.default": torch.tan,
    "aten.triangular_solve.default": lambda x: torch.triangular_solve(x, x + 1)[0],
    "aten._unique2.default": torch.unique,
    "aten.upsample_bicubic2d.vec": lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bicubic"),
}


RECURRENT = {"aten.lstm.input": nn.LSTM, "aten.gru.input": nn.GRU, "aten.rnn_tanh.input": nn.RNN}


class Use(nn.Module):
    """The place of an operator."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


class Branches(nn.Module):
    """A linear layer, and a branch for each operator."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.first(x)
        return [branch(y) for branch in self.branches]


def refused(*branches: nn.Module) -> UnsupportedError:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of operators that it will drop
        with pytest.raises(UnsupportedError) as info:
            capture(Branches(*branches).eval(), [torch.eye(4)])
    return info.value


@pytest.fixture(scope="module")
def all_refused() -> UnsupportedError:
    """What is said about a model of all of them: capturing one model for each would take long."""
    functions = [Use(function) for function in REFUSED.values()]
    return refused(*functions, *(layer(4, 4, batch_first=True) for layer in RECURRENT.values()))


@pytest.mark.parametrize(("place", "op"), list(enumerate([*REFUSED, *RECURRENT])))
def test_an_operator_without_a_protocol(all_refused: UnsupportedError, place: int, op: str) -> None:
    assert all_refused.missing[op] == [f"branches.{place}"]
    assert f"{op} at branches.{place}" in str(all_refused) and "Supported: " in str(all_refused)


def test_there_are_thirty() -> None:
    assert len(REFUSED) >= 30


@pytest.mark.parametrize("op", ["aten.sin.default", "aten.linalg_svd.default", "aten.nonzero.default"])
def test_one_alone(op: str) -> None:
    error = refused(Use(REFUSED[op]), nn.ReLU(), Use(REFUSED[op]))
    assert error.missing[op] == ["branches.0", "branches.2"]
