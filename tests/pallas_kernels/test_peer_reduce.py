"""Sums over devices with what comes after them; `vmap` stands for the devices where no kernel runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.packing import pack_int4
from pallas_kernels.peer_reduce import PeerLostError, empty_inbox, peer_reduce, row_parallel
from pallas_kernels.peer_reduce.cases import CASES, Case

AXIS = "tp"
BF16 = 2.0**-8


def in_float64(case: Case, devices: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Compute x and h with numpy, from operands as `Case` draws them."""
    own, same = ({n: v for n, v in part.items() if v is not None} for part in case.operands(devices, seed=seed))
    wide = {name: np.asarray(value, np.float64) for name, value in own.items()}
    if case.k:
        weights = wide["codes"] * wide["scale"]
        y = np.einsum("pmk,pnk->mn", wide["x"], weights)
        z = np.einsum("pmk,prk->mr", wide["x"], wide["a"]) if case.rank else None
    else:
        y, z = wide["y"].sum(0), wide["z"].sum(0) if case.rank else None
    if z is not None:
        compensator = same["compensator"]
        if (gate := compensator.gate) is not None:
            hidden = z @ np.asarray(gate.w_in, np.float64) + np.asarray(gate.b_in)
            hidden = hidden / (1 + np.exp(-hidden))
            z = z * (1 + np.tanh(hidden @ np.asarray(gate.w_out, np.float64).T + np.asarray(gate.b_out)))
        y = y + z @ (np.asarray(compensator.bt, np.float64) * np.asarray(compensator.bt_scale)[:, None])
    h = np.asarray(same["residual"], np.float64) + y
    x = h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5) * np.asarray(same["weight"])
    return {"x": x, "h": h}


def of_one_device(case: Case, **options):
    """Give a function of what a device has of its own, and of what all have."""

    def run(own, same, inbox):
        keywords = {"axis": AXIS, "eps": 1e-5, "following": same["following"], "compensator": same["compensator"]}
        rest = (same["residual"], same["weight"], inbox)
        if not case.k:
            return peer_reduce(own["y"], own.get("z"), *rest, **keywords, **options)
        if case.rank:
            keywords["compensator"] = dataclasses.replace(same["compensator"], a=own["a"])
        return row_parallel(own["x"], pack_int4(own["codes"]), own["scale"], *rest, **keywords, **options)

    return run


def assert_right(case: Case, devices: int, x, h, z, *, seed: int = 0) -> None:
    """Every device has the same bits, and they are right to the rounding of the sum, of h and of x."""
    wanted = in_float64(case, devices, seed=seed)
    for got in (x, h):
        assert got.dtype == jnp.bfloat16
        for other in got[1:]:
            np.testing.assert_array_equal(other, got[0])
    for name, got in {"x": x, "h": h}.items():
        error = np.abs(np.asarray(got[0], np.float64) - wanted[name])
        assert error.max() < 2.5 * BF16 * np.abs(wanted[name]).max()
    assert (z is None) == (case.following == 0)
    if z is not None:
        following = case.operands(devices, seed=seed)[1]["following"]
        right = wanted["x"] @ (np.asarray(following.a, np.float64) * np.asarray(following.a_scale)[:, None]).T
        assert np.abs(np.asarray(z[0], np.float64) - right).max() < 3 * BF16 * np.abs(right).max()
        for other in z[1:]:
            np.testing.assert_array_equal(other, z[0])


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_reference(name: str, devices: int):
    case = CASES[name]
    own, same = case.operands(devices)
    run = jax.vmap(of_one_device(case, implementation="xla"), in_axes=(0, None, None), axis_name=AXIS)
    x, h, z, _ = run(own, same, None)
    assert_right(case, devices, x, h, z)


def test_an_inbox_says_who_was_lost():
    inbox = empty_inbox(devices=2, rows=8, columns=128)
    inbox.check()
    lost = jnp.stack([inbox.fault, jnp.array([1, 7, 0, 0], jnp.int32)])
    with pytest.raises(PeerLostError, match="device 1 waited in vain for the part of device 0 of sum 7"):
        dataclasses.replace(inbox, fault=lost).check()


def test_operands_that_do_not_fit_are_refused():
    y, weight = jnp.ones((2, 64)), jnp.ones(64)
    compensator = CASES["gated"].operands(2)[1]["compensator"]
    with pytest.raises(ValueError, match=r"residual must be floating \[2, 64\] as the sum is, got float32\[2, 32\]"):
        peer_reduce(y, None, y[:, :32], weight, None, axis=AXIS, eps=0.1)
    with pytest.raises(ValueError, match=r"weight must have shape \[64\], got \[4\]"):
        peer_reduce(y, None, y, weight[:4], None, axis=AXIS, eps=0.1)
    with pytest.raises(ValueError, match="z needs a compensator with it"):
        peer_reduce(y, y, y, weight, None, axis=AXIS, eps=0.1)
    with pytest.raises(ValueError, match="a compensator needs z"):
        peer_reduce(y, None, y, weight, None, axis=AXIS, eps=0.1, compensator=compensator)
    with pytest.raises(ValueError, match=r"at least 2 devices.*devices=1"):
        empty_inbox(devices=1, rows=8, columns=64)
    seeing = dataclasses.replace(compensator.gate, w_rms=jnp.ones(8))
    with pytest.raises(NotImplementedError, match="gates that see more of x than z"):
        peer_reduce(
            *(y, y[:, :16], y, weight, None),
            axis=AXIS,
            eps=0.1,
            compensator=dataclasses.replace(compensator, gate=seeing),
        )
